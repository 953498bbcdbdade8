"""What `accelerate` can turn on. Each part is off, or on; off is bit for bit what was there before."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.contracts import Loss
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.calls import change_calls, progress, takes

__all__ = [
    "PARTS",
    "ChannelsLast",
    "Compile",
    "FewerSteps",
    "Guidance",
    "Kernels",
    "Part",
    "StepCache",
    "TailDrops",
    "denoiser_of",
    "made_part",
]

Undo = Callable[[], None]


def denoiser_of(pipe: Any) -> Any:
    """The network that is called at every step, or None."""
    found = [getattr(pipe, name, None) for name in ("transformer", "unet", "prior")]
    return next((each for each in found if isinstance(each, nn.Module)), None)


class Part(ABC):
    """One thing that makes a pipeline faster. Its fields are its settings."""

    name: ClassVar[str]
    loss: ClassVar[Loss]

    @abstractmethod
    def why_not(self, pipe: Any) -> str | None:
        """Why it cannot be used here, in a few words; None if it can. Changes nothing."""

    @abstractmethod
    def enable(self, pipe: Any) -> Undo:
        """Turn it on; returns what turns it off again."""

    @property
    def settings(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kernels(Part):
    """Fused kernels, `fastgen.enable_kernels`."""

    name = "kernels"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        from fastgen.pipelines.kernels import served

        enabled, others = served(pipe)
        if enabled:
            return "enabled already"
        if not others:
            return "nothing in it is served"
        return None if pipe.device.type == "cuda" else "Triton kernels need a GPU"

    def enable(self, pipe: Any) -> Undo:
        from fastgen.pipelines.kernels import disable_kernels, enable_kernels

        enable_kernels(pipe)
        return lambda: disable_kernels(pipe)


@dataclass(frozen=True)
class ChannelsLast(Part):
    """Weights of convolutions with the channels innermost, as their fastest routines read them."""

    name = "channels_last"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        if not self._convolutions(pipe):
            return "no 2D convolutions, or their weights are not on a device, or quantised"
        return None

    def enable(self, pipe: Any) -> Undo:
        before = [(layer, layer.weight.data) for layer in self._convolutions(pipe)]

        def undo() -> None:
            for layer, weight in before:
                # Weights that were moved or replaced meanwhile are no longer those of before.
                same = layer.weight.shape == weight.shape and layer.weight.device == weight.device
                if same and layer.weight.dtype == weight.dtype and torch.equal(layer.weight.data, weight):
                    layer.weight.data = weight
                else:
                    layer.weight.data = layer.weight.data.contiguous()

        for layer, weight in before:
            layer.weight.data = weight.contiguous(memory_format=torch.channels_last)
        return undo

    def _convolutions(self, pipe: Any) -> list[Any]:
        parts = [getattr(pipe, name, None) for name in ("unet", "vae", "movq", "vqvae", "controlnet")]
        return [
            layer
            for part in parts
            if isinstance(part, nn.Module)
            for layer in part.modules()
            if type(layer) is nn.Conv2d
            and layer.weight.is_floating_point()
            and layer.weight.device.type != "meta"
            and layer.kernel_size != (1, 1)
            and layer.weight.is_contiguous()
        ]


@dataclass(frozen=True)
class Compile(Part):
    """Regional compilation: `compile_repeated_blocks` of the denoiser. The first call of a size takes long."""

    name = "compile"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        model = denoiser_of(pipe)
        if model is None or not getattr(model, "_repeated_blocks", None):
            return "its denoiser names no repeated blocks"
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return "compiled already"
        return None

    def enable(self, pipe: Any) -> Undo:
        model = denoiser_of(pipe)
        model.compile_repeated_blocks()
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]

        def undo() -> None:
            for module in compiled:
                vars(module).pop("_compiled_call_impl", None)  # the class has it: None

        return undo


Cache = Literal["first-block", "taylor-seer", "mag"]


@dataclass(frozen=True)
class StepCache(Part):
    """One of diffusers' step caches: blocks are skipped while what they compute changes little.

    Args:
        kind: "first-block" or "taylor-seer".
        threshold: of "first-block": relative change below which the other blocks are skipped, above 0.
        interval: of "taylor-seer": steps from one whole pass to the next, at least 2.
    """

    name = "step_cache"
    loss = "lossy"
    kind: str = "first-block"
    threshold: float = 0.1
    interval: int = 3

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("first-block", "taylor-seer"))
        check_number("threshold", self.threshold, above=0)
        check_integer("interval", self.interval, 2)

    def why_not(self, pipe: Any) -> str | None:
        from diffusers.models.cache_utils import CacheMixin

        model = denoiser_of(pipe)
        if not isinstance(model, CacheMixin):
            return "its denoiser takes none of diffusers' step caches"
        if model.is_cache_enabled:
            return "a step cache is enabled already"
        if "cache_context" not in _names(type(pipe).__call__):
            return "its pipeline does not tell caches which pass is which"
        return None

    def enable(self, pipe: Any) -> Undo:
        from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

        model = denoiser_of(pipe)
        plain = [module for module in model.modules() if not hasattr(module, "_diffusers_hook")]
        if self.kind == "first-block":
            model.enable_cache(FirstBlockCacheConfig(threshold=self.threshold))
        else:
            model.enable_cache(TaylorSeerCacheConfig(cache_interval=self.interval, use_lite_mode=True))
        attached = any(hasattr(module, "_diffusers_hook") for module in plain)

        def undo() -> None:
            model.disable_cache()
            vars(model).pop("_cache_config", None)  # the class has it: None
            for module in plain:  # diffusers leaves empty registries
                vars(module).pop("_diffusers_hook", None)
                if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                    del module.forward

        if not attached:
            undo()
            raise FastgenError(f"step_cache: {self.kind} attaches to nothing in {type(model).__name__}")
        return undo


def _names(function: Any) -> set[str]:
    """Names that a function's own code reads, below its decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return set(function.__code__.co_names)


# Pipelines that run both branches of guidance as one batch, the unconditional half first.
_JOINT = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "HunyuanDiTPipeline",
    "AuraFlowPipeline",
    "Kandinsky3Pipeline",
    "CogView3PlusPipeline",
)


@dataclass(frozen=True)
class Guidance(Part):
    """Classifier-free guidance in the first steps only (guidance interval): the others need one branch, not two.

    Args:
        share: of the steps, in [0, 1); after them the conditional prediction stands alone.
    """

    name = "guidance"
    loss = "lossy"
    share: float = 0.5

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, below=1)

    def why_not(self, pipe: Any) -> str | None:
        if takes(pipe, "cfg_truncation") or _stock_name(pipe) in _JOINT:
            return None
        return "it is not known how its branches of guidance are computed"

    def enable(self, pipe: Any) -> Undo:
        model = denoiser_of(pipe)
        branch = _Truncated(pipe, self.share) if takes(pipe, "cfg_truncation") else _OneBranch(pipe, self.share)
        undo_call = change_calls(pipe, branch.change)
        # Other hooks and wrappers see the batch that is computed.
        before = model.register_forward_pre_hook(branch.before, with_kwargs=True, prepend=True)
        after = model.register_forward_hook(branch.after)

        def undo() -> None:
            undo_call()
            before.remove()
            after.remove()

        return undo


class _OneBranch:
    """Computes the conditional half of a batch and gives it to both, so that guidance adds nothing."""

    def __init__(self, pipe: Any, share: float) -> None:
        self.pipe, self.share = pipe, share
        self.cutting = False

    def change(self, given: dict[str, Any]) -> None:
        self.cutting = False

    def before(self, model: Any, args: Any, kwargs: Any) -> Any:
        now = progress.get()
        self.cutting = False
        if now is None or not getattr(self.pipe, "do_classifier_free_guidance", now.guidance_scale > 1):
            return None
        at, now.passes = now.passes, now.passes + 1
        if at < math.ceil(self.share * now.steps):
            return None
        batch = next(each for each in [*args, *kwargs.values()] if isinstance(each, torch.Tensor)).shape[0]
        self.cutting = batch % 2 == 0
        return _second_half((args, kwargs), batch) if self.cutting else None

    def after(self, model: Any, args: Any, output: Any) -> Any:
        if not self.cutting:
            return None
        if isinstance(output, tuple):
            return tuple(_doubled(each) for each in output)
        for name, value in output.items():
            output[name] = _doubled(value)
        return output


class _Truncated:
    """Ends guidance by the pipeline's own `cfg_truncation`, which it reads at every step."""

    def __init__(self, pipe: Any, share: float) -> None:
        self.pipe, self.share = pipe, share
        self.asked = False

    def change(self, given: dict[str, Any]) -> None:
        self.asked = "cfg_truncation" in given  # what the user asks for holds
        if not self.asked:
            given["cfg_truncation"] = 1.0 if self.share else -1.0

    def before(self, model: Any, args: Any, kwargs: Any) -> None:
        return None

    def after(self, model: Any, args: Any, output: Any) -> None:
        now = progress.get()
        if now is not None and not self.asked:
            now.passes += 1
            if now.passes >= math.ceil(self.share * now.steps):
                self.pipe._cfg_truncation = -1.0


def _second_half(value: Any, batch: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[batch // 2 :] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _second_half(each, batch) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_second_half(each, batch) for each in value)
    return value


def _doubled(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, torch.Tensor) else value


def _stock_name(pipe: Any) -> str:
    return type(pipe).__name__


@dataclass(frozen=True)
class FewerSteps(Part):
    """Fewer points of the same scheduler.

    Args:
        share: of the steps that are asked for, in (0, 1).
    """

    name = "fewer_steps"
    loss = "lossy"
    share: float = 0.5

    def __post_init__(self) -> None:
        check_number("share", self.share, above=0, below=1)

    def why_not(self, pipe: Any) -> str | None:
        return None if takes(pipe, "num_inference_steps") else "its call takes no number of steps"

    def enable(self, pipe: Any) -> Undo:
        import inspect

        default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default

        def fewer(given: dict[str, Any]) -> None:
            steps = given.get("num_inference_steps", default)
            if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
                given["num_inference_steps"] = max(1, round(self.share * steps))

        return change_calls(pipe, fewer)


@dataclass(frozen=True)
class TailDrops(Part):
    """Fewer tokens, where the denoiser has dynamic chunking.

    Args:
        tail_drop: share of the natural tokens to drop, in [0, 1).
        uncond_tail_drop: the same for the unconditional branch (Lite-CFG), at least as much.
    """

    name = "tail_drop"
    loss = "lossy"
    tail_drop: float = 0.0
    uncond_tail_drop: float = 0.5

    def __post_init__(self) -> None:
        check_number("tail_drop", self.tail_drop, 0, below=1)
        check_number("uncond_tail_drop", self.uncond_tail_drop, 0, below=1)

    def why_not(self, pipe: Any) -> str | None:
        from fastgen.models.elastic import ElasticModelMixin

        if not isinstance(denoiser_of(pipe), ElasticModelMixin):
            return "its denoiser has no dynamic chunking"
        return None if takes(pipe, "uncond_tail_drop") else "use the pipeline class with dynamic chunking"

    def enable(self, pipe: Any) -> Undo:
        def drop(given: dict[str, Any]) -> None:
            if not {"tail_drop", "uncond_tail_drop", "token_budget"} & given.keys():
                given |= self.settings

        return change_calls(pipe, drop)


#: In the order in which they are turned on.
PARTS: dict[str, type[Part]] = {
    each.name: each for each in (Kernels, ChannelsLast, Compile, StepCache, Guidance, TailDrops, FewerSteps)
}


def made_part(name: object, settings: object) -> Part:
    """A part by its name in a plan.

    Raises:
        FastgenError: there is none of that name, or it does not have such settings.
    """
    if not isinstance(name, str) or name not in PARTS:
        raise FastgenError(f"plan: part {name!r} is unknown, there are {', '.join(PARTS)}")
    if not isinstance(settings, dict):
        raise FastgenError(f"plan: settings of {name} must be an object, got {type(settings).__name__}")
    known = {each.name for each in fields(PARTS[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(settings) - known):
        raise FastgenError(f"plan: {name} has no setting {unknown[0]!r}")
    try:
        return PARTS[name](**settings)
    except (FastgenError, TypeError) as error:
        raise FastgenError(f"plan: {name}: {error}") from error
