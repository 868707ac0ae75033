"""The machine that flashgen runs on: `flashgen doctor`, `flashgen cache`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import click

from flashgen.cli.arguments import json_option
from flashgen.cli.terminal import console, new_table, print_json, size


@dataclass(frozen=True)
class Finding:
    """One thing that flashgen uses, and what is the matter with it."""

    name: str
    status: Literal["ok", "missing", "absent"]  # missing: something will fail; absent: something is left out
    detail: str
    remedy: str = ""


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and how to get it.

    Exits with 1 where something is missing that building or running needs.
    """
    findings = [
        finding
        for look in (_python, _compiler, _headers, _torch, _gpus, _cache, _peers)
        for finding in look()
    ]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = new_table("", "", "", show_header=False)
        for finding in findings:
            detail = f"{finding.detail}\n{finding.remedy}" if finding.remedy else finding.detail
            table.add_row(finding.status, finding.name, detail)
        console().print(table)
    if any(finding.status == "missing" for finding in findings):
        raise click.exceptions.Exit(1)


def _python() -> Iterator[Finding]:
    from importlib.metadata import version

    from flashgen._version import __version__

    yield Finding("flashgen", "ok", __version__)
    yield Finding("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    libraries = ("sympy", "pydantic", "jinja2", "numpy", "click", "rich")
    yield Finding("libraries", "ok", ", ".join(f"{name} {version(name)}" for name in libraries))


def _compiler() -> Iterator[Finding]:
    from flashgen.build.nvrtc import compiler_id

    yield _attempt("NVRTC", "missing", compiler_id)


def _headers() -> Iterator[Finding]:
    from flashgen.build.nvrtc import toolkit_headers

    yield _attempt("CUDA headers", "missing", lambda: str(toolkit_headers()))


def _torch() -> Iterator[Finding]:
    def version() -> str:
        import torch

        return (
            f"{torch.__version__}, CUDA {torch.version.cuda}"
            if torch.version.cuda
            else f"{torch.__version__} for CPUs"
        )

    yield _attempt(
        "torch", "missing", version, "pip install 'flashgen[torch]'; planning and building do without"
    )


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        reason = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        yield Finding(
            "GPU", "absent", f"{reason}: kernels are built, and run through the interpreter on the CPU"
        )
        return
    from flashgen.errors import LaunchError
    from flashgen.runtime.devices import target_of

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        chip = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        try:
            yield Finding(f"GPU {index}", "ok", f"{chip}: {target_of(torch.device('cuda', index))}")
        except LaunchError:
            yield Finding(
                f"GPU {index}", "missing", f"{chip}: no target of flashgen's", "`flashgen targets` lists them"
            )
    yield from _driver()


def _driver() -> Iterator[Finding]:
    """A cubin loads on drivers of the compiler's CUDA major version and newer."""
    try:
        from cupy.cuda import nvrtc, runtime

        driver, compiler = runtime.driverGetVersion(), nvrtc.getVersion()
    except Exception as error:  # whatever a half-installed CUDA raises is what there is to report
        yield Finding("driver", "missing", f"CuPy cannot ask it: {_line(error)}")
        return
    detail = f"for CUDA {driver // 1000}.{driver % 1000 // 10}"
    if driver // 1000 < compiler[0]:
        remedy = f"update the driver, or pip install 'flashgen[cuda{driver // 1000}]'"
        yield Finding(
            "driver", "missing", f"{detail}; the compiler is CUDA {compiler[0]}.{compiler[1]}", remedy
        )
    else:
        yield Finding("driver", "ok", detail)


def _cache() -> Iterator[Finding]:
    from flashgen.build import cache_dir

    yield _attempt("cache", "missing", lambda: str(cache_dir()))


def _peers() -> Iterator[Finding]:
    from importlib.util import find_spec

    modules = {"FA3": "flash_attn_interface", "FA4": "flash_attn", "FlashInfer": "flashinfer"}
    found = [name for name, module in modules.items() if find_spec(module)]
    absent = [name for name in modules if name not in found]
    yield Finding(
        "peers",
        "ok" if found else "absent",
        f"`flashgen bench` compares with torch's backends{''.join(f', {name}' for name in found)}"
        + (f"; not installed: {', '.join(absent)}" if absent else ""),
    )


def _attempt(
    name: str, otherwise: Literal["missing", "absent"], look: Callable[[], str], remedy: str = ""
) -> Finding:
    from flashgen.errors import FlashgenError

    try:
        return Finding(name, "ok", look())
    except FlashgenError as error:
        problem = error.problems[0]
        return Finding(name, otherwise, problem.message, problem.hint or remedy)
    except Exception as error:  # a broken installation may raise anything, and the doctor's task is to say it
        return Finding(name, otherwise, f"cannot be imported: {_line(error)}", remedy)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@click.group(invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """List or clear the compiled kernels kept on this machine."""
    if context.invoked_subcommand is None:
        context.invoke(list_entries, as_json=False)


@cache.command("list")
@json_option
def list_entries(as_json: bool) -> None:
    """List the cached kernels."""
    from flashgen.build.cache import cache_dir, entries

    found = sorted(entries(), key=lambda entry: (entry.kernel, entry.created))
    if as_json:
        print_json(
            {
                "folder": str(cache_dir()),
                "entries": [asdict(entry) | {"path": str(entry.path)} for entry in found],
            }
        )
        return
    from datetime import datetime

    table = new_table("kernel", "target", "size", "built", "key")
    for entry in found:
        built = datetime.fromtimestamp(entry.created).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.kernel, entry.target, size(entry.size), built, entry.key[:12])
    if found:
        console().print(table)
    total = sum(entry.size for entry in found)
    click.echo(f"{len(found)} kernels, {size(total)} in {cache_dir()}")


@cache.command("clear")
@json_option
def clear_entries(as_json: bool) -> None:
    """Remove every cached kernel; they are rebuilt when next asked for."""
    from flashgen.build.cache import cache_dir, clear

    removed = clear()
    if as_json:
        print_json({"folder": str(cache_dir()), "removed": removed})
    else:
        click.echo(f"removed {removed} kernels from {cache_dir()}")
