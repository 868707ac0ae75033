"""What persistent blocks agree by: counters that they draw tiles from, flags of what they share, notes."""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch

from flashgen.errors import LaunchError
from flashgen.runtime.memory import WORD_BYTES, zero_words

_COUNTERS = 1024
_COUNTER_SPACING = 32  # in int32: one counter to a cache line
_WORKSPACES = 64  # of 64 KiB: notes of 16384 tiles and warpgroups
WORKSPACE_WORDS = 1 << 14


class TileCounters:
    """The int32 counters from which persistent blocks draw their tiles, or `words` flags in the place of
    each: zero before a launch, left at zero by it.

    Launches on one stream follow one another and share a counter. A captured launch gets one of its own: its
    graph may be replayed on any stream. Counters of graphs are not taken back; when all are out, a captured
    launch gets a tensor from the graph's own memory, which the graph clears at each replay.
    """

    def __init__(self, device: torch.device, words: int = 1) -> None:
        self._words = -(-words // _COUNTER_SPACING) * _COUNTER_SPACING
        step = self._words * WORD_BYTES
        first = zero_words(_COUNTERS * self._words, device)
        self._free = iter(range(first, first + _COUNTERS * step, step))
        self._of_stream: dict[int, int] = {}
        self._device = device
        self._capturing = torch._C._cuda_isCurrentStreamCapturing
        self._lock = Lock()

    def address(self, stream: int) -> int:
        if self._capturing():
            with self._lock:
                address = next(self._free, None)
            return address or self._cleared_by_graph()
        address = self._of_stream.get(stream)
        if address is None:
            with self._lock:
                address = next(self._free, None)
            if address is None:
                raise LaunchError(f"more than {_COUNTERS} streams and captured launches on {self._device}")
            self._of_stream[stream] = address
        return address

    def _cleared_by_graph(self) -> int:
        # Freed at once: within the graph, what reuses the memory comes after the launch on the same stream.
        return torch.zeros(self._words, dtype=torch.int32, device=self._device).data_ptr()


class Workspaces:
    """`WORKSPACE_WORDS` words for each of some streams, not initialised, which a call need not allocate.

    Launches on one stream follow one another and share them.
    """

    def __init__(self, device: torch.device) -> None:
        step = WORKSPACE_WORDS * WORD_BYTES
        first = zero_words(_WORKSPACES * WORKSPACE_WORDS, device)
        self._free = iter(range(first, first + _WORKSPACES * step, step))
        self._of_stream: dict[int, int | None] = {}
        self._capturing = torch._C._cuda_isCurrentStreamCapturing
        self._lock = Lock()

    def address(self, stream: int) -> int | None:
        """None while a graph is captured, which may be replayed on any stream, and once all are out."""
        if self._capturing():
            return None
        if stream not in self._of_stream:
            with self._lock:
                if stream not in self._of_stream:
                    self._of_stream[stream] = next(self._free, None)
        return self._of_stream[stream]


@cache
def workspaces(device: torch.device) -> Workspaces:
    """The workspaces of a GPU; made with the first kernel that is loaded there and needs one."""
    return Workspaces(device)


@cache
def tile_counters(device: torch.device, words: int = 1) -> TileCounters:
    """The counters of a GPU; made with the first kernel that is loaded there and needs such."""
    return TileCounters(device, words)


__all__ = ["WORKSPACE_WORDS", "TileCounters", "Workspaces", "tile_counters", "workspaces"]
