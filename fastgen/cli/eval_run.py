"""What the commands of `fastgen eval` that generate have in common: their options, the run they continue, progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import search as searching
from fastgen.cli.methods import METHODS, check_method, check_method_name, find_model, read_plan
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.evaluation.distributed import Group, OnProgress
    from fastgen.evaluation.geneval.metadata import Metadata
    from fastgen.evaluation.runner import EvaluationRun, Generate
    from fastgen.pipelines.checkpoint import Checkpoint

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="Score this folder (GenEval layout) and generate nothing.")
]
ImagesPerPrompt = Annotated[int, typer.Option("--images-per-prompt", help="Images a prompt.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps; the model's default if not set.")]
GuidanceScale = Annotated[
    float | None, typer.Option("--guidance-scale", help="Guidance; the model's default if not set.")
]
TailDrop = Annotated[float | None, typer.Option("--tail-drop", help="Share of tokens to drop (dynamic chunking).")]
UncondTailDrop = Annotated[
    float | None, typer.Option("--uncond-tail-drop", help="The same for the unconditional branch (Lite-CFG).")
]
TokenBudget = Annotated[
    int | None, typer.Option("--token-budget", help="Exact number of image tokens (dynamic chunking).")
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="base, dc (dynamic chunking), speculative (decoding of image tokens) or search (for the noise whose "
        "picture a verifier scores best). Default: the model's own.",
        show_default=False,
    ),
]
Tree = Annotated[str | None, typer.Option("--tree", help="What a round drafts, e.g. jacobi-12 (speculative).")]
Acceptance = Annotated[str | None, typer.Option("--acceptance", help="What is accepted, e.g. exact (speculative).")]
Quality = Annotated[float | None, typer.Option("--quality", help="Of acceptance cascade, 0 to 1 (speculative).")]
Drafter = Annotated[
    str | None, typer.Option("--drafter", help="Folder, Hub id or none; default: the model's own (speculative).")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Turn on what a plan of `fastgen tune` chose.", show_default=False)
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images at once, at most.")]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant/--fast-batches",
        help="Pixels that do not depend on the batch, or faster batches with pixels equal up to rounding.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the run; every image gets its own from it.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N prompts of each task, for a quick look.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of images and results; a killed run continues there.")]


#: A search, and the settings of each of its pictures.
PlannedSearch = tuple[searching.Search, dict[str, Any]]
#: Settings of a run that `generate_images` takes.
_DRAWING = (
    *("steps", "guidance_scale", "tail_drop", "uncond_tail_drop", "token_budget"),
    *("tree", "acceptance", "quality"),
)


@dataclass(frozen=True, slots=True)
class Generation:
    """The options of generation, by the names of `RunSettings`; `model` None when a folder is scored instead."""

    model: str | None
    variant: str | None
    images_per_prompt: int
    steps: int | None
    guidance_scale: float | None
    tail_drop: float | None
    uncond_tail_drop: float | None
    token_budget: int | None
    method: str | None
    tree: str | None
    acceptance: str | None
    quality: float | None
    drafter: str | None
    policy: str | None
    verifier: str | None
    max_nfe: int | None
    target_score: float | None
    sampler: str | None
    tau: float | None
    starts: int | None
    chains: int | None
    explore: float | None
    explore_uncond: float | None
    preview: str | None
    plan: Path | None
    batch_size: int
    batch_invariant: bool
    seed: int
    limit: int | None
    device: str
    dtype: str

    def check(self, images: Path | None) -> None:
        """FastgenError naming the first option that is out of its range, or that does not go with `images`."""
        for name in ("images_per_prompt", "steps", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastgenError(f"{_option(name)}: {value} is not allowed, needs >= 1")
        guidance = self.guidance_scale
        if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
            raise FastgenError(f"--guidance-scale: {guidance} is not allowed, needs a number >= 0")
        if not 0 <= self.seed < 2**63:
            raise FastgenError(f"--seed: {self.seed} is not allowed, needs 0 .. 2**63 - 1")
        budget = self._options("tail_drop", "uncond_tail_drop", "token_budget")
        _check_budget(budget)
        check_method_name(self.method)
        decoding = self._options("tree", "acceptance", "quality", "drafter")
        _check_decoding(self.method, decoding)
        search = self._search()
        searching.check_options(self.method, search, save_tree=False)
        if images is not None:
            others = self._options("model", "variant", "steps", "guidance_scale", "limit", "method", "plan")
            refuse_with_images(others | budget | decoding | {_option(name): value for name, value in search.items()})
        check_device(self.device, self.dtype)
        if images is None and self.model != "renders":
            self._check_model()

    def _check_model(self) -> None:
        """FastgenError when the model is not there, or does not take the options; loads no weights."""
        from fastgen.pipelines.checkpoint import find_drafter

        checkpoint = find_model(self.model or METHODS[self.method or "base"], self.variant)
        check_method(self.method, checkpoint)
        self._planned_parts(checkpoint)
        if self.method == "speculative":
            find_drafter(checkpoint, self.drafter)
        if self.method == "search":
            self._planned_search(checkpoint)
        else:
            self._resolved(checkpoint)

    def _planned_parts(self, checkpoint: Checkpoint) -> list[list[Any]] | None:
        """Names and settings of the parts in the plan."""
        if self.plan is None:
            return None
        plan = read_plan(self.plan, self._resolved(checkpoint)[0], self.method)
        return [[part.name, part.settings] for part in plan.parts]

    def _resolved(self, checkpoint: Checkpoint) -> tuple[type, dict[str, Any]]:
        """Class and settings of the model's pipeline."""
        from fastgen.pipelines.arguments import SETTINGS
        from fastgen.pipelines.settings import pipeline_class, resolve_settings

        kind = pipeline_class(checkpoint, self.method)
        return kind, resolve_settings(kind, checkpoint, {name: getattr(self, name, None) for name in SETTINGS})

    def _options(self, *names: str) -> dict[str, Any]:
        return {_option(name): getattr(self, name) for name in names}

    def _search(self) -> dict[str, Any]:
        """Settings of a search, as `plan_search` takes them. No limit of seconds: what is found would depend on the
        machine's load, and a run that was interrupted would not end as one that was not."""
        from fastgen.pipelines.arguments import SEARCH_SETTINGS

        return {name: getattr(self, name) if name != "max_seconds" else None for name in SEARCH_SETTINGS}

    def open(
        self,
        benchmark: str,
        prompts: Sequence[Metadata],
        out: Path | None,
        group: Group,
        drawers: Mapping[str, Generate] | None = None,
    ) -> GenerationRun:
        """The run in `out`; without one, in a folder of the working directory that is named after its settings, so
        that the same command continues the same run and another one starts its own.

        Args:
            drawers: names that are no model -> what draws for them.
        """
        import hashlib

        from fastgen.evaluation.runner import EvaluationRun, RunSettings
        from fastgen.pipelines.checkpoint import find_checkpoint, find_drafter
        from fastgen.pipelines.settings import check_classes

        model = self.model or METHODS[self.method or "base"]
        drawer = (drawers or {}).get(model)
        identity, search, parts = model, None, None
        if drawer is None:
            checkpoint = find_checkpoint(model, self.variant)
            check_method(self.method, checkpoint)
            check_classes(checkpoint, (prompt.prompt for prompt in prompts))
            own = self.drafter is None or self.method is None
            identity = _identity(checkpoint, None if own else find_drafter(checkpoint, str(self.drafter)))
            search = self._planned_search(checkpoint) if self.method == "search" else None
            parts = self._planned_parts(checkpoint)
        else:
            made = self._options(*_DRAWING, "method", "drafter", "variant", "plan")
            if given := [name for name, value in made.items() if value is not None]:
                raise FastgenError(f"{given[-1] if '--method' in given else given[0]}: {model} is no model")
        same = (field.name for field in fields(RunSettings))
        settings = {name: getattr(self, name) for name in same if name in self.__slots__ and name != "model"}
        settings["method"] = self.method if self.method in ("speculative", "search") else None
        settings["batch_size"] = None if self.batch_invariant else self.batch_size
        settings["search"] = None if search is None else search[0].settings
        settings["plan"] = parts
        run = RunSettings(model=model, model_fingerprint=identity, **settings)
        if out is None:
            key = hashlib.sha256(json.dumps([run.as_dict(), self.limit]).encode()).hexdigest()[:8]
            out = Path("fastgen-eval") / f"{benchmark}-{Path(model).name}-{key}"
        return GenerationRun(EvaluationRun(out, prompts, run, group), drawer, self.batch_size, search)

    def _planned_search(self, checkpoint: Checkpoint) -> PlannedSearch:
        """Checked with the model's configuration."""
        kind, call = self._resolved(checkpoint)
        return searching.plan_search(checkpoint, kind, call, self._search(), save_tree=False), call


@dataclass(frozen=True, slots=True)
class GenerationRun:
    """A run on the disk and what draws for it; the model is loaded when images are due, so a finished run loads
    nothing."""

    run: EvaluationRun
    drawer: Generate | None
    batch_size: int
    search: PlannedSearch | None = None

    def make(self, on_progress: OnProgress) -> dict[str, Any]:
        """Draw what is missing; what goes into the report about it."""
        from fastgen.accounting import add_note, phase
        from fastgen.cli.notes import quiet_libraries, warnings_shown

        run = self.run
        quiet_libraries()
        with phase("generate"), warnings_shown(run.group.is_main) as notes:
            made = run.generate(self.drawer or _generator(run, self.batch_size, self.search), on_progress)
        for note in run.notes():  # those of other sessions and processes too
            notes.show(note)
            add_note(note)
        count, seconds = run.timing()
        return {
            "model": run.settings.model,
            "settings": {**run.settings.as_dict(), "prompts": len(run.prompts), "images_made_now": made},
            "seconds_per_image": seconds / count if count else None,
        }


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_device(device: str, dtype: str = "auto") -> None:
    """FastgenError when this machine cannot compute on `device` in `dtype`."""
    from fastgen.pipelines.checkpoint import check_names
    from fastgen.pipelines.loading import resolve_device

    check_names(device, dtype)
    resolve_device(device, dtype)


def refuse_with_images(options: dict[str, Any]) -> None:
    """FastgenError when an option of generation is given although nothing is generated."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise FastgenError(f"{', '.join(given)}: not allowed with --images, which generates nothing")


def _check_decoding(method: str | None, options: dict[str, Any]) -> None:
    """Options of speculative decoding."""
    from fastgen.pipelines.arguments import check_value

    for label, value in options.items():
        if value is not None:
            if method != "speculative":
                raise FastgenError(f"{label}: needs --method speculative")
            if label != "--drafter":  # it is looked for with the model
                check_value(label, label.removeprefix("--"), value)


def _check_budget(budget: dict[str, Any]) -> None:
    """Refuse a budget that no model can take."""
    from fastgen.pipelines.arguments import check_value

    for option, value in budget.items():
        if value is not None:
            check_value(option, option.removeprefix("--").replace("-", "_"), value)


def _identity(checkpoint: Checkpoint, drafter: Path | None) -> str:
    """What tells two versions of a model apart: its files, or the commit of a Hub model (the name of its folder); and
    the files of a drafter that is not its own."""
    from fastgen.evaluation.runner import model_fingerprint

    others = () if drafter is None else (drafter,)
    if checkpoint.hub_id is not None:
        name = f"{checkpoint.hub_id}@{checkpoint.folder.name}"
        return f"{name} {model_fingerprint(*others)}" if others else name
    return model_fingerprint(*checkpoint.folders, *others)


def _generator(run: EvaluationRun, batch_size: int, search: PlannedSearch | None) -> Generate:
    """Draws with the model of the run."""

    def generate(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        from fastgen.pipelines.accelerate import accelerate
        from fastgen.pipelines.accelerate.parts import made_part
        from fastgen.pipelines.loading import generate_images, load_pipeline

        settings = run.settings
        pipe = load_pipeline(
            settings.model,
            device=run.group.device(settings.device),
            dtype=settings.dtype,
            method=settings.method,
            drafter=settings.drafter,
            variant=settings.variant,
        )
        if settings.plan is not None:
            accelerate(pipe, plan=[made_part(*part) for part in settings.plan])
        batches: dict[str, Any] = {"batch_size": batch_size, "batch_invariant": settings.batch_size is None}
        if search is not None:
            planned, call = search
            verifier = planned.load_verifier(run.group.device(settings.device))
            found = searching.searched_pictures(pipe, verifier, planned, prompts, seeds, **call, **batches)
            # What a search had when it was cut short is no image of the run; the error comes after it.
            return (picture.image for picture in found if not picture.interrupted)
        asked = {name: getattr(settings, name) for name in _DRAWING}
        return (picture.image for picture in generate_images(pipe, prompts, seeds, **asked, **batches))

    return generate


def task_lines(report: dict[str, Any]) -> list[str]:
    """The scores of the tasks for people."""

    def row(name: str, score: float, stderr: float | None) -> str:
        error = "" if stderr is None else f" ± {stderr:.3f}"
        return f"  {name:<16}{score:.3f}{error}"

    lines = [f"{report['benchmark']}: {report['n_images']} images of {report['n_prompts']} prompts"]
    lines += [row(tag, task["score"], task["stderr"]) for tag, task in report["tasks"].items()]
    lines.append(row("mean of tasks", report["overall"], report["overall_stderr"]) + "  (standard error by prompt)")
    images, prompts = report["correct_images"], report["correct_prompts"]
    return [*lines, f"  correct images {images:.3f}, correct prompts {prompts:.3f}"]


def source_lines(report: dict[str, Any]) -> list[str]:
    """Where the scores come from and where they went, for people."""
    from fastgen.evaluation.report import provenance

    lines = []
    if report.get("seconds_per_image") is not None:
        lines.append(f"{report['seconds_per_image']:.3f} s per image on {report['settings']['device']}")
    lines.append(provenance(report))
    return lines + [f"{name}: {report[name]}" for name in ("images", "sheet", "results") if name in report]


@contextmanager
def progress(shown: bool = True) -> Iterator[OnProgress]:
    """Progress bars with the time left, on stderr and only on a terminal; yields the callback."""
    if not shown or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update
