"""The rows of `fastgen bench dc`: a dense Z-Image with ever fewer steps, its step caches, and dynamic chunking."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline, FirstBlockCacheConfig, MagCacheConfig, ZImagePipeline

from fastgen.data.shapes import ShapesWorld
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.peers import mag_ratios, step_cache, taylor_seer
from fastgen.evaluation.runner import model_fingerprint
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import Checkpoint

__all__ = ["FULL", "LATE", "LITE_CFG", "QUICK", "Choice", "Variant", "variants_of"]

LITE_CFG = 0.9
# Steps near the data keep most tokens and decide least: nothing is dropped before the last three steps.
LATE = (0.7, 0.95, 0.99)
LATE_LITE_CFG = 0.98
_ALL = {"tail_drop": 0.0, "uncond_tail_drop": 0.0}
_CALIBRATION = 8
"""Prompts of the training distribution that MagCache is calibrated with."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows.

    Args:
        tail_drops: rho of both branches, besides none and Lite-CFG; each at every number of steps.
        steps: denoising steps, besides the models' own.
        guidance_scales: besides the models' own, for the dense model, all tokens, and late drops.
        first_block, mag: thresholds of the step caches of the dense model; the first of `first_block` is that of the
            chunked one, too.
        taylor: intervals of TaylorSeer.
    """

    tail_drops: Sequence[float] = (0.1,)
    steps: Sequence[int] = (4, 6, 8, 12, 20)
    guidance_scales: Sequence[float] = ()
    first_block: Sequence[float] = (0.1, 0.3)
    mag: Sequence[float] = (0.06, 0.24)
    taylor: Sequence[int] = (2, 3)


FULL = Choice()
QUICK = Choice((0.1,), (6,), (), (), (0.06,), ())


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: "dense", "dense 6 steps", "dense UniPC 6 steps", "dense first-block-cache 0.1",
            "dc 0 8 steps", "dc 0 lite-cfg 0.9 6 steps", "dc 0.1 8 steps" …
        pipe: the pipeline it belongs to.
        fingerprint: of that pipeline's files.
        settings: of `generate_images`.
        adapt: makes the pipeline that draws.
    """

    name: str
    pipe: DiffusionPipeline
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[Any], AbstractContextManager[Any]] = nullcontext


def variants_of(checkpoints: Sequence[Checkpoint], choice: Choice, peers: bool, device: str) -> Iterator[Variant]:
    """All rows, the dense model as it is first.

    Args:
        checkpoints: of the model with dynamic chunking, and of the dense one.
        choice: which rows.
        peers: with step caches of the dense model.
        device: where the pipelines are loaded to.

    Raises:
        FastgenError: a model without dynamic chunking, or a baseline that is no stock Z-Image.
    """
    chunked, dense = (load_checkpoint(found, device=device, dtype="float32") for found in checkpoints)
    if "tail_drop" not in inspect.signature(type(chunked).__call__).parameters:
        raise FastgenError(f"model: {checkpoints[0].model} has no dynamic chunking")
    if type(dense) is not ZImagePipeline:
        raise FastgenError(f"dense: {checkpoints[1].model} is no stock Z-Image pipeline")
    ours, theirs = (model_fingerprint(*found.folders) for found in checkpoints)
    own, defaults = [int(found.defaults["steps"]) for found in checkpoints], checkpoints[1].defaults
    yield Variant("dense", dense, theirs)
    for steps in choice.steps:
        if steps != own[1]:
            yield Variant(f"dense {steps} steps", dense, theirs, {"steps": steps})
    for name, steps, adapt in _other_solver(chunked, dense, {own[1], *choice.steps}, own[1]):
        yield Variant(f"dense {name} {steps} steps", dense, theirs, {**defaults, "steps": steps}, adapt)
    if peers:
        for name, adapt in _peers(dense, defaults, choice):
            # An adapted pipeline does not know which model it was made of.
            yield Variant(f"dense {name}", dense, theirs, defaults, adapt)
    budgets = {"0": _ALL, f"0 lite-cfg {LITE_CFG:g}": {"tail_drop": 0.0, "uncond_tail_drop": LITE_CFG}}
    budgets |= {f"{rho:g}": {"tail_drop": rho, "uncond_tail_drop": rho} for rho in choice.tail_drops}
    for steps in sorted({own[0], *choice.steps}):
        for name, budget in budgets.items():
            yield Variant(f"dc {name} {steps} steps", chunked, ours, {**budget, "steps": steps})
    late_name, late = f"dc late lite-cfg {LATE_LITE_CFG:g} {own[0]} steps", _late(own[0])
    yield Variant(late_name, chunked, ours, late)
    schedule = {name: value for name, value in checkpoints[0].defaults.items() if name in _ALL}
    if schedule and schedule not in budgets.values():
        yield Variant(f"dc own schedule {own[0]} steps", chunked, ours)
    if peers and choice.first_block:
        # Its transformer takes diffusers' caches itself; as many steps as the dense rows with a cache.
        threshold, cached = choice.first_block[0], {**checkpoints[0].defaults, **_ALL, "steps": own[1]}
        adapt = partial(_cached, config=FirstBlockCacheConfig(threshold=threshold))
        yield Variant(f"dc 0 {own[1]} steps first-block-cache {threshold:g}", chunked, ours, cached, adapt)
    for scale in choice.guidance_scales:
        guided = {"guidance_scale": scale}
        yield Variant(f"dense guidance {scale:g}", dense, theirs, guided)
        full = {**_ALL, "steps": own[0]}
        yield Variant(f"dc 0 {own[0]} steps guidance {scale:g}", chunked, ours, {**full, **guided})
        yield Variant(f"{late_name} guidance {scale:g}", chunked, ours, {**late, **guided})


def _late(steps: int) -> dict[str, Any]:
    """Drops in the last steps, of a generation with `steps` steps."""
    drops = [0.0] * (steps - len(LATE)) + list(LATE)[-steps:]
    return {"tail_drop": drops, "uncond_tail_drop": LATE_LITE_CFG, "steps": steps}


def _peers(
    dense: ZImagePipeline, defaults: dict[str, Any], choice: Choice
) -> Iterator[tuple[str, Callable[[Any], AbstractContextManager[Any]]]]:
    """Names and step caches of the dense model."""
    for threshold in choice.first_block:
        config: Any = FirstBlockCacheConfig(threshold=threshold)
        yield f"first-block-cache {threshold:g}", partial(step_cache, config=config)
    for interval in choice.taylor:
        yield f"taylorseer {interval}", partial(step_cache, config=taylor_seer(interval))
    if choice.mag:
        prompts = list(ShapesWorld(2_718).batch(_CALIBRATION).texts)
        given = {name: defaults[name] for name in ("height", "width", "guidance_scale")}
        ratios = mag_ratios(dense, prompts, int(defaults["steps"]), **given)
        for threshold in choice.mag:
            config = MagCacheConfig(threshold=threshold, mag_ratios=ratios, num_inference_steps=len(ratios))
            yield f"magcache {threshold:g}", partial(step_cache, config=config)


def _other_solver(
    chunked: Any, dense: Any, steps: set[int], most: int
) -> Iterator[tuple[str, int, Callable[[Any], AbstractContextManager[Any]]]]:
    """Name and steps of the dense model with the chunked one's scheduler, where it is another: what a better solver
    gains is no merit of chunking. Up to `most` steps."""
    ours, theirs = (pipe.scheduler for pipe in (chunked, dense))
    if type(ours) is type(theirs) and dict(ours.config) == dict(theirs.config):
        return
    name = re.sub(r"(Multistep|Discrete)?Scheduler$", "", type(ours).__name__)
    for count in sorted(steps):
        if count <= most:
            yield name, count, partial(_scheduled, scheduler=ours)


@contextmanager
def _scheduled(pipe: Any, scheduler: Any) -> Iterator[Any]:
    """A pipeline with another scheduler."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield pipe
    finally:
        pipe.scheduler = own


@contextmanager
def _cached(pipe: Any, config: Any) -> Iterator[Any]:
    """A pipeline with dynamic chunking and a step cache."""
    pipe.transformer.enable_cache(config)
    try:
        yield pipe
    finally:
        pipe.transformer.disable_cache()
