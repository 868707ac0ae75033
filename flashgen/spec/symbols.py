"""The symbols that masks and scores are written in.

Of the integers nothing is assumed but that they are integers: what holds of them (lengths are never negative)
is for the proofs to know. A tensor's element is an applied undefined function of the axes' subscripts.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

Q = sympy.Symbol("q", integer=True)
KV = sympy.Symbol("kv", integer=True)
SEQLEN_Q = sympy.Symbol("seqlen_q", integer=True)
SEQLEN_KV = sympy.Symbol("seqlen_kv", integer=True)
BATCH = sympy.Symbol("batch", integer=True)
HEAD = sympy.Symbol("head", integer=True)
HEAD_KV = sympy.Symbol("head_kv", integer=True)
SCORE = sympy.Symbol("score", real=True)
SCALE = sympy.Symbol("scale", real=True)

MASK_VARIABLES: Mapping[str, sympy.Symbol] = {
    symbol.name: symbol for symbol in (Q, KV, SEQLEN_Q, SEQLEN_KV, BATCH, HEAD, HEAD_KV)
}
"""What a mask may speak of, by name: positions on the key timeline, lengths, which head, which batch."""

SCORE_VARIABLES: Mapping[str, sympy.Symbol] = {**MASK_VARIABLES, "score": SCORE, "scale": SCALE}
"""What a score may speak of: `score` is ``scale * (Q . K)`` of one query and one key."""

__all__ = [
    "BATCH",
    "HEAD",
    "HEAD_KV",
    "KV",
    "MASK_VARIABLES",
    "SCALE",
    "SCORE",
    "SCORE_VARIABLES",
    "SEQLEN_KV",
    "SEQLEN_Q",
    "Q",
]
