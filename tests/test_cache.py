"""The disk cache: what the key covers, several processes at once, damage, and who may write to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen.build import Cubin, Resources, artifact, cache
from flashgen.codegen import Source
from flashgen.errors import BuildError

SOURCE = Source("kernel", '#include "a.cuh"\n', {"a.cuh": "#pragma once\n"})
OPTIONS = ("-arch=sm_90a",)
COMPILER = "NVRTC 13.0.88"


def cubin(binary: bytes = b"\x7fELF binary") -> Cubin:
    resources = Resources(registers=100, spill_bytes=0, stack_bytes=0, smem_bytes=0, compile_s=0.5)
    manifest = artifact.describe(SOURCE, "sm_90a", OPTIONS, resources, COMPILER)
    return Cubin(binary, SOURCE, "sm_90a", resources, manifest)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(path))
    return path


def test_key_covers_all_that_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        cache.cache_key(SOURCE, OPTIONS, COMPILER),
        cache.cache_key(Source("kernel", SOURCE.text + " ", SOURCE.headers), OPTIONS, COMPILER),
        cache.cache_key(Source("other", SOURCE.text, SOURCE.headers), OPTIONS, COMPILER),
        cache.cache_key(Source("kernel", SOURCE.text, {"a.cuh": "#pragma once\n\n"}), OPTIONS, COMPILER),
        cache.cache_key(Source("kernel", SOURCE.text, {"b.cuh": "#pragma once\n"}), OPTIONS, COMPILER),
        cache.cache_key(SOURCE, ("-arch=sm_80",), COMPILER),
        cache.cache_key(SOURCE, OPTIONS, "NVRTC 13.1.0"),
    ]
    monkeypatch.setattr(cache, "__version__", "0.0.0")
    keys.append(cache.cache_key(SOURCE, OPTIONS, COMPILER))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert cache.cache_key(SOURCE, OPTIONS, COMPILER) == keys[0]


def test_entry_holds_source_headers_binary_and_manifest(folder: Path) -> None:
    published = cache.publish("0" * 64, cubin())
    found = cache.lookup("0" * 64)
    assert found == published
    assert found is not None and found.path is not None and found.path.read_bytes() == b"\x7fELF binary"
    assert sorted(file.name for file in (folder / ("0" * 64)).iterdir()) == [
        "a.cuh", "kernel.cu", "kernel.cubin", "manifest.json",
    ]  # fmt: skip
    assert cache.lookup("1" * 64) is None


def _publish(key: str, binary: bytes, start: object) -> bytes:
    start.wait()  # type: ignore[attr-defined]
    return cache.publish(key, cubin(binary)).binary


def test_processes_that_publish_at_once_end_with_one_whole_entry(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(4) as pool:
        start = manager.Barrier(4)
        binaries = [bytes([65 + index]) * 1_000_000 for index in range(4)]
        returned = pool.starmap(_publish, [("0" * 64, binary, start) for binary in binaries])
    found = cache.lookup("0" * 64)
    assert found is not None and set(returned) == {found.binary}
    assert [path.name for path in folder.iterdir()] == ["0" * 64]  # nothing pending is left


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated binary": lambda entry: (entry / "kernel.cubin").write_bytes(b"\x7fEL"),
    "changed binary": lambda entry: (entry / "kernel.cubin").write_bytes(b"\x7fELF binarz"),
    "missing binary": lambda entry: (entry / "kernel.cubin").unlink(),
    "changed header": lambda entry: (entry / "a.cuh").write_text("#define X\n"),
    "missing source": lambda entry: (entry / "kernel.cu").unlink(),
    "missing manifest": lambda entry: (entry / "manifest.json").unlink(),
    "empty manifest": lambda entry: (entry / "manifest.json").write_text(""),
    "manifest of another kind": lambda entry: (entry / "manifest.json").write_text("[]"),
    "file outside": lambda entry: (entry / "manifest.json").write_text(
        json.dumps({**json.loads((entry / "manifest.json").read_text()), "files": {"../../secret": "0"}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_entry_is_rebuilt_never_loaded(folder: Path, damage: Callable[[Path], object]) -> None:
    cache.publish("0" * 64, cubin())
    damage(folder / ("0" * 64))
    assert cache.lookup("0" * 64) is None
    assert cache.publish("0" * 64, cubin(b"new")).binary == b"new"
    found = cache.lookup("0" * 64)
    assert found is not None and found.binary == b"new"


def test_damaged_entry_does_not_win_against_a_new_one(folder: Path) -> None:
    cache.publish("0" * 64, cubin())
    (folder / ("0" * 64) / "kernel.cubin").write_bytes(b"")
    assert cache.publish("0" * 64, cubin(b"new")).binary == b"new"


def test_folder_is_made_private(folder: Path) -> None:
    assert cache.cache_dir() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    cache.publish("0" * 64, cubin())
    assert stat.S_IMODE((folder / ("0" * 64)).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_that_others_may_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(BuildError, match=f"others may write.*{mode:04o}") as error:
        cache.lookup("0" * 64)
    assert f"chmod 700 {folder}" in str(error.value)


def test_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(BuildError, match="belongs to user") as error:
        cache.cache_dir()
    assert "FLASHGEN_CACHE_DIR" in str(error.value)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="cannot be used"):
        cache.cache_dir()


def test_list_and_clear_leave_what_is_not_ours(folder: Path) -> None:
    cache.publish("0" * 64, cubin())
    cache.publish("f" * 64, cubin())
    (folder / ".pending-of-a-killed-process").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "photos").mkdir()
    listed = list(cache.entries())
    assert [(entry.key, entry.kernel, entry.target) for entry in listed] == [
        ("0" * 64, "kernel", "sm_90a"),
        ("f" * 64, "kernel", "sm_90a"),
    ]
    assert all(entry.size > 100 for entry in listed)
    assert cache.clear() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "photos"]


@pytest.mark.parametrize("name", ["../x.cuh", "/etc/x.cuh", "a/../../x.cuh", "a\\x.cuh", ""])
def test_artifact_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    source = Source("kernel", "", {name: ""})
    bad = Cubin(b"", source, "sm_90a", cubin().resources, cubin().manifest)
    with pytest.raises(ValueError, match="outside"):
        artifact.write(bad, tmp_path / "artifact")
