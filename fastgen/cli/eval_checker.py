"""`fastgen eval checker`: the validation of the ShapesWorld checker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli.eval_run import Device, Json, check_device, progress
from fastgen.errors import FastgenError


def checker(
    n: Annotated[int, typer.Option("--n", help="Clean renders.")] = 2000,
    n_perturbed: Annotated[
        int | None, typer.Option("--n-perturbed", help="Renders at each perturbation level; default min(n, 500).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="ShapesWorld seed; default is no training seed.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the result here as JSON, and its table beside it as .md.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Accuracy and calibration of the ShapesWorld checker on renders with known truth."""
    if n < 1:
        raise FastgenError(f"--n: {n} is not allowed, needs >= 1")
    if n_perturbed is not None and not 1 <= n_perturbed <= n:
        raise FastgenError(f"--n-perturbed: {n_perturbed} is not allowed, needs 1 .. --n ({n})")
    if seed is not None and not 0 <= seed < 2**63:
        raise FastgenError(f"--seed: {seed} is not allowed, needs 0 .. 2**63 - 1")
    if out is not None and out.suffix != ".json":
        raise FastgenError(f"--out: {out} is not allowed, needs a name that ends in .json")
    check_device(device)

    from fastgen.environment import environment
    from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, fingerprint, load_detector
    from fastgen.evaluation.geneval.validation import VALIDATION_SEED, validate_checker
    from fastgen.evaluation.results_page import checker_markdown
    from fastgen.io import atomic_write_bytes, atomic_write_json, check_writable

    if out is not None:
        check_writable(out.parent)
    detector = load_detector(device=device)
    with progress() as on_progress:
        data = validate_checker(
            ShapesChecker(detector, device=device),
            n,
            seed=VALIDATION_SEED if seed is None else seed,
            n_perturbed=n_perturbed,
            on_progress=lambda done, total: on_progress("check", done, total),
        )
    data |= {"detector": fingerprint(detector), "environment": environment()}
    text = checker_markdown(data)
    if out is not None:
        atomic_write_json(out, data)
        atomic_write_bytes(out.with_suffix(".md"), text.encode())
    typer.echo(json.dumps(data) if as_json else text)
