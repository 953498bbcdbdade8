"""What diffusers can add to a model while it is loaded, checked before its weights load. Imports neither library."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.checks import check_bool, check_choice
from fastgen.errors import FastgenError
from fastgen.io import file_sha256
from fastgen.pipelines.loading.checkpoint import denoiser_name
from fastgen.pipelines.loading.faults import explained
from fastgen.pipelines.loading.weight_files import check_safetensors
from fastgen.pipelines.quantization import BITS, why_not_here

if TYPE_CHECKING:
    import torch

__all__ = ["LoRA", "LoadOptions"]

#: Where weights are kept: on the device; there if they fit; or in main memory until they are needed, as whole
#: networks, groups of layers, or single layers.
OFFLOADS = ("none", "auto", "model", "group", "sequential")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Schedulers of flow models that read the noise levels and the shift that their pipelines pass.
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler")
# Of models distilled to few steps; diffusers does not list them among the schedulers that share a configuration.
_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
# Memory that drawing takes, as a multiple of the weights that are on the device.
_WORKING_MEMORY = 1.3


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
        for file in (files := self.files()):
            check_safetensors(file)
        on_hub = _HUB_ID.fullmatch(self.source) and not self.source.endswith(".safetensors")
        if not files and (os.path.exists(self.source) or not on_hub):
            needs = "a .safetensors file, a folder with one, or a Hub id"
            raise FastgenError(f"lora: {self.source!r} is not allowed, needs {needs}")
        return self

    def files(self) -> list[Path]:
        """Its weight files on this machine; none for a Hub id."""
        path = Path(self.source)
        found = path.glob("*.safetensors") if self.source and path.is_dir() else [path]
        return sorted(file for file in found if file.suffix == ".safetensors" and file.is_file())

    def load(self, pipe: Any, name: str) -> None:
        """Load as adapter `name`; refuses weights that do not fit the pipeline's layers."""
        path = Path(self.source)
        folder, where = (path.parent, {"weight_name": path.name}) if path.is_file() else (self.source, {})
        hub_id = None if path.exists() else self.source
        failed = f"cannot be loaded into {type(pipe).__name__}"
        with explained(f"lora: {self.source}", failed, hub_id=hub_id, use="pass its folder to --lora"):
            pipe.load_lora_weights(os.fspath(folder), adapter_name=name, use_safetensors=True, **where)
        if not any(name in names for names in pipe.get_list_adapters().values()):
            raise FastgenError(f"lora: {self.source} has no weights for any layer of {type(pipe).__name__}")


def _scheduler_class(current: str, asked: str) -> Any:
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
    return getattr(diffusers, found)


@dataclass(frozen=True)
class LoadOptions:
    """What is added to a model while it is loaded, as `load_pipeline` takes it."""

    scheduler: str | None = None
    loras: Any = ()  # in the end a tuple of `LoRA`
    offload: str = "none"
    vae_tiling: bool = False
    quantize: str | None = None
    target: Any = None  # options of a token model's adapter, in the end a dictionary

    def __post_init__(self) -> None:
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise FastgenError(f"scheduler: needs the name of a class, got {type(self.scheduler).__name__}")
        check_bool("vae_tiling", self.vae_tiling)
        check_choice("offload", self.offload, OFFLOADS)
        if self.quantize is not None:
            check_choice("quantize", self.quantize, BITS)
        one = isinstance(self.loras, str | os.PathLike | LoRA)
        object.__setattr__(self, "loras", tuple(map(LoRA.parse, [self.loras] if one else self.loras or ())))
        if self.target is not None and not isinstance(self.target, Mapping):
            raise FastgenError(f"options: needs a mapping of names to values, got {type(self.target).__name__}")
        target = dict(self.target or {})
        object.__setattr__(self, "target", target)
        decode = target.get("decode")
        if isinstance(decode, str) and not Path(decode, "config.json").is_file():
            raise FastgenError(f"options: decode={decode!r} is no folder of a VQModel of diffusers")

    def check(self, kind: type, index: Mapping[str, Any], device: torch.device, takes: tuple[str, ...] = ()) -> None:
        """Refuse what the pipeline of class `kind` or the device cannot do, before weights load. `index`: content of
        its model_index.json; `takes`: names of the options of a token model's adapter."""
        if unknown := sorted(str(name) for name in set(self.target) - set(takes)):
            has = f"the model has {', '.join(takes)}" if takes else "the model has no such options"
            raise FastgenError(f"options: {unknown[0]} is not allowed, {has}")
        if self.scheduler is not None:
            entry = index.get("scheduler")
            if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], str):
                raise FastgenError(f"scheduler: {kind.__name__} has none")
            _scheduler_class(entry[1], self.scheduler)
        if self.loras and not hasattr(kind, "load_lora_weights"):
            raise FastgenError(f"lora: {kind.__name__} does not take LoRA weights")
        if self.loras and importlib.util.find_spec("peft") is None:
            raise FastgenError("lora: needs peft, which is not installed (python -m pip install peft)")
        if self.vae_tiling and "vae" not in index:
            raise FastgenError(f"vae_tiling: {kind.__name__} has no VAE")
        if self.offload not in ("none", "auto") and device.type == "cpu":
            raise FastgenError(f"offload: {self.offload!r} moves weights to a GPU, and the device is the CPU")
        if self.quantize is not None and not denoiser_name(index):
            raise FastgenError(f"quantize: {kind.__name__} has no denoiser")
        if self.quantize is not None and (reason := why_not_here(self.quantize, device)):
            raise FastgenError(f"quantize: {self.quantize} cannot be used: {reason}")

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that change pictures, for the sidecar; only those that are set."""
        loras = [
            {"source": each.source, "weight": each.weight, "sha256": [file_sha256(file) for file in each.files()]}
            for each in self.loras
        ]
        asked = {name: getattr(self, name) for name in ("scheduler", "vae_tiling", "quantize")}
        asked |= {"loras": loras, "options": {name: each for name, each in self.target.items() if not callable(each)}}
        return {name: value for name, value in asked.items() if value}

    def apply(self, pipe: Any) -> None:
        """Set scheduler, LoRA weights and tiling of a loaded pipeline."""
        from fastgen.pipelines.flow_solver import for_pipelines_of_flow, unipc_of_flow

        if self.scheduler is not None:
            current = type(pipe.scheduler).__name__
            chosen: Any = _scheduler_class(current, self.scheduler)
            flow = chosen.__name__ == "UniPCMultistepScheduler" and current.startswith("FlowMatch")
            pipe.scheduler = unipc_of_flow(pipe.scheduler) if flow else chosen.from_config(pipe.scheduler.config)
        if type(getattr(pipe, "scheduler", None)).__name__ == "UniPCMultistepScheduler":
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

    def resolve_offload(self, sizes: Mapping[str, int], free: int | None) -> str:
        """The way to place networks of these sizes in bytes, "auto" by what fits; `free` is None on a CPU."""
        if self.offload != "auto":
            return self.offload
        if free is None or sum(sizes.values()) * _WORKING_MEMORY <= free:
            return "none"
        return "model" if max(sizes.values()) * _WORKING_MEMORY <= free else "group"

    @staticmethod
    def place(pipe: Any, device: torch.device, way: str) -> None:
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
