"""`fastgen bench serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastgen.cli.methods import VariantOption, find_model
from fastgen.cli.notes import measuring
from fastgen.cli.publish import JsonOption, OutOption, check_files, publish

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Option(help="Model to serve: name, folder or Hub id.")] = "tiny",
    variant: VariantOption = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 5,
    pictures: Annotated[int, typer.Option(help="Pictures of a round.")] = 24,
    minutes: Annotated[
        float, typer.Option(help="Then keep eight clients busy for this long, and compare every picture.")
    ] = 0.0,
    replicas: Annotated[
        int, typer.Option(help="Replicas of Ray Serve to draw on; one is killed every minute of that load.")
    ] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """What `fastgen serve` gains by shared batches, and whether it stays right under load."""
    from fastgen.cli.serve import check_libraries

    check_libraries(ray=replicas > 0)
    find_model(model, variant)
    check_files(out)
    with measuring() as notes:
        from fastgen.evaluation.benchmarks.serve import benchmark_serve, serve_markdown

        result = benchmark_serve(
            model,
            rounds=rounds,
            pictures=pictures,
            minutes=minutes,
            variant=variant,
            replicas=replicas,
            report=lambda line: typer.echo(line, err=True),
        )
    publish(result, out, as_json, serve_markdown(result), notes.texts)
