"""The solver's predictions held against the tilings measured on an H200, as a Markdown table. Needs no GPU.

    python benchmarks/solver_ranking.py [--write]

``benchmarks/data/sm90_tilings.csv`` holds TFLOP/s (4 * batch * heads * seqlen^2 * head_dim, half of it for
causal; bf16, 16k tokens, hidden size 2048) of Hopper tilings, by the commit of the kernel that was measured.
Only tilings measured in one run are compared. ``--write`` puts the table into docs/solver.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flashgen.arch import ARCHS  # noqa: E402
from flashgen.explore.ranking import rank_correlation, regret  # noqa: E402
from flashgen.plan import MaskPlan, Sm90Schedule, Workload  # noqa: E402
from flashgen.plan.constraints import violations  # noqa: E402
from flashgen.plan.cost import cost  # noqa: E402
from flashgen.plan.lattice import with_registers  # noqa: E402
from flashgen.plan.tiling import Head, Tiling  # noqa: E402
from flashgen.spec.bounds import RowBounds  # noqa: E402
from flashgen.spec.symbols import Q  # noqa: E402

DATA = Path(__file__).resolve().parent / "data" / "sm90_tilings.csv"
DOCUMENT = ROOT / "docs" / "solver.md"
BEGIN, END = "<!-- ranking: begin -->\n", "<!-- ranking: end -->"
MASKS = {"full": RowBounds(None, None), "causal": RowBounds(None, Q)}
TOKENS, HIDDEN = 16384, 2048
H200 = ARCHS["sm_90a"]


@dataclass(frozen=True)
class Cell:
    """Tilings measured side by side on one workload, in TFLOP/s."""

    commit: str
    head_dim: int
    mask: str
    seqlen: int
    tilings: tuple[Tiling, ...]
    measured: tuple[float, ...]

    @property
    def workload(self) -> Workload:
        heads = HIDDEN // self.head_dim
        return Workload(
            batch=TOKENS // self.seqlen, heads_q=heads, heads_kv=heads, seqlen_q=self.seqlen,
            seqlen_kv=self.seqlen, head_dim_qk=self.head_dim, head_dim_v=self.head_dim, dtype="bf16",
            align="bottom_right", mask=MaskPlan.of_bounds(self.mask, MASKS[self.mask]),
        )  # fmt: skip

    @property
    def predicted(self) -> tuple[float, ...]:
        """In the TFLOP/s of `measured`."""
        work = self.workload
        flops = 4 * work.batch * work.heads_q * self.seqlen**2 * self.head_dim
        flops //= 2 if self.mask == "causal" else 1
        return tuple(flops / cost(tiling, work, H200).seconds / 1e12 for tiling in self.tilings)


def cells() -> Iterator[Cell]:
    """The measurements of what the constraints allow (the rest spills), in the order of the file."""
    rows: dict[tuple[str, int, str, int], list[dict[str, str]]] = {}
    with DATA.open(newline="") as file:
        for row in csv.DictReader(file):
            key = (row["commit"], int(row["head_dim"]), row["mask"], int(row["seqlen"]))
            rows.setdefault(key, []).append(row)
    for key, found in rows.items():
        _, head_dim, mask, _ = key
        head = Head(head_dim, head_dim, unmasked=mask == "full")
        pairs = [(_tiling(row, head_dim), float(row["tflops"])) for row in found]
        legal = [pair for pair in pairs if not violations(pair[0], head, H200)]
        yield Cell(*key, tuple(tiling for tiling, _ in legal), tuple(rate for _, rate in legal))


def _tiling(row: dict[str, str], head_dim: int) -> Tiling:
    tile_q, tile_kv, stages = (int(row[name]) for name in ("tile_q", "tile_kv", "stages"))
    given = dict(pair.split("=") for pair in row["schedule"].split())
    kinds = {f.name: f.type for f in dataclasses.fields(Sm90Schedule)}
    fields: dict[str, Any] = {name: _parsed(text, str(kinds[name])) for name, text in given.items()}
    plain = Sm90Schedule(**fields)
    schedule = with_registers(plain, Head(head_dim, head_dim), tile_q // 64, {})
    return Tiling("sm90", tile_q, tile_kv, stages, tile_q // 16, schedule)


def _parsed(text: str, kind: str) -> Any:
    return {"bool": lambda: text == "true", "int": lambda: int(text)}.get(kind, lambda: text)()


def table() -> str:
    """One line for each cell that has tilings to choose from, and one for their means."""
    lines = [
        "| kernel | cell | tilings | rank correlation | measured best | the model's choice | regret |",
        "|---|---|---|---|---|---|---|",
    ]
    correlations, regrets = [], []
    for cell in cells():
        predicted = cell.predicted
        correlation, lost = rank_correlation(predicted, cell.measured), regret(predicted, cell.measured)
        best, chosen = (max(range(len(rates)), key=rates.__getitem__) for rates in (cell.measured, predicted))
        regrets.append(lost)
        if correlation is not None:
            correlations.append(correlation)
        lines.append(
            f"| {cell.commit} | d{cell.head_dim} {cell.mask} {cell.seqlen} | {len(cell.tilings)} "
            f"| {'' if correlation is None else f'{correlation:+.2f}'} "
            f"| {_name(cell.tilings[best])} {cell.measured[best]:.0f} "
            f"| {_name(cell.tilings[chosen])} {cell.measured[chosen]:.0f} | {100 * lost:.1f}% |"
        )
    mean_correlation, mean_regret = (sum(values) / len(values) for values in (correlations, regrets))
    lines.append(
        f"| | mean of {len(regrets)} cells | | {mean_correlation:+.2f} | | | {100 * mean_regret:.1f}% "
        f"(most: {100 * max(regrets):.1f}%) |"
    )
    return "\n".join(lines) + "\n"


def _name(tiling: Tiling) -> str:
    schedule = tiling.schedule
    assert isinstance(schedule, Sm90Schedule)
    notes = [
        note
        for note, holds in (
            ("2 Q", schedule.q_stages > 1),
            (f"{schedule.q_register_steps} steps of Q held", schedule.q_register_steps > 0),
            ("one more V", schedule.extra_v_stages > 0),
            (f"O in {schedule.o_buffer}", schedule.o_buffer != "q"),
            (f"{tiling.stages} stages", tiling.stages > 2),
            ("no ping-pong", not schedule.ping_pong),
            ("no overlap", not schedule.overlap),
            ("cluster", schedule.cluster > 1),
            (f"sections of {schedule.section_mib} MiB", schedule.section_mib != Sm90Schedule.section_mib),
            ("first", schedule.reference == "first"),
            ("stream_k", schedule.tile_order == "stream_k"),
            ("ascending", schedule.key_order == "ascending"),
            ("late rescale", schedule.rescale == "late"),
        )
        if holds
    ]
    return f"{tiling.tile_q}x{tiling.tile_kv}" + (f" ({', '.join(notes)})" if notes else "")


def main() -> None:
    """Print the table, or write it into the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/solver.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
