"""What a kernel decides about tiles on the tensors of one call: the interpreter's view of a plan's mask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import sympy
import torch
from torch import Tensor

from flashgen.plan.model import KernelPlan, Sm90Schedule
from flashgen.plan.tiles import visits
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.preparation import check_prepared, extents, prepared_in_torch
from flashgen.spec.symbols import KV, SEQLEN_KV

_WARPGROUP_ROWS = 64


class Decisions:
    """Which rows decide together, which tiles they visit, and which elements of a masked tile they keep."""

    def __init__(self, plan: KernelPlan, elements: Elements, prepared: tuple[Tensor, ...]) -> None:
        """`prepared` is what `Kernel.prepare` returned; where it is empty, it is computed here."""
        self._plan = plan
        self._elements = elements
        self._sizes = elements.sizes
        self._prepared = prepared or prepared_in_torch(plan, elements)
        check_prepared(plan, self._prepared, self._sizes, elements.device)
        # A listed kernel takes its tiles from one list for the whole block, and masks by the condition.
        self._listed = plan.mask.listed
        self._segments = self._intervals()

    def boxes(self) -> Iterator[Box]:
        """The rows that decide together, with all the batches and heads that the mask does not tell apart."""
        sizes, over = self._sizes, self._plan.mask.derivation.over
        batches = _each(sizes.batch) if "batch" in over else [range(sizes.batch)]
        heads = _each(sizes.heads_q) if "head" in over else [range(sizes.heads_q)]
        step = self._rows_of_a_decision()
        for batch, head, start in product(batches, heads, range(0, sizes.seqlen_q, step)):
            rows = range(start, min(start + step, sizes.seqlen_q))
            yield Box(batch, head, rows, range(sizes.seqlen_kv))

    def visits(self, box: Box) -> list[tuple[int, bool]]:
        """The tiles that the rows of a box visit, in order, and whether each is masked."""
        plan = self._plan
        if plan.mask.derivation.route == "map":
            tile = box.rows.start // plan.tile_q
            counts, listed = (_of(box, tensor)[tile] for tensor in self._prepared)
            return [(word // 2, bool(word % 2)) for word in listed[: int(counts)].tolist()]
        rows = (box.rows.start, box.rows.stop - 1)
        ends = [[int(_of(box, end)[row]) for row in rows for end in segment] for segment in self._segments]
        tiles = visits(ends, plan.tile_kv)
        descending = getattr(plan.schedule, "key_order", "descending") == "descending"
        return tiles[::-1] if descending and not self._listed else tiles

    def kept(self, box: Box) -> Tensor:
        """The kept elements of a masked tile: bool, broadcastable to the box."""
        if self._listed:
            return self._elements.at(sympy.And(KV < SEQLEN_KV, self._plan.mask.condition), box)
        ((first, last),) = self._segments
        rows = slice(box.rows.start, box.rows.stop)
        kv = torch.arange(box.columns.start, box.columns.stop, device=self._elements.device)
        return (_of(box, first)[rows, None] <= kv) & (kv <= _of(box, last)[rows, None])

    def _rows_of_a_decision(self) -> int:
        """Those of a q tile; on Hopper, of a warpgroup, where the tiles do not come from a list."""
        plan = self._plan
        if not isinstance(plan.schedule, Sm90Schedule) or self._listed:
            return plan.tile_q
        return max(_WARPGROUP_ROWS // plan.group, 1) if plan.schedule.pack_gqa else _WARPGROUP_ROWS

    def _intervals(self) -> list[tuple[Tensor, Tensor]]:
        """First and last key of each row in each segment: [batches, heads, seqlen_q]."""
        sizes, derivation = self._sizes, self._plan.mask.derivation
        if derivation.route == "map":
            return []
        if derivation.route == "ranges":
            return [(self._prepared[0], self._prepared[1])]
        batches, heads = extents(self._plan, sizes)
        box = Box(range(batches), range(heads), range(sizes.seqlen_q), range(1))
        shape = (batches, heads, sizes.seqlen_q, 1)

        def end(expr: sympy.Expr | None, default: int) -> Tensor:
            value = self._elements.at(sympy.Integer(default) if expr is None else expr, box)
            return value.expand(shape)[..., 0]

        last_key = sizes.seqlen_kv - 1
        return [
            (
                end(segment.first, 0).clamp(0, sizes.seqlen_kv),
                end(segment.last, last_key).clamp(-1, last_key),
            )
            for segment in derivation.segments
        ]


def _each(length: int) -> list[range]:
    return [range(index, index + 1) for index in range(length)]


def _of(box: Box, tensor: Tensor) -> Tensor:
    """The part of a [batches, heads, ...] tensor that a box's batches and heads have in common."""
    batch = box.batches.start if tensor.shape[0] > 1 else 0
    return tensor[batch, box.heads.start if tensor.shape[1] > 1 else 0]


__all__ = ["Decisions"]
