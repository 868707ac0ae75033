"""A cubin on one GPU: loaded once, then launched on torch's current stream with as little host work as Python
allows.

A `Launch` belongs to one set of shapes, strides and dtypes. What can be decided from those is decided when it
is prepared; a call allocates the outputs, writes the addresses into the ready struct and calls
``cuLaunchKernel``. Nothing synchronises, so calls can be captured in CUDA graphs.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from flashgen.build import Cubin
from flashgen.errors import LaunchError
from flashgen.plan.model import KernelPlan
from flashgen.runtime.arguments import check_scale
from flashgen.runtime.parameters import Parameters, Shapes, parameters

try:  # what Inductor's own code allocates with: a third of the host time of torch.empty
    from torch._C._dynamo.guards import _empty_strided_cuda as empty_strided  # type: ignore[attr-defined]
except ImportError:

    def empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the current GPU."""
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


Outputs = tuple[Tensor, Tensor | None]
# q, k, v, scale, return_lse -> o, lse
Run = Callable[[Tensor, Tensor, Tensor, float | None, bool], Outputs]

_ALIGNMENT = 16  # bytes that one copy instruction moves, and what TMA asks of addresses and strides
LAUNCHES_MAX = 4096  # shapes remembered by one kernel; then all are forgotten: preparing takes microseconds

_GRID_MAX = 2**31 - 1
_NO_CONTEXT = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, .._HANDLE: this thread may not have used the GPU yet
_COUNTERS = 1024
_COUNTER_SPACING = 32  # in int32: one counter to a cache line


class LoadedKernel:
    """A cubin loaded onto one GPU.

    Raises `LaunchError` where the driver refuses the binary, and during a CUDA graph capture, which forbids
    loading.
    """

    def __init__(self, plan: KernelPlan, cubin: Cubin, device: torch.device) -> None:
        import cupy
        from cupy.cuda import driver

        if torch.cuda.is_current_stream_capturing():
            raise LaunchError(
                f"{plan.kernel} is not loaded on {device} yet, and a CUDA graph is being captured",
                hint="call it once before the capture, as for other kernels",
            )
        self.plan = plan
        self.device = device
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.launch_kernel = driver.launchKernel
        self.driver_error = driver.CUDADriverError
        self._counters = tile_counters(device) if plan.family == "sm90" else None
        with torch.cuda.device(device):
            try:
                self._module, kernel = _load(cupy, cubin)
                kernel.max_dynamic_shared_size_bytes = plan.smem_bytes
                # Leave the L1 cache no more than it must have: K and V are read through shared memory alone.
                kernel.preferred_shared_memory_carveout = 100
                self.function = kernel.kernel.ptr
            except driver.CUDADriverError as error:
                name = torch.cuda.get_device_name(device)
                raise LaunchError(
                    f"the driver refuses {plan.kernel} on {device} ({name}): {error}",
                    hint="`flashgen doctor` compares the driver with the CUDA that compiled the kernel",
                ) from None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, again: Run) -> Run:
        """A launch for tensors like these, which have been checked; `again` is called with copies where one
        is needed.
        """
        batch, seqlen_q, heads_q, _ = q.shape
        shape = (batch, seqlen_q, heads_q, self.plan.head_dim_v)
        if 0 in shape or k.shape[1] == 0:
            return _without_keys(shape)
        copies = tuple(not _taken_as_is(tensor, self.plan) for tensor in (q, k, v))
        if any(copies):
            return _with_copies(copies, again)
        return Launch(self, q, k, v, again)

    def make_current(self) -> None:
        """Make the GPU's context current to this thread."""
        from cupy.cuda import runtime

        runtime.setDevice(self.device.index)

    @property
    def counter(self) -> Callable[[int], int]:
        """From a stream to the address of a tile counter that nothing else uses while a launch on it does."""
        assert self._counters is not None
        return self._counters.address


class Launch:
    """One kernel at one set of shapes and strides."""

    def __init__(self, loaded: LoadedKernel, q: Tensor, k: Tensor, v: Tensor, again: Run) -> None:
        plan = loaded.plan
        batch, seqlen_q, heads_q, _ = q.shape
        o_shape = (batch, seqlen_q, heads_q, plan.head_dim_v)
        lse_shape = (batch, heads_q, seqlen_q)
        o_stride = (seqlen_q * heads_q * plan.head_dim_v, heads_q * plan.head_dim_v, plan.head_dim_v)
        shapes = Shapes(
            q=q.shape,
            k=k.shape,
            v=v.shape,
            o=o_shape,
            q_stride=q.stride()[:3],
            k_stride=k.stride()[:3],
            v_stride=v.stride()[:3],
            o_stride=o_stride,
        )
        prepared = parameters(plan, shapes, loaded.sms)
        if prepared.grid > _GRID_MAX:
            raise LaunchError(
                f"{plan.kernel}: {prepared.grid:,} thread blocks; a grid holds {_GRID_MAX:,}",
                hint="split the batch",
            )
        self._again = again
        self._index = q.get_device()
        self._scale = plan.scale
        self._o = (o_shape, (*o_stride, 1), q.dtype)
        self._lse = (lse_shape, (heads_q * seqlen_q, seqlen_q, 1), torch.float32)
        # The private call behind torch.cuda.current_device(), at a tenth of its cost.
        self._current_device = torch._C._cuda_getDevice
        # cuLaunchKernel takes an array of pointers to parameters; there is one.
        self._arguments = (ctypes.c_void_p * 1)(prepared.address)
        self._enqueue = _enqueuer(loaded, prepared, ctypes.addressof(self._arguments), self._index)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool) -> Outputs:
        q_data, k_data, v_data = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (q_data | k_data | v_data) % _ALIGNMENT:
            copies = tuple(bool(data % _ALIGNMENT) for data in (q_data, k_data, v_data))
            return _with_copies(copies, self._again)(q, k, v, scale, return_lse)
        # New tensors come on the current GPU, and cuLaunchKernel wants the function's own to be that.
        if self._current_device() != self._index:
            with torch.cuda.device(self._index):
                return self(q, k, v, scale, return_lse)
        if scale is None:
            scale = self._scale
        else:
            check_scale(scale)
        o = empty_strided(*self._o)
        if return_lse:
            lse = empty_strided(*self._lse)
            self._enqueue(q_data, k_data, v_data, o.data_ptr(), lse.data_ptr(), scale, None)
            return o, lse
        self._enqueue(q_data, k_data, v_data, o.data_ptr(), 0, scale, None)
        return o, None

    def write(
        self,
        q: int,
        k: int,
        v: int,
        o: Tensor,
        lse: Tensor | None,
        scale: float,
        *,
        counter: int | None = None,
    ) -> None:
        """Launch into given outputs, contiguous and of the shapes that a call would allocate.

        `counter` is the address of an int32 zero that no other launch uses meanwhile; None takes one of the
        GPU's.
        """
        with torch.cuda.device(self._index):
            self._enqueue(q, k, v, o.data_ptr(), 0 if lse is None else lse.data_ptr(), scale, counter)


Enqueue = Callable[[int, int, int, int, int, float, int | None], None]  # q, k, v, o, lse, scale, counter


def _enqueuer(loaded: LoadedKernel, prepared: Parameters, arguments: int, index: int) -> Enqueue:
    """A function that launches at the addresses that it is given, on the current stream of GPU `index`.

    A closure: reading what it holds costs less than reading attributes.
    """
    plan, grid = loaded.plan, prepared.grid
    function, threads, smem = loaded.function, plan.threads, plan.smem_bytes
    launch_kernel, driver_error = loaded.launch_kernel, loaded.driver_error
    point_at = prepared.point_at
    free_counter = loaded.counter if prepared.needs_counter else None
    # The private call behind torch.cuda.current_stream(), at a tenth of its cost.
    current_stream = torch._C._cuda_getCurrentRawStream
    # The driver reads the struct during the launch; a second thread must not write to it meanwhile.
    lock = Lock()

    def enqueue(q: int, k: int, v: int, o: int, lse: int, scale: float, counter: int | None) -> None:
        stream = current_stream(index)
        if counter is None:
            counter = free_counter(stream) if free_counter else 0
        with lock:
            point_at(q, k, v, o, lse, counter, scale)
            try:
                launch_kernel(function, grid, 1, 1, threads, 1, 1, smem, stream, arguments, 0)
            except driver_error as error:
                if error.status not in _NO_CONTEXT:
                    raise refused(error) from None
                # A fresh thread has no context until a runtime call makes one current; torch's allocator,
                # served from its cache, makes none.
                loaded.make_current()
                try:
                    launch_kernel(function, grid, 1, 1, threads, 1, 1, smem, stream, arguments, 0)
                except driver_error as second:
                    raise refused(second) from None

    def refused(error: Exception) -> LaunchError:
        return LaunchError(f"{plan.kernel} on {loaded.device}: {error}")

    return enqueue


class TileCounters:
    """The int32 counters from which persistent blocks draw their tiles: zero before a launch, left at zero by
    it.

    Launches on one stream follow one another and share a counter. A captured launch gets one of its own: its
    graph may be replayed on any stream. Counters of graphs are not taken back; when all are out, a captured
    launch gets a tensor from the graph's own memory, which the graph clears at each replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(_COUNTERS * _COUNTER_SPACING, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # the zeros are written on one stream and read on many
        self._free = iter(range(self._counters.data_ptr(), *self._end()))
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
        return torch.zeros(1, dtype=torch.int32, device=self._device).data_ptr()

    def _end(self) -> tuple[int, int]:
        size = self._counters.element_size()
        return self._counters.data_ptr() + self._counters.numel() * size, _COUNTER_SPACING * size


@cache
def tile_counters(device: torch.device) -> TileCounters:
    """The counters of a GPU; made with the first kernel that is loaded there."""
    return TileCounters(device)


def _load(cupy: Any, cubin: Cubin) -> tuple[Any, Any]:
    if cubin.path is not None and cubin.path.is_file():
        module = cupy.RawModule(path=os.fspath(cubin.path))
        return module, module.get_function(cubin.kernel)
    # Built without the cache, or cleared from it since.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{cubin.kernel}.cubin")
        with open(path, "wb") as file:
            file.write(cubin.binary)
        module = cupy.RawModule(path=path)
        return module, module.get_function(cubin.kernel)


def _taken_as_is(tensor: Tensor, plan: KernelPlan) -> bool:
    """Whether the kernel can read this layout: head_dim contiguous, rows that start at 16 bytes.

    TMA cannot step by zero, so an expanded tensor is copied for the sm90 family.
    """
    *outer, last = tensor.stride()
    steps = [stride for stride, length in zip(outer, tensor.shape[:3], strict=True) if length > 1]
    aligned = all(stride * tensor.element_size() % _ALIGNMENT == 0 for stride in steps)
    return last == 1 and aligned and not (plan.family == "sm90" and 0 in steps)


def _with_copies(copies: tuple[bool, ...], again: Run) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool) -> Outputs:
        tensors = [
            tensor.clone(memory_format=torch.contiguous_format) if copy else tensor
            for copy, tensor in zip(copies, (q, k, v), strict=True)
        ]
        return again(tensors[0], tensors[1], tensors[2], scale, return_lse)

    return run


def _without_keys(shape: tuple[int, int, int, int]) -> Run:
    """No work for a GPU: an empty output, or no key at all, which is a row with every key masked."""

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool) -> Outputs:
        o = q.new_zeros(shape)
        lse_shape = (shape[0], shape[2], shape[1])
        return o, q.new_full(lse_shape, -torch.inf, dtype=torch.float32) if return_lse else None

    return run


__all__ = ["LAUNCHES_MAX", "Launch", "LoadedKernel", "Outputs", "Run", "TileCounters", "tile_counters"]
