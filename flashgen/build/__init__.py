"""source -> cubin: compiled by NVRTC, checked against its plan, cached on disk. Needs no GPU."""

from flashgen.build.artifact import Cubin
from flashgen.build.artifact import write as write_artifact
from flashgen.build.cache import cache_dir
from flashgen.build.compile import PlanMismatchWarning, build, compile_source
from flashgen.build.resources import Resources, mismatches

__all__ = [
    "Cubin",
    "PlanMismatchWarning",
    "Resources",
    "build",
    "cache_dir",
    "compile_source",
    "mismatches",
    "write_artifact",
]
