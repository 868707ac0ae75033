"""The torch op on CPU: registration, torch.compile, gradients, errors, and the two ways to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_exact
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import flashgen
from flashgen.errors import LaunchError, SpecError
from flashgen.runtime import Kernel, api, attention, interpret, load

CASE = Case(mask="causal", heads_kv=2, group=2, seqlen_q=40, seqlen_kv=60, batch=2)
FORWARD = torch.ops.flashgen.forward.default


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return load(CASE.spec())


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return CASE.tensors()


def test_call_returns_what_the_interpreter_computes(kernel: Kernel, qkv: tuple[Tensor, ...]) -> None:
    o, lse = kernel(*qkv, return_lse=True)
    assert_exact(CASE, o, lse, *qkv)
    assert torch.equal(o, interpret(kernel.plan, *qkv)[0])
    assert torch.equal(kernel(*qkv), o)


@pytest.mark.parametrize("return_lse", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_opcheck(kernel: Kernel, qkv: tuple[Tensor, ...], scale: float | None, return_lse: bool) -> None:
    torch.library.opcheck(FORWARD, (*qkv, scale, kernel.key, return_lse, [], [], None, []))


def test_opcheck_of_attention(qkv: tuple[Tensor, ...]) -> None:
    torch.library.opcheck(FORWARD, (*qkv, None, api._key(True, None, None), True, [], [], None, []))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(kernel: Kernel, dynamic: bool) -> None:
    compiled = torch.compile(
        lambda q, k, v: 2 * kernel(q, k, v), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for length in (40, 41, 90):
        q, k, v = replace(CASE, seqlen_q=length).tensors()
        assert torch.equal(compiled(q, k, v), 2 * kernel(q, k, v))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": 9},
        {"mask": "causal"},
        {"mask": {"window": 9}},
        {"causal": True, "scale": 0.2},
    ],
    ids=str,
)
def test_attention_compiles_without_graph_breaks(qkv: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, return_lse=True, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for compiled_part, part in zip(compiled(*qkv), call(*qkv), strict=True):
        assert torch.equal(compiled_part, part)


def test_fake_tensors_have_the_right_shapes(kernel: Kernel) -> None:
    with FakeTensorMode():
        q, k = (
            torch.empty(2, 40, 4, 64, dtype=torch.bfloat16),
            torch.empty(2, 60, 2, 64, dtype=torch.bfloat16),
        )
        o, lse = kernel(q, k, k, return_lse=True)
        assert o.shape == (2, 40, 4, 64) and o.dtype == torch.bfloat16
        assert lse.shape == (2, 4, 40) and lse.dtype == torch.float32
        with pytest.raises(LaunchError, match="v has batch 1"):
            kernel(q, k, k[:1])


# -- gradients ---------------------------------------------------------------------------------------------


def test_needed_gradient_is_an_error(kernel: Kernel, qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    for needing in ((q.clone().requires_grad_(), k, v), (q, k.clone().requires_grad_(), v)):
        for call in (kernel, attention):
            with pytest.raises(LaunchError, match=r"no backward for this kernel yet[^$]*torch\.no_grad\(\)"):
                call(*needing)
            with torch.no_grad():
                call(*needing)
            call(*(tensor.detach() for tensor in needing))
            with torch.inference_mode():
                call(*needing)


def test_needed_gradient_is_an_error_when_compiled(kernel: Kernel, qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no backward for this kernel yet"):
        compiled(q.requires_grad_(), k, v)


def test_needed_forward_derivative_is_an_error(kernel: Kernel, qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    with forward_ad.dual_level(), pytest.raises(LaunchError, match="no backward"):
        kernel(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


# -- errors ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "rank": (
        lambda q, k, v: (q[0], k, v),
        r"q has shape \(40, 4, 64\); expected \[batch, seqlen, heads, head_dim\]",
    ),
    "dtype": (lambda q, k, v: (q.float(), k.float(), v.float()), r"q is torch.float32.*\n.*cast it"),
    "mixed dtypes": (lambda q, k, v: (q, k.half(), v), r"k is torch.float16, q is torch.bfloat16"),
    "device": (lambda q, k, v: (q, k.to("meta"), v), r"k is on meta, q is on cpu"),
    "batch": (lambda q, k, v: (q, k[:1], v[:1]), r"k has batch 1, q has 2"),
    "keys and values": (lambda q, k, v: (q, k, v[:, 1:]), r"k has 60 keys, v has 59"),
    "heads of k and v": (lambda q, k, v: (q, k, v[:, :, :1]), r"k has 2 heads, v has 1"),
    "head_dim": (lambda q, k, v: (q[..., :32], k, v), r"q has head_dim 32, k has 64"),
    "length": (
        lambda q, k, v: (q, *(t[:, :1].expand(-1, 2**26, -1, -1) for t in (k, v))),
        "k has seqlen 67,108,864",
    ),
    "heads": (lambda q, k, v: (q[:, :, :3], k, v), r"q has 3 heads, which is no multiple of k's 2"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors(kernel: Kernel, change: Callable[..., Any], message: str) -> None:
    for call in (kernel, attention):
        with pytest.raises(LaunchError, match=message):
            call(*change(*CASE.tensors()))


def test_several_mistakes_are_told_together(kernel: Kernel, qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    with pytest.raises(LaunchError) as error:
        kernel(q, k[:1], v[:, 1:])
    assert len(error.value.problems) == 2


SPECIFIC: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "dtype": (
        lambda q, k, v: (q.half(), k.half(), v.half()),
        r"case computes in bf16; the tensors are torch.float16",
    ),
    "head_dim": (lambda q, k, v: (q[..., :32], k[..., :32], v), r"q has head_dim 32; case was built for 64"),
    "head_dim of v": (lambda q, k, v: (q, k, v[..., :32]), r"v has head_dim 32; case was built for 64"),
    "heads": (
        lambda q, k, v: (q[:, :, :2], k, v),
        r"q has 2 heads and k has 2; case was built for 2 query heads",
    ),
}


@pytest.mark.parametrize(("change", "message"), SPECIFIC.values(), ids=SPECIFIC.keys())
def test_tensors_of_another_kernel(kernel: Kernel, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        kernel(*change(*CASE.tensors()))


def test_unknown_kernel(qkv: tuple[Tensor, ...]) -> None:
    with pytest.raises(LaunchError, match=r"no kernel 'nobody/0'[^$]*flashgen\.load"):
        FORWARD(*qkv, None, "nobody/0", False, [], [], None, [])


def test_scale_must_be_positive(kernel: Kernel, qkv: tuple[Tensor, ...]) -> None:
    with pytest.raises(LaunchError, match="scale must be positive"):
        kernel(*qkv, scale=-1.0)


# -- load and attention ------------------------------------------------------------------------------------


def test_heads_are_free_their_ratio_is_not(kernel: Kernel) -> None:
    more = replace(CASE, heads_kv=5)
    q, k, v = more.tensors()
    assert_exact(more, *kernel(q, k, v, return_lse=True), q, k, v)


def test_load_reads_a_file(tmp_path: Path, qkv: tuple[Tensor, ...], kernel: Kernel) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(CASE.text())
    loaded = flashgen.load(path)
    assert loaded.key == kernel.key and loaded.plan == kernel.plan
    assert torch.equal(loaded(*qkv), kernel(*qkv))
    assert loaded.source.name == loaded.plan.kernel


@pytest.mark.compiler
@pytest.mark.parametrize("cubin", ["whole", "missing"])
def test_load_reads_a_built_folder(
    tmp_path: Path, kernel: Kernel, qkv: tuple[Tensor, ...], cubin: str
) -> None:
    from flashgen.build import artifact

    folder = tmp_path / "case"
    written = artifact.write(kernel.cubin, folder, {"spec": json.loads(CASE.text())})
    assert written.path is not None
    if cubin == "missing":
        written.path.unlink()
    loaded = load(folder)
    assert loaded.plan == kernel.plan and loaded.cubin.binary == kernel.cubin.binary
    assert loaded.cubin.path is not None
    assert (loaded.cubin.path.parent == folder) == (cubin == "whole")
    assert torch.equal(loaded(*qkv), kernel(*qkv))


def test_load_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not a folder that `flashgen build` wrote"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SpecError, match="is not a folder that `flashgen build` wrote"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, "full"),
        ({"causal": True}, "causal"),
        ({"window": 9}, {"window": 9}),
        ({"mask": {"window": 9}}, {"window": 9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim_v", [64, 40])
def test_attention_makes_the_kernel_from_the_tensors(
    options: dict[str, Any], mask: Any, head_dim_v: int
) -> None:
    case = replace(CASE, mask=mask, dtype="fp16", head_dim_v=head_dim_v)
    q, k, v = case.tensors()
    assert_exact(case, *attention(q, k, v, return_lse=True, **options), q, k, v)


def test_attention_keeps_one_kernel_for_similar_lengths() -> None:
    shaped = api._shaped(True, None, None)
    kernels = {
        length: shaped.kernel_for(*replace(CASE, seqlen_q=length, seqlen_kv=length).tensors())
        for length in (129, 200, 256, 257)
    }
    assert kernels[129] is kernels[200] is kernels[256] is not kernels[257]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 3}])
def test_attention_takes_one_mask(qkv: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    with pytest.raises(LaunchError, match="`mask` says it all"):
        attention(*qkv, mask="full", **options)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"mask": "casual"}, {"mask": "__import__('os').system('id')"}], ids=str
)
def test_attention_refuses_masks_that_are_none(qkv: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        attention(*qkv, **options)


def test_importing_flashgen_imports_neither_torch_nor_cupy() -> None:
    import subprocess
    import sys

    loaded = "{'torch', 'cupy'} & set(sys.modules)"
    code = f"import sys, flashgen; flashgen.__version__; dir(flashgen); assert not {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True)
