"""Settings shared by recipes: base classes for `fastgen.training.recipes`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastgen.checks import check_bool, check_integer
from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, embedded_folder
from fastgen.pipelines.schema import Rule, Settings, setting

if TYPE_CHECKING:
    from fastgen.pipelines.loading.checkpoint import Checkpoint
    from fastgen.training.engine import Recipe
    from fastgen.training.pictures import Pictures
    from fastgen.training.samples import Samples
    from fastgen.training.train_config import TrainConfig

__all__ = [
    "PICTURES_HELP",
    "DrawnSettings",
    "RecipeSettings",
    "TrainingSettings",
    "UpcyclingSettings",
    "key_values",
    "place",
    "threads",
]

PICTURES_HELP = "The pipeline's own samples, or pictures with captions: a folder, webdataset shards or a zip file."


def _check_seed(label: str, value: object) -> None:
    check_integer(label, value, 0, 2**63 - 1)


def _check_place(label: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike):
        raise FastgenError(f"{label}: {value!r} is not allowed, needs a name or a path")


def _check_choices(label: str, value: object) -> None:
    if isinstance(value, list | tuple):
        _choices(value, label)
    elif not isinstance(value, Mapping):
        raise FastgenError(f"{label}: {value!r} is not allowed, needs texts KEY=VALUE or a mapping")


def _choices(texts: Any, label: str = "--set") -> dict[str, Any]:
    """KEY=VALUE texts as a dictionary; values are parsed as JSON, or kept as text if they are not JSON."""
    from fastgen.io import parse_json

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = str(text).partition("=")
        if not equals or not key or key in found:
            raise FastgenError(f"{label}: {text!r} is not allowed, needs KEY=VALUE, each key once")
        try:
            found[key] = parse_json(value, label)
        except ValueError:
            found[key] = value
    return found


def place(help: str) -> Any:
    """A setting that is a name or a path."""
    return setting(Path, help, special=_check_place)


def key_values(help: str) -> Any:
    """The setting `set`: KEY=VALUE texts, or a mapping."""
    return setting(list[str], f"KEY=VALUE: {help}; repeat.", special=_check_choices)


def threads() -> Any:
    """The number of CPU threads."""
    return setting(int, "CPU threads; 0 = torch's default.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(Settings):
    """Settings of a recipe; None where not given. A recipe is a subclass that defines these attributes.

    Attributes:
        name: of the recipe.
        summary: one line for the command line.
        example: options of an example command.
        needs: required settings and their descriptions.
    """

    panel: ClassVar[str] = "Options"
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    example: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, str]] = {}

    seed: int | None = setting(int, "Seed of weights, data and noise. Default: 0.", special=_check_seed, minimum=0)

    def __init_subclass__(cls, **attributes: Any) -> None:
        super().__init_subclass__()
        for name, value in attributes.items():
            setattr(cls, name, value)

    @property
    def choices(self) -> dict[str, Any]:
        """The choices of `--set`."""
        given = getattr(self, "set", None) or ()
        return dict(given) if isinstance(given, Mapping) else _choices(given)

    def path(self, name: str) -> Path | None:
        """The path in a setting; None if the recipe has no such setting or it is not given."""
        given = getattr(self, name, None)
        return None if given is None else Path(given)

    def needed(self, name: str) -> Path:
        """The path in a required setting.

        Raises:
            FastgenError: it is not given.
        """
        found = self.path(name)
        if found is None:
            raise FastgenError(f"recipe {self.name} needs --{name}, {self.needs[name]}")
        return found

    def check_together(self) -> None:
        for name in self.needs:
            self.needed(name)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(RecipeSettings):
    """Settings of a recipe that trains.

    Attributes:
        defaults: fields of `TrainConfig`.
    """

    defaults: ClassVar[dict[str, Any]] = {}

    steps: int | None = setting(int, "Total optimizer steps.", minimum=1)
    batch_size: int | None = setting(int, "Batch size per process.", minimum=1)
    accumulate: int | None = setting(int, "Gradient-accumulation steps, a divisor of the batch size.", minimum=1)
    lr: float | None = setting(float, "Peak learning rate.", above=0)
    compile: bool | None = setting(bool, "Use torch.compile.", special=check_bool)
    precision: str | None = setting(
        str, "auto, bf16 or fp32; auto is bf16 where it is native.", choices=("auto", "bf16", "fp32")
    )
    workers: int | None = setting(int, "Data-loading processes; 0 = none.", minimum=0)
    max_minutes: float | None = setting(
        float, "Save a checkpoint and stop after this many minutes; 0 = never.", minimum=0
    )
    threads: int | None = threads()

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """Rules by name, with the recipe's defaults; the recipe's own settings come first."""
        found = {name: cls._with_default(name, rule) for name, rule in super().rules().items()}
        common = {each.name for each in fields(TrainingSettings)}
        return dict(sorted(found.items(), key=lambda item: item[0] in common))

    @classmethod
    def _with_default(cls, name: str, rule: Rule) -> Rule:
        default = {"accumulate": 1, **cls.defaults}.get(name)
        return rule if default is None else replace(rule, help=f"{rule.help} Default: {default}.")

    def train_config(self, output_dir: Path) -> TrainConfig:
        """The trainer's settings.

        Raises:
            FastgenError: settings that exclude each other.
        """
        from fastgen.training.train_config import TrainConfig

        given = self.given()
        ours = {each.name for each in fields(TrainConfig)}
        chosen = {name: value for name, value in given.items() if name in ours}
        chosen["max_seconds"] = 60.0 * given.get("max_minutes", 0.0)
        return TrainConfig(output_dir=output_dir, **{**self.defaults, **chosen})

    def build(self) -> Recipe:
        """The recipe.

        Raises:
            FastgenError: a setting is missing, or its folder is missing or not usable.
        """
        self.check_together()
        return self._build(self.seed or 0)

    def _build(self, seed: int) -> Recipe:
        raise NotImplementedError

    def made(self, kind: Callable[..., Recipe], *arguments: Any, **chosen: Any) -> Recipe:
        """A recipe of a class.

        Raises:
            FastgenError: `chosen` has an unknown name.
        """
        try:
            return kind(*arguments, **chosen)
        except TypeError as error:
            raise FastgenError(f"recipe {self.name}: {error}") from error

    def model(self, name: str) -> Path | None:
        """The folder of a trained model in a setting.

        Raises:
            FastgenError: it has no model.
        """
        given = self.path(name)
        if given is None:
            return None
        folder = embedded_folder(str(given)) if name == "part" and str(given) in EMBEDDED_MODELS else given
        if not (folder / "config.json").exists() and not (folder / "model_index.json").exists():
            raise FastgenError(f"{folder} holds no model (no config.json or model_index.json)")
        return folder


@dataclass(frozen=True, kw_only=True)
class DrawnSettings(TrainingSettings):
    """Settings of a recipe that can train on a trained model's samples."""

    part: Path | None
    init: Path | None = place("Model folder to continue from.")
    data: Path | None = place("Folder of the pipeline's own samples.")
    samples: int | None = setting(
        int, "First draw this many samples into --data; 0 = use those in the folder.", minimum=0
    )
    prompts_file: str | None = setting(
        str, "Prompts of the samples, one per line, or 'shapesworld'; a DiT draws every class in turn."
    )

    def check_together(self) -> None:
        super().check_together()
        if self.samples and self.data is None:
            raise FastgenError(f"recipe {self.name} needs --data, the folder for the samples")


@dataclass(frozen=True, kw_only=True)
class UpcyclingSettings(DrawnSettings):
    """Settings of a recipe that upcycles a trained pipeline, of any size."""

    data: Path | None = place(PICTURES_HELP)
    size: int | None = setting(int, "Height and width that pictures are cut to; samples have their own.", minimum=1)
    shard: bool | None = setting(
        bool, "Divide weights and optimizer state between processes (FSDP2, AdamW).", special=check_bool
    )
    gradient_checkpointing: bool | None = setting(
        bool, "Recompute activations in the backward pass to save memory.", special=check_bool
    )

    def found(self) -> tuple[Checkpoint, Samples | Pictures]:
        """The pipeline and the data, after checking that their shapes and the student's match; no weights are read.

        Raises:
            FastgenError: they do not match, or something is missing.
        """
        from fastgen.pipelines.loading.checkpoint import find_checkpoint
        from fastgen.training.pictures import open_data
        from fastgen.training.upcycling_checks import check_data, check_student

        checkpoint = find_checkpoint(str(self.part))
        if (init := self.path("init")) is not None:
            check_student(init, checkpoint, self.name)
        if self.size is not None:
            checkpoint.check_size(self.size, self.size)
        data = open_data(self.needed("data"), self.seed or 0, self.size)
        check_data(data, checkpoint)
        return checkpoint, data

    def loaded(self, checkpoint: Checkpoint) -> Any:
        """The pipeline: bfloat16 if sharded and trained in bfloat16, otherwise float32. Students are float32."""
        from fastgen.pipelines.loading import load_checkpoint
        from fastgen.training.engine import asks_to_shard
        from fastgen.training.train_config import resolve_precision

        config = self.train_config(Path())
        bfloat16 = asks_to_shard(config) and resolve_precision(config.precision) == "bf16"
        return load_checkpoint(checkpoint, dtype="bfloat16" if bfloat16 else "float32")
