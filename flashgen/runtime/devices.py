"""Which target a GPU runs."""

from __future__ import annotations

import torch

from flashgen.arch import ARCHS, DEFAULT_TARGET, Arch
from flashgen.errors import LaunchError


def runs(arch: Arch, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs binaries of `arch`.

    Binaries run on later minor versions of the same major one; those of an "a" target on that exact version
    only (CUDA C++ Programming Guide, "Binary Compatibility" and "Architecture-Specific Features").
    """
    if arch.target.endswith("a"):
        return arch.capability == capability
    return arch.capability[0] == capability[0] and arch.capability[1] <= capability[1]


def target_of(device: torch.device) -> str:
    """The target to build for `device`. Raises `LaunchError` for a GPU that flashgen has no record of."""
    capability = torch.cuda.get_device_capability(device)
    fitting = [arch for arch in ARCHS.values() if runs(arch, capability)]
    if not fitting:
        raise LaunchError(
            f"flashgen has no target for {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]})",
            hint=f"known targets: {', '.join(ARCHS)}; a GPU is one record in flashgen/arch",
        )
    return max(fitting, key=lambda arch: arch.capability).target


def default_target() -> str:
    """The current GPU's target; without a GPU, the default one."""
    if not torch.cuda.is_available():
        return DEFAULT_TARGET
    return target_of(torch.device("cuda", torch.cuda.current_device()))


__all__ = ["default_target", "runs", "target_of"]
