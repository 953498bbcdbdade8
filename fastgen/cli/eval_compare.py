"""`fastgen eval compare`: a regression gate for CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli.publish import JsonOption

REGRESSION = 3
"""Exit status of a regression; 2 is a mistake in the call, as everywhere, e.g. results that do not compare."""


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="The baseline: scores.json or a result of eval fid.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The result to judge.")],
    confidence: Annotated[
        float, typer.Option("--confidence", help="Confidence of all gated intervals together.")
    ] = 0.95,
    margin: Annotated[
        float, typer.Option("--margin", help="Allowed loss: 0.01 is one point of a score, one percent of a distance.")
    ] = 0.0,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Fail unless a loss beyond the margin can be excluded (non-inferiority)."),
    ] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Number that decides; repeat; all. Default: the mean of tasks, or all distances."),
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option("--max-slowdown", help="Fail when a picture takes this many times as long.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the comparison here as JSON.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Compare two results: exit status 0 without a regression, 3 with one, 2 when they do not compare."""
    from fastgen.evaluation.compare import compare as compare_results
    from fastgen.evaluation.measures import read_results
    from fastgen.io import atomic_write_json, check_writable

    first, second = read_results([a, b])
    found = compare_results(
        first, second, confidence=confidence, margin=margin, gates=gate, prove=prove, max_slowdown=max_slowdown
    )
    if out is not None:
        check_writable(out.parent)
        atomic_write_json(out, found.as_dict())
    typer.echo(json.dumps(found.as_dict()) if as_json else found.markdown())
    return REGRESSION if found.regressed else 0
