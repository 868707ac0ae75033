"""What there is to choose from: `flashgen specs`, `flashgen targets`."""

from __future__ import annotations

from typing import Any

import click

from flashgen.cli.arguments import gallery, json_option
from flashgen.cli.terminal import console, new_table, pair, print_json


@click.command()
@json_option
def specs(as_json: bool) -> None:
    """List the gallery of specs."""
    from flashgen.spec import load_spec

    rows: list[dict[str, Any]] = []
    for path in gallery().values():
        spec = load_spec(path)
        attention = spec.attention
        rows.append(
            {
                "name": spec.name,
                "heads": {"q": attention.heads.q, "kv": attention.heads.kv},
                "head_dim": {"qk": attention.head_dim.qk, "v": attention.head_dim.v},
                "dtype": attention.dtype,
                "mask": attention.mask.text,
                "score": attention.score.text,
                "sink": attention.sink,
                "passes": list(spec.passes),
                "file": str(path),
            }
        )
    if as_json:
        print_json(rows)
        return

    table = new_table("name", "heads", "head_dim", "dtype", "mask", "score")
    for row in rows:
        heads, dims = row["heads"], row["head_dim"]
        score = "" if row["score"] == "score" else row["score"]  # nothing is done to it
        table.add_row(
            row["name"],
            pair(heads["q"], heads["kv"]),
            pair(dims["qk"], dims["v"]),
            row["dtype"],
            row["mask"],
            ", ".join(filter(None, (score, "sink" if row["sink"] else ""))),
        )
    console().print(table)


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the chips that kernels can be built for."""
    from flashgen.arch import ARCHS, DEFAULT_TARGET

    if as_json:
        print_json(
            [
                {
                    "target": arch.target,
                    "title": arch.title,
                    "default": arch.target == DEFAULT_TARGET,
                    "sms": arch.sms,
                    "smem_per_block": arch.smem_per_block,
                    "smem_per_sm": arch.smem_per_sm,
                    "l2_bytes": arch.l2_bytes,
                    "hbm_bytes_per_s": arch.hbm_bytes_per_s,
                    "tensor_flops": dict(arch.tensor_flops),
                    "features": sorted(arch.features),
                    "sources": dict(arch.sources),
                }
                for arch in ARCHS.values()
            ]
        )
        return

    table = new_table("target", "chips", "SMs", "shared memory", "L2", "HBM", "bf16")
    for arch in ARCHS.values():
        table.add_row(
            arch.target + (" (default)" if arch.target == DEFAULT_TARGET else ""),
            arch.title,
            str(arch.sms),
            f"{arch.smem_per_block:,} B/block",
            f"{arch.l2_bytes / 2**20:.0f} MiB",
            f"{arch.hbm_bytes_per_s / 1e12:.2f} TB/s",
            f"{arch.tensor_flops['bf16'] / 1e12:.0f} TFLOP/s",
        )
    console().print(table)
