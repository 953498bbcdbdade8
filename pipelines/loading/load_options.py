"""What a user may add to a model while it is loaded: another scheduler, LoRA weights, offloading, a tiled decoder.

Everything is diffusers' own, and checked before the weights load. Imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastgen.checks import check_bool, check_choice
from fastgen.errors import FastgenError
from fastgen.io import file_sha256
from fastgen.pipelines.loading.faults import explained
from fastgen.pipelines.loading.weight_files import check_safetensors
from fastgen.pipelines.quantization import BITS

if TYPE_CHECKING:
    import torch

__all__ = ["OFFLOADS", "QUANTIZED", "LoadOptions", "LoRA", "scheduler_class"]

Offload = Literal["none", "auto", "model", "group", "sequential"]
OFFLOADS: tuple[Offload, ...] = ("none", "auto", "model", "group", "sequential")
"""Where weights are kept: on the device; there if they fit; or in main memory until they are needed, as whole
networks, groups of layers, or single layers."""

QUANTIZED = tuple(BITS)
"""Kinds of weights in fewer bits; int8-dynamic computes in 8 bits too."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Schedulers of flow models that read the noise levels and the shift that their pipelines pass.
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler")
# Of models distilled to few steps; diffusers does not list them among the schedulers that share a configuration.
_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_WORKING_MEMORY = 1.3
"""Memory that drawing takes, as a multiple of the weights that are on the device."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank weights to load into a pipeline: a .safetensors file, a folder, or a Hub id."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: object) -> LoRA:
        """PATH or PATH:WEIGHT."""
        if isinstance(text, cls):
            return text._checked()
        if not isinstance(text, str | os.PathLike):
            raise FastgenError(f"lora: needs PATH or PATH:WEIGHT, got {type(text).__name__}")
        source, weight = os.fspath(text), 1.0
        head, colon, tail = source.rpartition(":")
        if colon and not os.path.exists(source):
            try:
                source, weight = head, float(tail)
            except ValueError as error:
                raise FastgenError(f"lora: {tail!r} in {source!r} is not a number; needs PATH:WEIGHT") from error
        return cls(source, weight)._checked()

    def _checked(self) -> LoRA:
        if not math.isfinite(self.weight):
            raise FastgenError(f"lora: weight {self.weight} is not allowed, needs a finite number")
        on_hub = _HUB_ID.fullmatch(self.source) and not self.source.endswith(".safetensors")
        if not (files := self.files()) and (os.path.exists(self.source) or not on_hub):
            needs = "a .safetensors file, a folder with one, or a Hub id"
            raise FastgenError(f"lora: {self.source!r} is not allowed, needs {needs}")
        for file in files:
            check_safetensors(file)
        return self

    def files(self) -> list[Path]:
        """Its weight files on this machine; none for a Hub id."""
        path = Path(self.source)
        found = path.glob("*.safetensors") if self.source and path.is_dir() else [path]
        return sorted(file for file in found if file.suffix == ".safetensors" and file.is_file())

    def load(self, pipe: Any, name: str) -> None:
        """Load as adapter `name`; refuses weights that do not fit the pipeline's layers."""
        path = Path(self.source)
        where = {"weight_name": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else self.source
        hub_id = None if path.exists() else self.source
        failed = f"cannot be loaded into {type(pipe).__name__}"
        with explained(f"lora: {self.source}", failed, hub_id=hub_id, use="pass its folder to --lora"):
            pipe.load_lora_weights(os.fspath(folder), adapter_name=name, use_safetensors=True, **where)
        if not any(name in names for names in pipe.get_list_adapters().values()):
            raise FastgenError(f"lora: {self.source} has no weights for any layer of {type(pipe).__name__}")


def scheduler_class(current: str, asked: str) -> type:
    """The scheduler that takes the place of a model's own, by their classes in diffusers: `asked` with or without
    "Scheduler" at its end. Refuses one that does not read such a model's configuration."""
    import diffusers

    own = getattr(diffusers, current, None)
    if current.startswith("FlowMatch"):
        names = list(_FLOW)
    else:
        names = sorted(set(getattr(own, "_compatibles", ())) | {current})
        names += _FEW_STEPS if len(names) > 1 else ()
    found = next((name for name in names if name.removesuffix("Scheduler") == asked.removesuffix("Scheduler")), None)
    if found is None:
        raise FastgenError(
            f"scheduler: {asked!r} is not allowed, a model with {current} needs one of {', '.join(names)}"
        )
    chosen: type = getattr(diffusers, found)
    return chosen


def _size(text: str) -> list[int]:
    height, _, width = text.partition("x")
    return [int(height), int(width)]


#: What `NAME=VALUE` of an option of a token model means.
_TARGET_OPTIONS: dict[str, Callable[[str], Any]] = {
    "size": _size,
    "negative": str,
    "line_end": int,
    "begin": lambda text: [int(each) for each in text.split(",")],
    "decode": str,
}


def target_options(given: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Any]:
    """Options of a token model's adapter, of a mapping, or of texts NAME=VALUE."""
    if isinstance(given, str):
        given = [given]
    found: dict[str, Any] = {}
    texts = () if isinstance(given, Mapping) else given or ()
    pairs = given.items() if isinstance(given, Mapping) else (str(text).partition("=")[::2] for text in texts)
    for name, value in pairs:
        if name not in _TARGET_OPTIONS:
            raise FastgenError(f"options: {name!r} is unknown, there are {', '.join(_TARGET_OPTIONS)}")
        try:
            found[name] = _TARGET_OPTIONS[name](value) if isinstance(value, str) else value
        except ValueError as error:
            needed = "HEIGHTxWIDTH in tokens" if name == "size" else "a number, or numbers with commas"
            raise FastgenError(f"options: {name}={value!r} is not allowed, needs {needed}") from error
    decode = found.get("decode")
    if isinstance(decode, str) and not Path(decode, "config.json").is_file():
        raise FastgenError(f"options: decode={decode!r} is no folder of a VQModel of diffusers")
    return found


@dataclass(frozen=True)
class LoadOptions:
    """What is added to a model while it is loaded."""

    scheduler: str | None = None  # a class of diffusers that reads the configuration of the model's own
    loras: tuple[LoRA, ...] = ()
    offload: Offload = "none"
    vae_tiling: bool = False  # for large pictures in little memory; pixels change near the borders of tiles
    quantize: str | None = None  # the denoiser's weights in fewer bits, see `QUANTIZED`
    target: Mapping[str, Any] = field(default_factory=dict)  # options of a token model's adapter

    @classmethod
    def of(
        cls,
        scheduler: str | None = None,
        loras: Iterable[Any] | str | None = None,
        offload: str = "none",
        vae_tiling: bool = False,
        quantize: str | None = None,
        target: Mapping[str, Any] | Iterable[str] | None = None,
    ) -> LoadOptions:
        """Check a user's arguments: `loras` as PATH or PATH:WEIGHT, one or several; `target` as `target_options`."""
        if scheduler is not None and not isinstance(scheduler, str):
            raise FastgenError(f"scheduler: needs the name of a class, got {type(scheduler).__name__}")
        given = (loras,) if isinstance(loras, str | os.PathLike | LoRA) else tuple(loras or ())
        check_bool("vae_tiling", vae_tiling)
        check_choice("offload", offload, OFFLOADS)
        if quantize is not None:
            check_choice("quantize", quantize, QUANTIZED)
        parsed = tuple(LoRA.parse(each) for each in given)
        return cls(scheduler, parsed, offload, vae_tiling, quantize, target_options(target))  # type: ignore[arg-type]

    def check(self, kind: type, index: Mapping[str, Any], device: torch.device, takes: tuple[str, ...] = ()) -> None:
        """Refuse what the pipeline or the device cannot do, before weights load.

        Args:
            kind: the pipeline's class.
            index: content of its model_index.json.
            device: where it goes.
            takes: names of the options of a token model's adapter.
        """
        if unknown := sorted(set(self.target) - set(takes)):
            has = f"the model has {', '.join(takes)}" if takes else "the model has no such options"
            raise FastgenError(f"options: {unknown[0]} is not allowed, {has}")
        if self.scheduler is not None:
            entry = index.get("scheduler")
            if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], str):
                raise FastgenError(f"scheduler: {kind.__name__} has none")
            scheduler_class(entry[1], self.scheduler)
        if self.loras and not hasattr(kind, "load_lora_weights"):
            raise FastgenError(f"lora: {kind.__name__} does not take LoRA weights")
        if self.loras and importlib.util.find_spec("peft") is None:
            raise FastgenError("lora: needs peft, which is not installed (python -m pip install peft)")
        if self.vae_tiling and "vae" not in index:
            raise FastgenError(f"vae_tiling: {kind.__name__} has no VAE")
        if self.offload not in ("none", "auto") and device.type == "cpu":
            raise FastgenError(f"offload: {self.offload!r} moves weights to a GPU, and the device is the CPU")
        if self.quantize is None:
            return
        from fastgen.pipelines.loading.memory import denoiser_name
        from fastgen.pipelines.quantization import why_not_here

        if not denoiser_name(index):
            raise FastgenError(f"quantize: {kind.__name__} has no denoiser")
        if reason := why_not_here(self.quantize, device):
            raise FastgenError(f"quantize: {self.quantize} cannot be used: {reason}")

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that change pictures, for the sidecar; only those that are set."""
        loras = [
            {"source": each.source, "weight": each.weight, "sha256": [file_sha256(file) for file in each.files()]}
            for each in self.loras
        ]
        asked: dict[str, Any] = {"scheduler": self.scheduler, "loras": loras, "vae_tiling": self.vae_tiling}
        options = {name: value for name, value in self.target.items() if not callable(value)}
        asked |= {"quantize": self.quantize, "options": options}
        return {name: value for name, value in asked.items() if value}

    def apply(self, pipe: Any) -> None:
        """Set scheduler, LoRA weights and tiling of a loaded pipeline."""
        if self.scheduler is not None:
            current = type(pipe.scheduler).__name__
            chosen: Any = scheduler_class(current, self.scheduler)
            if chosen.__name__ == "UniPCMultistepScheduler" and current.startswith("FlowMatch"):
                from fastgen.pipelines.flow_solver import unipc_of_flow

                pipe.scheduler = unipc_of_flow(pipe.scheduler)
            else:
                pipe.scheduler = chosen.from_config(pipe.scheduler.config)
        if type(getattr(pipe, "scheduler", None)).__name__ == "UniPCMultistepScheduler":
            from fastgen.pipelines.flow_solver import for_pipelines_of_flow

            pipe.scheduler = for_pipelines_of_flow(pipe.scheduler)
        names = [f"lora_{i}" for i in range(len(self.loras))]
        for lora, name in zip(self.loras, names, strict=True):
            lora.load(pipe, name)
        if names:
            pipe.set_adapters(names, [lora.weight for lora in self.loras])
        if self.vae_tiling:
            if not hasattr(pipe.vae, "enable_tiling"):
                raise FastgenError(f"vae_tiling: {type(pipe.vae).__name__} does not decode in tiles")
            pipe.vae.enable_tiling()

    def resolve_offload(self, sizes: Mapping[str, int], free: int | None) -> Offload:
        """The way to place networks of these sizes in bytes, "auto" by what fits; `free` is None on a CPU."""
        if self.offload != "auto":
            return self.offload
        if free is None or sum(sizes.values()) * _WORKING_MEMORY <= free:
            return "none"
        return "model" if max(sizes.values()) * _WORKING_MEMORY <= free else "group"

    @staticmethod
    def place(pipe: Any, device: torch.device, way: Offload) -> None:
        """Move the pipeline to its device, or let its parts wait in main memory."""
        with explained(f"offload: {type(pipe).__name__}", f"cannot do {way!r}"):
            if way == "none":
                pipe.to(device)
            elif way == "model":
                pipe.enable_model_cpu_offload(device=device)
            elif way == "sequential":
                pipe.enable_sequential_cpu_offload(device=device)
            else:
                stream = device.type == "cuda"
                pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=stream)
