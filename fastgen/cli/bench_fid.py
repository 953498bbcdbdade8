"""`fastgen bench fid`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli.publish import check_files, publish

__all__ = ["fid"]


def fid(
    images: Annotated[int, typer.Option(help="Extracted with each number of processes.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Images in one pass of the network.")] = 32,
    runs: Annotated[int, typer.Option(help="Measured batches.")] = 5,
    processes: Annotated[list[int] | None, typer.Option(help="Repeat for several. Default: 1 and 2.")] = None,
    features: Annotated[int, typer.Option(help="Set whose metrics are computed for their memory; 0: none.")] = 50_000,
    reference: Annotated[int, typer.Option(help="Size of its reference.")] = 10_000,
    manifold: Annotated[
        int | None, typer.Option(help="Features taken for precision and recall; all if not set.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")] = False,
) -> None:
    """What the FID family costs beside its network: statistics, several processes, memory."""
    from fastgen.cli.eval_run import check_device

    check_device(device)
    check_files(out)
    from fastgen.evaluation.benchmarks.fid import benchmark_fid, fid_markdown

    result = benchmark_fid(
        images,
        batch_size=batch_size,
        runs=runs,
        processes=processes or (1, 2),
        features=features,
        reference=reference,
        manifold=manifold,
        device=device,
    )
    publish(result, out, as_json, fid_markdown(result))
