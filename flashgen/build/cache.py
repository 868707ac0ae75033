"""The disk cache of compiled kernels.

One folder per key, in the layout of `artifact`. An entry is written beside its place and renamed into it, so
that a reader sees a whole entry or none; of several processes that build the same kernel, the first to rename
wins and the others drop theirs. An entry that does not match its hashes is moved away and rebuilt. A cubin is
code that will run with the user's rights, so the folder must be writable by nobody else.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from flashgen._version import __version__
from flashgen.build import artifact
from flashgen.build.artifact import Cubin, DamagedArtifactError, digest
from flashgen.codegen import Source
from flashgen.errors import BuildError

COMPILER_PREFIX = "compiler-"  # of the files in which `compiler` remembers who compiles
_PENDING = ".pending-"  # being written, or being removed
_ATTEMPTS = 8  # each loss means that another process published or removed the same entry meanwhile


@dataclass(frozen=True)
class Entry:
    """One cached kernel."""

    key: str
    kernel: str
    target: str
    size: int  # bytes, all files
    created: float  # seconds since the epoch
    path: Path


def cache_dir() -> Path:
    """The cache folder, made on first use with mode 0700: ``$FLASHGEN_CACHE_DIR``, or the platform's cache
    directory.

    Raises `BuildError` when it belongs to somebody else, when others may write to it, or when it cannot be
    made.
    """
    chosen = os.environ.get("FLASHGEN_CACHE_DIR")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("flashgen"))
    mend = "set FLASHGEN_CACHE_DIR to a folder of your own"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be used: {error.strerror}", hint=mend) from None
    if hasattr(os, "getuid"):  # Windows keeps per-user folders private by itself
        if status.st_uid != os.getuid():
            raise BuildError(
                f"the cache folder {folder} belongs to user {status.st_uid}, not to you", hint=mend
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BuildError(
                f"others may write to the cache folder {folder} (mode {stat.S_IMODE(status.st_mode):04o}); "
                "what lies there would run with your rights",
                hint=f"{mend}, or: chmod 700 {folder}",
            )
    return folder


def cache_key(source: Source, options: tuple[str, ...], compiler: str) -> str:
    """A hash of everything that the binary depends on."""
    parts = [__version__, compiler, options, source.name, source.text, sorted(source.headers.items())]
    return digest(json.dumps(parts))


def lookup(key: str) -> Cubin | None:
    """The entry under `key`, or `None` where there is none or it is damaged; a damaged one is moved out of
    the way.
    """
    folder = cache_dir() / key
    if not folder.is_dir():
        return None
    try:
        return artifact.read(folder)
    except DamagedArtifactError:
        _remove(folder)
        return None


def publish(key: str, cubin: Cubin) -> Cubin:
    """Put `cubin` under `key`, and return what lies there now: ours, or that of a process that was faster."""
    root = cache_dir()
    pending = root / f"{_PENDING}{uuid.uuid4().hex}"
    try:
        pending.mkdir(mode=0o700)
        written = artifact.write(cubin, pending)
        for attempt in range(_ATTEMPTS):
            try:
                os.rename(pending, root / key)
                return replace(written, path=root / key / f"{cubin.kernel}.cubin")
            except OSError:  # taken; the error's number differs between systems
                if winner := lookup(key):
                    return winner
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")
    except OSError as error:
        raise BuildError(
            f"the cache folder {root} cannot be written to: {error.strerror}",
            hint="set FLASHGEN_CACHE_DIR to a folder of your own",
        ) from None
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def entries() -> Iterator[Entry]:
    """What the cache holds; entries that cannot be read are left out."""
    for folder in sorted(cache_dir().iterdir()):
        if folder.name.startswith(_PENDING) or not folder.is_dir():
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((folder / artifact.MANIFEST).read_bytes())
            files = [file.stat() for file in folder.rglob("*") if file.is_file()]
            yield Entry(
                key=folder.name,
                kernel=manifest["kernel"],
                target=manifest["target"],
                size=sum(file.st_size for file in files),
                created=folder.stat().st_mtime,
                path=folder,
            )


def clear() -> int:
    """Remove every entry, what is remembered of compilers, and what interrupted processes left; returns how
    many entries there were.

    Only what looks like ours is touched: FLASHGEN_CACHE_DIR may name a folder that holds other things.
    """
    removed = 0
    for folder in list(cache_dir().iterdir()):
        if folder.name.startswith(_PENDING):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name.startswith((COMPILER_PREFIX, f".{COMPILER_PREFIX}")) and ".json" in folder.name:
            folder.unlink(missing_ok=True)
        elif len(folder.name) == 64 and (folder.is_dir() and set(folder.name) <= set("0123456789abcdef")):
            _remove(folder)
            removed += 1
    return removed


def _remove(folder: Path) -> None:
    # Renamed first: no other process may find half an entry.
    condemned = folder.parent / f"{_PENDING}{uuid.uuid4().hex}"
    with suppress(OSError):
        os.rename(folder, condemned)
        shutil.rmtree(condemned, ignore_errors=True)


__all__ = ["COMPILER_PREFIX", "Entry", "cache_dir", "cache_key", "clear", "entries", "lookup", "publish"]
