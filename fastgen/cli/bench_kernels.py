"""`fastgen bench kernels`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from fastgen.cli.methods import check_device
from fastgen.cli.publish import DeviceOption, JsonOption, OutOption, check_files, publish

__all__ = ["kernels"]


def kernels(
    op: Annotated[
        list[str] | None,
        typer.Option(help="Only this operation (with --end-to-end: models whose names begin so); repeat for several."),
    ] = None,
    device: DeviceOption = "cpu",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure compiled references.")] = True,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Steps of whole models with random weights, kernels on and off.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="After this many, references are no longer compiled and no other model is begun.")
    ] = 110.0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fused kernels against their references, eager and compiled, and against the memory's speed."""
    from fastgen.io import atomic_write_json

    check_device(device)
    check_files(out)
    with contextlib.redirect_stdout(sys.stderr):
        from fastgen.evaluation.benchmarks.kernels import benchmark_kernels
        from fastgen.evaluation.kernel_results import kernels_markdown

        result = benchmark_kernels(
            op,
            device=device,
            compile=compile,
            end_to_end=end_to_end,
            seconds=seconds,
            report=lambda line: typer.echo(line, err=True),
            save=lambda result: None if out is None else atomic_write_json(out, result),
        )
    publish(result, out, as_json, kernels_markdown(result))
