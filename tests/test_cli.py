"""The command: exit codes, the format of errors, JSON for scripts."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from stopwatch import slowness, spent

import flashgen
from flashgen.cli import main
from flashgen.cli.arguments import gallery

ROOT = Path(__file__).resolve().parent.parent
SPEC = """\
flashgen: 1
name: tiny
attention:
  heads: {q: 4, kv: 2}
  head_dim: 64
  dtype: bf16
  mask: causal
passes: [forward]
workload: {batch: 2, seqlen: 256}
tiles: {q: 64, kv: 32, stages: 2, warps: 4}
target: sm_80
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    """What a command prints with --json, which must be all of stdout."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# -- exit codes and errors ---------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, flashgen.cli\n"
        "heavy = {'torch', 'cupy', 'sympy', 'numpy', 'pydantic', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_spec_is_refused_at_once(spec_file: Path) -> None:
    spec_file.write_text(SPEC.replace("mask: causal", "mask: kv <= qq"))
    code = (
        "import sys, flashgen.cli\n"
        f"try: flashgen.cli.main(['plan', {str(spec_file)!r}])\n"
        "finally: print(*{'numpy', 'jinja2', 'rich', 'flashgen.plan', 'flashgen.build'} & set(sys.modules))\n"
    )
    seconds = []
    for _ in range(3):  # half of it is the import of sympy, whose time varies most
        started = spent()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(spent() - started)
        assert result.returncode == 2 and 'unknown name "qq"' in result.stderr
        assert result.stdout.strip() == "", "what only planning needs is not imported"
    assert min(seconds) < slowness()


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("build", "plan", "render", "run", "bench", "specs", "targets", "cache", "doctor"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)
        assert call(command, "--help").exit_code == 0


def test_version() -> None:
    assert call("--version").stdout == f"flashgen {flashgen.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("plann",),
        ("plan",),
        ("plan", "--bogus"),
        ("run", "llama3-8b", "--device", "tpu"),
        ("run", "llama3-8b", "--seqlen", "-1"),
        ("build",),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_usage_errors_have_the_format_of_all_errors() -> None:
    result = call("plan", "--bogus")
    assert result.stderr.startswith("error: ")
    assert "`flashgen plan --help`" in result.stderr


def test_missing_file_suggests_the_gallery() -> None:
    result = call("plan", "specs/lama3-8b.yaml")
    assert result.exit_code == 2
    assert "specs/lama3-8b.yaml: no such file; did you mean llama3-8b" in result.stderr


def test_spec_errors_name_the_place_and_come_together(spec_file: Path) -> None:
    spec_file.write_text(SPEC.replace("head_dim: 64", "head_dims: 64").replace("bf16", "bf17"))
    result = call("plan", spec_file)
    assert result.exit_code == 2
    assert result.stdout == ""
    places = re.findall(r"^error: (\S+?):(\d+):(\d+): ", result.stderr, re.MULTILINE)
    assert {(file, line) for file, line, _ in places} >= {(str(spec_file), "5"), (str(spec_file), "6")}
    assert "head_dim'" in result.stderr  # did you mean


def test_a_tile_that_does_not_fit_says_both_numbers(spec_file: Path) -> None:
    spec_file.write_text(SPEC.replace("kv: 32, stages: 2", "kv: 256, stages: 4"))
    result = call("build", spec_file, "--out", spec_file.parent / "out")
    assert result.exit_code == 2
    assert re.search(r"^error: \S+tiny.yaml:\d+:\d+: .*166,912", result.stderr, re.MULTILINE), result.stderr
    assert not (spec_file.parent / "out").exists()


def test_unknown_target_is_a_spec_error(spec_file: Path) -> None:
    result = call("plan", spec_file, "--target", "sm_90")
    assert result.exit_code == 2
    assert "did you mean sm_90a" in result.stderr


def test_tracebacks_only_with_debug(spec_file: Path) -> None:
    spec_file.write_text("flashgen: 1\nname: [")
    for place in (0, 1, 2):
        arguments = ["plan", str(spec_file)]
        arguments.insert(place, "--debug")
        result = subprocess.run(
            [sys.executable, "-m", "flashgen", *arguments], capture_output=True, text=True
        )
        assert "Traceback" in result.stderr
    result = subprocess.run(
        [sys.executable, "-m", "flashgen", "plan", str(spec_file)], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_a_bug_is_reported_as_one(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the solver fell over\nbadly")

    monkeypatch.setattr("flashgen.plan.rank", broken)
    result = call("plan", spec_file)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: internal error: RuntimeError: the solver fell over\n")
    assert "--debug" in result.stderr


def test_interruption_is_no_traceback(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashgen.plan.rank", interrupted)
    result = call("plan", spec_file)
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: interrupted"


def test_markup_in_a_spec_is_not_read(spec_file: Path) -> None:
    spec_file.write_text(SPEC.replace("name: tiny", "name: '[red]tiny[/red]'"))
    result = call("plan", spec_file)
    assert result.exit_code == 2
    assert "[red]" in result.stderr


# -- plan and render ---------------------------------------------------------------------------------------


def test_plan_says_what_and_why(spec_file: Path) -> None:
    result = call("plan", spec_file)
    assert result.exit_code == 0
    for text in (
        "tile_q 64   tile_kv 32   stages 2   warps 4",
        "attn_fwd_causal_bf16_d64_g2_sm80",
        "standard attention",
        "lower bound",
        "/ 166,912 B of shared memory",
    ):
        assert text in result.stdout


def test_the_readme_shows_what_plan_prints() -> None:
    shown = (ROOT / "README.md").read_text().partition("$ flashgen plan llama3-8b\n")[2].partition("```")[0]
    printed = call("plan", "llama3-8b").stdout
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_plan_json(spec_file: Path) -> None:
    plan = answer("plan", spec_file)
    assert plan["plan"]["tile_q"] == 64
    assert plan["plan"]["why"]["origin"] == "given"
    assert plan["bytes"]["compulsory"]["bytes"] > plan["bytes"]["lower_bound"]["bytes"] > 0
    assert "candidates" not in plan


def test_plan_all_ranks_by_predicted_time() -> None:
    candidates = answer("plan", "gpt2-medium", "--all")["candidates"]
    seconds = [candidate["cost"]["seconds"] for candidate in candidates]
    assert len(seconds) > 10
    assert seconds == sorted(seconds)
    table = call("plan", "gpt2-medium", "--all").stdout
    assert re.search(rf"^ *{len(seconds)} ", table, re.MULTILINE)


def test_target_overrides_the_spec(spec_file: Path) -> None:
    assert answer("plan", spec_file, "--target", "sm_86")["plan"]["target"] == "sm_86"


def test_render(spec_file: Path) -> None:
    source = call("render", spec_file).stdout
    assert 'extern "C"' in source
    assert '#include "' in source
    standalone = call("render", spec_file, "--standalone").stdout
    assert 'extern "C"' in standalone
    assert '#include "' not in standalone


# -- run and bench -----------------------------------------------------------------------------------------


def test_run_on_the_cpu(spec_file: Path) -> None:
    outcome = answer("run", spec_file, "--device", "cpu")
    assert outcome["passed"]
    assert 0 < outcome["error"] <= outcome["tolerance"]
    assert outcome["batch"] == 1
    assert outcome["reduced"]
    text = call("run", spec_file, "--device", "cpu", "--seqlen", "100").stdout
    assert "seqlen 100" in text
    assert "smaller workload" in text
    assert text.endswith("passed\n")


@pytest.mark.parametrize("seqlen", [0, 1])
def test_run_on_the_shortest_lengths(spec_file: Path, seqlen: int) -> None:
    assert answer("run", spec_file, "--device", "cpu", "--seqlen", seqlen)["passed"]


def test_run_fails_where_the_error_is_too_large(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flashgen.runtime.reference")  # the package's attribute is the function
    monkeypatch.setattr(module, "tolerance", lambda expected, textbook: 1e-9)
    result = call("run", spec_file, "--device", "cpu", "--seqlen", 64)
    assert result.exit_code == 1
    assert result.stdout.endswith("failed: the error is too large\n")


def test_without_a_gpu_it_is_said(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments in (("run", spec_file, "--device", "cuda"), ("bench", spec_file)):
        result = call(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "NVIDIA GPU" in result.stderr
        assert "flashgen doctor" in result.stderr


def test_bench_refuses_an_unknown_peer(spec_file: Path) -> None:
    result = call("bench", spec_file, "--peers", "cudnn,fa9")
    assert result.exit_code == 2
    assert "fa9" in result.stderr


# -- what there is -----------------------------------------------------------------------------------------


def test_specs_lists_the_gallery() -> None:
    rows = answer("specs")
    assert [row["name"] for row in rows] == list(gallery())
    assert {"llama3-8b", "mistral-7b", "bert-large"} <= {row["name"] for row in rows}
    assert "llama3-8b" in call("specs").stdout


def test_targets() -> None:
    rows = answer("targets")
    assert [row["target"] for row in rows if row["default"]] == ["sm_90a"]
    assert "sm_90a (default)" in call("targets").stdout


def test_doctor_knows_what_is_installed() -> None:
    result = call("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["flashgen"]["detail"] == flashgen.__version__
    assert findings["torch"]["status"] == "ok"
    assert (result.exit_code == 1) == any(finding["status"] == "missing" for finding in findings.values())


def test_doctor_says_how_to_get_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    from flashgen.build import nvrtc

    nvrtc._loaded.cache_clear()
    try:
        result = call("doctor")
    finally:
        nvrtc._loaded.cache_clear()
    assert result.exit_code == 1
    assert "missing" in result.stdout
    assert "pip install 'flashgen[cuda13]'" in result.stdout


def test_cache_lists_and_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    assert answer("cache", "list") == {"folder": str(tmp_path / "cache"), "entries": []}
    entry = tmp_path / "cache" / ("ab" * 32)
    entry.mkdir()
    (entry / "manifest.json").write_text(json.dumps({"kernel": "attn_fwd", "target": "sm_80"}))
    assert [row["kernel"] for row in answer("cache", "list")["entries"]] == ["attn_fwd"]
    assert "attn_fwd" in call("cache").stdout
    assert answer("cache", "clear")["removed"] == 1
    assert not entry.exists()
