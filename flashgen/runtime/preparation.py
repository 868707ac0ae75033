"""What a mask needs to be computed before the launch: ranges of keys for each row, or lists of tiles.

On a GPU a second kernel of the same source writes them; `prepared_in_torch` says the same in torch, for the
interpreter. Layouts (int32, contiguous; batches and heads are 1 where the mask depends on neither):

    ranges    key_first, key_last [batches, heads, seqlen_q]       in [0, seqlen_kv] and [-1, seqlen_kv - 1]
    map       tile_counts [batches, heads, q_tiles]
              tile_list [batches, heads, q_tiles, kv_tiles]        2 * kv_tile + masked, ascending
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from sympy.core.function import AppliedUndef
from torch import Tensor, empty

from flashgen.codegen import PREPARE_THREADS
from flashgen.errors import LaunchError
from flashgen.plan.model import KernelPlan
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.inputs import Inputs, Sizes
from flashgen.runtime.memory import empty_words
from flashgen.runtime.structs import InputFields
from flashgen.spec.derivation import Ranges, Search

_KEPT_MAX = 16  # maps, of other parameters or streams, that one launch remembers


@dataclass(frozen=True)
class Prepared:
    """What `Kernel.prepare` computed, for calls of that kernel with the same shapes, tensors and parameters.

    Where the tensors that the mask reads change, so must this. Empty for a mask that needs nothing.
    """

    tensors: tuple[Tensor, ...]
    kernel: str
    sizes: Sizes
    params: tuple[float, ...]


def extents(plan: KernelPlan, sizes: Sizes) -> tuple[int, int]:
    """Batches and heads that a plan's mask tells apart."""
    over = plan.mask.derivation.over
    return sizes.batch if "batch" in over else 1, sizes.heads_q if "head" in over else 1


def prepared_shapes(plan: KernelPlan, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    """The shapes of a plan's prepared tensors."""
    outer = extents(plan, sizes)
    if plan.preparation == "ranges":
        return ((*outer, sizes.seqlen_q),) * 2
    if plan.preparation == "map":
        tiles = (*outer, -(-sizes.seqlen_q // plan.tile_q))
        return tiles, (*tiles, -(-sizes.seqlen_kv // plan.tile_kv))
    return ()


def check_prepared(plan: KernelPlan, tensors: tuple[Tensor, ...], sizes: Sizes, device: torch.device) -> None:
    """Whether prepared tensors are those of such a call, as far as shapes tell. Raises `LaunchError`."""
    wanted = prepared_shapes(plan, sizes)
    given = tuple(tuple(tensor.shape) for tensor in tensors)
    fits = all(
        tensor.dtype == torch.int32 and tensor.device == device and tensor.is_contiguous()
        for tensor in tensors
    )
    if given != wanted or not fits:
        raise LaunchError(
            f"what was prepared does not fit this call: shapes {given}, not {wanted}, in int32 on {device}",
            hint="prepare it with tensors of these shapes: kernel.prepare(q, k, v, ...)",
        )


def check_is_prepared(given: object) -> None:
    """Whether it came from a `prepare`. Raises `LaunchError`."""
    if not isinstance(given, Prepared):
        raise LaunchError(
            f"`prepared` is a {type(given).__name__}, and not what `prepare` returns",
            hint="prepared = flashgen.prepare(q, k, v, ...), or kernel.prepare(q, k, v, ...)",
        )


def check_use(prepared: Prepared, kernel: str, sizes: Sizes, params: tuple[float, ...]) -> None:
    """Whether `prepared` is for such a call. Raises `LaunchError`."""
    for what, made, asked in (
        ("kernel", prepared.kernel, kernel),
        ("shapes", prepared.sizes, sizes),
        ("parameters", prepared.params, params),
    ):
        if made != asked:
            raise LaunchError(
                f"`prepared` was made for other {what}: {made}, not {asked}",
                hint="prepare it with what it is called with: kernel.prepare(q, k, v, ...)",
            )


def blocks(plan: KernelPlan, sizes: Sizes) -> int:
    """The grid of the preparation kernel."""
    batches, heads = extents(plan, sizes)
    assert plan.preparation is not None
    step = plan.tile_q if plan.preparation == "map" else PREPARE_THREADS["ranges"]
    return batches * heads * -(-sizes.seqlen_q // step)


class Loaded(Protocol):
    """What a preparation needs of a loaded kernel."""

    plan: KernelPlan
    device: torch.device
    prepare_function: int  # where the plan has a preparation

    def start(self, *launch: int) -> None: ...


class Preparation:
    """What precedes each launch of one kernel at one set of shapes: its inputs are written into the struct,
    and what its mask needs is computed by a launch of its own.

    A map that depends on no tensor is kept for the next launch on the stream with the same parameters. During
    a CUDA graph's capture nothing is kept, and nothing kept is used: the graph owns what it reads. What is
    kept lies outside of torch's allocator.
    """

    def __init__(self, loaded: Loaded, sizes: Sizes, fields: InputFields, arguments: int) -> None:
        plan = loaded.plan
        self._loaded = loaded
        self._fields = fields
        self._arguments = arguments
        self._shapes = prepared_shapes(plan, sizes)
        self._grid = blocks(plan, sizes) if plan.preparation else 0
        keeps = plan.preparation == "map" and not plan.mask.condition.atoms(AppliedUndef)
        self._capturing = torch._C._cuda_isCurrentStreamCapturing if keeps else None
        self._kept: dict[tuple[int, tuple[float, ...]], tuple[Tensor, ...]] = {}

    def __call__(self, inputs: Inputs, stream: int) -> tuple[Tensor, ...]:
        """What the struct now points to, to be held until the kernel is launched."""
        if inputs.prepared or not self._shapes:
            return self._write(inputs, inputs.prepared)
        if self._capturing is None or self._capturing():
            return self.fresh(inputs, stream)
        key = (stream, inputs.params)
        if key in self._kept:
            return self._write(inputs, self._kept[key])
        if len(self._kept) >= _KEPT_MAX:
            self._kept.clear()
        device = self._loaded.device
        self._kept[key] = self._compute(inputs, stream, [empty_words(s, device) for s in self._shapes])
        return self._kept[key]

    def fresh(self, inputs: Inputs, stream: int) -> tuple[Tensor, ...]:
        """Compute it, by a launch on the current stream, and point the struct at it."""
        device = self._loaded.device
        return self._compute(
            inputs, stream, [empty(shape, dtype=torch.int32, device=device) for shape in self._shapes]
        )

    def _compute(self, inputs: Inputs, stream: int, prepared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        loaded = self._loaded
        prepared = self._write(inputs, tuple(prepared))
        if loaded.plan.preparation:
            threads = PREPARE_THREADS[loaded.plan.preparation]
            loaded.start(
                loaded.prepare_function, self._grid, 1, 1, threads, 1, 1, 0, stream, self._arguments, 0
            )
        return prepared

    def _write(self, inputs: Inputs, prepared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sink = () if inputs.sink is None else (inputs.sink,)
        addresses = [tensor.data_ptr() for tensor in (*inputs.tensors, *sink, *prepared)]
        self._fields.write(addresses, inputs.params)
        return prepared


def prepared_in_torch(plan: KernelPlan, elements: Elements) -> tuple[Tensor, ...]:
    """The plan's prepared tensors, from the definitions."""
    if 0 in (elements.sizes.seqlen_q, elements.sizes.seqlen_kv):
        shapes = prepared_shapes(plan, elements.sizes)
        return tuple(torch.zeros(shape, dtype=torch.int32, device=elements.device) for shape in shapes)
    if plan.preparation == "ranges":
        assert plan.mask.derivation.ranges is not None
        return _ranges(plan.mask.derivation.ranges, plan, elements)
    return _map(plan, elements) if plan.preparation == "map" else ()


def _ranges(ranges: Ranges, plan: KernelPlan, elements: Elements) -> tuple[Tensor, Tensor]:
    sizes = elements.sizes
    batches, heads = extents(plan, sizes)
    box = Box(range(batches), range(heads), range(sizes.seqlen_q), range(sizes.seqlen_kv))
    found = {search.result.name: _found(search, elements, box) for search in ranges.searches}
    shape, last_key = (batches, heads, sizes.seqlen_q, 1), sizes.seqlen_kv - 1
    ends = [
        torch.tensor(default) if end is None else elements.at(end, box, found)
        for end, default in ((ranges.bounds.first, 0), (ranges.bounds.last, last_key))
    ]
    first, last = (end.expand(shape)[..., 0].to(torch.int32) for end in ends)
    return first.clamp(0, sizes.seqlen_kv), last.clamp(-1, last_key)


def _found(search: Search, elements: Elements, box: Box) -> Tensor:
    """The least kv whose element stands in the relation: as many keys as do not."""
    before = search.read < search.value if search.relation == ">=" else search.read <= search.value
    shape = (len(box.batches), len(box.heads), len(box.rows), len(box.columns))
    return elements.at(before, box).expand(shape).sum(-1, keepdim=True)


def _map(plan: KernelPlan, elements: Elements) -> tuple[Tensor, Tensor]:
    sizes = elements.sizes
    counts, listed = (
        torch.zeros(shape, dtype=torch.int32, device=elements.device)
        for shape in prepared_shapes(plan, sizes)
    )
    batches, heads, q_tiles, kv_tiles = listed.shape
    missing = kv_tiles * plan.tile_kv - sizes.seqlen_kv  # of the last tile, which therefore is masked
    for q_tile in range(q_tiles):
        start = q_tile * plan.tile_q
        rows = range(start, min(start + plan.tile_q, sizes.seqlen_q))
        box = Box(range(batches), range(heads), rows, range(sizes.seqlen_kv))
        kept = elements.at(plan.mask.condition, box).expand(batches, heads, len(rows), sizes.seqlen_kv)
        tiles = torch.nn.functional.pad(kept, (0, missing)).reshape(*kept.shape[:3], kv_tiles, plan.tile_kv)
        visited, whole = tiles.any(-1).any(-2), tiles.all(-1).all(-2)
        counts[..., q_tile] = visited.sum(-1)
        # visited tiles first, each group in ascending order
        order = torch.sort(~visited, dim=-1, stable=True).indices
        listed[..., q_tile, :] = (2 * order + (~whole).gather(-1, order)).to(torch.int32)
    return counts, listed


__all__ = [
    "Preparation",
    "Prepared",
    "blocks",
    "check_is_prepared",
    "check_prepared",
    "check_use",
    "extents",
    "prepared_in_torch",
    "prepared_shapes",
]
