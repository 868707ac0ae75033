"""Specs as text: one with every key, and one with no more than there must be."""

FULL = """\
flashgen: 1                     # version of the language
name: llama3-8b
attention:
  heads: {q: 32, kv: 8}
  head_dim: 128
  dtype: bf16
  scale: 1/sqrt(head_dim)
  mask: window(4096)
  align: bottom_right
passes: [forward]
workload: {batch: 8, seqlen: 4096}
tiles: {q: 128, kv: 64, schedule: {family: sm90, overlap: false}}
target: auto
"""
LEAST = "flashgen: 1\nname: a\nattention: {heads: 2, head_dim: 64}\n"
