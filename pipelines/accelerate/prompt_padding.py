"""Text encoders compute the tokens of the prompts, not the padding behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastgen.pipelines.accelerate.part import Part, Undo

__all__ = ["PromptPadding"]

#: Pipelines that drop what their text encoder computes for padding.
_DROPPED_BY = "ZImage"


@dataclass(frozen=True)
class PromptPadding(Part):
    """The text encoder gets as many tokens as the longest prompt has, not always the most that are allowed."""

    name = "prompt_padding"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        if not any(kind.__name__.startswith(_DROPPED_BY) for kind in type(pipe).__mro__):
            return "its pipeline reads padding, or has little of it"
        encoder = getattr(pipe, "text_encoder", None)
        if not isinstance(encoder, nn.Module):
            return "it has no text encoder"
        return "its text encoder is compiled" if encoder._compiled_call_impl is not None else None

    def enable(self, pipe: Any) -> Undo:
        cuts = _Cuts()
        before = pipe.text_encoder.register_forward_pre_hook(cuts.before, with_kwargs=True)
        after = pipe.text_encoder.register_forward_hook(cuts.after)

        def undo() -> None:
            before.remove()
            after.remove()

        return undo


class _Cuts:
    """Cuts padding off the end before a pass, and puts zeros in its place after it."""

    def __init__(self) -> None:
        self.cut = 0

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.cut = 0
        mask = kwargs.get("attention_mask")
        if args or set(kwargs) - {"input_ids", "attention_mask", "output_hidden_states"} or mask is None:
            return None
        used = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else mask.shape[1]
        self.cut = mask.shape[1] - used
        return args, {**kwargs, **{name: kwargs[name][:, :used] for name in ("input_ids", "attention_mask")}}

    def after(self, model: Any, args: Any, output: Any) -> None:
        if not self.cut:
            return
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = self._whole(output[name])

    def _whole(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return functional.pad(value, (0, 0, 0, self.cut))
        return tuple(self._whole(each) for each in value)
