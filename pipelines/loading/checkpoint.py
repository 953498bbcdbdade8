"""Finding a model, and what its configuration and the headers of its weight files say. Imports neither torch nor
diffusers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import fastgen
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.io import read_json, read_object
from fastgen.pipelines.loading.faults import explained
from fastgen.pipelines.loading.weight_files import read_files

__all__ = ["EMBEDDED_MODELS", "Checkpoint", "denoiser_name", "embedded_folder", "find_checkpoint", "find_drafter"]

#: Models that come with the package.
EMBEDDED_MODELS = ("tiny", "tiny-janus", "small", "small-dc")

# Pipelines of this package by the transformer that asks for one, whatever class the folder names.
_OWN_PIPELINES = {"DCZImageTransformer2DModel": "DCZImagePipeline"}

Kind = Literal["diffusers", "janus", "tokens"]
#: Models of transformers that only speculative decoding draws with, by model_type: their class, and the options of
#: their adapter (`fastgen.drafters.targets`).
TOKEN_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "chameleon": ("ChameleonForConditionalGeneration", ("size", "line_end", "begin", "decode")),
    "emu3": ("Emu3ForConditionalGeneration", ("size", "negative")),
}
#: What to do with models of other types, by model_type.
_ADVICE = {
    "multi_modality": "; the official layout of Janus-Pro is not read, take the converted "
    "deepseek-community/Janus-Pro-1B or deepseek-community/Janus-Pro-7B",
    "glm_image": "; fastgen reads the whole folder of diffusers' GlmImagePipeline, zai-org/GLM-Image",
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CONFIG_FILES = ("*.json", "*/*.json")
# What networks and schedulers are built from.
_NETWORK_FILES = ("config.json", "scheduler_config.json", "generation_config.json", "model_index.json")
_TOKEN_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
# Beyond it a tokenizer table takes longer to parse than the check is worth.
_LARGEST_PARSED_JSON = 32 * 2**20
# Integers of a configuration, and its lists, are limited so that networks are built in bounded time. Far above any
# published model.
_LAYERS = re.compile(r"layers|blocks|depth|stages|repeats|experts")
_MOST_LAYERS, _LONGEST_LIST, _LARGEST_INTEGER = 2**10, 2**12, 2**24
_UNLIMITED = re.compile(r"theta|max_length")


@dataclass(frozen=True)
class Checkpoint:
    """A model whose configuration files were read."""

    model: str  # as the user wrote it
    folder: Path  # of its configuration files
    kind: Kind  # "janus" and "tokens" are of transformers, see `TOKEN_MODELS`
    hub_id: str | None = None  # where the model comes from the Hub; its weights may not be on this machine yet
    pipeline_class: str = ""  # of diffusers, "JanusImagePipeline" for Janus, else that of the model
    defaults: dict[str, Any] = field(default_factory=dict)  # its generation settings, from its fastgen.json
    size_multiple: int = 0  # of height and width; 0: the configuration does not say
    fixed_size: int | None = None  # the only height and width in pixels
    max_size: int | None = None  # the largest height and width in pixels
    drafter: Path | None = None  # for speculative decoding: "drafter" in fastgen.json, a folder relative to it
    # Supplies the components and defaults that `folder` lacks: "base" in fastgen.json, an embedded model or a folder
    # relative to that file.
    base: Path | None = None
    variant: str | None = None  # of the weight files, as in diffusers ("fp16")
    revision: str | None = None  # branch, tag or commit on the Hub
    # Of a saved `SpeculativeImagePipeline`: the folder of its tokenizer, and the options of its adapter.
    tokenizer: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder that `model` names; of a Hub id the snapshot, whose name is the commit."""
        return self.folder if self.tokenizer is None else self.tokenizer.parent

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that the model's files are in."""
        return (self.root,) if self.base is None else (self.root, self.base)

    @property
    def has_dynamic_chunking(self) -> bool:
        return self.pipeline_class in _OWN_PIPELINES.values()

    @property
    def draws_tokens(self) -> bool:
        return self.kind != "diffusers" or self.pipeline_class == "LlamaGen"

    @property
    def speculative_only(self) -> bool:
        """Whether speculative decoding, with its plain loop, is the only method that draws with it."""
        return self.draws_tokens and self.kind != "janus"

    @property
    def target_options(self) -> tuple[str, ...]:
        """Names of the options of its adapter."""
        return next((names for kind, names in TOKEN_MODELS.values() if kind == self.pipeline_class), ())

    @property
    def networks(self) -> dict[str, Path]:
        """The folders of its networks, by the names of the components."""
        if self.kind != "diffusers":
            return {"model": self.folder}
        places = {name: self.component(name) for name in _components(self.index)}
        # Schedulers and processors have configuration files of other names and no weights.
        return {name: folder for name, folder in places.items() if (folder / "config.json").is_file()}

    @property
    def index(self) -> dict[str, Any]:
        """Content of its model_index.json; empty for a folder of transformers."""
        return _read_if_there(self.folder / "model_index.json")

    def component(self, name: str) -> Path:
        """Folder of a component of a diffusers pipeline."""
        own = self.folder / name
        return own if self.base is None or own.is_dir() else self.base / name

    def check_weights(self) -> None:
        """Refuse weight files that are missing, or not whole by their headers and lengths."""
        for folder in self.networks.values():
            read_files(folder, self.variant)

    def check_size(self, height: int | None, width: int | None) -> None:
        """Refuse a picture size that the model cannot draw; None is the model's default."""
        for name, value in (("height", height), ("width", width)):
            if value is None:
                continue
            check_integer(name, value, 1)
            if self.fixed_size is not None and value != self.fixed_size:
                needs = f"draws {self.fixed_size} pixels only"
            elif self.size_multiple and value % self.size_multiple:
                needs = f"needs a multiple of {self.size_multiple} pixels"
            elif self.max_size is not None and value > self.max_size:
                needs = f"draws at most {self.max_size} pixels"
            else:
                continue
            raise FastgenError(f"{name}: {value} is not allowed, {self.model} {needs}")


def denoiser_name(index: Mapping[str, Any]) -> str:
    """Which component of a model_index.json is called at every step; empty where none is."""
    return next((name for name in ("transformer", "unet", "prior") if name in index), "")


def embedded_folder(name: str) -> Path:
    """Folder of a model that comes with the package."""
    for root in fastgen.__path__:
        if (folder := Path(root, "assets", name)).is_dir():
            return folder
    raise FastgenError(f"model {name!r} is missing from this installation of fastgen; reinstall the package")


def find_checkpoint(
    model: str | os.PathLike[str], variant: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Find a model by what `load_pipeline` takes, and read its configuration files; those of a Hub id are downloaded
    if need be."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[A-Za-z]\w*", variant)):
        raise FastgenError(f"variant: {variant!r} is not allowed, needs a name such as fp16")
    name = _name("model", model)
    path = embedded_folder(name) if name in EMBEDDED_MODELS else Path(name).expanduser()
    on_hub = not path.exists() and _HUB_ID.fullmatch(name)
    if revision is not None and not (isinstance(revision, str) and revision and on_hub):
        raise FastgenError(f"revision: {revision!r} is not allowed, needs a branch, tag or commit of a Hub id")
    if path.is_dir():
        return replace(_read_checkpoint(name, path, None), variant=variant)
    if path.exists():
        raise FastgenError(f"model {name!r} is a file; needs the folder that contains model_index.json or config.json")
    if on_hub:
        found = _read_checkpoint(name, download(name, revision, _CONFIG_FILES), name)
        return replace(found, variant=variant, revision=revision)
    if os.sep in name or "/" in name or name.startswith((".", "~")):
        raise FastgenError(f"model {name!r}: there is no such folder")
    raise FastgenError(
        f"model {name!r} is unknown: it is neither an embedded model ({', '.join(EMBEDDED_MODELS)}), "
        "nor a folder, nor a Hub id of the form owner/name"
    )


def find_drafter(checkpoint: Checkpoint, name: str | os.PathLike[str] | None) -> Path | None:
    """Folder of a drafter: of a folder or a Hub id, of "none", or by None of the model's own."""
    text = None if name is None else _name("drafter", name)
    if text is None or text == "none":
        folder = checkpoint.drafter if text is None else None
    else:
        on_hub = not Path(text).is_dir() and _HUB_ID.fullmatch(text)
        folder = _drafter_folder(download(text) if on_hub else Path(text))
    if folder is not None and (checkpoint.hub_id is None or folder != checkpoint.drafter):
        read_files(folder)
    return folder


def _name(argument: str, value: object) -> str:
    """The name or the folder that an argument means."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not text or not isinstance(text, str) or "\0" in text:
        raise FastgenError(f"{argument}: {str(value)[:60]!r} is not allowed, needs a name, a folder or a Hub id")
    return text


def _read_checkpoint(model: str, folder: Path, hub_id: str | None) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        return _read_pipeline(model, folder, hub_id)
    if not (folder / "config.json").is_file():
        raise FastgenError(f"model {model!r}: {folder} has neither model_index.json nor config.json")
    config, defaults = read_object(folder / "config.json"), _read_if_there(folder / "fastgen.json")
    kind = str(config.get("model_type", "model of unknown type"))
    if kind != "janus" and kind not in TOKEN_MODELS:
        raise FastgenError(
            f"model {model!r} is a transformers {kind!r}; needs a diffusers pipeline or a model that draws image "
            f"tokens (janus, {', '.join(TOKEN_MODELS)}){_ADVICE.get(kind, '')}"
        )
    _check_json_files(folder)
    drafter = _named(folder, "drafter", defaults)
    own = None if drafter is None else _drafter_folder(folder / drafter)
    if kind == "janus":
        size, name = _janus_size(folder, config), "JanusImagePipeline"
        return Checkpoint(model, folder, "janus", hub_id, name, defaults, fixed_size=size, drafter=own)
    return Checkpoint(model, folder, "tokens", hub_id, TOKEN_MODELS[kind][0], defaults, drafter=own)


def _read_pipeline(model: str, folder: Path, hub_id: str | None) -> Checkpoint:
    """Read a folder with a model_index.json."""
    file, defaults = folder / "model_index.json", _read_if_there(folder / "fastgen.json")
    index = read_object(file)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise FastgenError(f"{file} names no pipeline class (_class_name)")
    for component, entry in index.items():
        if isinstance(entry, list) and not all(part is None or isinstance(part, str) for part in entry):
            raise FastgenError(f"{file}: {component} must name a library and a class")
    if name == "SpeculativeImagePipeline":
        return _read_saved(model, folder, hub_id, index)
    base = _base_folder(folder, defaults)
    if base is not None:
        defaults = {**_read_if_there(base / "fastgen.json"), **defaults}
    found = Checkpoint(model, folder, "diffusers", hub_id, name, defaults, base=base)
    for component in _components(index):
        if not found.component(component).is_dir():
            raise FastgenError(f"{folder}: the component {component!r} of model_index.json is missing")
    if "transformer" in _components(index):
        name = _OWN_PIPELINES.get(str(index["transformer"][1]), name)
    for place in found.folders:
        _check_json_files(place)
    multiple, largest = _size_limits(found.component, index)
    return replace(found, pipeline_class=name, size_multiple=multiple, max_size=largest)


def _read_saved(model: str, folder: Path, hub_id: str | None, index: dict[str, Any]) -> Checkpoint:
    """Read a folder written by `SpeculativeImagePipeline.save_pretrained`."""
    found, options = _read_checkpoint(model, folder / "model", hub_id), index.get("options") or {}
    if not found.draws_tokens or not isinstance(options, dict):
        raise FastgenError(f"{folder / 'model_index.json'}: the model or its options are not those of image tokens")
    if not (folder / "tokenizer").is_dir():
        raise FastgenError(f"{folder}: the component 'tokenizer' of model_index.json is missing")
    drafts = [folder / name for name in ("drafter", "heads") if name in _components(index)]
    drafter = _drafter_folder(drafts[0]) if drafts else None
    return replace(found, tokenizer=folder / "tokenizer", drafter=drafter, options=options)


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _named(folder: Path, key: str, defaults: dict[str, Any]) -> str | None:
    """The value of "base" or "drafter" in fastgen.json."""
    name = defaults.pop(key, None)
    if name is not None and (not isinstance(name, str) or not name or "\0" in name):
        raise FastgenError(f"{folder / 'fastgen.json'}: {key} must name a folder, got {str(name)[:60]!r}")
    return name


def _base_folder(folder: Path, defaults: dict[str, Any]) -> Path | None:
    if (base := _named(folder, "base", defaults)) is None:
        return None
    found = embedded_folder(base) if base in EMBEDDED_MODELS else folder / base
    if not (found / "model_index.json").is_file() or "base" in _read_if_there(found / "fastgen.json"):
        raise FastgenError(f"{folder / 'fastgen.json'}: the base {base!r} is no whole pipeline")
    return found


def _drafter_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise FastgenError(f"drafter {os.fspath(folder)!r}: there is no config.json in such a folder")
    _check_json_files(folder)
    return folder


def _components(index: dict[str, Any]) -> Iterator[str]:
    """Names of the components that a pipeline folder must contain."""
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            yield name


def _check_json_files(folder: Path) -> None:
    for pattern in _CONFIG_FILES:
        for file in sorted(folder.glob(pattern)):
            if file.name in _NETWORK_FILES:
                check_numbers(read_object(file), file)
            elif file.stat().st_size <= _LARGEST_PARSED_JSON:
                read_json(file)


def check_numbers(value: object, file: Path, key: str = "") -> None:
    """Refuse integers and lists of a configuration that are too large, and numbers that are not finite; the message
    names file and key."""
    infinite = isinstance(value, float) and not math.isfinite(value)
    # The defaults of some schedulers are infinite.
    if infinite and (file.name != "scheduler_config.json" or value != value):
        raise FastgenError(f"{file}: {key} is {value}, needs a finite number")
    limit = _MOST_LAYERS if _LAYERS.search(key) else _LARGEST_INTEGER
    if isinstance(value, int) and abs(value) > limit and not _UNLIMITED.search(key):
        raise FastgenError(f"{file}: {key} is {value}, at most {limit} is allowed")
    if isinstance(value, list) and len(value) > _LONGEST_LIST:
        raise FastgenError(f"{file}: {key} has {len(value)} values, at most {_LONGEST_LIST} are allowed")
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else ((key, each) for each in value):
            check_numbers(inner, file, name)


def _size_limits(component: Callable[[str], Path], index: dict[str, Any]) -> tuple[int, int | None]:
    """Multiple and largest size of height and width; (0, None) where the configuration does not tell."""
    vae, config = (_read_if_there(component(name) / "config.json") for name in ("vae", "transformer"))
    channels = vae.get("block_out_channels")
    if vae.get("_class_name") != "AutoencoderKL" or not isinstance(channels, list):
        return 0, None
    multiple, largest = 2 ** (len(channels) - 1), None  # a UNet works on single latents
    if config.get("_class_name") in ("ZImageTransformer2DModel", "DCZImageTransformer2DModel"):
        multiple *= 2  # the pipeline always uses patch size 2
        lengths = config.get("axes_lens")
        if isinstance(lengths, list) and len(lengths) == 3:
            largest = multiple * min(int(lengths[1]), int(lengths[2]))
    elif isinstance(patch := config.get("patch_size"), int):
        # FLUX packs 2x2 latents in the pipeline and calls its own patch size 1.
        multiple *= 2 if str(index.get("_class_name")).startswith("Flux") else patch
    return multiple, largest


def _janus_size(folder: Path, config: dict[str, Any]) -> int | None:
    """Side of the square picture; None where the configuration does not say."""
    vision, vq = config.get("vision_config"), config.get("vq_config")
    if not isinstance(vision, dict) or not isinstance(vq, dict):
        raise FastgenError(f"{folder / 'config.json'} has no vision_config or no vq_config")
    image, patch, levels = vision.get("image_size"), vision.get("patch_size"), vq.get("channel_multiplier")
    if not (isinstance(image, int) and isinstance(patch, int) and patch > 0 and isinstance(levels, list)):
        return None
    return image // patch * 2 ** (len(levels) - 1)


def download(model: str, revision: str | None = None, patterns: tuple[str, ...] = _TOKEN_MODEL_FILES) -> Path:
    """Download files of a Hub id, or find them in the local cache; by default those of a transformers model."""
    from huggingface_hub import snapshot_download

    with explained(f"model {model!r}", hub_id=model):
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
