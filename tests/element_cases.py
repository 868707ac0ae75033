"""Masks and scores of every kind, their plans, and what they are in numpy and in the host kernel's memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from host_kernel import HostKernel

from flashgen.arch import arch
from flashgen.plan import solve
from flashgen.plan.model import KernelPlan
from flashgen.spec import parse_spec
from flashgen.spec.evaluation import evaluate
from flashgen.spec.gallery import GALLERY
from flashgen.spec.inputs import TensorInput
from flashgen.spec.sample import sample_tensor

HEADS_Q, HEADS_KV, BATCH = 4, 2, 2

SCORES = {
    **{name: {"score": entry.sample} for name, entry in GALLERY.items() if entry.kind == "score"},
    "softcap at call time": {"score": "softcap(cap)", "params": "{cap: runtime}"},
    "large scores": {"score": "softcap(0.01)"},
    "distance, not affine": {
        "score": "score - slope[head] * abs(kv - q) + 0.25 * max(q, kv) - (q // 3) % 5",
        "tensors": "{slope: {index: [head], dtype: fp32}}",
    },
    "a tanh of a sum": {
        "score": "20 * tanh((score + pad[kv]) / 20) + slope[head] * (kv - q)",
        "tensors": "{pad: {index: [batch, kv], dtype: fp16}, slope: {index: [head], dtype: fp32}}",
    },
    "a tanh of a diagonal": {
        "score": "2 * tanh(score + near[q - kv])",
        "tensors": "{near: {index: [head_kv, q - kv], dtype: bf16}}",
    },
    "two tanh": {"score": "tanh(score) + tanh(score / 7) * score"},
    "everything": {
        "score": "score * sigmoid(score) + exp(-score * score) + log(1 + abs(score)) + sqrt(abs(score))"
        " + where(score > 0.5, score / (1 + abs(score)), min(score, -0.25) * 3)"
    },
    "integers in an element": {"score": "score + (q - kv) // 7 + (q * kv) % 5 + (kv - q) // 8 + kv % 4"},
    "quotients that fall": {
        "score": "score + (5 - 3 * kv) // 11 + (9 - 2 * kv) % 13 + (q - 2 * kv) // 5"
        " + table[(q - kv) // 7 + (q - kv) % 6 + 20]",
        "tensors": "{table: {index: [64], dtype: fp32}}",
    },
    "tables": {
        "score": "score + near[kv % 6] * far[q // 3, kv // 5] + all * where(on[kv], 1, -1)",
        "tensors": "{near: {index: [6], dtype: fp32}, far: {index: [q, kv], dtype: fp32},"
        " all: {index: [], dtype: fp32}, on: {index: [batch, kv], dtype: bool}}",
    },
    "shifted": {
        "score": "score + bias[head, q - 3, kv + 5] + near[q - kv + 9]",
        "tensors": "{bias: {index: [head, q, kv], dtype: bf16}, near: {index: [q - kv], dtype: fp32}}",
    },
    "integers at call time": {
        "score": "score * where((q - kv) % step < reach, 1, 0.5) + kv // step",
        "params": "{step: runtime, reach: {runtime: int, min: 0}}",
    },
    "remainders on a diagonal": {
        "score": "score + table[(kv - q) // 7 + 30] + table[(kv - q) % 11] + where((q - kv) % 3 == 0 or"
        " (kv - q) % step == 0 or (kv - 2 - q) % 5 != 1, exp(-abs(q - kv) / 100), 0)",
        "params": "{step: runtime}",
        "tensors": "{table: {index: [64], dtype: fp32}}",
    },
    "high powers": {"score": "score - (score / 4) ** 9 + (score / 5) ** 12 - 1 / (1 + (score / 3) ** 16)"},
    "lengths and heads": {
        "score": "score * head_dim / seqlen_kv + head * 0.5 - head_kv + batch + seqlen_q ** 2"
    },
}

MASKS = {
    **{name: {"mask": entry.sample} for name, entry in GALLERY.items() if entry.kind == "mask"},
    "dilated by a power of two": {"mask": "kv <= q and (q - kv) % 4 == 0"},
    "dilated at call time": {"mask": "kv <= q and (q - kv) % step == 0", "params": "{step: runtime}"},
    "remainders compared": {"mask": "q % 3 == kv % 3 or (kv + 2 * q) % 7 < 3"},
    "a remainder that none has": {"mask": "(q - kv) % 5 == q % 9"},
    "unsorted documents": {
        "mask": "causal and doc[q] == doc[kv]",
        "tensors": "{doc: {index: [batch, kv], dtype: int32}}",
    },
    "elements": {"mask": "keep[q, kv]", "tensors": "{keep: {index: [batch, head, q, kv], dtype: bool}}"},
    "distances": {
        "mask": "near[q - kv] > 0 and kv != 5",
        "tensors": "{near: {index: [head, q - kv], dtype: fp32}}",
    },
    "a quotient that falls": {"mask": "(q - kv) // 6 % 3 == 0"},
    "a quotient by a constant": {"mask": "(kv - q) // 6 % 2 == 0 or abs(kv % 10 - q % 10) <= 2"},
    "heads of two kinds": {"mask": "kv <= q and (head < 2 or q - kv < 9)"},
    "remainders by powers of two of a row": {"mask": "(q % 2 == head and kv % 3 == 1) or q % 4 > batch + 1"},
    "an end with a part that it needs twice": {
        "mask": "not (max(kv, step) // -3 < seqlen_q - q)",
        "params": "{step: runtime}",
    },
    "two windows": {"mask": "window(12) or (kv <= q - 40 and kv > q - 60)"},
    "documents, windows": {"mask": "document and window(30)"},
}

# What may leave 32 bits on the way.
PRODUCTS = {
    "of positions": {"mask": "q * kv % 7 < 3"},
    "of a position and a length": {"mask": "(q * seqlen_kv + kv) % 7 < 3"},
    "squares": {"mask": "q * q // 1000 >= kv"},
    "squares compared": {"mask": "kv * kv <= q * q - 1000000 * q"},
    "with large constants": {"mask": "(q * 1103515245 + kv * 12345) % 65536 < 3000"},
    "with what is known at run time": {"mask": "(q - kv) * step % 11 == 3", "params": "{step: runtime}"},
    "over a product of lengths": {"score": "score + (q * kv - kv * kv) // (seqlen_kv * seqlen_q)"},
    "of a diagonal": {"score": "score + (q - kv) ** 2 // 3 % 11"},
    "twice in subscripts of a query": {
        "score": "score + table[q * seqlen_kv] + other[q * seqlen_kv]",
        "tensors": "{table: {index: [1000], dtype: fp32}, other: {index: [1000], dtype: fp32}}",
    },
    "in a subscript": {
        "score": "score + table[q * kv]",
        "tensors": "{table: {index: [1000], dtype: fp32}}",
    },
}


def solved(mask: str = "full", score: str = "score", params: str = "{}", tensors: str = "{}") -> KernelPlan:
    """A plan for the Ampere family."""
    text = f"""
flashgen: 1
name: printed
attention:
  heads: {{q: {HEADS_Q}, kv: {HEADS_KV}}}
  head_dim: 64
  mask: "{mask}"
  score: "{score}"
  params: {params}
  tensors: {tensors}
workload: {{batch: {BATCH}, seqlen: 4096}}
"""
    return solve(parse_spec(text), arch("sm_80"))


PLANS = {name: solved(**mask) for name, mask in MASKS.items()}


class Case:
    """A plan with lengths and contents for all that it reads, in numpy and in the host kernel's memory.

    There a tensor begins `start` elements behind what is aligned, and `gap` elements part its rows.
    """

    def __init__(
        self, plan: KernelPlan, folder: Path, seqlen_q: int, seqlen_kv: int, *, start: int = 0, gap: int = 0
    ) -> None:
        self.plan, self.seqlen_q, self.seqlen_kv = plan, seqlen_q, seqlen_kv
        self._start, self._gap = start, gap
        self.kernel = HostKernel(plan, folder)
        self.scale = 0.125
        self.random = np.random.default_rng(17)
        self.kernel.set(
            batch=BATCH,
            heads_q=HEADS_Q,
            heads_kv=HEADS_KV,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            scale=self.scale,
        )
        self.values: dict[str, Any] = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, "scale": self.scale}
        for tensor in plan.tensors:
            self._give(tensor)
        for parameter in plan.parameters:
            number = 3 if parameter.kind == "int" else 2.5
            self.values[parameter.name] = number
            self.kernel.set(**{f"inputs_{parameter.name}": number})
        self.shift = seqlen_kv - seqlen_q if plan.align == "bottom_right" else 0

    def _give(self, tensor: TensorInput) -> None:
        sizes = {"seqlen_q": self.seqlen_q, "seqlen_kv": self.seqlen_kv}
        held = sample_tensor(tensor, batch=BATCH, heads_q=HEADS_Q, heads_kv=HEADS_KV, **sizes)
        if held is None:
            lengths = {
                "batch": BATCH,
                "head": HEADS_Q,
                "head_kv": HEADS_KV,
                "q": self.seqlen_q,
                "kv": self.seqlen_kv,
                "q - kv": self.seqlen_q + self.seqlen_kv - 1,
            }
            shape = tuple(axis if isinstance(axis, int) else lengths[axis] for axis in tensor.index)
            held = (
                self.random.integers(-1, 2, shape)
                if tensor.dtype == "int32"
                else self.random.normal(size=shape)
            )
            held = held > 0 if tensor.dtype == "bool" else held
        memory, numbers = _stored(np.asarray(held), tensor.dtype)
        self.kernel.give(tensor.name, self._placed(memory))
        starts = {"q": self.seqlen_kv - self.seqlen_q if self.plan.align == "bottom_right" else 0}
        starts["q - kv"] = starts["q"] - (self.seqlen_kv - 1)

        def element(*subscripts: Any) -> Any:
            places = [
                np.clip(np.asarray(at) - starts.get(str(axis), 0), 0, size - 1)
                for axis, at, size in zip(tensor.index, subscripts, numbers.shape, strict=True)
            ]
            return numbers[tuple(places)]

        self.values[tensor.name] = element

    def _placed(self, memory: npt.NDArray[Any]) -> npt.NDArray[Any]:
        *outer, inner = memory.shape or (1,)
        rows = np.empty(self._start + math.prod(outer) * (inner + self._gap), memory.dtype)
        rows.view(np.uint8)[:] = 0xFF  # NaN, between the rows
        placed = rows[self._start :].reshape(*outer, inner + self._gap)[..., :inner]
        placed[...] = memory
        return placed

    def tiles(self) -> list[tuple[int, int]]:
        """(first position, first key) of every 16 rows and every tile of keys."""
        rows = range(0, self.seqlen_q, 16)
        return [(row + self.shift, kv) for row in rows for kv in range(0, self.seqlen_kv, self.plan.tile_kv)]

    def at(self, batch: int, head: int, q: int, kv: int) -> dict[str, Any]:
        """Values for the 16 rows from position q on and the tile of keys from kv on."""
        named = {"batch": batch, "head": head, "head_kv": head * HEADS_KV // HEADS_Q}
        rows, keys = q + np.arange(16)[:, None], kv + np.arange(self.plan.tile_kv)[None, :]
        return self.values | named | {"q": rows, "kv": keys}

    def condition(self, batch: int, head: int, q: int, kv: int) -> npt.NDArray[np.bool_]:
        """What the mask keeps of the 16 rows from position q on and the tile of keys from kv on."""
        shape = (16, self.plan.tile_kv)
        kept = np.broadcast_to(evaluate(self.plan.mask.condition, self.at(batch, head, q, kv)), shape)
        return kept & (kv + np.arange(self.plan.tile_kv) < self.seqlen_kv)

    def row(self, batch: int, head: int, row: int) -> npt.NDArray[np.bool_]:
        """What the mask keeps of one row."""
        named = {"batch": batch, "head": head, "head_kv": head * HEADS_KV // HEADS_Q}
        values = self.values | named | {"q": row + self.shift, "kv": np.arange(self.seqlen_kv)}
        return np.broadcast_to(evaluate(self.plan.mask.condition, values), (self.seqlen_kv,))

    def kept_keys(self, batch: int, head: int, row: int) -> list[int]:
        return np.flatnonzero(self.row(batch, head, row)).tolist()

    def extents(self) -> tuple[int, int]:
        """Batches and heads that have prepared arrays of their own."""
        over = self.plan.mask.derivation.over
        return BATCH if "batch" in over else 1, HEADS_Q if "head" in over else 1

    def exists(self, q: int, kv: int) -> npt.NDArray[np.bool_]:
        rows = q + np.arange(16) - self.shift < self.seqlen_q
        return rows[:, None] & (kv + np.arange(self.plan.tile_kv) < self.seqlen_kv)[None, :]


def _stored(held: npt.NDArray[Any], dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """As in memory, and the numbers that it stands for."""
    if dtype == "bf16":
        bits = (held.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = held.astype({"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "bool": np.uint8}[dtype])
    return stored, stored.astype(np.float64 if dtype in ("fp32", "fp16") else np.int64)
