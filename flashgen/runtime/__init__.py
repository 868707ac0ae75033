"""cubin -> kernel: loading, launching, torch ops, and the interpreter that runs plans without a GPU."""

from flashgen.runtime.api import attention, load
from flashgen.runtime.interpreter import interpret
from flashgen.runtime.kernel import Kernel
from flashgen.runtime.reference import reference, same_precision, tolerance

__all__ = ["Kernel", "attention", "interpret", "load", "reference", "same_precision", "tolerance"]
