"""Arch records: self-checks that can fail, sources, and the lookup's suggestion."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from flashgen.arch import ARCHS, DEFAULT_TARGET, arch
from flashgen.errors import SpecError

H200 = ARCHS["sm_90a"]


def test_targets() -> None:
    assert set(ARCHS) == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"}
    assert DEFAULT_TARGET in ARCHS
    assert all(record.target == name for name, record in ARCHS.items())
    assert H200.tag == "sm90a"


def test_numbers_the_solver_leans_on() -> None:
    assert H200.smem_per_block == 232_448
    assert ARCHS["sm_80"].smem_per_block == 166_912
    assert ARCHS["sm_89"].smem_per_block == 101_376
    assert [name for name, record in ARCHS.items() if "wgmma" in record.features] == ["sm_90a"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"smem_per_block": 228 * 1024}, "must fit an SM"),
        ({"target": "sm_91"}, "target must be sm_90"),
        ({"sms": 0}, "positive"),
        ({"features": frozenset({"warp_drive"})}, "features"),
        ({"features": frozenset({"wgmma"})}, "descriptors"),
        ({"tensor_flops": {"bf16": 1e15}}, "tensor_flops must cover"),
        ({"mma_sync_fraction": 1.5}, "mma_sync_fraction"),
        ({"l2_bytes_per_s": 1e12}, "L2 must be faster"),
        ({"max_registers_per_thread": 256}, "8 bits"),
        ({"sources": {k: v for k, v in H200.sources.items() if k != "sms"}}, r"no source for \['sms'\]"),
        ({"sources": dict(H200.sources) | {"colour": "green"}}, "unknown fields"),
    ],
)
def test_a_contradicting_record_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(H200, **change)


def test_records_are_frozen_and_hashable() -> None:
    assert isinstance(H200.sources, MappingProxyType)
    assert len({*ARCHS.values()}) == 6


@pytest.mark.parametrize("wrong, right", [("sm_90", "sm_90a"), ("sm89", "sm_89"), ("sm_120", "sm_120a")])
def test_did_you_mean(wrong: str, right: str) -> None:
    with pytest.raises(SpecError, match=f"did you mean {right}") as error:
        arch(wrong)
    assert error.value.exit_code == 2


def test_arch_finds_every_record() -> None:
    assert all(arch(name) is record for name, record in ARCHS.items())
