"""GPU memory outside of torch's allocator, for what lives longer than a call.

While torch.compile warms up for CUDA graphs (``mode="reduce-overhead"``), what torch allocates belongs to the
graphs, which reuse it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD_BYTES = 4  # of an int32


def zero_words(words: int, device: torch.device) -> int:
    """The address of int32 zeros that are never given back."""
    from cupy.cuda import Device, runtime

    with Device(device.index):
        address: int = runtime.malloc(words * WORD_BYTES)
        runtime.memset(address, 0, words * WORD_BYTES)
        runtime.deviceSynchronize()  # the zeros are written on one stream and read on many
    return address


def empty_words(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int32 tensor, not initialised. Its memory is freed with it, after all work on the GPU."""
    import cupy

    with cupy.cuda.Device(device.index):
        memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(math.prod(shape) * WORD_BYTES), 0)
        return torch.as_tensor(cupy.ndarray(shape, cupy.int32, memory), device=device)


__all__ = ["WORD_BYTES", "empty_words", "zero_words"]
