"""`fastgen train search-calibrate`: thresholds of a noise search for a model with its verifier.

Trajectories are drawn with the search's sampler on prompts outside the evaluation set. At every time several
candidates of one parent are scored, and the first one continues. A checker decides which final pictures are correct;
without a checker, their scores are used instead.

    <folder>/search-calibrate.json     settings; other settings need another folder
    <folder>/trajectories/00000.json   up to 16 trajectories, written atomically, so an interrupted run resumes
    <folder>/thresholds.json           the calibration
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fastgen.data.captions import TASKS, caption_metadata, evaluation_prompts, sample_training_caption
from fastgen.environment import commit, environment
from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.rules import evaluate_image
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, fingerprint
from fastgen.evaluation.runner import model_fingerprint
from fastgen.evaluation.verifiers.agreement import agreement
from fastgen.evaluation.verifiers.base import ModelVerifier, Verifier
from fastgen.evaluation.verifiers.names import load_verifier, verifier_class
from fastgen.io import atomic_write_json, check_writable, read_json
from fastgen.pipelines.beginnings import Beginning, read_beginning
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import Checkpoint, find_checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline, SearchInterrupted
from fastgen.pipelines.search.calibration import FILE, Calibration, model_signature
from fastgen.pipelines.search.denoisers.base import denoiser_of
from fastgen.pipelines.search.engine import Chain, Program
from fastgen.pipelines.search.policy import Policy, check_counts
from fastgen.pipelines.settings import pipeline_arguments, pipeline_class
from fastgen.training.threshold_rules import (
    FEWEST,
    LEVEL,
    PRICES,
    precision_curve,
    prospects,
    quantile_rows,
    schedule_at,
    smallest_threshold,
)

__all__ = ["Branching", "calibrate_search", "calibration_captions", "measure"]

RECORD = "search-calibrate.json"
SHAPESWORLD = "shapesworld"
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SETTINGS = ("branches", "guidance_scale", "height", "num_inference_steps", "sampler", "steps", "width")
#: Settings of img2img and inpainting pipelines.
BEGINNING = ("image", "mask", "strength")
_CHUNK = 16


@dataclass
class Branching(Policy):
    """A stochastic trajectory with siblings: the first candidate of each transition continues.

    Attributes:
        branches: candidates per transition.
        times: noise levels of the last call's trajectories, in the model's own interpolant.

    Raises:
        ValueError: branches < 1.
    """

    name: ClassVar[str] = "branching"
    branches: int = 4
    times: tuple[float, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        check_counts(self, "branches")

    def least(self, transitions: int) -> int:
        return self.branches * (transitions + 1)

    def program(self, chain: Chain) -> Program:
        each, sampler, model = range(self.branches), chain.sampler, chain.denoiser.interpolant
        self.times = tuple(sampler.model_level(index, model)[0] for index in range(len(sampler.times)))
        node, *_ = yield chain.ask([chain.first(number) for number in each], 0)
        for step in range(sampler.transitions):
            proposals = [node.step(chain.noise(step, number)) for number in each]
            node, *_ = yield chain.ask(proposals, step + 1, [node] * self.branches)
        return node


def calibration_captions(count: int, seed: int = 0) -> list[Metadata]:
    """ShapesWorld captions with the content of a correct picture, for the six tasks in turn. They are training
    captions: neither evaluation prompts nor their held-out combinations."""
    found = []
    for number in range(count):
        rng = random.Random(f"search-calibrate/{seed}/{number}")
        while (caption := sample_training_caption(rng)).tag != TASKS[number % len(TASKS)]:
            pass
        found.append(Metadata.from_dict(caption_metadata(caption)))
    return found


def calibrate_search(
    model: str,
    verifier: str,
    output: Path,
    *,
    trajectories: int = 1000,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Calibrate and write `output/thresholds.json`; the same call resumes an interrupted one.

    Args:
        model: name, folder or Hub id of a diffusion pipeline.
        verifier: see `load_verifier`.
        output: folder; created if missing.
        trajectories: number of trajectories to draw.
        prompts: used in turn; None takes ShapesWorld captions and the ShapesWorld checker.
        seed: of captions and trajectories.
        batch_size: rows per forward pass.
        settings: of the pipeline and the search: `SETTINGS`, by default the model's own. `image`, `mask` (files) and
            `strength` calibrate the model's img2img or inpainting pipeline, with that picture for every prompt.
        device: to run on.
        report: called after every chunk.

    Raises:
        FastgenError: too few trajectories, no prompt or one of the evaluation set, an unknown setting, model or
            verifier, a model that the search does not support, or a folder of another run.
    """
    if trajectories < 2 * FEWEST:
        raise FastgenError(f"trajectories: {trajectories} is not allowed, needs an integer >= {2 * FEWEST}")
    given = dict(settings or {})
    if unknown := sorted(set(given) - {*SETTINGS, *BEGINNING}):
        raise FastgenError(f"settings: {', '.join(unknown)} is unknown, there are {', '.join(SETTINGS + BEGINNING)}")
    beginning = _beginning(given)
    items = calibration_captions(trajectories, seed) if prompts is None else _in_turn(prompts, trajectories)
    verifier_class(verifier)
    checkpoint = find_checkpoint(model)
    begins = None if beginning is None else beginning.begins
    denoiser_of(pipeline_class(checkpoint, begins=begins))
    asked = _settings(checkpoint, given)
    branches = Branching(asked.pop("branches")).branches
    made = load_verifier(verifier, device=device)
    recorded = asked | ({} if beginning is None else beginning.settings)
    _open(output, checkpoint, made, prompts, seed, branches, recorded)
    dtype = "float32" if device == "cpu" else "auto"
    pipe: Any = load_checkpoint(checkpoint, device=device, dtype=dtype, begins=begins)
    pipe.set_progress_bar_config(disable=True)
    policy, checker = Branching(branches), ShapesChecker() if prompts is None else None
    search = NoiseSearchPipeline(pipe, made, policy)
    call = {"sampler": asked.pop("sampler"), "batch_size": batch_size}
    call["pipeline_kwargs"] = asked | ({} if beginning is None else beginning.arguments)
    rows = _draw(search, policy, checker, output, items, seed, call, report)
    about = {"trajectories": trajectories, "seed": seed, "settings": recorded}
    about |= {"prompts": SHAPESWORLD if prompts is None else len(prompts), "level": LEVEL}
    about |= {"commit": commit(), "environment": environment()}
    about |= {"weights": read_json(output / RECORD).get("weights")}
    if checker is not None:
        about["checker"] = fingerprint(checker.model)
    calibration = measure(rows, str(model), made, model_signature(pipe), about)
    calibration.save(output / FILE)
    return calibration


def measure(
    rows: Sequence[Mapping[str, Any]],
    model: str,
    verifier: Verifier,
    signature: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Calibration:
    """The calibration from trajectories.

    Args:
        rows: "times", "scores" [N][K], "tag" and "correct" (None: not checked) of each trajectory.
    """
    scores = np.array([row["scores"] for row in rows], dtype=np.float64)
    final, judged = scores[:, -1, 0], rows[0]["correct"] is not None
    correct = np.array([bool(row["correct"]) for row in rows])
    bounded = verifier.range == (0.0, 1.0)
    found: dict[str, Any] = {}
    if judged:
        taus = TAUS if bounded else np.quantile(final, TAUS)
        found["curve"] = precision_curve(final, correct, [float(tau) for tau in taus])
        tags = [row["tag"] for row in rows]
        found["agreement"] = [
            agreement(scores[:, time, 0].tolist(), correct.tolist(), tags, bounded) for time in range(scores.shape[1])
        ]
    outcome = correct.astype(np.float64) if judged else final
    lowest = None if verifier.range is None else verifier.range[0]
    return Calibration(
        model=model,
        signature=signature,
        verifier=verifier.name,
        times=tuple(rows[0]["times"]),
        schedules=tuple(schedule_at(price, scores, outcome, lowest) for price in PRICES),
        branches=scores.shape[2],
        wanted="correct" if judged else "score",
        fixed=smallest_threshold(final, correct) if judged else None,
        prospects=prospects(scores, correct) if judged else None,
        quantiles=quantile_rows(scores),
        report=found,
        about=about,
    )


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    if not prompts:
        raise FastgenError("prompts: needs at least one")
    kept_back = {item["prompt"] for item in evaluation_prompts()}
    if wrong := [prompt for prompt in prompts if prompt in kept_back]:
        raise FastgenError(f"prompts: {wrong[0]!r} is an evaluation prompt of ShapesWorld; training must not use it")
    return [prompts[number % len(prompts)] for number in range(count)]


def _beginning(given: dict[str, Any]) -> Beginning | None:
    """The input picture of every trajectory, removed from `given`."""
    image, mask, strength = (given.pop(name, None) for name in BEGINNING)
    return read_beginning(image and Path(str(image)), mask and Path(str(mask)), strength)


def _settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the search's call: the model's defaults, overridden by the user's."""
    own = {"sampler": "ancestral", "branches": 4, **pipeline_arguments(checkpoint.defaults)}
    return own | pipeline_arguments(given)


def _open(
    output: Path,
    checkpoint: Checkpoint,
    verifier: Verifier,
    prompts: Sequence[str] | None,
    seed: int,
    branches: int,
    settings: Mapping[str, Any],
) -> None:
    """Start or resume a run."""
    check_writable(output / "trajectories")
    asked = {"model": model_fingerprint(*checkpoint.folders), "seed": seed, "branches": branches}
    asked |= {"verifier": verifier.name, "settings": dict(settings)}
    asked["prompts"] = SHAPESWORLD if prompts is None else list(prompts)
    if isinstance(verifier, ModelVerifier):
        asked["weights"] = fingerprint(verifier.model)
    path = output / RECORD
    if path.is_file() and (held := read_json(path)) != asked:
        changed = [key for key in asked if not isinstance(held, dict) or held.get(key) != asked[key]]
        raise FastgenError(f"{output}: has trajectories with another {', '.join(changed)}; choose another folder")
    atomic_write_json(path, asked)


def _draw(
    search: NoiseSearchPipeline,
    policy: Branching,
    checker: ShapesChecker | None,
    output: Path,
    items: Sequence[Metadata | str],
    seed: int,
    settings: Mapping[str, Any],
    report: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Draw the missing trajectories; returns all of them."""
    rows: list[dict[str, Any]] = []
    for first in range(0, len(items), _CHUNK):
        part = items[first : first + _CHUNK]
        path = output / "trajectories" / f"{first // _CHUNK:05d}.json"
        known: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        if len(known) < len(part):
            begin = first + len(known)
            known += _trajectories(search, policy, checker, part[len(known) :], seed * 1_000_003 + begin, settings)
            atomic_write_json(path, known)
        rows += known[: len(part)]
        report(len(rows), len(items))
    return rows


def _trajectories(
    search: NoiseSearchPipeline,
    policy: Branching,
    checker: ShapesChecker | None,
    items: Sequence[Metadata | str],
    seed: int,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    prompts = [item if isinstance(item, str) else item.prompt for item in items]
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(items))]
    try:
        output = search(prompts, generator=generators, output_type="np", **settings)
    except SearchInterrupted as error:
        raise error.__cause__ or error from None
    pictures = (np.asarray(output.images) * 255).round().astype(np.uint8)
    found = [None] * len(items) if checker is None else checker.detect(list(pictures))
    rows = []
    for item, report, seen in zip(items, output.reports, found, strict=True):
        right = evaluate_image(item, seen).correct if isinstance(item, Metadata) and seen is not None else None
        rows.append(
            {
                "prompt": report.prompt,
                "tag": item.tag if isinstance(item, Metadata) else "",
                "times": list(policy.times),
                "scores": _by_time(report.trees[0]),
                "correct": right,
            }
        )
    return rows


def _by_time(tree: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Scores [N][K] of a tree's rows (number, parent, time, score).

    Raises:
        FastgenError: a score that is not a number.
    """
    found: dict[int, list[float]] = {}
    for _, _, time, score in tree:
        if score is None or time is None:
            raise FastgenError("verifier: returned a score that is not a number")
        found.setdefault(int(time), []).append(score)
    return [found[time] for time in sorted(found)]
