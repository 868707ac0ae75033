"""The wheel, installed elsewhere, needs no repository; the pinned environment covers what is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flashgen import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_template_and_spec(wheel: Path) -> None:
    assert wheel.name == f"flashgen-{__version__}-py3-none-any.whl"
    packed = set(zipfile.ZipFile(wheel).namelist())
    packages = (
        ("templates", "*.*"),
        ("specs", "*.yaml"),
        ("flashgen", "*.py"),
        ("flashgen", "tunings/*.json"),
    )
    for folder, pattern in packages:
        inside = "flashgen" if folder == "flashgen" else f"flashgen/_{folder}"
        files = [path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(pattern)]
        assert files
        assert {f"{inside}/{name}" for name in files} <= packed
    assert "flashgen/py.typed" in packed
    assert not any(name.startswith(("tests/", "templates/", "specs/")) for name in packed)


@pytest.mark.slow
@pytest.mark.compiler
def test_the_installed_wheel_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            site,
            wheel,
        ],
        check=True,
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONSAFEPATH": "1",
        "FLASHGEN_CACHE_DIR": str(tmp_path / "cache"),
    }

    def flashgen(*arguments: str) -> str:
        command = [sys.executable, str(site / "bin" / "flashgen"), *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    (llama,) = [row for row in json.loads(flashgen("specs", "--json")) if row["name"] == "llama3-8b"]
    assert llama["file"].startswith(str(site))
    assert flashgen("plan", "llama3-8b").startswith("llama3-8b: causal")
    flashgen("build", "llama3-8b", "--out", "out")
    assert list((tmp_path / "out" / "llama3-8b").glob("*.cubin"))
    assert json.loads(flashgen("run", "llama3-8b", "--device", "cpu", "--json"))["passed"]


def test_every_dependency_is_pinned() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = pyproject[pyproject.index("dependencies = [") : pyproject.index("[project.scripts]")]
    # the cuda12 extra's NVIDIA wheels follow the torch that a user of CUDA 12 brings along
    wanted = {
        canonical(name)
        for name in re.findall(r'"([A-Za-z][\w.-]*)[><=~!]', block)
        if not name.endswith("-cu12")
    }
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", pin) for pin in pins)
    assert len(wanted) > 15
    assert wanted <= {canonical(pin.partition("==")[0]) for pin in pins}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
