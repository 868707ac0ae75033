"""The kernels in ``generated/``, committed to be read and reviewed as diffs, are what the templates print.

Each lies beside a manifest that holds its plan. Whether the solver still arrives at that plan is for
``flashgen build --check`` to say; a change of a template shows here, and ``flashgen build`` takes it over.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashgen.codegen import render
from flashgen.plan import plan_from_dict

GENERATED = Path(__file__).resolve().parent.parent / "generated"
MANIFESTS = sorted(GENERATED.glob("**/manifest.json"))


def test_there_is_something_to_compare() -> None:
    assert len(MANIFESTS) >= 6


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: str(path.parent.relative_to(GENERATED)))
def test_committed_source_is_what_the_template_prints(manifest: Path) -> None:
    source = render(plan_from_dict(json.loads(manifest.read_text())["plan"]))
    assert (manifest.parent / f"{source.name}.cu").read_text() == source.text
