"""The recipes by name: one settings class each, with the defaults of the committed checkpoints.

`fastgen train RECIPE` derives its options from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import download, embedded_folder, find_checkpoint
from fastgen.pipelines.schema import setting
from fastgen.pretrained import load_pretrained
from fastgen.training.recipe_settings import (
    PICTURES_HELP,
    DrawnSettings,
    RecipeSettings,
    TrainingSettings,
    UpcyclingSettings,
    key_values,
    place,
    threads,
)

if TYPE_CHECKING:
    from fastgen.training.engine import Recipe

__all__ = [
    "RECIPES",
    "CascadeCalibrate",
    "Heads",
    "SearchCalibrate",
    "janus_folder",
]

_CONTINUE = "Model folder to continue from."
_VAE = "FOLDER/model/vae, written by `fastgen train vae -o FOLDER`"
_VQ = "FOLDER/model/vq, written by `fastgen train vq -o FOLDER`"
_Z_IMAGE = "a Z-Image pipeline: an embedded name or a folder"
_JANUS = "a Janus model: a name, a folder or a Hub id"
_PIPELINE = "a Z-Image or DiT pipeline: a name, a folder or a Hub id"
_SAMPLES = "a folder of the pipeline's samples; with --prompts-file and --samples they are drawn"
_WINDOWS = "a folder of recorded windows; with --samples they are recorded"
_GRAFTED = "FOLDER/model/transformer, written by `fastgen train dc-graft -o FOLDER`"


def _part(what: str) -> Any:
    return place(f"{what[0].upper()}{what[1:]}.")


class Vae(
    TrainingSettings,
    name="vae",
    summary="the AutoencoderKL of the tiny Z-Image pipeline",
    defaults={"steps": 2000, "batch_size": 8, "lr": 1.5e-3, "warmup": 50, "decay": 0.4, "ema_decay": 0.99},
):
    def _build(self, seed: int) -> Recipe:
        from fastgen.training.vae import VaeRecipe

        return VaeRecipe(seed)


class Vq(
    TrainingSettings,
    name="vq",
    summary="the VQ tokenizer of the tiny Janus",
    defaults={**Vae.defaults, "precision": "fp32"},  # bfloat16 changes most vectors' nearest code
):
    def _build(self, seed: int) -> Recipe:
        from fastgen.training.vq import VqRecipe

        return VqRecipe(seed)


class Detector(
    TrainingSettings,
    name="detector",
    summary="the ShapesWorld detector (checker and FD-shapes features)",
    defaults={"steps": 1350, "batch_size": 32, "lr": 2e-3, "ema_decay": 0.995},
):
    def _build(self, seed: int) -> Recipe:
        from fastgen.training.detector import DetectorRecipe

        return DetectorRecipe(seed)


class Verifier(
    TrainingSettings,
    name="verifier",
    summary="the yes/no model of ShapesWorld that scores pictures in a search",
    defaults={"steps": 1900, "batch_size": 64, "lr": 1e-3, "decay": 0.4, "ema_decay": 0.998},
):
    def _build(self, seed: int) -> Recipe:
        from diffusers import AutoencoderKL

        from fastgen.training.verifier import VerifierRecipe

        return VerifierRecipe(seed, load_pretrained(AutoencoderKL, embedded_folder("tiny") / "vae").float())


@dataclass(frozen=True, kw_only=True)
class ZImage(
    TrainingSettings,
    name="z-image",
    summary="transformer and text encoder of the tiny Z-Image pipeline",
    example="--part runs/vae/model/vae",
    needs={"part": _VAE},
    defaults={"steps": 10000, "batch_size": 64, "accumulate": 2, "lr": 2e-3, "decay": 0.4},
):
    part: Path | None = _part(_VAE)
    init: Path | None = place(_CONTINUE)

    def check_together(self) -> None:
        if self.init is None:  # a pipeline to continue from has a VAE
            super().check_together()

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.z_image import ZImageRecipe

        return ZImageRecipe(seed, self.model("part"), self.model("init"))


@dataclass(frozen=True, kw_only=True)
class Janus(
    ZImage,
    name="janus",
    summary="language model and image heads of the tiny Janus",
    example="--part runs/vq/model/vq",
    needs={"part": _VQ},
    defaults={"steps": 8400, "batch_size": 32, "accumulate": 4, "lr": 2e-3, "decay": 0.4},
):
    part: Path | None = _part(_VQ)

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.janus import JanusRecipe

        return JanusRecipe(seed, self.model("part"), self.model("init"))


@dataclass(frozen=True, kw_only=True)
class Small(
    TrainingSettings,
    name="small",
    summary="a deeper Z-Image for 128x128 pictures, grown from the tiny one",
    example="--part tiny",
    needs={"part": _Z_IMAGE},
    defaults={"steps": 20000, "batch_size": 16, "accumulate": 2, "lr": 1.5e-3, "decay": 0.3},
):
    part: Path | None = _part(_Z_IMAGE)
    init: Path | None = place(_CONTINUE)

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.small_z_image import SmallRecipe

        return SmallRecipe(seed, self.model("part") or Path(), self.model("init"))


@dataclass(frozen=True, kw_only=True)
class DCPatch(
    UpcyclingSettings,
    name="dc-patch",
    summary="a trained Z-Image that learns to drop its own patches",
    example="--part tiny",
    needs={"part": _Z_IMAGE},
    defaults={"steps": 4000, "batch_size": 16, "lr": 5e-4, "warmup": 50, "decay": 0.4},
):
    part: Path | None = _part(_Z_IMAGE)
    data: Path | None = place(f"{PICTURES_HELP} Default: ShapesWorld.")
    set: Any = key_values(
        "anneal (items over which the share of kept patches falls), cost, or the new scaffold's configuration "
        "(compression=8, floor=0.0625, n_last_layers=2)"
    )

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.patch_chunking import PatchRecipe

        init = self.path("init")
        if self.data is not None:
            checkpoint, data = self.found()
            return self.made(PatchRecipe, seed, self.loaded(checkpoint), init, samples=data, **self.choices)
        if self.size is not None:
            raise FastgenError("size: belongs to pictures; needs --data")
        return self.made(PatchRecipe, seed, self.model("part"), self.model("init"), **self.choices)


@dataclass(frozen=True, kw_only=True)
class Drafter(
    DrawnSettings,
    name="drafter",
    summary="an EAGLE drafter of a Janus (name, folder or Hub id)",
    example="--part tiny-janus",
    needs={"part": _JANUS},
    defaults={"steps": 2400, "batch_size": 16, "accumulate": 2, "lr": 2e-3, "decay": 0.5},
):
    part: Path | None = _part(_JANUS)
    set: Any = key_values("a loss term, kind, or the new drafter's configuration (redundancy=class, width=128)")

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.drafter import DrafterRecipe, DrafterTerms
        from fastgen.training.samples import Samples

        ours = {field.name for field in fields(DrafterTerms)}
        terms = DrafterTerms(**{key: value for key, value in self.choices.items() if key in ours})
        drafter = {key: value for key, value in self.choices.items() if key not in ours}
        init, data = self.path("init"), self.path("data")
        if init is not None and drafter:
            raise FastgenError(f"recipe drafter: {', '.join(drafter)} belong to a new drafter, not to one of --init")
        folder = janus_folder(self.name, self.needed("part"))
        drawn = None if data is None else Samples(data, seed)
        return self.made(DrafterRecipe, seed, folder, init, terms, samples=drawn, **drafter)


@dataclass(frozen=True, kw_only=True)
class Heads(
    DrawnSettings,
    name="heads",
    summary="heads that correct the Jacobi windows of a Janus (name, folder or Hub id)",
    example="--part tiny-janus --data runs/windows --samples 2000",
    needs={"part": _JANUS, "data": _WINDOWS},
    defaults={"steps": 4000, "batch_size": 12, "lr": 2e-3, "warmup": 50, "decay": 0.5, "ema_decay": 0.99},
):
    part: Path | None = _part(_JANUS)
    data: Path | None = place("Folder of recorded windows.")
    set: Any = key_values("window (places, also of recorded windows), or the new heads' configuration")

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.heads import HeadsRecipe, initial_heads, load_target
        from fastgen.training.windows import Windows

        init, new = self.path("init"), dict(self.choices)
        heads = None if init is None else initial_heads(init, new.pop("window", None))
        if heads is not None and new:
            raise FastgenError(f"recipe heads: {', '.join(new)} belong to new heads, not to those of --init")
        folder = janus_folder(self.name, self.needed("part"))
        windows = Windows(self.needed("data"), seed)
        return self.made(HeadsRecipe, seed, load_target(folder), windows, heads, **new)


@dataclass(frozen=True, kw_only=True)
class DCGraft(
    UpcyclingSettings,
    name="dc-graft",
    summary="stage 1 of upcycling a trained Z-Image or DiT: the new parts learn from the original",
    example="--part tiny --data runs/samples --samples 20000 --prompts-file shapesworld",
    needs={"part": _PIPELINE, "data": _SAMPLES},
    defaults={"steps": 5000, "batch_size": 64, "accumulate": 4, "lr": 1e-3},
):
    part: Path | None = _part(_PIPELINE)

    def _build(self, seed: int) -> Recipe:
        from fastgen.training.upcycling import FinetuneRecipe, GraftRecipe

        checkpoint, data = self.found()  # reports what is missing before anything is loaded
        kind = FinetuneRecipe if isinstance(self, DCFinetune) else GraftRecipe
        return kind(seed, self.loaded(checkpoint), data, self.path("init"))


@dataclass(frozen=True, kw_only=True)
class DCFinetune(
    DCGraft,
    name="dc-finetune",
    summary="stage 2 of upcycling: everything but the embeddings, for many compute budgets",
    example="--part tiny --data runs/samples --init runs/graft/model/transformer",
    needs={**DCGraft.needs, "init": _GRAFTED},
    defaults={"steps": 10000, "batch_size": 64, "accumulate": 4, "lr": 5e-4},
):
    init: Path | None = place(f"{_GRAFTED}; required.")


@dataclass(frozen=True, kw_only=True)
class CascadeCalibrate(
    RecipeSettings,
    name="cascade-calibrate",
    summary="thresholds of CASCADE-R for a model (--part) with its drafter (--init)",
    example="--part tiny-janus --init runs/drafter/model",
    needs={"part": "a model that draws tokens", "init": "the folder of its drafter"},
):
    part: Path | None = place("Model that draws tokens, by name, folder or Hub id.")
    init: Path | None = place("Folder of its drafter.")
    data: Path | None = place(
        "Result of `fastgen bench speculative`: its score drops and costs choose the default source."
    )
    samples: int | None = setting(int, "Pictures to measure. Default: 50.", minimum=0)
    prompts_file: str | None = setting(str, "Prompts, one per line, or 'shapesworld'.")


@dataclass(frozen=True, kw_only=True)
class SearchCalibrate(
    RecipeSettings,
    name="search-calibrate",
    summary="thresholds of noise search for a model (--part) with a verifier (--init)",
    example="--part tiny --init shapes-verifier --samples 1000",
    needs={"part": "a diffusion pipeline", "init": "a verifier by name or folder"},
):
    part: Path | None = place("Diffusion pipeline by name, folder or Hub id.")
    init: Path | None = place("Verifier by name or folder.")
    samples: int | None = setting(int, "Trajectories to measure. Default: 1000.", minimum=0)
    prompts_file: str | None = setting(
        str, "Prompts, one per line; their scores replace the check of pictures. Default: ShapesWorld."
    )
    batch_size: int | None = setting(int, "Trajectories at a time. Default: 32.", minimum=1)
    set: Any = key_values(
        "steps, guidance_scale, height, width, sampler, branches; image and mask (files) or strength, for img2img and "
        "inpainting"
    )
    threads: int | None = threads()


_TRAINED = (
    Vae,
    Vq,
    Detector,
    Verifier,
    ZImage,
    Small,
    Janus,
    Drafter,
    Heads,
    DCPatch,
    DCGraft,
    DCFinetune,
)
RECIPES: dict[str, type[TrainingSettings]] = {each.name: each for each in _TRAINED}


def janus_folder(recipe: str, part: Path) -> Path:
    """Folder of the Janus that a recipe needs; downloads it if necessary.

    Raises:
        FastgenError: it is not a Janus model.
    """
    checkpoint = find_checkpoint(str(part))
    if checkpoint.kind != "janus":
        raise FastgenError(f"recipe {recipe}: {part} is not a Janus model")
    return checkpoint.folder if checkpoint.hub_id is None else download(checkpoint.hub_id)
