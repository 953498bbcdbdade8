"""The recipes by name, with the settings that made the committed checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, download_janus, embedded_folder, find_checkpoint
from fastgen.pretrained import load_pretrained

if TYPE_CHECKING:
    from fastgen.training.engine import Recipe, TrainConfig


@dataclass(frozen=True, slots=True)
class RecipeEntry:
    """A recipe's defaults.

    Args:
        summary: one line for the command line.
        settings: fields of `TrainConfig`.
        needs: the recipe whose result must be there before, or "".
        part: where that result lies below its output folder.
        continues: whether `--init` is understood.
        upcycles: whether it starts from a whole pipeline (name, folder or Hub id) and its own samples.
        draws: whether it can learn from that pipeline's own samples.
    """

    summary: str
    settings: dict[str, Any]
    needs: str = ""
    part: str = ""
    continues: bool = False
    upcycles: bool = False
    draws: bool = False


CHOOSING = ("drafter", "heads", "dc-patch")
"""Recipes of which more can be chosen."""
RECIPES: dict[str, RecipeEntry] = {
    "vae": RecipeEntry(
        "the AutoencoderKL of the tiny Z-Image pipeline",
        {"steps": 2000, "batch_size": 8, "lr": 1.5e-3, "warmup": 50, "decay": 0.4, "ema_decay": 0.99},
    ),
    "vq": RecipeEntry(
        "the VQ tokenizer of the tiny Janus",
        {
            "steps": 2000,
            "batch_size": 8,
            "lr": 1.5e-3,
            "warmup": 50,
            "decay": 0.4,
            "ema_decay": 0.99,
            "precision": "fp32",  # in bfloat16 most vectors fall to another code than in float32
        },
    ),
    "detector": RecipeEntry(
        "the ShapesWorld detector (checker and FD-shapes features)",
        {"steps": 1350, "batch_size": 32, "lr": 2e-3, "ema_decay": 0.995},
    ),
    "verifier": RecipeEntry(
        "the yes/no model of ShapesWorld that a search asks",
        {"steps": 1900, "batch_size": 64, "lr": 1e-3, "decay": 0.4, "ema_decay": 0.998},
    ),
    "z-image": RecipeEntry(
        "transformer and text encoder of the tiny Z-Image pipeline",
        {"steps": 10000, "batch_size": 64, "accumulate": 2, "lr": 2e-3, "decay": 0.4},
        needs="vae",
        part="model/vae",
        continues=True,
    ),
    "small": RecipeEntry(
        "a deeper Z-Image for 128x128 pictures, grown from the tiny one",
        {"steps": 20000, "batch_size": 16, "accumulate": 2, "lr": 1.5e-3, "decay": 0.3},
        needs="z-image",
        part="model",
        continues=True,
    ),
    "janus": RecipeEntry(
        "language model and image heads of the tiny Janus",
        {"steps": 8400, "batch_size": 32, "accumulate": 4, "lr": 2e-3, "decay": 0.4},
        needs="vq",
        part="model/vq",
        continues=True,
    ),
    "drafter": RecipeEntry(
        "an EAGLE drafter of a Janus (name, folder or Hub id)",
        {"steps": 2400, "batch_size": 16, "accumulate": 2, "lr": 2e-3, "decay": 0.5},
        needs="janus",
        part="model",
        continues=True,
        draws=True,
    ),
    "heads": RecipeEntry(
        "heads that correct the Jacobi windows of a Janus (name, folder or Hub id)",
        {"steps": 4000, "batch_size": 12, "lr": 2e-3, "warmup": 50, "decay": 0.5, "ema_decay": 0.99},
        needs="janus",
        part="model",
        continues=True,
    ),
    "dc": RecipeEntry(
        "a small Z-Image transformer with dynamic chunking, for many compute budgets",
        {"steps": 10000, "batch_size": 32, "lr": 2e-3, "warmup": 400, "decay": 0.5},
        needs="z-image",
        part="model",
        continues=True,
    ),
    "dc-patch": RecipeEntry(
        "a trained Z-Image for ShapesWorld that learns to drop its own patches, beginning as itself",
        {"steps": 4000, "batch_size": 16, "lr": 5e-4, "warmup": 50, "decay": 0.4},
        needs="z-image",
        part="model",
        continues=True,
    ),
    "dc-graft": RecipeEntry(
        "stage 1 of upcycling a trained Z-Image or DiT: the new parts learn from the original",
        {"steps": 5000, "batch_size": 64, "accumulate": 4, "lr": 1e-3},
        continues=True,
        upcycles=True,
        draws=True,
    ),
    "dc-finetune": RecipeEntry(
        "stage 2 of upcycling: everything but the embeddings, for many compute budgets",
        {"steps": 10000, "batch_size": 64, "accumulate": 4, "lr": 5e-4},
        continues=True,
        upcycles=True,
        draws=True,
    ),
    "dc-dense": RecipeEntry(
        "the same transformer without dynamic chunking, its baseline",
        # As many as take the compute of the steps of `dc`: over its tail drops, with 23 to 30 % of the tokens kept
        # before them, its forward passes take 1.17 times as many FLOPs.
        {"steps": 11700, "batch_size": 32, "lr": 2e-3, "warmup": 400, "decay": 0.5},
        needs="z-image",
        part="model",
        continues=True,
    ),
}


def train_config(name: str, output_dir: Path, **overrides: Any) -> TrainConfig:
    """The recipe's `TrainConfig` with overrides; those that are `None` keep the default.

    Raises:
        FastgenError: unknown recipe.
        ValueError: a setting is out of range.
    """
    from fastgen.training.engine import TrainConfig

    config = TrainConfig(output_dir=output_dir, **_entry(name).settings)
    return replace(config, **{key: value for key, value in overrides.items() if value is not None})


def build_recipe(
    name: str,
    seed: int,
    part: Path | None = None,
    init: Path | None = None,
    data: Path | None = None,
    choices: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build a recipe.

    Args:
        name: a key of `RECIPES`.
        seed: seed of weights and data.
        part: folder of the trained part that the recipe needs (VAE, VQ, or a pipeline), or name of an embedded model.
        init: folder of a model to go on from.
        data: folder of samples to learn from (`fastgen.training.samples`): upcycling, and the drafter where it is not
            to learn from renders; for heads, of recorded windows (`fastgen.training.windows`).
        choices: what else the recipe lets one choose: of `drafter` the fields of `DrafterTerms`, `kind`, and the
            configuration of a new drafter; of `heads` the configuration of new heads; of `dc-patch` the arguments of
            `PatchRecipe`.

    Raises:
        FastgenError: unknown recipe, a folder that is missing, absent or not understood, or a choice it does not have.
        ValueError: a choice out of range.
    """
    entry = _entry(name)
    if choices and name not in CHOOSING:
        raise FastgenError(f"recipe {name} lets nothing be chosen, got {', '.join(choices)}")
    if entry.upcycles:
        return _upcycling(name, seed, part, init, data)
    if name == "drafter" and part is not None:
        return _drafter(seed, part, init, data, choices or {})
    if name == "heads" and part is not None:
        return _heads(seed, part, init, data, choices or {})
    if data is not None:
        raise FastgenError(f"recipe {name} renders its data and takes no --data")
    if entry.needs and part is None and (init is None or entry.needs in ("z-image", "janus")):
        raise FastgenError(
            f"recipe {name} needs --part FOLDER/{entry.part}, written by `fastgen train {entry.needs} -o FOLDER`"
        )
    if part is not None and not entry.needs:
        raise FastgenError(f"recipe {name} takes no trained part")
    if init is not None and not entry.continues:
        raise FastgenError(f"recipe {name} does not take --init; the same command goes on from its checkpoint")
    if part is not None and str(part) in EMBEDDED_MODELS:
        part = embedded_folder(str(part))
    for folder in (part, init):
        if folder is not None and not (folder / "config.json").exists() and not (folder / "model_index.json").exists():
            raise FastgenError(f"{folder} holds no model (no config.json or model_index.json)")
    if name == "dc-patch":
        return _dc_patch(seed, part or Path(), init, choices or {})
    return _BUILDERS[name](seed, part, init)


def _entry(name: str) -> RecipeEntry:
    if name not in RECIPES:
        raise FastgenError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _vae(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from fastgen.training.vae import VaeRecipe

    return VaeRecipe(seed)


def _vq(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from fastgen.training.vq import VqRecipe

    return VqRecipe(seed)


def _detector(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from fastgen.training.detector import DetectorRecipe

    return DetectorRecipe(seed)


def _verifier(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from diffusers import AutoencoderKL

    from fastgen.training.verifier import VerifierRecipe

    return VerifierRecipe(seed, load_pretrained(AutoencoderKL, embedded_folder("tiny") / "vae").float())


def _z_image(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from fastgen.training.z_image import ZImageRecipe

    return ZImageRecipe(seed, part, init)


def _small(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from fastgen.training.small_z_image import SmallRecipe

    return SmallRecipe(seed, part or Path(), init)


def _janus(seed: int, part: Path | None, init: Path | None) -> Recipe:
    from fastgen.training.janus import JanusRecipe

    return JanusRecipe(seed, part, init)


def _drafter(seed: int, part: Path, init: Path | None, data: Path | None, choices: Mapping[str, Any]) -> Recipe:
    from fastgen.training.drafter import DrafterRecipe, DrafterTerms
    from fastgen.training.samples import Samples

    ours = {field.name for field in fields(DrafterTerms)}
    terms = DrafterTerms(**{key: value for key, value in choices.items() if key in ours})
    drafter = {key: value for key, value in choices.items() if key not in ours}
    if init is not None and drafter:
        raise FastgenError(f"recipe drafter: {', '.join(drafter)} belong to a new drafter, not to one of --init")

    folder = janus_folder("drafter", part)
    drawn = None if data is None else Samples(data, seed)
    try:
        return DrafterRecipe(seed, folder, init, terms, samples=drawn, **drafter)
    except TypeError as error:
        raise FastgenError(f"recipe drafter: {error}") from error


def _heads(seed: int, part: Path, init: Path | None, data: Path | None, choices: Mapping[str, Any]) -> Recipe:
    from fastgen.training.heads import HeadsRecipe, load_heads, load_target
    from fastgen.training.windows import Windows

    if data is None:
        raise FastgenError("recipe heads needs --data, a folder of recorded windows; with --samples they are recorded")
    if init is not None and choices:
        raise FastgenError(f"recipe heads: {', '.join(choices)} belong to new heads, not to those of --init")
    folder = janus_folder("heads", part)
    windows, heads = Windows(data, seed), None if init is None else load_heads(init)
    try:
        return HeadsRecipe(seed, load_target(folder), windows, heads, **choices)
    except TypeError as error:
        raise FastgenError(f"recipe heads: {error}") from error


def janus_folder(recipe: str, part: Path) -> Path:
    """Folder of the Janus that a recipe needs, downloaded if need be.

    Raises:
        FastgenError: it is none.
    """
    checkpoint = find_checkpoint(str(part))
    if checkpoint.kind != "janus":
        raise FastgenError(f"recipe {recipe}: {part} is no Janus model")
    return checkpoint.folder if checkpoint.hub_id is None else download_janus(checkpoint.hub_id)


def _dc(seed: int, part: Path | None, init: Path | None, dense: bool = False) -> Recipe:
    from fastgen.training.dc_z_image import DCRecipe

    return DCRecipe(seed, part or Path(), init, dense)


def _dc_dense(seed: int, part: Path | None, init: Path | None) -> Recipe:
    return _dc(seed, part, init, dense=True)


def _dc_patch(seed: int, part: Path, init: Path | None, choices: Mapping[str, Any]) -> Recipe:
    from fastgen.training.patch_chunking import PatchRecipe

    try:
        return PatchRecipe(seed, part, init, **choices)
    except TypeError as error:
        raise FastgenError(f"recipe dc-patch: {error}") from error


def _upcycling(name: str, seed: int, part: Path | None, init: Path | None, data: Path | None) -> Recipe:
    if part is None or data is None:
        raise FastgenError(
            f"recipe {name} needs --part, a Z-Image or DiT pipeline (name, folder or Hub id), and --data, a folder of "
            "its samples; with --prompts-file and --samples they are drawn"
        )
    if name == "dc-finetune" and init is None:
        raise FastgenError(f"recipe {name} needs --init FOLDER/model/transformer, written by `fastgen train dc-graft`")
    from fastgen.pipelines.loading import load_checkpoint
    from fastgen.training.samples import Samples
    from fastgen.training.upcycling import FinetuneRecipe, GraftRecipe

    checkpoint = find_checkpoint(str(part))  # explains what is missing before anything is read
    samples = Samples(data, seed)
    kind = GraftRecipe if name == "dc-graft" else FinetuneRecipe
    return kind(seed, load_checkpoint(checkpoint, dtype="float32"), samples, init)


_BUILDERS: dict[str, Callable[[int, Path | None, Path | None], Recipe]] = {
    "vae": _vae,
    "vq": _vq,
    "detector": _detector,
    "verifier": _verifier,
    "z-image": _z_image,
    "small": _small,
    "janus": _janus,
    "dc": _dc,
    "dc-dense": _dc_dense,
}
