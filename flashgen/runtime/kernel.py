"""`Kernel`: a spec as a callable op, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from threading import RLock

import torch
from torch import Tensor

from flashgen.arch import ARCHS, arch
from flashgen.build import Cubin, build
from flashgen.build.artifact import digest
from flashgen.codegen import Source, render
from flashgen.errors import LaunchError
from flashgen.plan import Explanation, KernelPlan, solve
from flashgen.runtime import ops
from flashgen.runtime.arguments import (
    Signature,
    bypasses_dispatcher,
    check_call,
    check_kernel,
    is_plain,
    signature,
)
from flashgen.runtime.devices import default_target, runs, target_of
from flashgen.runtime.elements import Elements
from flashgen.runtime.inputs import (
    NO_INPUTS,
    Declarations,
    Inputs,
    Sizes,
    arrange,
    check_inputs,
    check_parameters,
)
from flashgen.runtime.interpreter import interpret_with
from flashgen.runtime.launch import LAUNCHES_MAX, LoadedKernel
from flashgen.runtime.layouts import Outputs, Run
from flashgen.runtime.preparation import Prepared, check_is_prepared, check_use, prepared_in_torch
from flashgen.spec import AttentionSpec, dump_spec


class Kernel:
    """A spec, ready to be called with tensors of any batch, lengths and number of heads.

    CUDA tensors run the kernel that is planned, built and loaded for their GPU on first use; CPU tensors run
    the interpreter. A spec that names a target is never built for another.
    """

    def __init__(
        self, spec: AttentionSpec, *, plan: KernelPlan | None = None, cubin: Cubin | None = None
    ) -> None:
        """`plan`, and the cubin built from it, stand in for what would be solved and built for that plan's
        target.
        """
        target = spec.target if spec.target != "auto" else plan.target if plan else default_target()
        self.spec = spec
        self.plan = plan if plan is not None and plan.target == target else solve(spec, arch(target))
        self.declared = Declarations.of(spec)
        self._reads = not self.declared.are_none or self.plan.preparation is not None
        decided = repr(replace(self.plan, why=Explanation()))
        self.key = f"{spec.name}/{digest(dump_spec(spec) + decided)[:16]}"
        self._plans = {self.plan.target: self.plan}
        self._cubins: dict[str, Cubin] = {} if cubin is None else {cubin.target: cubin}
        self._loaded: dict[torch.device, LoadedKernel] = {}
        self._launches: dict[Signature, Run] = {}
        self._lock = RLock()
        ops.register(self.key, self)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
        params: Mapping[str, float] | None = None,
        sink: Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """softmax(score(scale * Q K^T), masked) V.

        Args:
            q: [batch, seqlen_q, heads_q, head_dim_qk], in the spec's dtype. Any strides: a tensor whose
                head_dim is not contiguous, or whose rows do not start at multiples of 16 bytes, is copied
                once.
            k: [batch, seqlen_kv, heads_kv, head_dim_qk]; heads_q / heads_kv is the spec's.
            v: [batch, seqlen_kv, heads_kv, head_dim_v].
            scale: of the scores, positive; the spec's where `None`.
            return_lse: also return the logarithm of the softmax's denominators.
            tensors: those that the spec's mask and score read, by name, in the dtype and with the axes that
                the spec declares. Any strides, zero (broadcast) included; one whose last axis is not
                contiguous is copied once.
            params: the spec's runtime parameters, by name. Another value needs no other kernel.
            sink: the logits of a spec with ``sink: true``, fp32 [heads_q].
            prepared: what `prepare` returned for the same shapes, tensors and parameters; without it, a mask
                that needs something prepared has it prepared by each call.

        Returns:
            o [batch, seqlen_q, heads_q, head_dim_v] in the spec's dtype, contiguous; with `return_lse` also
            lse [batch, heads_q, seqlen_q], fp32, natural logarithm. A row with every key masked gives 0 and
            -inf (the sink, where there is one).

        Raises `LaunchError`: tensors that do not fit, a gradient is needed, or the GPU cannot run the spec's
        target.
        """
        if self._reads or tensors is not None or params is not None or sink is not None:
            given = self._given(q, k, tensors, params, sink, prepared)
            if bypasses_dispatcher(q, k, v) and is_plain(given.all_tensors()):
                o, lse = self.run(q, k, v, scale, return_lse, given)
            else:
                names = (tensor.name for tensor in self.declared.tensors)
                check_call(q, k, v, given.sink, zip(names, given.tensors, strict=True))
                o, lse = torch.ops.flashgen.forward(
                    q, k, v, scale, self.key, return_lse,
                    given.tensors, given.params, given.sink, given.prepared,
                )  # fmt: skip
        elif bypasses_dispatcher(q, k, v):
            key = signature(q, k, v)
            launch = self._launches.get(key) or self._prepare(key, q, k, v, None)
            o, lse = launch(q, k, v, scale, return_lse)
        else:
            check_call(q, k, v)
            o, lse = torch.ops.flashgen.forward(q, k, v, scale, self.key, return_lse, (), (), None, ())
        return (o, lse) if return_lse else o  # type: ignore[return-value]

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        params: Mapping[str, float] | None = None,
        sink: Tensor | None = None,
    ) -> Prepared:
        """What the mask needs besides its tensors (ranges of keys, lists of tiles), computed once for many
        calls: layers that share a mask, or the replays of a CUDA graph.

        Arguments as for a call; of q, k and v only shapes and strides matter. Nothing is computed where the
        mask needs nothing.
        """
        check_kernel(q, k, v, self.plan, name=self.spec.name)
        inputs, sizes = self._given(q, k, tensors, params, sink, None), Sizes.of(q, k, self.plan.align)
        check_inputs(self.declared, inputs, sizes, q.device)
        if q.is_cuda and 0 not in (*q.shape, *k.shape):
            with self._lock:
                loaded = self._load(q.device)
            made = loaded.prepared(q, k, v, inputs)
        else:
            elements = Elements(
                self.declared, inputs, sizes, scale=self.plan.scale, real=torch.float32, device=q.device
            )
            made = prepared_in_torch(self.plan, elements)
        return Prepared(made, self.key, sizes, inputs.params)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        """The op without its dispatcher: o, and lse or `None`."""
        if inputs is None and self._reads:
            inputs = NO_INPUTS
        if inputs is not None:
            check_parameters(self.declared, inputs)
        return self.launch_for(q, k, v, inputs)(q, k, v, scale, return_lse, inputs)

    def launch_for(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Run:
        """What `run` calls for tensors of these shapes, strides, dtypes and device."""
        key = signature(q, k, v)
        if inputs is not None:
            key = (key, inputs.signature())
        return self._launches.get(key) or self._prepare(key, q, k, v, inputs)

    def plan_for(self, target: str) -> KernelPlan:
        """The plan for a target; solved once."""
        with self._lock:
            if target not in self._plans:
                self._plans[target] = solve(self.spec, arch(target))
            return self._plans[target]

    def cubin_for(self, target: str) -> Cubin:
        """The compiled kernel for a target; built once."""
        with self._lock:
            if target not in self._cubins:
                self._cubins[target] = build(self.plan_for(target))
            return self._cubins[target]

    @cached_property
    def source(self) -> Source:
        """The CUDA source of `plan`."""
        return render(self.plan)

    @property
    def cubin(self) -> Cubin:
        """The compiled kernel of `plan`; built on first use, which needs no GPU."""
        return self.cubin_for(self.plan.target)

    def __repr__(self) -> str:
        return f"<flashgen.Kernel {self.spec.name}: {self.plan.kernel}>"

    def _given(
        self,
        q: Tensor,
        k: Tensor,
        tensors: Mapping[str, Tensor] | None,
        params: Mapping[str, float] | None,
        sink: Tensor | None,
        prepared: Prepared | None,
    ) -> Inputs:
        given = arrange(self.declared, tensors, params, sink, name=self.spec.name)
        if prepared is None:
            return given
        check_is_prepared(prepared)
        check_use(prepared, self.key, Sizes.of(q, k, self.plan.align), given.params)
        return replace(given, prepared=prepared.tensors)

    def _prepare(self, key: Signature, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None) -> Run:
        check_kernel(q, k, v, self.plan, name=self.spec.name)
        if inputs is None:
            inputs = NO_INPUTS
        sizes = Sizes.of(q, k, self.plan.align)
        check_inputs(self.declared, inputs, sizes, q.device)
        with self._lock:
            if q.device.type == "cpu":
                launch: Run = self._interpret
            elif q.is_cuda:
                launch = self._load(q.device).prepare(q, k, v, self.run, inputs)
            else:
                raise LaunchError(f"flashgen runs on CUDA and CPU tensors; q is on {q.device}")
            if len(self._launches) >= LAUNCHES_MAX:
                self._launches.clear()
            self._launches[key] = launch
        return launch

    def _load(self, device: torch.device) -> LoadedKernel:
        if device not in self._loaded:
            target = self._target_on(device)
            self._loaded[device] = LoadedKernel(self.plan_for(target), self.cubin_for(target), device)
        return self._loaded[device]

    def _target_on(self, device: torch.device) -> str:
        capability = torch.cuda.get_device_capability(device)
        if runs(ARCHS[self.plan.target], capability):
            return self.plan.target
        if self.spec.target == "auto":
            return target_of(device)
        raise LaunchError(
            f"{self.spec.name} asks for target {self.spec.target}; {torch.cuda.get_device_name(device)} has "
            f"compute capability {capability[0]}.{capability[1]}",
            hint="target: auto builds for the GPU that the tensors are on",
        )

    def _interpret(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool,
        inputs: Inputs | None = None, /,
    ) -> Outputs:  # fmt: skip
        return interpret_with(self.plan, q, k, v, scale, inputs or NO_INPUTS)


__all__ = ["Kernel"]
