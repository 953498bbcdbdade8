"""Guidance on a part of the steps: the others need one branch of the model, not two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.checks import check_number
from fastgen.pipelines.accelerate.calls import change_calls, progress, takes
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network

__all__ = ["Guidance"]

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
        share: of the steps, in [0, 1); after them only the conditional prediction is used.
    """

    name = "guidance"
    loss = "lossy"
    share: float = 0.5

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, below=1)

    def why_not(self, pipe: Any) -> str | None:
        if takes(pipe, "cfg_truncation") or type(pipe).__name__ in _JOINT:
            return None
        return "it is not known how its branches of guidance are computed"

    def enable(self, pipe: Any) -> Undo:
        model = denoising_network(pipe)
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
