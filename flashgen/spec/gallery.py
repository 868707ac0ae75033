"""The gallery: named masks and scores, each a formula in the expression language.

A new one is one more `Entry` here and a spec in ``specs/``. The tiles that it visits, its CUDA, its
derivative and its tests follow from the formula. An entry's formula may speak of other entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flashgen.spec.inputs import TensorInput


@dataclass(frozen=True)
class EntryParameter:
    """What an entry is called with: ``window(4096)``. A constant is held to `least`.

    `sample` is a small value to try the entry with.
    """

    name: str
    sample: int = 40
    kind: Literal["int", "float"] = "int"
    least: int | None = 1


@dataclass(frozen=True)
class Entry:
    """A named mask (a condition) or score (a number).

    `tensors` are what the formula reads, given by the caller. A spec that declares a tensor of the same name
    replaces its axes and dtype, so a formula names no axis that it does not speak of. `sink`: the softmax
    gets a learnable logit per head.
    """

    name: str
    kind: Literal["mask", "score"]
    formula: str
    about: str
    reference: str = ""
    parameters: tuple[EntryParameter, ...] = ()
    tensors: tuple[TensorInput, ...] = ()
    sink: bool = False

    @property
    def call(self) -> str:
        """How it is written: ``causal``, ``window(size)``."""
        arguments = ", ".join(parameter.name for parameter in self.parameters)
        return f"{self.name}({arguments})" if arguments else self.name

    @property
    def sample(self) -> str:
        """The entry called with small values: ``window(40)``."""
        arguments = ", ".join(str(parameter.sample) for parameter in self.parameters)
        return f"{self.name}({arguments})" if arguments else self.name


_SIZE = EntryParameter("size")

_MASKS = (
    Entry("full", "mask", "true", "every query sees every key"),
    Entry("causal", "mask", "kv <= q", "a query sees the keys up to its own position"),
    Entry(
        "window",
        "mask",
        "kv <= q and q - kv < size",
        "causal, and only the last `size` keys, its own included",
        "Beltagy et al., Longformer, arXiv:2004.05150; Jiang et al., Mistral 7B, arXiv:2310.06825",
        parameters=(_SIZE,),
    ),
    Entry(
        "band",
        "mask",
        "abs(q - kv) <= radius",
        "the keys at most `radius` away, on both sides",
        "Beltagy et al., Longformer, arXiv:2004.05150; ModernBERT, arXiv:2412.13663",
        parameters=(EntryParameter("radius", least=0),),
    ),
    Entry(
        "longformer",
        "mask",
        "band(radius) or kv < tokens or q < tokens",
        "a band, and the first `tokens` positions, which see and are seen by all",
        "Beltagy et al., Longformer, arXiv:2004.05150",
        parameters=(EntryParameter("radius", least=0), EntryParameter("tokens", 5)),
    ),
    Entry(
        "sink_window",
        "mask",
        "kv <= q and (kv < sinks or q - kv < size)",
        "causal: the first `sinks` keys, and the last `size`",
        "Xiao et al., StreamingLLM, arXiv:2309.17453",
        parameters=(EntryParameter("sinks", 4), _SIZE),
    ),
    Entry(
        "dilated",
        "mask",
        "kv <= q and q - kv < size * step and (q - kv) % step == 0",
        "causal: every `step`-th key back from its own, `size` of them",
        "Beltagy et al., Longformer, arXiv:2004.05150; Child et al., Sparse Transformers, arXiv:1904.10509",
        parameters=(_SIZE, EntryParameter("step", 3)),
    ),
    Entry(
        "chunked",
        "mask",
        "kv <= q and kv // size == q // size",
        "causal within chunks of `size`, and nothing of the chunks before",
        "Llama 4: transformers, modeling_llama4.py, attention_chunk_size",
        parameters=(_SIZE,),
    ),
    Entry(
        "block_causal",
        "mask",
        "kv // size <= q // size",
        "the blocks of `size` up to its own, all of its own included",
        "Arriola et al., Block Diffusion, arXiv:2503.09573",
        parameters=(_SIZE,),
    ),
    Entry(
        "prefix_lm",
        "mask",
        "kv < prefix or kv <= q",
        "all of the first `prefix` keys, and causal after them",
        "Raffel et al., T5, arXiv:1910.10683, section 3.2.1; PaliGemma, arXiv:2407.07726",
        parameters=(EntryParameter("prefix"),),
    ),
    Entry(
        "natten_2d",
        "mask",
        "abs(kv // width - min(max(q // width, radius), height - 1 - radius)) <= radius"
        " and abs(kv % width - min(max(q % width, radius), width - 1 - radius)) <= radius",
        "pixels of an image, row after row: the square of side 2 radius + 1 around its own, moved inside",
        "Hassani et al., Neighborhood Attention Transformer, arXiv:2204.07143",
        parameters=(EntryParameter("width", 16), EntryParameter("height", 12), EntryParameter("radius", 2)),
    ),
    Entry(
        "document",
        "mask",
        "doc[q] == doc[kv]",
        "sequences packed one after the other: only keys of its own; `doc` never falls along kv",
        "PyTorch FlexAttention; flash-attention's cu_seqlens",
        tensors=(TensorInput("doc", ("batch", "kv"), "int32", sorted=True),),
    ),
    Entry(
        "padding",
        "mask",
        "kv < kv_len",
        "sequences of different lengths, filled up at the end: only the first `kv_len` keys",
        "torch.nn.MultiheadAttention, key_padding_mask",
        tensors=(TensorInput("kv_len", ("batch",), "int32"),),
    ),
)

_T5_TABLE = TensorInput("t5_table", ("head", 32), "fp32", grad=True)

# A thousandth is added under the floor, so that no rounding of the logarithm can leave a distance one bucket
# short. The next distance below a bucket's first is further away than that, up to where buckets end.
_SCORES = (
    Entry(
        "alibi",
        "score",
        "score + slope * (kv - q)",
        "a penalty that grows with the distance, at a slope of each head's own; with a causal mask",
        "Press et al., ALiBi, arXiv:2108.12409",
        tensors=(TensorInput("slope", ("head",), "fp32"),),
    ),
    Entry(
        "softcap",
        "score",
        "cap * tanh(score / cap)",
        "scores squeezed smoothly into (-cap, cap)",
        "Gemma 2, arXiv:2408.00118, section 2",
        parameters=(EntryParameter("cap", 30, kind="float", least=None),),
    ),
    Entry(
        "t5_bias",
        "score",
        "score + t5_table[where(q - kv < 16, max(q - kv, 0),"
        " min(16 + floor(16 * log(max(q - kv, 1) / 16) / log(8) + 0.001), 31))]",
        "a learned bias per distance back, in 32 buckets that widen from 16 to 128 (decoder)",
        "Raffel et al., T5, arXiv:1910.10683; transformers, modeling_t5.py, _relative_position_bucket",
        tensors=(_T5_TABLE,),
    ),
    Entry(
        "t5_encoder_bias",
        "score",
        "score + t5_table[where(kv > q, 16, 0) + where(abs(q - kv) < 8, abs(q - kv),"
        " min(8 + floor(8 * log(max(abs(q - kv), 1) / 8) / log(16) + 0.001), 15))]",
        "a learned bias per distance, in 16 buckets on each side that widen from 8 to 128 (encoder)",
        "Raffel et al., T5, arXiv:1910.10683; transformers, modeling_t5.py, _relative_position_bucket",
        tensors=(_T5_TABLE,),
    ),
    Entry(
        "relative_bias",
        "score",
        "score + distance_bias",
        "a learned bias for every distance",
        "Raffel et al., T5, arXiv:1910.10683, without buckets; Liu et al., Swin, arXiv:2103.14030",
        tensors=(TensorInput("distance_bias", ("head", "q - kv"), "fp32", grad=True),),
    ),
    Entry(
        "dense_bias",
        "score",
        "score + bias",
        "a bias for every query and key, learned or given",
        "torch.nn.functional.scaled_dot_product_attention, attn_mask; AlphaFold 2's pair bias",
        tensors=(TensorInput("bias", ("head", "q", "kv"), "bf16", grad=True),),
    ),
    Entry(
        "sink",
        "score",
        "score",
        "a learned logit of each head joins the softmax's denominator, so that a query may attend to nothing",
        "OpenAI, gpt-oss, arXiv:2508.10925; Miller, Attention Is Off By One",
        sink=True,
    ),
)

GALLERY: Mapping[str, Entry] = {entry.name: entry for entry in (*_MASKS, *_SCORES)}

SAMPLES: Mapping[str, str] = {
    "doc": "4 * (kv + 29 * batch) * (kv + seqlen_kv) // (seqlen_kv * seqlen_kv)",
    "kv_len": "max(seqlen_kv - seqlen_kv * (batch + 1) // 5, 0)",
    "slope": "exp(-8 * log(2) * (head + 1) / heads_q)",
    "t5_table": "(i * 7 + head * 3) % 11 / 5 - 1",
    "distance_bias": "(distance * 7 + head * 3) % 17 / 8 - 1",
    "bias": "(q * 5 + kv * 3 + head) % 13 / 6 - 1",
}
"""What the gallery's tensors can be tried with: an element in the indices of the axes, and in the sizes.

The index on an axis is named as the axis is; on the axis q - kv it is `distance`, in a table `i`.
"""

__all__ = ["GALLERY", "SAMPLES", "Entry", "EntryParameter"]
