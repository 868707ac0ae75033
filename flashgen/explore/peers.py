"""The other implementations that `flashgen bench` times: what each needs, and how each is called.

A peer is a function of a case and its tensors that returns a call without arguments, giving
[batch, seqlen_q, heads_q, head_dim_v]; it raises Unsupported where it has no such kernel, ImportError where
it is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashgen.plan.tiles import row_shift
from flashgen.plan.workload import Workload
from flashgen.runtime.reference import evaluate
from flashgen.spec.symbols import KV, Q

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

    @classmethod
    def of(cls, spec: AttentionSpec, batch: int, seqlen_q: int, seqlen_kv: int) -> Case:
        """A spec on another workload than its own."""
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

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row indices, the first and last `rows` of them, and their float64 output in batch 0, head 0.

        A check that the peers compute the same function, not a proof: that is what the tests are for.
        """
        index = torch.arange(self.work.seqlen_q, device=q.device)
        index = torch.cat([index[:rows], index[rows:][-rows:]])
        scores = q[0, index, 0].double() @ k[0, :, 0].double().T * self.spec.scale
        values = {
            "q": index[:, None] + self.shift,
            "kv": torch.arange(self.work.seqlen_kv, device=q.device)[None, :],
        }
        keep = torch.as_tensor(evaluate(self.spec.attention.condition, values), device=q.device)
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
        return index, weights @ v[0, :, 0].double()


def _sdpa(backend: SDPBackend) -> Callable[[Case, torch.Tensor, torch.Tensor, torch.Tensor], Call]:
    def peer(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
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

    block_mask = None
    if case.work.mask.condition != sympy.true:
        shift = case.shift
        keep = sympy.lambdify([Q, KV], case.spec.attention.condition, modules="torch")
        block_mask = create_block_mask(
            lambda b, h, row, kv: keep(row + shift, kv),
            None, None, case.work.seqlen_q, case.work.seqlen_kv, device=q.device,
        )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    qt, kt, vt = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    scale, grouped = case.spec.scale, q.shape[2] != k.shape[2]

    def call() -> torch.Tensor:
        output = compiled(qt, kt, vt, block_mask=block_mask, scale=scale, enable_gqa=grouped)
        assert isinstance(output, torch.Tensor)
        return output.transpose(1, 2)

    return call


def _fa3(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    left, right = case.window
    library = os.environ.get("FA3_SO")  # the build inside vLLM's wheel, which needs no vLLM
    if library is not None:
        return _fa3_of_vllm(library, case, q, k, v)
    from flash_attn_interface import flash_attn_func

    def call() -> torch.Tensor:
        output = flash_attn_func(
            q, k, v, softmax_scale=case.spec.scale, causal=right == 0, window_size=(left, right)
        )
        return _first(output)

    return call


def _fa3_of_vllm(library: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    left, right = case.window
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
            left, right, 0.0, True, None, 1, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip
        assert isinstance(output, torch.Tensor)
        return output.view(case.work.batch, case.work.seqlen_q, *output.shape[1:])

    return call


def _fa4(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    from flash_attn.cute import flash_attn_func

    window = tuple(None if side == -1 else side for side in case.window)
    settings: dict[str, Any] = {"softmax_scale": case.spec.scale}
    settings |= {"causal": True} if window == (None, 0) else {"window_size": window}

    def call() -> torch.Tensor:
        return _first(flash_attn_func(q, k, v, **settings))

    return call


def _flashinfer(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    import flashinfer

    left, right = case.window
    if right not in (-1, 0):
        raise Unsupported("has no such mask")
    if case.work.batch != 1:
        raise Unsupported("prefills one sequence per call; give --batch 1")
    q1, k1, v1 = q[0], k[0], v[0]

    def call() -> torch.Tensor:
        output = flashinfer.single_prefill_with_kv_cache(
            q1, k1, v1, causal=right == 0, window_left=left, sm_scale=case.spec.scale
        )
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
