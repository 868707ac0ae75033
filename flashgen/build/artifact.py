"""A built kernel as a folder: ``<kernel>.cu``, its headers, ``<kernel>.cubin`` and ``manifest.json``.

The disk cache and ``flashgen build --out`` write the same layout, so that either can be read, compiled by
hand with ``nvcc``, or loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from flashgen.build.resources import Resources
from flashgen.codegen import Source

MANIFEST = "manifest.json"


class DamagedArtifactError(Exception):
    """A folder does not hold what its manifest says. The cache rebuilds on it; it never reaches a user."""


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel and where it came from."""

    binary: bytes
    source: Source
    target: str  # "sm_90a"
    resources: Resources
    manifest: Mapping[
        str, Any
    ]  # JSON: versions, options, hashes, resources, and the plan where there was one
    path: Path | None = None  # the .cubin on disk, once it lies there

    @property
    def kernel(self) -> str:
        """The ``extern "C"`` entry point."""
        return self.source.name


def digest(data: bytes | str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def contents(cubin: Cubin) -> dict[str, bytes]:
    """The files of an artifact without its manifest, by name."""
    files = {f"{cubin.kernel}.cu": cubin.source.text.encode(), f"{cubin.kernel}.cubin": cubin.binary}
    return files | {name: text.encode() for name, text in cubin.source.headers.items()}


def write(cubin: Cubin, folder: Path, extra: Mapping[str, Any] | None = None) -> Cubin:
    """Write the artifact into `folder`, each file atomically, the manifest last; return the cubin with its
    path.

    `extra` joins the manifest (``flashgen build`` puts the spec and the predicted bytes there).
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = contents(cubin)
    manifest = {
        **cubin.manifest,
        **(extra or {}),
        "files": {name: digest(data) for name, data in sorted(files.items())},
    }
    for name, data in files.items():
        _write_file(folder / _inside(name), data)
    _write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return replace(cubin, manifest=manifest, path=folder / f"{cubin.kernel}.cubin")


def read(folder: Path) -> Cubin:
    """Read an artifact back. Raises `DamagedArtifactError`: a file is missing or differs from its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {name: (folder / _inside(name)).read_bytes() for name in manifest["files"]}
        for name, data in files.items():
            if digest(data) != manifest["files"][name]:
                raise DamagedArtifactError(f"{folder / name} differs from its hash in {MANIFEST}")
        kernel = manifest["kernel"]
        binary, text = files.pop(f"{kernel}.cubin"), files.pop(f"{kernel}.cu")
        headers = {name: data.decode() for name, data in files.items()}
        return Cubin(
            binary=binary,
            source=Source(name=kernel, text=text.decode(), headers=headers),
            target=manifest["target"],
            resources=Resources(**manifest["resources"]),
            manifest=manifest,
            path=folder / f"{kernel}.cubin",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifactError(f"{folder}: {error!r}") from error


def describe(
    source: Source, target: str, options: tuple[str, ...], resources: Resources, compiler: str
) -> dict[str, Any]:
    """The part of a manifest that every artifact has."""
    from flashgen._version import __version__

    return {
        "flashgen": __version__,
        "compiler": compiler,
        "kernel": source.name,
        "target": target,
        "options": list(options),
        "resources": asdict(resources),
    }


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
        raise ValueError(f"{name!r} would lie outside the artifact's folder")
    return name


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        temporary.write(data)
    os.chmod(temporary.name, 0o644)  # as an ordinary file: the folder decides who may read it
    os.replace(temporary.name, path)


__all__ = ["MANIFEST", "Cubin", "DamagedArtifactError", "contents", "describe", "digest", "read", "write"]
