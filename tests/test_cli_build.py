"""`flashgen build`: what it writes, what --check finds, what a hostile spec or folder cannot make it do."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flashgen.cli import main

pytestmark = pytest.mark.compiler

SPEC = """\
flashgen: 1
name: {name}
attention: {{heads: 2, head_dim: 32, mask: full}}
passes: [forward]
workload: {{batch: 1, seqlen: 128}}
tiles: {{q: 32, kv: 16, stages: 2, warps: 2}}
target: sm_80
"""
KERNEL = "attn_fwd_full_bf16_d32_sm80"


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    return write_spec(tmp_path, "tiny")


def write_spec(folder: Path, name: str) -> Path:
    path = folder / f"{Path(name).name}.yaml"
    path.write_text(SPEC.format(name=name))
    return path


def build(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["build", *map(str, arguments)])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what is written ---------------------------------------------------------------------------------------


def test_writes_source_cubin_and_manifest(spec_file: Path, tmp_path: Path) -> None:
    result = build(spec_file, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    folder = tmp_path / "out" / "tiny"
    assert report["folder"] == str(folder)
    assert report["kernel"] == KERNEL
    assert report["spill_bytes"] == 0
    assert 'extern "C"' in (folder / f"{KERNEL}.cu").read_text()
    assert (folder / f"{KERNEL}.cubin").read_bytes()[:4] == b"\x7fELF"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["spec"]["name"] == manifest["plan"]["spec"] == "tiny"
    assert manifest["plan"]["tile_q"] == 32
    assert manifest["resources"]["smem_bytes"] == manifest["plan"]["smem_bytes"]
    assert manifest["bytes"]["standard"]["bytes"] > manifest["bytes"]["compulsory"]["bytes"]
    assert {f"{KERNEL}.cu", f"{KERNEL}.cubin"} <= manifest["files"].keys()
    assert "V1" in manifest["compiler"]


def test_the_folder_can_be_loaded(spec_file: Path, tmp_path: Path) -> None:
    from flashgen.build import artifact

    build(spec_file, "--out", tmp_path / "out")
    assert artifact.read(tmp_path / "out" / "tiny").kernel == KERNEL


def test_is_the_same_on_every_machine(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(spec_file, "--out", tmp_path / "here")
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cold"))  # compiled anew, in other time
    build(spec_file, "--out", tmp_path / "there")
    here, there = snapshot(tmp_path / "here"), snapshot(tmp_path / "there")
    text = here["tiny/manifest.json"].decode()
    for files in (here, there):  # names in the cubin hold the compiling process's id and the time
        binary = files.pop(f"tiny/{KERNEL}.cubin")
        digest = hashlib.sha256(binary).hexdigest().encode()
        files["tiny/manifest.json"] = files["tiny/manifest.json"].replace(digest, b"")
    assert here == there
    assert str(tmp_path) not in text
    assert os.path.expanduser("~") not in text
    assert "site-packages" not in text


def test_another_spec_with_the_same_kernel_gets_its_own_manifest(tmp_path: Path) -> None:
    first, second = write_spec(tmp_path, "first"), write_spec(tmp_path, "second")
    for path in (first, second):  # the second finds the first's kernel in the cache
        assert build(path, "--out", tmp_path / "out").exit_code == 0
    manifest = json.loads((tmp_path / "out" / "second" / "manifest.json").read_text())
    assert manifest["plan"]["spec"] == manifest["name"] == "second"


def test_a_kernel_of_another_name_is_replaced(spec_file: Path, tmp_path: Path) -> None:
    build(spec_file, "--out", tmp_path / "out")
    spec_file.write_text(spec_file.read_text().replace("mask: full", "mask: causal"))
    assert build(spec_file, "--out", tmp_path / "out").exit_code == 0
    sources = [path.name for path in (tmp_path / "out" / "tiny").glob("*.cu*") if path.suffix != ".cuh"]
    assert sorted(sources) == ["attn_fwd_causal_bf16_d32_sm80.cu", "attn_fwd_causal_bf16_d32_sm80.cubin"]


def test_several_specs_build_in_processes_of_their_own(tmp_path: Path) -> None:
    files = [write_spec(tmp_path, name) for name in ("one", "two")]
    result = build(*files, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert [report["name"] for report in json.loads(result.stdout)] == ["one", "two"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one", "two"}


def test_nothing_is_built_before_every_spec_is_right(spec_file: Path, tmp_path: Path) -> None:
    wrong = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in wrong:
        path.write_text("flashgen: 2\n")
    result = build(spec_file, *wrong, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert all(f"error: {path}:" in result.stderr for path in wrong)
    assert not (tmp_path / "out").exists()


def test_one_name_twice_is_refused(spec_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(spec_file.read_text())
    result = build(spec_file, other, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"error: {other}:2:" in result.stderr


# -- --check -----------------------------------------------------------------------------------------------


def test_check_passes_on_what_build_wrote(spec_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(spec_file, "--out", out)
    for path in (out / "tiny").iterdir():
        if path.suffix in (".cubin", ".cuh"):
            path.unlink()  # not committed
    before = snapshot(out)
    result = build(spec_file, "--out", out, "--check")
    assert result.exit_code == 0, result.output
    assert snapshot(out) == before


def test_check_fails_on_nothing(spec_file: Path, tmp_path: Path) -> None:
    result = build(spec_file, "--out", tmp_path / "out", "--check")
    assert result.exit_code == 1
    assert "manifest.json: missing" in result.stderr
    assert not (tmp_path / "out").exists()


def test_check_shows_what_differs(spec_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny"
    build(spec_file, "--out", tmp_path / "out")
    source, manifest = folder / f"{KERNEL}.cu", folder / "manifest.json"
    source.write_text(source.read_text().replace("kTileKv = 16", "kTileKv = 24"))
    manifest.write_text(manifest.read_text().replace('"tile_q": 32', '"tile_q": 64'))
    before = snapshot(folder)
    result = build(spec_file, "--out", tmp_path / "out", "--check")
    assert result.exit_code == 1
    assert f"{source}: differs (+1 -1 lines)" in result.stderr
    assert "kTileKv = 24" in result.stderr
    assert '"tile_q": 64' in result.stderr
    assert snapshot(folder) == before


def test_check_compares_registers_under_one_compiler_only(spec_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "tiny" / "manifest.json"
    build(spec_file, "--out", tmp_path / "out")
    manifest = json.loads(path.read_text())
    manifest["resources"]["registers"] += 1
    path.write_text(json.dumps(manifest))
    assert build(spec_file, "--out", tmp_path / "out", "--check").exit_code == 1
    manifest["compiler"] = "another"
    path.write_text(json.dumps(manifest))
    assert build(spec_file, "--out", tmp_path / "out", "--check").exit_code == 0


# -- hostile input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../evil", "/tmp/evil", "..", ".", "a/b", "a\\b", '"evil\\n"', '"\\0"', "'\"); system(\"'", "~root"],
)
def test_a_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.format(name=name))
    result = build(path, "--out", tmp_path / "a" / "out")
    assert result.exit_code == 2
    assert f"error: {path}:2:" in result.stderr
    assert snapshot(tmp_path) == {"spec.yaml": path.read_bytes()}


def test_a_linked_folder_is_not_followed(spec_file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny").symlink_to(elsewhere)
    result = build(spec_file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "is a link" in result.stderr
    assert list(elsewhere.iterdir()) == []


def test_a_linked_file_is_replaced_and_not_written_through(spec_file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    (folder / f"{KERNEL}.cu").symlink_to(victim)
    assert build(spec_file, "--out", tmp_path / "out").exit_code == 0
    assert victim.read_text() == "untouched"
    assert not (folder / f"{KERNEL}.cu").is_symlink()


@pytest.mark.parametrize("content", ['{"name": "my-package"}', "[1]", "not json"])
def test_somebody_elses_manifest_is_left_alone(spec_file: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    result = build(spec_file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "was not written by flashgen" in result.stderr
    assert snapshot(folder) == {"manifest.json": content.encode()}


def test_an_old_manifest_cannot_name_files_elsewhere(spec_file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.cu"
    victim.write_text("untouched")
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    files = {"../../victim.cu": "", str(victim): "", "..": ""}
    (folder / "manifest.json").write_text(json.dumps({"flashgen": "0", "files": files}))
    assert build(spec_file, "--out", tmp_path / "out").exit_code == 0
    assert victim.read_text() == "untouched"
