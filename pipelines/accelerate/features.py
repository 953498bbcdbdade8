"""Parts that turn on one feature: fused kernels, channels last, compiled blocks, slices and tiles of the VAE, fewer
steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.checks import check_number
from fastgen.pipelines.accelerate.calls import change_calls, takes
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["ChannelsLast", "Compile", "FewerSteps", "Kernels", "VaeSlicing", "VaeTiling"]


@dataclass(frozen=True)
class Kernels(Part):
    """Fused kernels, `fastgen.enable_kernels`."""

    name = "kernels"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        if pipe.device.type != "cuda":  # first: what follows imports networks of transformers
            return "Triton kernels need a GPU"
        from fastgen.pipelines.kernels import served

        enabled, others = served(pipe)
        if enabled:
            return "enabled already"
        return None if others else "nothing in it is served"

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
        # The first layout is not kept: a second copy of every weight would cost memory. It is written again instead.
        layers = self._convolutions(pipe)

        def undo() -> None:
            for layer in layers:
                layer.weight.data = layer.weight.data.contiguous()

        try:
            for layer in layers:
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        except BaseException:
            undo()
            raise
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
            and not layer.weight.is_contiguous(memory_format=torch.channels_last)  # one channel: nothing to gain
        ]


@dataclass(frozen=True)
class Compile(Part):
    """Regional compilation: `compile_repeated_blocks` of the denoiser. The first call of a size takes long."""

    name = "compile"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        model = denoising_network(pipe)
        if model is None or not getattr(model, "_repeated_blocks", None):
            return "its denoiser names no repeated blocks"
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return "compiled already"
        return None

    def enable(self, pipe: Any) -> Undo:
        model = denoising_network(pipe)
        model.compile_repeated_blocks()
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]

        def undo() -> None:
            for module in compiled:
                vars(module).pop("_compiled_call_impl", None)  # the class has it: None

        return undo


class _Decoding(Part):
    """Sets a switch of the VAE."""

    def why_not(self, pipe: Any) -> str | None:
        kind = self.name.removeprefix("vae_")
        vae = getattr(pipe, "vae", None)
        if not hasattr(vae, f"enable_{kind}") or not hasattr(vae, f"use_{kind}"):
            return f"it has no VAE with {kind}"
        return "enabled already" if getattr(vae, f"use_{kind}") else None

    def enable(self, pipe: Any) -> Undo:
        kind, vae = self.name.removeprefix("vae_"), pipe.vae
        before = dict(vars(vae))
        getattr(vae, f"enable_{kind}")()
        changed = [name for name, value in vars(vae).items() if name not in before or before[name] is not value]

        def undo() -> None:
            for name in changed:
                if name in before:
                    setattr(vae, name, before[name])
                else:
                    delattr(vae, name)

        return undo


@dataclass(frozen=True)
class VaeSlicing(_Decoding):
    """The VAE decodes the pictures of a batch one by one: less memory."""

    name = "vae_slicing"
    loss = "exact"


@dataclass(frozen=True)
class VaeTiling(_Decoding):
    """The VAE decodes pictures above its tile size in tiles: less memory, other pixels near the borders of tiles."""

    name = "vae_tiling"
    loss = "lossy"


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
        default = defaults_of(type(pipe))["num_inference_steps"]

        def fewer(given: dict[str, Any]) -> None:
            steps = given.get("num_inference_steps", default)
            if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
                given["num_inference_steps"] = max(1, round(self.share * steps))

        return change_calls(pipe, fewer)
