"""The parts of a cubin, an ELF file, that the build looks at: where it ends, and what its kernel takes.

The layout is that of "System V ABI, chapter 4"; the sections ``.nv.*`` and their attributes are NVIDIA's, as
``cuobjdump --dump-elf`` prints them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from flashgen.build.resources import Resources
from flashgen.errors import BuildError

_IDENTITY = 16  # bytes: magic number, class, byte order, ABI
_HEADER = struct.Struct("<HHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL_BYTES = 24
_SYMBOLS = 2  # SHT_SYMTAB
_RESERVED_SHARED = 1024  # bytes of the system's, which since sm_90 come before a kernel's own

_WITH_SIZE = 4  # EIFMT_SVAL: an attribute whose value is as long as its header says
_FRAME_SIZE, _REGISTER_COUNT = 0x11, 0x2F  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT: (symbol, number)


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def whole(image: bytes) -> bytes:
    """`image` to its last byte: CuPy's `getCUBIN` takes the last one for the end of a string, and drops it.

    What ends a cubin is a table of headers, whose last byte is the highest one of a 64-bit alignment: zero.
    Raises `BuildError` for what is no ELF file, or lacks more than that byte.
    """
    missing = _end(image) - len(image) if _is_elf(image) else _HEADER.size
    if missing > 1:
        raise BuildError(f"the compiler's binary of {len(image):,} B is incomplete")
    return image + bytes(max(missing, 0))


def resources(image: bytes, kernel: str, *, dynamic_smem: int, compile_s: float) -> Resources:
    """What `kernel` takes, by the attributes of the cubin that holds it.

    For compilers that give no report. Spilled registers cannot be told from other local memory there: they
    are counted as `stack_bytes`. Raises `BuildError` when there is no such kernel.
    """
    sections = list(_sections(image))
    symbols = next((section for section in sections if section.kind == _SYMBOLS), None)
    if symbols is None or f".text.{kernel}" not in {section.name for section in sections}:
        raise BuildError(f"the compiled source has no entry function '{kernel}'")
    names = _bytes(image, sections[symbols.link])
    registers = stack = 0
    for section in sections:
        if section.name != ".nv.info":
            continue
        for attribute, value in _attributes(_bytes(image, section)):
            if attribute not in (_FRAME_SIZE, _REGISTER_COUNT):
                continue
            index, number = struct.unpack("<II", value)
            name_at = struct.unpack_from("<I", image, symbols.offset + index * _SYMBOL_BYTES)[0]
            if attribute == _FRAME_SIZE:
                stack = max(stack, number)
            elif _text(names, name_at) == kernel:
                registers = number
    shared = {section.name: section.size for section in sections if section.name.startswith(".nv.shared.")}
    static = shared.get(f".nv.shared.{kernel}", 0)
    if static and ".nv.shared.reserved.0" in shared:
        static -= _RESERVED_SHARED
    return Resources(registers, 0, stack, static + dynamic_smem, compile_s)


def _is_elf(image: bytes) -> bool:
    return len(image) >= _IDENTITY + _HEADER.size and image.startswith(b"\x7fELF\x02\x01")  # 64 bits, little


def _end(image: bytes) -> int:
    """Where the last of the sections and tables ends that the header tells of."""
    _, _, _, _, segments_at, sections_at, *_, segment_bytes, segments, section_bytes, count, _ = (
        _HEADER.unpack_from(image, _IDENTITY)
    )
    return int(max(segments_at + segment_bytes * segments, sections_at + section_bytes * count))


def _sections(image: bytes) -> Iterator[_Section]:
    header = _HEADER.unpack_from(image, _IDENTITY)
    table, count, names_index = header[5], header[-2], header[-1]
    raw = [_SECTION.unpack_from(image, table + index * _SECTION.size) for index in range(count)]
    names_at, names_size = raw[names_index][4:6]
    names = image[names_at : names_at + names_size]
    for name, kind, _, _, offset, size, link, *_ in raw:
        yield _Section(_text(names, name), kind, offset, size, link)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes that have a value of their own length."""
    at = 0
    while at + 4 <= len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _WITH_SIZE:
            yield attribute, data[at : at + size]
            at += size


def _bytes(image: bytes, section: _Section) -> bytes:
    return image[section.offset : section.offset + section.size]


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(0, at)].decode()


__all__ = ["resources", "whole"]
