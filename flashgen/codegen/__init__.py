"""plan -> source: one readable CUDA file for one plan. Needs no GPU and no compiler."""

from flashgen.codegen.elements import PREPARE_THREADS
from flashgen.codegen.printer import cuda
from flashgen.codegen.source import Source, render, render_standalone

__all__ = ["PREPARE_THREADS", "Source", "cuda", "render", "render_standalone"]
