"""cubin -> kernel: loading, launching, torch ops, and the interpreter that runs plans without a GPU."""

from flashgen.runtime.api import attention, load, prepare
from flashgen.runtime.derivative import Gradients, reference_gradients
from flashgen.runtime.interpreter import interpret
from flashgen.runtime.kernel import Kernel
from flashgen.runtime.preparation import Prepared
from flashgen.runtime.reference import reference, same_precision, tolerance

__all__ = [
    "Gradients",
    "Kernel",
    "Prepared",
    "attention",
    "interpret",
    "load",
    "prepare",
    "reference",
    "reference_gradients",
    "same_precision",
    "tolerance",
]
