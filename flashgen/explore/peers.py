"""The other implementations that `flashgen bench` times: what each needs, and how each is called.

A peer is a function of a case and its tensors that returns a call without arguments, giving
[batch, seqlen_q, heads_q, head_dim_v]; it raises Unsupported where it has no such kernel, ImportError where
it is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashgen.explore.inputs import Samples
from flashgen.plan.tiles import row_shift
from flashgen.plan.workload import Workload
from flashgen.runtime.elements import Box
from flashgen.runtime.evaluate import evaluator
from flashgen.runtime.inputs import Sizes
from flashgen.runtime.reference import Textbook
from flashgen.spec.symbols import SCORE, Q

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec

Call = Callable[[], torch.Tensor]


class Unsupported(Exception):
    """The peer has no kernel for this case."""


@dataclass(frozen=True)
class Case:
    """What every implementation is asked to compute."""

    spec: AttentionSpec
    work: Workload
    samples: Samples = field(default_factory=Samples)

    @classmethod
    def of(cls, spec: AttentionSpec, batch: int, seqlen_q: int, seqlen_kv: int) -> Case:
        """A spec on another workload than its own. What mask and score read is to be filled in."""
        work = replace(Workload.of(spec), batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        return cls(spec, work)

    @property
    def shift(self) -> int:
        """What is added to a row's index to get its position on the key timeline."""
        return row_shift(self.work.align, self.work.seqlen_q, self.work.seqlen_kv)

    @property
    def window(self) -> tuple[int, int]:
        """Keys kept to the left and right of each position, -1 for all, as the FlashAttention APIs take it.

        Raises Unsupported where the mask is no such band, or the alignment is not theirs.
        """
        work = self.work
        if not work.head.closed_form:
            raise Unsupported("has no such mask")
        bounds = work.mask.bounds
        masked = bounds.first is not None or bounds.last is not None
        if masked and work.align != "bottom_right" and work.seqlen_q != work.seqlen_kv:
            raise Unsupported("aligns masks bottom-right only")
        sides = []
        for end, sign in ((bounds.first, 1), (bounds.last, -1)):
            distance = sympy.Integer(-1) if end is None else sympy.expand(sign * (Q - end))
            if not (distance.is_Integer and (end is None or distance >= 0)):
                raise Unsupported("has no such mask")
            sides.append(int(distance))
        return sides[0], sides[1]

    @property
    def softcap(self) -> float:
        """The bound of scores that are squeezed by tanh, 0.0 where nothing is done to them.

        Raises Unsupported where something else is, or where there is a sink.
        """
        expr = self.spec.attention.score_expr
        if self.spec.attention.sink:
            raise Unsupported("is called without a sink here")
        if expr == SCORE:
            return 0.0
        cap = sympy.Wild("cap", properties=[lambda value: value.is_number])
        found = expr.match(cap * sympy.tanh(SCORE / cap))
        if not found:
            raise Unsupported("has no such score")
        return float(found[cap])

    def require_no_score(self) -> None:
        """Raises Unsupported where something is done to the scores."""
        if self.softcap:
            raise Unsupported("has no scores of one's own")

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row indices, the first and last `rows` of them, and their float64 output in batch 0, head 0.

        A check that the peers compute the same function, not a proof: that is what the tests are for.
        """
        length = self.work.seqlen_q
        parts = [range(min(rows, length)), range(max(length - rows, rows), length)]
        formula = Textbook(
            self.spec, q.double(), k.double(), v.double(), scale=None, **self.samples.arguments
        )
        keys = range(self.work.seqlen_kv)
        outputs = [formula.block(Box(range(1), range(1), part, keys)).o[0, 0] for part in parts if part]
        index = [torch.arange(part.start, part.stop, device=q.device) for part in parts if part]
        return torch.cat(index), torch.cat(outputs)


def _sdpa(backend: SDPBackend) -> Callable[[Case, torch.Tensor, torch.Tensor, torch.Tensor], Call]:
    def peer(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        case.require_no_score()
        left, right = case.window
        if left != -1 or right not in (-1, 0):
            raise Unsupported("has no window")
        if right == 0 and case.work.seqlen_q != case.work.seqlen_kv:
            raise Unsupported("aligns causal masks top-left only")
        # [batch, heads, seqlen, head_dim], as views
        qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
        scale, grouped = case.spec.scale, q.shape[2] != k.shape[2]

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                output = F.scaled_dot_product_attention(
                    qt, kt, vt, is_causal=right == 0, scale=scale, enable_gqa=grouped
                )
            return output.transpose(1, 2)

        return call

    return peer


def _flex(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.spec.attention.sink:
        raise Unsupported("has no sink")
    keep, modify = flex_functions(case, q, k)
    block_mask = None
    if case.work.mask.condition != sympy.true:
        over = case.work.mask.derivation.over
        batches, heads = q.shape[0] if "batch" in over else None, q.shape[2] if "head" in over else None
        seqlens = (case.work.seqlen_q, case.work.seqlen_kv)
        block_mask = torch.compile(create_block_mask)(keep, batches, heads, *seqlens, device=q.device)
    score_mod = None if case.spec.attention.score_expr == SCORE else modify
    compiled = torch.compile(flex_attention, dynamic=False)
    qt, kt, vt = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    scale, grouped = case.spec.scale, q.shape[2] != k.shape[2]

    def call() -> torch.Tensor:
        output = compiled(
            qt, kt, vt, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped
        )
        assert isinstance(output, torch.Tensor)
        return output.transpose(1, 2)

    return call


def flex_functions(
    case: Case, q: torch.Tensor, k: torch.Tensor
) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """A case's mask and score as FlexAttention takes them: mask_mod(b, h, q_idx, kv_idx) and score_mod(score,
    b, h, q_idx, kv_idx).
    """
    attention = case.spec.attention
    sizes = Sizes.of(q, k, attention.align)
    group, shift, scale = sizes.heads_q // sizes.heads_kv, sizes.q_offset, case.spec.scale
    tensors = dict(case.samples.tensors)
    axes = {
        tensor.name: [(sizes.first(axis), sizes.length(axis) - 1) for axis in tensor.index]
        for tensor in attention.inputs
    }
    numbers = {
        parameter.name: int(number) if parameter.kind == "int" else float(number)
        for parameter in attention.runtime
        for number in (case.samples.params[parameter.name],)
    }
    condition = evaluator(attention.condition, torch.float32)
    modified = evaluator(attention.score_expr, torch.float32)

    def read(name: str, subscripts: tuple[Any, ...]) -> torch.Tensor:
        indices = tuple(
            (subscript - first).clamp(0, last)
            for subscript, (first, last) in zip(subscripts, axes[name], strict=True)
        )
        return tensors[name][indices]

    def values(b: Any, h: Any, row: Any, kv: Any) -> dict[str, Any]:
        positions = {"batch": b, "head": h, "head_kv": h // group, "q": row + shift, "kv": kv}
        lengths = {"seqlen_q": sizes.seqlen_q, "seqlen_kv": sizes.seqlen_kv, "scale": scale}
        return {**positions, **lengths, **numbers}

    def keep(b: Any, h: Any, row: Any, kv: Any) -> torch.Tensor:
        kept: torch.Tensor = condition(values(b, h, row, kv), read)
        return kept

    def modify(score: Any, b: Any, h: Any, row: Any, kv: Any) -> torch.Tensor:
        score = modified({**values(b, h, row, kv), "score": score}, read)
        assert isinstance(score, torch.Tensor)
        return score

    return keep, modify


def _fa3(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    left, right = case.window
    softcap = case.softcap
    library = os.environ.get("FA3_SO")  # the build inside vLLM's wheel, which needs no vLLM
    if library is not None:
        return _fa3_of_vllm(library, case, q, k, v)
    from flash_attn_interface import flash_attn_func

    def call() -> torch.Tensor:
        output = flash_attn_func(
            q, k, v, softmax_scale=case.spec.scale, causal=right == 0, window_size=(left, right),
            softcap=softcap,
        )  # fmt: skip
        return _first(output)

    return call


def _fa3_of_vllm(library: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    left, right = case.window
    softcap = case.softcap
    ends = [
        torch.arange(0, (case.work.batch + 1) * seqlen, seqlen, device=q.device, dtype=torch.int32)
        for seqlen in (case.work.seqlen_q, case.work.seqlen_kv)
    ]
    # its only form is the one for ragged batches: [tokens, heads, head_dim]
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    seqlens = (case.work.seqlen_q, case.work.seqlen_kv)

    def call() -> torch.Tensor:
        output = torch.ops._vllm_fa3_C.fwd(
            *flat, None, None, None, None, *ends, None, None, None, *seqlens,
            None, None, None, None, None, None, None, None, None, case.spec.scale, right == 0,
            left, right, softcap, True, None, 1, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip
        assert isinstance(output, torch.Tensor)
        return output.view(case.work.batch, case.work.seqlen_q, *output.shape[1:])

    return call


def _fa4(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    from flash_attn.cute import flash_attn_func

    window = tuple(None if side == -1 else side for side in case.window)
    settings: dict[str, Any] = {"softmax_scale": case.spec.scale}
    settings |= {"softcap": case.softcap} if case.softcap else {}
    settings |= {"causal": True} if window == (None, 0) else {"window_size": window}

    def call() -> torch.Tensor:
        return _first(flash_attn_func(q, k, v, **settings))

    return call


def _flashinfer(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    import flashinfer

    left, right = case.window
    softcap = case.softcap or None
    if right not in (-1, 0):
        raise Unsupported("has no such mask")
    if case.work.batch != 1:
        raise Unsupported("prefills one sequence per call; give --batch 1")
    q1, k1, v1 = q[0], k[0], v[0]

    def call() -> torch.Tensor:
        output = flashinfer.single_prefill_with_kv_cache(
            q1, k1, v1, causal=right == 0, window_left=left, sm_scale=case.spec.scale,
            logits_soft_cap=softcap,
        )  # fmt: skip
        assert isinstance(output, torch.Tensor)
        return output[None]

    return call


def _first(output: object) -> torch.Tensor:
    """The output alone, of peers that return (output, lse) in some versions."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


PEERS: Mapping[str, Callable[[Case, torch.Tensor, torch.Tensor, torch.Tensor], Call]] = {
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "fa3": _fa3,
    "fa4": _fa4,
    "flashinfer": _flashinfer,
    "flex": _flex,
}
