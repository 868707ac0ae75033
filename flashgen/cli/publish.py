"""What `flashgen build` writes: ``DIR/<name>/`` with the source, the cubin and the manifest.

The manifest is committed beside the source and compared by ``--check``, so it holds only what every machine
agrees on: no times, no paths. What depends on the compiler's version (registers, spills) stands beside that
version, and is compared only where the versions are equal.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.errors import SpecError

if TYPE_CHECKING:
    from flashgen.build import Cubin
    from flashgen.plan import KernelPlan
    from flashgen.spec import AttentionSpec

MANIFEST = "manifest.json"
_SUFFIXES = (".cu", ".cuh", ".cubin")
_DIFF_LINES = 12  # of each differing file: enough to recognise the change, not to review it


def describe(spec: AttentionSpec, plan: KernelPlan) -> dict[str, Any]:
    """What the manifest says beyond the compiler's facts: the spec as data, its plan, the predicted bytes.

    The cache may hold the kernel from another spec that prints the same source: the plan is this spec's own.
    """
    import yaml

    from flashgen.plan import IoModel, Workload
    from flashgen.spec import dump_spec

    solution = plan.to_dict()
    # numpy adds in an order that depends on the processor: the last digits are not the same everywhere
    solution["why"]["cost"] = [[term, float(f"{value:.4g}")] for term, value in solution["why"]["cost"]]
    return {
        "name": spec.name,
        "spec": yaml.safe_load(dump_spec(spec)),
        "plan": solution,
        "bytes": IoModel.of_plan(Workload.of(spec), plan).to_dict(),
    }


def write(cubin: Cubin, folder: Path, extra: Mapping[str, Any]) -> None:
    """Write the folder, the manifest last; what an earlier build of another kernel left there is removed.

    Raises SpecError where the folder is a link, or holds a manifest that is not flashgen's.
    """
    from flashgen.build import write_artifact

    before = _read_manifest(folder)
    write_artifact(stable(cubin), folder, extra)
    written = json.loads((folder / MANIFEST).read_bytes())["files"]
    for name in before.get("files", {}):
        if name not in written and Path(name).name == name and Path(name).suffix in _SUFFIXES:
            (folder / name).unlink(missing_ok=True)


def differences(cubin: Cubin, folder: Path, extra: Mapping[str, Any]) -> list[str]:
    """What `write` would change among the committed files, as lines to print; empty where nothing would.

    Headers are not committed: the manifest has their hashes. Cubins are not compared: NVRTC names what lies
    in an anonymous namespace after the process and the time.
    """
    import tempfile

    from flashgen.build import write_artifact

    committed = _read_manifest(folder)
    if not committed:
        return [f"{folder / MANIFEST}: missing"]
    with tempfile.TemporaryDirectory() as scratch:
        write_artifact(stable(cubin), Path(scratch), extra)
        expected = json.loads((Path(scratch) / MANIFEST).read_bytes())
    source = f"{cubin.kernel}.cu"
    lines = list(_diff(folder / source, _read(folder / source), cubin.source.text))
    for manifest in (committed, expected):
        manifest["files"] = {
            name: value for name, value in manifest["files"].items() if not name.endswith(".cubin")
        }
    if committed.get("compiler") != expected["compiler"]:
        for manifest in (committed, expected):
            manifest.pop("compiler", None)
            manifest.pop("resources", None)
    lines += _diff(folder / MANIFEST, json.dumps(committed, indent=2), json.dumps(expected, indent=2))
    return lines


def stable(cubin: Cubin) -> Cubin:
    """The cubin with a manifest that is the same on every machine that has the same compiler."""
    manifest = dict(cubin.manifest)
    manifest["resources"] = {**manifest["resources"], "compile_s": None}
    manifest["options"] = [
        option for option in manifest["options"] if not option.startswith("--include-path=")
    ]
    return replace(cubin, manifest=manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an earlier build, or {}. Raises SpecError for a folder that is not flashgen's."""
    hint = "choose another folder with --out, or another name in the spec"
    if folder.is_symlink():
        raise SpecError(f"{folder} is a link; flashgen writes into folders of its own only", hint=hint)
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if (
        not isinstance(manifest, dict)
        or "flashgen" not in manifest
        or not isinstance(manifest.get("files"), dict)
    ):
        raise SpecError(f"{path} was not written by flashgen; it is left alone", hint=hint)
    return manifest


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _diff(path: Path, committed: str | None, expected: str) -> Iterator[str]:
    if committed is None:
        yield f"{path}: missing"
        return
    changes = list(
        difflib.unified_diff(
            committed.splitlines(), expected.splitlines(), "committed", "built", lineterm="", n=0
        )
    )
    if not changes:
        return
    lines = [line for line in changes[2:] if not line.startswith("@@")]
    removed = sum(line.startswith("-") for line in lines)
    yield f"{path}: differs (+{len(lines) - removed} -{removed} lines)"
    yield from (f"    {line}" for line in lines[:_DIFF_LINES])
    if len(lines) > _DIFF_LINES:
        yield f"    ... {len(lines) - _DIFF_LINES} more"
