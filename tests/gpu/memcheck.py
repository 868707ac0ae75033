"""A few launches of every kind, small enough for compute-sanitizer. Run by scripts/gpu_tests.sh."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SHAPES = ((1, 1), (65, 130), (130, 65), (128, 128), (200, 257))
CHOICES = (
    {"tile_order": "stream_k"},
    {"reference": "first"},
    {"reference": "first", "tile_order": "dynamic", "q_register_steps": 4},
    {"reference": "first", "cluster": 2, "o_buffer": "v", "q_stages": 1},
)
HEAD_DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))


def main() -> None:
    """Exits with a message when nothing could be launched or a result is wrong."""
    # One allocation per tensor: within the caching allocator's large blocks an overrun would go unnoticed.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    here = Path(__file__).parent
    sys.path[:0] = [str(here.parents[1]), str(here.parent), str(here)]

    import torch
    from attention_cases import GALLERY_CASES, Case, assert_exact
    from gpu_kernels import FAMILIES, kernel_of, missing

    launches = 0
    for family in FAMILIES:
        if reason := missing(family):
            print(f"memcheck: {family} left out: {reason}")
            continue
        for head_dim_qk, head_dim_v in HEAD_DIMS:
            for mask in ("full", "causal", {"window": 50}):
                for seqlen_q, seqlen_kv in SHAPES:
                    case = Case(
                        head_dim_qk,
                        head_dim_v,
                        heads_kv=2,
                        group=2,
                        mask=mask,
                        seqlen_q=seqlen_q,
                        seqlen_kv=seqlen_kv,
                    )
                    q, k, v = case.tensors("cuda")
                    o, lse = kernel_of(case, family)(q, k, v, return_lse=True)
                    assert_exact(case, o.cpu(), lse.cpu(), q.cpu(), k.cpu(), v.cpu())
                    launches += 1
        for parts in GALLERY_CASES.values():
            for seqlen_q, seqlen_kv in SHAPES[1:3]:
                case = Case(heads_kv=2, group=2, batch=2, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, **parts)
                q, k, v = case.tensors("cuda")
                given = case.given("cuda")
                o, lse = kernel_of(case, family)(q, k, v, return_lse=True, **given)
                assert_exact(case, o, lse, q, k, v, **given)
                launches += 1
    for choice in () if missing("sm90") else CHOICES:
        for head_dim in (64, 256):
            case = Case(
                head_dim, head_dim, heads_kv=2, seqlen_q=300, seqlen_kv=3000, tiles={"schedule": choice}
            )
            q, k, v = case.tensors("cuda")
            k[:, 1000] *= 200  # beyond the range of the first reference
            o, lse = kernel_of(case, "sm90")(q, k, v, return_lse=True)
            assert_exact(case, o, lse, q, k, v)
            launches += 1
    torch.cuda.synchronize()
    print(f"memcheck: {launches} launches")
    if not launches:
        sys.exit("memcheck: nothing was launched")


if __name__ == "__main__":
    main()
