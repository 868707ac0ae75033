"""plan -> source: one readable CUDA file for one plan. Needs no GPU and no compiler."""

from flashgen.codegen.printer import cuda
from flashgen.codegen.source import Source, render, render_standalone

__all__ = ["Source", "cuda", "render", "render_standalone"]
