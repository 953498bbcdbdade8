"""What the commands of `fastgen eval` that generate have in common: their options and the run they continue."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.cli import search as searching
from fastgen.cli.methods import (
    METHODS,
    BatchInvariantOption,
    DrafterOption,
    MethodOption,
    PlanOption,
    check_device,
    check_method,
    check_method_name,
    find_model,
    read_plan,
)
from fastgen.cli.options import given_loading, load_options, option_name, with_common, with_loading, with_options
from fastgen.cli.publish import DtypeOption
from fastgen.errors import FastgenError
from fastgen.pipelines.schema import SETTINGS, ChunkingSettings, DrawSettings, SearchSettings, SpeculativeSettings

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.evaluation.distributed import Group, OnProgress
    from fastgen.evaluation.geneval.metadata import Metadata
    from fastgen.evaluation.runner import EvaluationRun, Generate, RunSettings
    from fastgen.pipelines.loading.checkpoint import Checkpoint
    from fastgen.pipelines.loading.load_options import LoadOptions

Images = Annotated[
    Path | None, typer.Option("--images", help="Score this folder (GenEval layout) and generate nothing.")
]
ImagesPerPrompt = Annotated[int, typer.Option("--images-per-prompt", help="Images a prompt.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the run; every image gets its own from it.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N prompts of each task, for a quick look.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of images and results; a killed run continues there.")]

Engine = Annotated[str, typer.Option("--engine", help="local draws in this process, ray on workers of a Ray cluster.")]
Workers = Annotated[int, typer.Option("--ray-workers", help="Workers that draw (ray).")]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="Address of a running cluster. Default: starts one on this machine.", show_default=False
    ),
]


#: A search, and the settings of each of its pictures.
PlannedSearch = tuple[searching.Search, dict[str, Any]]
#: Revision of a model, and the options of its loader.
Loading = tuple[str | None, "LoadOptions | None"]
#: Settings that a run does not have. No limit of seconds: results would depend on the machine's load, and a run
#: that was interrupted would not end as one that was not.
_WITHOUT = ("height", "width", "negative_prompt", "max_seconds")
_METHODS = (DrawSettings, ChunkingSettings, SpeculativeSettings)
#: Settings of a run that `generate_images` takes.
_DRAWING = tuple(name for method in _METHODS for name in method.rules() if name not in _WITHOUT)

#: Options of every command that draws, besides those of the methods: annotation and default.
_COMMON: dict[str, tuple[Any, Any]] = {
    "images_per_prompt": (ImagesPerPrompt, 4),
    "method": (MethodOption, None),
    "drafter": (DrafterOption, None),
    "plan": (PlanOption, None),
    "batch_invariant": (BatchInvariantOption, False),
    "dtype": (DtypeOption, "auto"),
    "engine": (Engine, "local"),
    "ray_workers": (Workers, 2),
    "ray_address": (Address, None),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where images are drawn that are not drawn here.

    Attributes:
        workers: processes, each with its own GPU if the run uses GPUs.
        address: of a running Ray cluster; None starts one on this machine.
    """

    workers: int
    address: str | None

    @classmethod
    def of(cls, given: Any) -> Cluster | None:
        """What the options ask for; None: drawn here.

        Raises:
            FastgenError: a value out of range, or Ray is not installed.
        """
        check_choice("--engine", given.engine, ("local", "ray"))
        check_integer("--ray-workers", given.ray_workers, 1)
        if given.engine == "local":
            return None
        if importlib.util.find_spec("ray") is None:
            raise FastgenError("--engine: ray needs Ray: pip install ray")
        return cls(given.ray_workers, given.ray_address)


def drawing_options(command: Any) -> Any:
    """Give a command that draws the options of all methods that a run can have, and the common ones."""
    return with_loading(with_common(_COMMON)(with_options(*_METHODS, SearchSettings, without=_WITHOUT)(command)))


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a command draws the images that it scores, from its options.

    Attributes:
        given: all options of the command, by name; `model` None when a folder is scored instead.
        batch_size: pictures drawn together, at most.
        draw: settings of `generate_images`.
        search: those of a search.
        options: what the model is loaded with.
    """

    given: Any
    batch_size: int
    draw: dict[str, Any]
    search: SearchSettings
    options: LoadOptions

    @classmethod
    def of(cls, context: typer.Context, images: Path | None, batch_size: str = "batch_size") -> Drawing:
        """Check the options of a command.

        Args:
            context: of the command.
            images: scored instead of drawn ones.
            batch_size: name of that option.

        Raises:
            FastgenError: names the first option that is out of its range, or that does not go with `images`.
        """
        given = SimpleNamespace(**context.params)
        for name in ("images_per_prompt", batch_size, "limit"):
            if (value := getattr(given, name)) is not None:
                check_integer(option_name(name), value, 1)
        check_integer("--seed", given.seed, 0, 2**63 - 1)
        Cluster.of(given)
        if given.guidance_scale is not None:
            check_number("--guidance-scale", given.guidance_scale, 0)
        check_method_name(given.method)
        if given.method != "speculative":
            for name in (*SpeculativeSettings.rules(), "drafter"):
                if getattr(given, name) is not None:
                    raise FastgenError(f"{option_name(name)}: needs --method speculative")
        draw = {
            name: value for method in _METHODS for name, value in method.of(vars(given), option_name).given().items()
        }
        search = SearchSettings.of(vars(given), option_name)
        searching.check_options(given.method, search, save_tree=False)
        if images is not None:
            own = {name: getattr(given, name) for name in ("model", "limit", "method", "drafter", "plan")}
            every = {**own, **given_loading(given), **draw, **search.given()}
            refuse_with_images({option_name(name): value for name, value in every.items()})
        check_device(given.device, given.dtype)
        drawing = cls(given, getattr(given, batch_size), draw, search, load_options(given))
        if images is None and given.model != "renders":
            drawing._check_model()
        return drawing

    def _model(self) -> str:
        return str(self.given.model or METHODS[self.given.method or "base"])

    def _check_model(self) -> None:
        """FastgenError when the model is not there, or does not take the options; loads no weights."""
        import torch

        from fastgen.pipelines.loading.checkpoint import find_drafter

        checkpoint = find_model(self._model(), self.given.variant, self.given.revision)
        check_method(self.given.method, checkpoint)
        kind = self._resolved(checkpoint)[0]
        self.options.check(kind, checkpoint.index, torch.device(self.given.device))
        self._planned_parts(checkpoint)
        if self.given.method == "speculative":
            find_drafter(checkpoint, self.given.drafter)
        if self.given.method == "search":
            self._planned_search(checkpoint)

    def _planned_parts(self, checkpoint: Checkpoint) -> list[list[Any]] | None:
        """Names and settings of the parts in the plan."""
        if self.given.plan is None:
            return None
        plan = read_plan(self.given.plan, self._resolved(checkpoint)[0], self.given.method, checkpoint)
        return [[part.name, part.settings] for part in plan.parts]

    def _resolved(self, checkpoint: Checkpoint) -> tuple[type, dict[str, Any]]:
        """Class and settings of the model's pipeline."""
        from fastgen.pipelines.settings import pipeline_class, resolve_settings

        kind = pipeline_class(checkpoint, self.given.method)
        return kind, resolve_settings(kind, checkpoint, dict.fromkeys(SETTINGS) | self.draw)

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
        from fastgen.pipelines.loading.checkpoint import find_checkpoint, find_drafter
        from fastgen.pipelines.settings import check_classes

        given, model = self.given, self._model()
        drawer = (drawers or {}).get(model)
        identity, search, parts = model, None, None
        if drawer is None:
            checkpoint = find_checkpoint(model, given.variant, given.revision)
            check_method(given.method, checkpoint)
            check_classes(checkpoint, (prompt.prompt for prompt in prompts))
            own = given.drafter is None or given.method is None
            identity = _identity(checkpoint, None if own else find_drafter(checkpoint, str(given.drafter)))
            search = self._planned_search(checkpoint) if given.method == "search" else None
            parts = self._planned_parts(checkpoint)
        else:
            own_options = {name: getattr(given, name) for name in ("method", "drafter", "plan")}
            own_options |= given_loading(given) | self.draw
            if made := [name for name, value in own_options.items() if value is not None]:
                raise FastgenError(f"{option_name(made[0])}: {model} is no model")
        same = ("images_per_prompt", "seed", "device", "dtype", "drafter", "variant")
        run = RunSettings(
            model=model,
            model_fingerprint=identity,
            method=given.method if given.method in ("speculative", "search") else None,
            batch_size=None if given.batch_invariant else self.batch_size,
            search=None if search is None else search[0].settings,
            plan=parts,
            loading=self.options.recorded or None,
            **{name: getattr(given, name) for name in same},
            **self.draw,
        )
        if out is None:
            key = hashlib.sha256(json.dumps([run.as_dict(), given.limit]).encode()).hexdigest()[:8]
            out = Path("fastgen-eval") / f"{benchmark}-{Path(model).name}-{key}"
        folder = EvaluationRun(out, prompts, run, group)
        loading = (given.revision, self.options)
        return GenerationRun(folder, drawer, self.batch_size, search, Cluster.of(given), loading)

    def _planned_search(self, checkpoint: Checkpoint) -> PlannedSearch:
        """Checked with the model's configuration."""
        kind, call = self._resolved(checkpoint)
        return searching.plan_search(checkpoint, kind, call, self.search, save_tree=False), call


@dataclass(frozen=True, slots=True)
class GenerationRun:
    """A run on the disk and what draws for it; the model is loaded when an image is missing, so a finished run loads
    nothing."""

    run: EvaluationRun
    drawer: Generate | None
    batch_size: int
    search: PlannedSearch | None = None
    cluster: Cluster | None = None
    loading: Loading = (None, None)

    def make(self, on_progress: OnProgress) -> dict[str, Any]:
        """Draw the missing images; returns their entries of the report."""
        from fastgen.accounting import add_note, phase
        from fastgen.cli.notes import quiet_libraries, warnings_shown

        run = self.run
        quiet_libraries()
        with phase("generate"), warnings_shown(run.group.is_main) as notes:
            made = run.generate(
                self.drawer or _generator(run, self.batch_size, self.search, self.cluster, self.loading), on_progress
            )
        for note in run.notes():  # those of other sessions and processes too
            notes.show(note)
            add_note(note)
        count, seconds = run.timing()
        return {
            "model": run.settings.model,
            "settings": {**run.settings.as_dict(), "prompts": len(run.prompts), "images_made_now": made},
            "seconds_per_image": seconds / count if count else None,
        }


def refuse_with_images(options: dict[str, Any]) -> None:
    """FastgenError when an option of generation is given although nothing is generated."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise FastgenError(f"{', '.join(given)}: not allowed with --images, which generates nothing")


def _identity(checkpoint: Checkpoint, drafter: Path | None) -> str:
    """Identifies a version of a model: its files, or the commit of a Hub model (the name of its folder); and
    the files of a drafter that is not its own."""
    from fastgen.evaluation.runner import model_fingerprint

    others = () if drafter is None else (drafter,)
    if checkpoint.hub_id is not None:
        name = f"{checkpoint.hub_id}@{checkpoint.root.name}"
        return f"{name} {model_fingerprint(*others)}" if others else name
    return model_fingerprint(*checkpoint.folders, *others)


@dataclass(frozen=True, slots=True)
class Drawer:
    """Draws images of a run; can be sent to another process.

    Attributes:
        settings: of the run.
        device: where.
        batch_size: pictures drawn together, at most.
        search: of a search.
        loading: revision of the model, and the options of its loader.
    """

    settings: RunSettings
    device: str
    batch_size: int
    search: PlannedSearch | None
    loading: Loading = (None, None)

    def load(self) -> Generate:
        """Load the model; what draws with it."""
        from fastgen.pipelines.accelerate import accelerate
        from fastgen.pipelines.accelerate.parts import made_part
        from fastgen.pipelines.generation import generate_images
        from fastgen.pipelines.loading import load_checkpoint
        from fastgen.pipelines.loading.checkpoint import find_checkpoint

        settings, (revision, options) = self.settings, self.loading
        chosen = {name: getattr(settings, name) for name in ("dtype", "method", "drafter")}
        checkpoint = find_checkpoint(settings.model, settings.variant, revision)
        pipe = load_checkpoint(checkpoint, device=self.device, options=options, **chosen)
        if settings.plan is not None:
            accelerate(pipe, plan=[made_part(*part) for part in settings.plan])
        batches: dict[str, Any] = {"batch_size": self.batch_size, "batch_invariant": settings.batch_size is None}
        asked = {name: getattr(settings, name) for name in _DRAWING}
        verifier = None if self.search is None else self.search[0].load_verifier(self.device)

        def generate(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
            if self.search is None:
                return (picture.image for picture in generate_images(pipe, prompts, seeds, **asked, **batches))
            planned, call = self.search
            found = searching.searched_pictures(pipe, verifier, planned, prompts, seeds, **call, **batches)
            # The picture of an interrupted search is not an image of the run; the error follows.
            return (picture.image for picture in found if not picture.interrupted)

        return generate


def _generator(
    run: EvaluationRun,
    batch_size: int,
    search: PlannedSearch | None,
    cluster: Cluster | None = None,
    loading: Loading = (None, None),
) -> Generate:
    """Draws with the model of the run: here, or on a cluster."""

    def generate(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        drawer = Drawer(run.settings, run.group.device(run.settings.device), batch_size, search, loading)
        if cluster is None:
            return drawer.load()(prompts, seeds)
        from fastgen.cli.eval_cluster import scattered

        return scattered(drawer, prompts, seeds, cluster)

    return generate
