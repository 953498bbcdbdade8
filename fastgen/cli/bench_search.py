"""`fastgen bench search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from fastgen.cli.methods import VariantOption, check_device, find_model
from fastgen.cli.notes import measuring
from fastgen.cli.publish import DeviceOption, DtypeOption, JsonOption, OutOption, check_files, publish, report

__all__ = ["search"]


def search(
    model: Annotated[str, typer.Option(help="Diffusion pipeline: name, folder or Hub id.")] = "tiny",
    variant: VariantOption = None,
    verifier: Annotated[
        str, typer.Option(help="Verifier to search with: a name, NAME:FOLDER, or a folder.")
    ] = "shapes-verifier",
    heldout: Annotated[str | None, typer.Option(help="A second verifier that scores the found pictures.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help='"POLICY [SETTING=VALUE …]", e.g. "threshold tau=0.7 starts=4" or "svdd chains=1"; repeat. '
            "Default: all; the pipeline without a search is always measured."
        ),
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(help="NFE for each prompt; repeat. Default: 48, 100, 200, 350, 500.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Searches of each prompt.")] = 3,
    limit: Annotated[int, typer.Option(help="Only the first N prompts of each task; 60 are all.")] = 2,
    sampler: Annotated[str, typer.Option(help="ancestral, euler-maruyama or rollover.")] = "ancestral",
    batch_size: Annotated[int, typer.Option(help="Samples of a forward pass.")] = 32,
    folder: Annotated[Path, typer.Option(help="Folder of pictures and records; a killed run continues there.")] = Path(
        "fastgen-bench-search"
    ),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    plot: Annotated[Path | None, typer.Option(help="PNG of score against NFE and seconds (extra: report).")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Noise search: ShapesWorld-GenEval against NFE and seconds for all policies, with paired tests."""
    from fastgen.checks import check_choice
    from fastgen.evaluation.verifiers.names import verifier_class
    from fastgen.pipelines.noise_search import SamplerName
    from fastgen.pipelines.search.names import POLICIES

    check_device(device, dtype)
    find_model(model, variant)
    check_choice("--sampler", sampler, get_args(SamplerName))
    for name in (verifier, *([] if heldout is None else [heldout])):
        verifier_class(name)
    for text in policy or []:
        check_choice("--policy", text.split()[0], ["none", *POLICIES])
    check_files(out, folder=folder, plot=plot)
    with measuring() as notes:
        from fastgen.evaluation.benchmarks.search import BUDGETS, VARIANTS, benchmark_search
        from fastgen.evaluation.search_results import search_markdown, search_plot

        result = benchmark_search(
            model,
            folder,
            variant=variant,
            verifier=verifier,
            heldout=heldout,
            policies=policy or VARIANTS,
            budgets=budget or BUDGETS,
            seeds=seeds,
            limit=limit,
            sampler=sampler,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            report=report,
        )
        if plot is not None:
            search_plot(result, plot)
    publish(result, out, as_json, search_markdown(result), notes.texts)
