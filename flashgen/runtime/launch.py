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
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from flashgen.build import Cubin
from flashgen.errors import LaunchError
from flashgen.plan.model import KernelPlan
from flashgen.runtime.arguments import check_scale
from flashgen.runtime.counters import WORKSPACE_WORDS, tile_counters, workspaces
from flashgen.runtime.inputs import NO_INPUTS, Inputs, Sizes
from flashgen.runtime.layouts import (
    ALIGNMENT,
    Outputs,
    Run,
    readable,
    taken_as_is,
    with_copies,
    with_readable,
    without_keys,
)
from flashgen.runtime.parameters import Parameters, Shapes, counter_words, parameters
from flashgen.runtime.preparation import Preparation, check_prepared

try:  # what Inductor's own code allocates with: a third of the host time of torch.empty
    from torch._C._dynamo.guards import _empty_strided_cuda as empty_strided  # type: ignore[attr-defined]
except ImportError:

    def empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the current GPU."""
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


LAUNCHES_MAX = 4096  # shapes remembered by one kernel; then all are forgotten: preparing takes microseconds

_GRID_MAX = 2**31 - 1
_NO_CONTEXT = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, .._HANDLE: this thread may not have used the GPU yet


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
        self.counter_words = counter_words(plan, self.sms)
        self._counters = tile_counters(device, self.counter_words) if plan.family == "sm90" else None
        self._workspaces = workspaces(device) if plan.family == "sm90" and plan.first_reference else None
        with torch.cuda.device(device):
            try:
                self._module = _load(cupy, cubin)
                kernel = self._module.get_function(cubin.kernel)
                kernel.max_dynamic_shared_size_bytes = plan.smem_bytes
                # Leave the L1 cache no more than it must have: K and V are read through shared memory alone.
                kernel.preferred_shared_memory_carveout = 100
                self.function = kernel.kernel.ptr
                if plan.preparation:
                    self.prepare_function = self._module.get_function(f"{cubin.kernel}_prepare").kernel.ptr
            except driver.CUDADriverError as error:
                name = torch.cuda.get_device_name(device)
                raise LaunchError(
                    f"the driver refuses {plan.kernel} on {device} ({name}): {error}",
                    hint="`flashgen doctor` compares the driver with the CUDA that compiled the kernel",
                ) from None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, again: Run, inputs: Inputs | None = None) -> Run:
        """A launch for tensors like these, which have been checked; `again` is called with copies where one
        is needed.
        """
        batch, seqlen_q, heads_q, _ = q.shape
        shape = (batch, seqlen_q, heads_q, self.plan.head_dim_v)
        if 0 in shape or k.shape[1] == 0:
            return without_keys(shape)
        if inputs is not None and inputs.prepared:
            check_prepared(self.plan, inputs.prepared, Sizes.of(q, k, self.plan.align), q.device)
        copies = tuple(not taken_as_is(tensor, self.plan) for tensor in (q, k, v))
        if any(copies):
            return with_copies(copies, again)
        if inputs is not None and readable(inputs) is not inputs:
            return with_readable(again)
        return Launch(self, q, k, v, again, inputs)

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the mask needs, computed by a launch of its preparation alone; q, k and v are not read."""
        if self.plan.preparation is None:
            return ()
        inputs = readable(inputs)
        return Launch(self, q, k, v, without_keys((0, 0, 0, 0)), inputs).prepare(inputs)

    def start(self, *launch: int) -> None:
        """`cuLaunchKernel` on this GPU. Raises `LaunchError` where the driver refuses."""
        try:
            self.launch_kernel(*launch)
        except self.driver_error as error:
            self.start_again(error, *launch)

    def start_again(self, error: Any, *launch: int) -> None:
        """After an error of the driver, which is raised where it is not to be mended.

        A fresh thread has no context until a runtime call makes one current; torch's allocator, served from
        its cache, makes none.
        """
        if error.status in _NO_CONTEXT:
            self.make_current()
            try:
                self.launch_kernel(*launch)
            except self.driver_error as second:
                error = second
            else:
                return
        raise LaunchError(f"{self.plan.kernel} on {self.device}: {error}") from None

    def make_current(self) -> None:
        """Make the GPU's context current to this thread."""
        from cupy.cuda import runtime

        runtime.setDevice(self.device.index)

    @property
    def counter(self) -> Callable[[int], int]:
        """From a stream to the address of a tile counter that nothing else uses while a launch on it does."""
        assert self._counters is not None
        return self._counters.address

    @property
    def workspace(self) -> Callable[[int], int | None] | None:
        """From a stream to the address of a small workspace that nothing else uses while a launch on it does.

        From it None: the launch's own is to be allocated.
        """
        return None if self._workspaces is None else self._workspaces.address


class Launch:
    """One kernel at one set of shapes and strides."""

    def __init__(
        self, loaded: LoadedKernel, q: Tensor, k: Tensor, v: Tensor, again: Run, inputs: Inputs | None
    ) -> None:
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
            input_strides=() if inputs is None else tuple(tensor.stride() for tensor in inputs.tensors),
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
        arguments = ctypes.addressof(self._arguments)
        self.preparation = Preparation(loaded, Sizes.of(q, k, plan.align), prepared.inputs, arguments)
        # The driver reads the struct during the launch; a second thread must not write to it meanwhile.
        self._lock = Lock()
        self._enqueue = _enqueuer(loaded, prepared, arguments, self._index, self.preparation, self._lock)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        q_data, k_data, v_data = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (q_data | k_data | v_data) % ALIGNMENT:
            copies = tuple(bool(data % ALIGNMENT) for data in (q_data, k_data, v_data))
            return with_copies(copies, self._again)(q, k, v, scale, return_lse, inputs)
        # New tensors come on the current GPU, and cuLaunchKernel wants the function's own to be that.
        if self._current_device() != self._index:
            with torch.cuda.device(self._index):
                return self(q, k, v, scale, return_lse, inputs)
        if scale is None:
            scale = self._scale
        else:
            check_scale(scale)
        o = empty_strided(*self._o)
        if return_lse:
            lse = empty_strided(*self._lse)
            self._enqueue(q_data, k_data, v_data, o.data_ptr(), lse.data_ptr(), scale, None, inputs)
            return o, lse
        self._enqueue(q_data, k_data, v_data, o.data_ptr(), 0, scale, None, inputs)
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
        inputs: Inputs | None = None,
    ) -> None:
        """Launch into given outputs, contiguous and of the shapes that a call would allocate.

        `counter` is the address of `LoadedKernel.counter_words` int32 zeros that no other launch uses
        meanwhile; None takes some of the GPU's.
        """
        with torch.cuda.device(self._index):
            self._enqueue(q, k, v, o.data_ptr(), 0 if lse is None else lse.data_ptr(), scale, counter, inputs)

    def prepare(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the kernel's mask needs, computed by a launch of its preparation alone."""
        with torch.cuda.device(self._index), self._lock:
            return self.preparation.fresh(inputs, torch._C._cuda_getCurrentRawStream(self._index))


# q, k, v, o, lse, scale, counter, inputs
Enqueue = Callable[[int, int, int, int, int, float, int | None, Inputs | None], None]


def _enqueuer(
    loaded: LoadedKernel,
    prepared: Parameters,
    arguments: int,
    index: int,
    preparation: Preparation,
    lock: Lock,
) -> Enqueue:
    """A function that launches at the addresses that it is given, on the current stream of GPU `index`.

    A closure: reading what it holds costs less than reading attributes.
    """
    plan, grid = loaded.plan, prepared.grid
    function, threads, smem = loaded.function, plan.threads, plan.smem_bytes
    launch_kernel, driver_error = loaded.launch_kernel, loaded.driver_error
    point_at, start_again = prepared.point_at, loaded.start_again
    free_counter = loaded.counter if prepared.needs_counter else None
    workspace_words, point_at_workspace = prepared.workspace_words, prepared.point_at_workspace
    kept_workspace = loaded.workspace if 0 < workspace_words <= WORKSPACE_WORDS else None
    absent = NO_INPUTS if plan.preparation else None  # a mask that reads nothing may need a map all the same
    # The private call behind torch.cuda.current_stream(), at a tenth of its cost.
    current_stream = torch._C._cuda_getCurrentRawStream

    def enqueue(
        q: int, k: int, v: int, o: int, lse: int, scale: float, counter: int | None, inputs: Inputs | None
    ) -> None:
        stream = current_stream(index)
        if counter is None:
            counter = free_counter(stream) if free_counter else 0
        with lock:
            point_at(q, k, v, o, lse, counter, scale)
            if (given := inputs or absent) is not None:
                _held = preparation(given, stream)  # until the launch that reads it is enqueued
            if workspace_words:
                workspace = kept_workspace(stream) if kept_workspace else None
                if workspace is None:
                    _workspace = empty_strided((workspace_words,), (1,), torch.float32)
                    workspace = _workspace.data_ptr()
                point_at_workspace(workspace)
            try:
                launch_kernel(function, grid, 1, 1, threads, 1, 1, smem, stream, arguments, 0)
            except driver_error as error:
                start_again(error, function, grid, 1, 1, threads, 1, 1, smem, stream, arguments, 0)

    return enqueue


def _load(cupy: Any, cubin: Cubin) -> Any:
    if cubin.path is not None and cubin.path.is_file():
        return cupy.RawModule(path=os.fspath(cubin.path))
    # Built without the cache, or cleared from it since.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{cubin.kernel}.cubin")
        with open(path, "wb") as file:
            file.write(cubin.binary)
        module = cupy.RawModule(path=path)
        module.get_function(cubin.kernel)  # loads it, while the file is there
        return module


__all__ = ["LAUNCHES_MAX", "Launch", "LoadedKernel"]
