"""Host time: of building a kernel (cold, warm) and, with a GPU, of calling one.

python benchmarks/latency.py [SPEC]        default: specs/llama3-8b.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_BUILD = """
import sys, time
from flashgen.arch import DEFAULT_TARGET, arch
from flashgen.spec import load_spec
start = time.perf_counter()
spec = load_spec(sys.argv[1])
from flashgen.build import build
from flashgen.plan import solve
build(solve(spec, arch(spec.target if spec.target != "auto" else DEFAULT_TARGET)))
cold = time.perf_counter() - start
start = time.perf_counter()
spec = load_spec(sys.argv[1])
build(solve(spec, arch(spec.target if spec.target != "auto" else DEFAULT_TARGET)))
print(cold, time.perf_counter() - start)
"""


def build_seconds(spec: Path) -> tuple[float, float]:
    """Spec to cubin: in a fresh process with an empty cache, and again in that process."""
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, "-c", _BUILD, str(spec)],
            env={**os.environ, "FLASHGEN_CACHE_DIR": cache},
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    cold, warm = map(float, result.stdout.split())
    return cold, warm


def call_microseconds(call: Callable[[], object], calls: int = 200) -> float:
    """Median host time of one call, with the queue empty at its start so that it never blocks."""
    import torch

    for _ in range(10):
        call()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path, nargs="?", default=Path("specs/llama3-8b.yaml"))
    spec_file = parser.parse_args().spec

    cold, warm = build_seconds(spec_file)
    print(f"build, cold     {cold:8.2f} s    (a fresh process, an empty cache)")
    print(f"build, warm     {warm:8.3f} s")

    import torch

    if not torch.cuda.is_available():
        print("call            needs a GPU, and torch sees none here")
        return
    import torch.nn.functional as F

    import flashgen
    from flashgen.explore.inputs import random_inputs
    from flashgen.plan import Workload
    from flashgen.spec import load_spec

    spec = load_spec(spec_file)
    work = dataclasses.replace(Workload.of(spec), batch=1, seqlen_q=512, seqlen_kv=512)
    q, k, v = random_inputs(work, "cuda")
    kernel = flashgen.load(spec)
    causal = spec.attention.mask_label == "causal"
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    calls: dict[str, Callable[[], object]] = {
        "flashgen.load": lambda: kernel(q, k, v),
        "flashgen.attention": lambda: flashgen.attention(q, k, v, causal=causal),
        "torch SDPA": lambda: F.scaled_dot_product_attention(
            qt, kt, vt, is_causal=causal, enable_gqa=grouped
        ),
    }
    for name, call in calls.items():
        print(f"call, {name:18} {call_microseconds(call):6.1f} us")


if __name__ == "__main__":
    main()
