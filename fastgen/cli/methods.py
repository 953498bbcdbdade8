"""What the commands that draw with a model share: its options, the methods, and what each asks of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.pipelines.accelerate import Plan
    from fastgen.pipelines.loading.checkpoint import Checkpoint

__all__ = [
    "METHODS",
    "BatchInvariantOption",
    "BatchSizeOption",
    "DrafterOption",
    "MethodOption",
    "PlanOption",
    "VariantOption",
    "best_device",
    "check_device",
    "check_method",
    "check_method_name",
    "find_model",
    "read_plan",
    "variant_option",
]


def variant_option(name: str = "--variant") -> Any:
    """The option for the weight files of `--model`; `name` where `--variant` means something else."""
    return typer.Option(name, help="Variant of the weight files, e.g. fp16.", show_default=False)


VariantOption = Annotated[str | None, variant_option()]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="base, dc (dynamic chunking), speculative (decoding of image tokens) or search (for the noise "
        "with the picture that a verifier scores best). Default: the model's own.",
        show_default=False,
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="A drafter: folder, Hub id or none. Default: the model's own (speculative).",
        show_default=False,
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="Turn on what a plan of `fastgen tune` chose.", show_default=False)
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", help="Largest batch.")]
BatchInvariantOption = Annotated[
    bool,
    typer.Option(
        "--batch-invariant/--fast-batches",
        help="Draw one picture at a time, so that pixels do not depend on the batch; slower.",
    ),
]

#: Methods, each with the embedded model that it takes by default.
METHODS = {"base": "tiny", "dc": "small-dc", "speculative": "tiny-janus", "search": "tiny"}


def best_device() -> str:
    """What `--device auto` means."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str, dtype: str = "auto") -> None:
    """FastgenError when this machine cannot compute on `device` in `dtype`."""
    from fastgen.pipelines.loading import resolve_device

    resolve_device(device, dtype)


def check_method_name(method: str | None) -> None:
    """FastgenError when there is no such method; None leaves the choice to the model."""
    if method is not None and method not in METHODS:
        raise FastgenError(f"--method: {method!r} is not allowed, needs one of {', '.join(METHODS)}")


def check_method(method: str | None, checkpoint: Checkpoint) -> None:
    """FastgenError when the model cannot draw by `method`; what decoding needs is looked for where it is loaded."""
    model, is_chunked = checkpoint.model, checkpoint.has_dynamic_chunking
    if method in ("base", "dc") and (method == "dc") != is_chunked:
        raise FastgenError(f"--method {method}: model {model!r} has {'' if is_chunked else 'no '}dynamic chunking")
    if method == "search" and checkpoint.draws_tokens:
        raise FastgenError(f"--method search: model {model!r} draws tokens, there is no noise to search")


def find_model(model: str, variant: str | None = None, revision: str | None = None) -> Checkpoint:
    """The model with its configuration, and its weight files checked if they are on this machine.

    Raises:
        FastgenError: there is no such model, it is broken, or it has no weights of this variant.
    """
    from fastgen.pipelines.loading.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(model, variant, revision)
    if checkpoint.hub_id is None:
        checkpoint.check_weights()
    return checkpoint


def read_plan(path: Path, pipeline: type, method: str | None, checkpoint: Checkpoint) -> Plan:
    """A plan of `fastgen tune` for a model.

    Raises:
        FastgenError: a broken plan, one of another pipeline, model or version, or for a method that takes none.
    """
    from fastgen.cli.plan import model_digest
    from fastgen.pipelines.accelerate import Plan

    if method in ("search", "speculative"):
        raise FastgenError(f"--plan: not with --method {method}")
    plan = Plan.load(path)
    if plan.pipeline != pipeline.__name__:
        raise FastgenError(f"--plan: {path} is of a {plan.pipeline}, and the model is a {pipeline.__name__}")
    plan.check_measured(weights=model_digest(checkpoint))
    return plan
