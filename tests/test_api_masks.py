"""Masks and scores from Python: `flashgen.attention` and kernels of specs, with all that they read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import GALLERY_CASES, Case, assert_exact
from torch import Tensor

import flashgen
from flashgen.errors import LaunchError, SpecError
from flashgen.runtime import Kernel, attention, decisions, interpret, load
from flashgen.runtime.preparation import Prepared

CASE = Case(heads_kv=2, group=2, batch=2, seqlen_q=60, seqlen_kv=90)
FORWARD = torch.ops.flashgen.forward.default


def case_of(name: str) -> Case:
    return replace(CASE, **GALLERY_CASES[name])


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return CASE.tensors()


@pytest.fixture(scope="module")
def documents() -> Kernel:
    return load(case_of("causal document").spec())


# -- kernels of specs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GALLERY_CASES)
def test_kernels_are_exact(name: str) -> None:
    case = case_of(name)
    q, k, v = case.tensors()
    given = case.given()
    o, lse = load(case.spec())(q, k, v, return_lse=True, **given)
    assert_exact(case, o, lse, q, k, v, **given)


def test_runtime_parameters_need_no_other_kernel(qkv: tuple[Tensor, ...]) -> None:
    case = case_of("runtime window")
    kernel = load(case.spec())
    for size in (1, 7, 64):
        o, lse = kernel(*qkv, return_lse=True, params={"size": size})
        assert_exact(replace(CASE, mask={"window": size}), o, lse, *qkv)
    assert len(kernel._launches) == 1


@pytest.mark.parametrize("name", ["document", "natten_2d", "keys left out", "causal"])
def test_prepared_once_for_many_calls(name: str) -> None:
    case = case_of(name)
    q, k, v = case.tensors()
    kernel, given = load(case.spec()), case.given()
    prepared = kernel.prepare(q, k, v, **given)
    assert len(prepared.tensors) == (2 if kernel.plan.preparation else 0)
    assert torch.equal(kernel(q, k, v, prepared=prepared, **given), kernel(q, k, v, **given))


def test_what_is_prepared_is_what_is_used(documents: Kernel, qkv: tuple[Tensor, ...]) -> None:
    """Prepared for one document, the mask lets through what the documents would not."""
    given = case_of("causal document").given()
    one = {"tensors": {"doc": torch.zeros_like(given["tensors"]["doc"])}}
    prepared = documents.prepare(*qkv, **one)
    assert torch.equal(documents(*qkv, prepared=prepared, **given), documents(*qkv, **one))


def test_prepared_for_something_else_is_refused(documents: Kernel, qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    given = case_of("causal document").given()
    prepared = documents.prepare(q, k, v, **given)
    shorter = {"tensors": {"doc": given["tensors"]["doc"][:, :50].contiguous()}}
    with pytest.raises(LaunchError, match="made for other shapes"):
        documents(q, k[:, :50], v[:, :50], prepared=prepared, **shorter)
    with pytest.raises(LaunchError, match="made for other kernel"):
        load(case_of("document").spec())(q, k, v, prepared=prepared, **given)
    step = load(case_of("runtime step").spec())
    prepared = step.prepare(q, k, v, params={"step": 2})
    with pytest.raises(LaunchError, match="made for other parameters"):
        step(q, k, v, params={"step": 3}, prepared=prepared)
    forged = Prepared(prepared.tensors[:1], step.key, prepared.sizes, (2.0,))
    with pytest.raises(LaunchError, match="does not fit this call"):
        step(q, k, v, params={"step": 2}, prepared=forged)


def test_missing_and_unknown_inputs(documents: Kernel, qkv: tuple[Tensor, ...]) -> None:
    given = case_of("causal document").given()
    with pytest.raises(LaunchError, match="reads the tensor 'doc', which is not given"):
        documents(*qkv)
    with pytest.raises(LaunchError, match=r"case reads no parameter .size.\n    it takes no parameters"):
        documents(*qkv, **{**given, "params": {"size": 1}})
    with pytest.raises(LaunchError, match="case has no sink"):
        documents(*qkv, **{**given, "sink": torch.zeros(4)})
    with pytest.raises(LaunchError, match="doc has 90 elements along axis kv, not 60"):
        documents(qkv[0], qkv[1][:, :60], qkv[2][:, :60], **given)
    with pytest.raises(LaunchError, match=r"reads no tensor .doc."):
        load(CASE.spec())(*qkv, tensors=given["tensors"])


@pytest.mark.parametrize(("size", "message"), [(0, "from 1 to"), (2.5, "an integer"), ("4", "a number")])
def test_parameters_are_checked_at_every_call(qkv: tuple[Tensor, ...], size: Any, message: str) -> None:
    kernel = load(case_of("runtime window").spec())
    kernel(*qkv, params={"size": 3})
    with pytest.raises(LaunchError, match=message):
        kernel(*qkv, params={"size": size})
    if isinstance(size, float | int):
        with pytest.raises(LaunchError, match=message):
            FORWARD(*qkv, None, kernel.key, False, [], [float(size)], None, [])


def test_the_op_is_told_what_is_missing(documents: Kernel, qkv: tuple[Tensor, ...]) -> None:
    with pytest.raises(LaunchError, match=r"takes the tensors \[doc\]"):
        FORWARD(*qkv, None, documents.key, False, [], [], None, [])


# -- the op ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["causal document", "rows and keys", "padded causal", "runtime cap", "natten_2d"]
)
def test_opcheck(name: str) -> None:
    case = case_of(name)
    kernel, given = load(case.spec()), case.given()
    tensors, params = list(given["tensors"].values()), [float(number) for number in given["params"].values()]
    arguments = (*case.tensors(), None, kernel.key, True, tensors, params, given["sink"], [])
    torch.library.opcheck(FORWARD, arguments)


def test_gradients_of_inputs_are_an_error(qkv: tuple[Tensor, ...]) -> None:
    case = case_of("dense_bias")
    bias = case.given()["tensors"]["bias"].requires_grad_()
    kernel = load(case.spec())
    with pytest.raises(LaunchError, match="no backward for this kernel yet"):
        kernel(*qkv, tensors={"bias": bias})
    with torch.no_grad():
        kernel(*qkv, tensors={"bias": bias})
    sinks = load(case_of("sink").spec())
    with pytest.raises(LaunchError, match="no backward for this kernel yet"):
        sinks(*qkv, sink=torch.zeros(4, requires_grad=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["causal document", "padded causal", "runtime cap"])
def test_kernels_compile_without_graph_breaks(name: str, dynamic: bool) -> None:
    case = case_of(name)
    kernel = load(case.spec())
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> Any:
        return 2 * kernel(q, k, v, **given)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (60, 61, 70):
        longer = replace(case, seqlen_q=length)
        q, k, v = longer.tensors()
        given = longer.given()
        assert torch.equal(compiled(q, k, v, given), call(q, k, v, given))


# -- attention ---------------------------------------------------------------------------------------------

SLOPE = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOC = (torch.arange(180).reshape(2, 90) // 25).int()
BIAS = torch.randn(4, 60, 90, generator=torch.Generator().manual_seed(7))
CAP = 5.0
SIZE = 20

# What is passed, and the case that it stands for.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"mask": "kv <= q and q - kv < 20"}, {"mask": {"window": 20}}),
    "a name": ({"mask": "window(20)"}, {"mask": {"window": 20}}),
    "a score": ({"causal": True, "score": "softcap(5)"}, {"mask": "causal", "score": "softcap(5)"}),
    "functions": (
        {
            "mask": lambda q, kv: (kv <= q) & (q - kv < SIZE),
            "score": lambda score: CAP * flashgen.tanh(score / CAP),
        },
        {"mask": "window(20)", "score": "softcap(5)"},
    ),
    "a function and a tensor": (
        {"mask": "causal", "score": lambda score, q, kv, head, slope: score + slope[head] * (kv - q),
         "tensors": {"slope": SLOPE}},
        {"mask": "causal", "score": "alibi"},
    ),
    "the gallery's tensor": (
        {"mask": "causal and document", "tensors": {"doc": DOC}}, {"mask": "causal and document"},
    ),
    "the gallery's tensor in another dtype": (
        {"score": "dense_bias", "tensors": {"bias": BIAS}},
        {"score": "dense_bias", "inputs": {"bias": {"index": ["head", "q", "kv"], "dtype": "fp32"}}},
    ),
    "a batch that is left out": (
        {"mask": "doc[q] == doc[kv]", "tensors": {"doc": DOC}},
        {"mask": "doc[q] == doc[kv]", "inputs": {"doc": {"index": ["batch", "kv"], "dtype": "int32"}}},
    ),
    "a table": (
        {"score": "score + table[head, abs(q - kv) % 7]", "tensors": {"table": BIAS[:, 0, :7].half()}},
        {"score": "score + table[head, abs(q - kv) % 7]",
         "inputs": {"table": {"index": ["head", 7], "dtype": "fp16"}}},
    ),
    "a length given": (
        {"score": "score + table[head, q % 7]", "tensors": {"table": (BIAS[:, :7, 0], ["head", 7])}},
        {"score": "score + table[head, q % 7]", "inputs": {"table": {"index": ["head", 7], "dtype": "fp32"}}},
    ),
    "axes given": (
        {"score": "score + pair", "tensors": {"pair": (BIAS, ["head", "q", "kv"])}},
        {"score": "score + pair", "inputs": {"pair": {"index": ["head", "q", "kv"], "dtype": "fp32"}}},
    ),
    "a scalar": (
        {"score": "score * gain", "tensors": {"gain": torch.tensor(0.5)}},
        {"score": "score * gain", "inputs": {"gain": {"index": [], "dtype": "fp32"}}},
    ),
    "parameters": (
        {"mask": "kv <= q and q - kv < size", "score": "softcap(cap)", "params": {"size": 20, "cap": 5.0}},
        {"mask": "window(20)", "score": "softcap(5)"},
    ),
    "a sink": ({"causal": True, "sink": SLOPE}, {"mask": "causal", "sink": True}),
    "a sink by name": ({"causal": True, "score": "sink", "sink": SLOPE}, {"mask": "causal", "sink": True}),
    "bytes for bools": (
        {"mask": "valid[kv] and kv <= q", "tensors": {"valid": (DOC % 3 > 0).to(torch.uint8)}},
        {"mask": "valid[kv] and kv <= q", "inputs": {"valid": {"index": ["batch", "kv"], "dtype": "bool"}}},
    ),
}  # fmt: skip


def given_of(options: dict[str, Any]) -> dict[str, Any]:
    """What the reference is given where `attention` is given `options`."""
    tensors = {
        name: tensor if isinstance(tensor, Tensor) else tensor[0]
        for name, tensor in options.get("tensors", {}).items()
    }
    return {"tensors": tensors, "sink": options.get("sink")}


@pytest.mark.parametrize(("options", "parts"), CALLS.values(), ids=CALLS.keys())
def test_attention_is_exact(options: dict[str, Any], parts: dict[str, Any], qkv: tuple[Tensor, ...]) -> None:
    case = replace(CASE, **parts)
    o, lse = attention(*qkv, return_lse=True, **options)
    assert_exact(case, o, lse, *qkv, **given_of(options))
    assert torch.equal(attention(*qkv, **options), o)


COMPILED = {name: options for name, (options, _) in CALLS.items()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED.keys())
def test_attention_compiles_without_graph_breaks(
    options: dict[str, Any], qkv: tuple[Tensor, ...], dynamic: bool
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, **options), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    assert torch.equal(compiled(*qkv), attention(*qkv, **options))


PREPARED: dict[str, dict[str, Any]] = {
    "ranges": {"mask": "document", "tensors": {"doc": DOC}},
    "a map": {"mask": lambda q, kv: (kv <= q) & ((q - kv) % 3 == 0)},
    "a map of a tensor": {"mask": "doc[q] == doc[kv]", "tensors": {"doc": DOC}, "score": "softcap(5)"},
    "a map of a parameter": {"mask": "causal and (q - kv) % step == 0", "params": {"step": 5}},
    "nothing": {"causal": True, "sink": SLOPE},
}


@pytest.mark.parametrize("options", PREPARED.values(), ids=PREPARED.keys())
def test_prepared_once_for_many_calls_of_attention(
    options: dict[str, Any], qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = attention(*qkv, **options)
    prepared = flashgen.prepare(*qkv, **options)
    monkeypatch.setattr(decisions, "prepared_in_torch", lambda plan, elements: ())  # nor can calls prepare
    assert torch.equal(attention(*qkv, prepared=prepared, **options), expected)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, prepared=prepared, **options), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*qkv), expected)


def test_what_is_prepared_for_another_attention_is_refused(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    step = {"mask": "causal and (q - kv) % step == 0"}
    prepared = flashgen.prepare(q, k, v, params={"step": 5}, **step)
    with pytest.raises(LaunchError, match="made for other parameters"):
        attention(q, k, v, params={"step": 6}, prepared=prepared, **step)
    with pytest.raises(LaunchError, match="made for other shapes"):
        attention(q[:, 1:], k, v, params={"step": 5}, prepared=prepared, **step)
    with pytest.raises(LaunchError, match="made for another mask or score"):
        attention(q, k, v, causal=True, prepared=prepared)
    with pytest.raises(LaunchError, match="computes in bf16"):
        attention(q.half(), k.half(), v.half(), params={"step": 5}, prepared=prepared, **step)
    with pytest.raises(LaunchError, match="made for other kernel"):
        load(case_of("runtime step").spec())(q, k, v, params={"step": 5}, prepared=prepared)


def test_a_function_is_run_anew_by_each_call(
    qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for size in (20, 5):
        monkeypatch.setattr(__import__(__name__), "SIZE", size)
        outputs.append(attention(*qkv, mask=lambda q, kv: (kv <= q) & (q - kv < SIZE)))
    for size, o in zip((20, 5), outputs, strict=True):
        assert torch.equal(o, attention(*qkv, window=size))


def test_parameters_change_without_another_kernel(qkv: tuple[Tensor, ...]) -> None:
    from flashgen.runtime import api

    before = len(api._of_key)
    for cap in (3.0, 4, 50.5):
        o = attention(*qkv, score="softcap(limit)", params={"limit": cap})
        assert torch.equal(o, load_softcap(cap)(*qkv, params={"cap": cap}))
    assert len(api._of_key) == before + 1


def load_softcap(cap: float) -> Kernel:
    return load(replace(CASE, score="softcap(cap)", params={"cap": "runtime"}).spec())


def test_leading_dimensions_are_batch_and_head() -> None:
    """Not by their lengths: here batch, heads and rows are all as long."""
    case = replace(CASE, batch=4, seqlen_q=4, seqlen_kv=4, heads_kv=4, group=1)
    q, k, v = case.tensors()
    left = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3))
    o, lse = attention(q, k, v, score="score + left[q]", tensors={"left": left}, return_lse=True)
    declared = {"left": {"index": ["batch", "head", "q"], "dtype": "fp32"}}
    assert_exact(
        replace(case, score="score + left", inputs=declared), o, lse, q, k, v, tensors={"left": left}
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": "kv <= qq"}, SpecError, r"unknown name .qq.[^$]*did you mean 'q'"),
        ({"mask": "kv + q"}, SpecError, "expected a condition"),
        ({"score": "kv <= q"}, SpecError, "expected a number"),
        ({"mask": lambda q, kv: kv <= q and q - kv < 5}, SpecError, r"write & \| ~ for and, or, not"),
        ({"mask": lambda q, kv: 0 < kv < q}, SpecError, r"a < b < c"),
        ({"mask": lambda q, keys: keys < q}, SpecError, "cannot take .keys."),
        ({"score": lambda score: torch.tanh(score)}, SpecError, "torch's tanh cannot take symbols"),
        ({"score": "score + pair", "tensors": {"pair": BIAS}}, SpecError, "axes of 'pair' are not known"),
        ({"score": "score + pair[q]", "tensors": {"pair": BIAS[None, None]}}, SpecError, "has 5 dimensions"),
        ({"score": "score + a[q] + a[q, kv]", "tensors": {"a": BIAS}}, SpecError, "read with 1 and 2 subscr"),
        ({"tensors": {"doc": DOC.long()}, "mask": "document"}, LaunchError, r"int64[^$]*: doc\.int\(\)"),
        ({"tensors": {"slope": SLOPE.double()}, "score": "alibi"}, LaunchError, r"float64[^$]*float\(\)"),
        ({"mask": "full", "tensors": {"dok": (DOC, ["batch", "kv"])}}, LaunchError, "reads no tensor .dok."),
        ({"mask": "document"}, LaunchError, "tensor 'doc', which is not given"),
        ({"mask": "causal", "causal": True, "score": "sink"}, LaunchError, "`mask` says it all"),
        ({"score": "sink"}, LaunchError, "has a sink, and none is given"),
        ({"score": "softcap(cap)", "params": {"cap": 1, "cup": 2}}, LaunchError, "reads no parameter .cup."),
        ({"mask": "q - kv < size", "params": {"size": 0}}, LaunchError, "an integer from 1"),
        ({"score": "alibi", "tensors": {"slope": SLOPE[:3]}}, LaunchError, "has 3 elements along axis head"),
        ({"score": "alibi", "tensors": {"slope": [0.5, 0.25]}}, LaunchError, "'slope' is a list, not"),
        ({"score": "alibi", "tensors": {"slope": (SLOPE, "head")}}, LaunchError, "'slope' is a tuple, not"),
        ({"mask": "q - kv < size", "params": {"size": "4"}}, LaunchError, "must be a number, but .* '4'"),
        ({"mask": "q - kv < size", "params": {"size": torch.tensor(4)}}, LaunchError, "must be a number"),
        ({"mask": torch.ones(60, 90).bool()}, SpecError, r"Tensor has no place in a mask\n.*into `tensors`"),
        ({"mask": {"window": torch.tensor(3)}}, SpecError, "a Tensor has no place in a mask"),
        ({"mask": "document", "tensors": {"doc": DOC.flip(1)}}, LaunchError, "doc falls along kv"),
        ({"mask": "true or q < p * 0", "params": {"p": "4"}}, LaunchError, "must be a number"),
        ({"mask": "q < p", "params": {"p": 10**400}}, LaunchError, "'p' is an integer beyond the range"),
        ({"window": torch.tensor(3)}, SpecError, r"Tensor has no place in a mask\n.*int\(size\)"),
        ({"mask": max}, SpecError, ".max. is no Python function that a mask can be"),
        ({"sink": [0.5, 0.25]}, LaunchError, "sink is a list, not a tensor"),
        ({"causal": True, "prepared": 3}, LaunchError, "`prepared` is a int, and not what `prepare` returns"),
    ],
)  # fmt: skip
def test_what_attention_refuses(
    options: dict[str, Any], error: type[Exception], message: str, qkv: tuple[Tensor, ...]
) -> None:
    with pytest.raises(error, match=message):
        attention(*qkv, **options)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"mask": "kv <= q + p * 0", "params": {"p": 3}}, {"mask": "causal"}),
        ({"mask": "causal and (document or kv <= kv)", "tensors": {"doc": DOC}}, {"mask": "causal"}),
        ({"causal": True, "score": "score + 0 * bias[q, kv]", "tensors": {"bias": BIAS}}, {"mask": "causal"}),
        ({"mask": "window(20 + p - p)", "params": {"p": 3}}, {"mask": "window(20)"}),
    ],
)  # fmt: skip
def test_what_cancels_may_be_given(
    options: dict[str, Any], same: dict[str, Any], qkv: tuple[Tensor, ...]
) -> None:
    assert torch.equal(attention(*qkv, **options), attention(*qkv, **same))
    prepared = flashgen.prepare(*qkv, **options)
    assert torch.equal(attention(*qkv, prepared=prepared, **options), attention(*qkv, **same))


def test_what_a_spec_declares_may_be_given(qkv: tuple[Tensor, ...]) -> None:
    """Though its formulas do without; but no constant, whose value is in the kernel."""
    declared = {"doc": {"index": ["batch", "kv"], "dtype": "int32"}}
    params = {"p": "runtime", "size": 7}
    spec = replace(CASE, mask="kv <= q + p * 0 and q - kv < size", inputs=declared, params=params).spec()
    kernel, expected = load(spec), load(replace(CASE, mask="window(7)").spec())(*qkv)
    assert torch.equal(kernel(*qkv), expected)
    assert torch.equal(kernel(*qkv, tensors={"doc": DOC}, params={"p": 5}), expected)
    for wrong in ({"params": {"size": 7}}, {"params": {"doc_": 5}}, {"tensors": {"dok": DOC}}):
        with pytest.raises(LaunchError, match="reads no"):
            kernel(*qkv, **wrong)
    reads = load(case_of("document").spec())
    with pytest.raises(LaunchError, match=r"reads no parameter .doc."):
        reads(*qkv, tensors={"doc": DOC}, params={"doc": 5})


@pytest.mark.parametrize("wrong", [None, [1.0], "array"], ids=str)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_no_tensor_is_told(documents: Kernel, qkv: tuple[Tensor, ...], at: int, wrong: Any) -> None:
    given = {"tensors": {"doc": DOC}}
    mask = {"mask": "causal and document", **given}
    prepared = flashgen.prepare(*qkv, **mask)
    arguments: list[Any] = list(qkv)
    arguments[at] = qkv[at].float().numpy() if wrong == "array" else wrong
    for call in (
        lambda: attention(*arguments),
        lambda: attention(*arguments, causal=True, score="softcap(5)"),
        lambda: attention(*arguments, prepared=prepared, **mask),
        lambda: flashgen.prepare(*arguments, **mask),
        lambda: documents(*arguments, **given),
        lambda: documents.prepare(*arguments, **given),
    ):
        with pytest.raises(LaunchError, match=f"^{'qkv'[at]} is a .*, not a tensor"):
            call()


def test_kernels_tell_what_is_no_tensor(documents: Kernel, qkv: tuple[Tensor, ...]) -> None:
    doc: Any = [[1, 2]]
    for call in (documents, documents.prepare):
        with pytest.raises(LaunchError, match="doc is a list, not a tensor"):
            call(*qkv, tensors={"doc": doc})
    prepared: Any = (1, 2)
    with pytest.raises(LaunchError, match="`prepared` is a tuple"):
        documents(*qkv, tensors={"doc": DOC}, prepared=prepared)
    prepared = documents.prepare(*qkv, tensors={"doc": DOC})
    with pytest.raises(LaunchError, match=r"q has shape \(60, 4, 64\); expected \[batch"):
        documents(qkv[0][0], *qkv[1:], tensors={"doc": DOC}, prepared=prepared)


def test_documents_in_any_order(qkv: tuple[Tensor, ...]) -> None:
    """What docs/spec.md says to write where a gallery's `doc` would fall: padding of -1, say."""
    doc = torch.where(DOC >= 6, -1, DOC)
    with pytest.raises(LaunchError, match=r"falls along kv.*\n.*doc\[q\] == doc\[kv\]"):
        attention(*qkv, mask="document", tensors={"doc": doc})
    mask = "doc[q] == doc[kv] and doc[kv] >= 0"
    o, lse = attention(*qkv, mask=mask, tensors={"doc": doc}, return_lse=True)
    declared = {"doc": {"index": ["batch", "kv"], "dtype": "int32"}}
    assert_exact(replace(CASE, mask=mask, inputs=declared), o, lse, *qkv, tensors={"doc": doc})
    own = replace(CASE, mask="document and doc[kv] >= 0", inputs=declared)
    o, lse = load(own.spec())(*qkv, tensors={"doc": doc}, return_lse=True)
    assert_exact(own, o, lse, *qkv, tensors={"doc": doc})


def test_functions_of_flashgen_write_expressions() -> None:
    from flashgen.spec.trace import trace

    def score(score: Any, q: Any, kv: Any) -> Any:
        far = flashgen.maximum(q - kv, 1)
        return flashgen.where(kv < q, score - flashgen.log(far), flashgen.floor(flashgen.sqrt(far)))

    assert "where(kv < q" in trace(score, kind="score")
    assert set(flashgen.__all__) >= {"exp", "sigmoid", "tanh", "minimum"}


def test_interpreter_takes_the_same_names(documents: Kernel, qkv: tuple[Tensor, ...]) -> None:
    given = case_of("causal document").given()
    assert torch.equal(interpret(documents.plan, *qkv, **given)[0], documents(*qkv, **given))
