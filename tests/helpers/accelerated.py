"""Pipelines of many families before, under and after `accelerate`."""

from __future__ import annotations

from typing import Any

import torch
from stock_families import FAMILIES

STEPS = 4


def draw(pipe: Any, name: str, steps: int = STEPS, **given: Any) -> torch.Tensor:
    call = {**FAMILIES[name][1], "output_type": "pt", "num_inference_steps": steps, **given}
    if not any(key.startswith("prompt_embeds") for key in call):
        call.setdefault("prompt", "a red circle")
    torch.manual_seed(0)  # some read their conditions with the global random numbers
    images: torch.Tensor = pipe(generator=torch.Generator().manual_seed(3), **call)[0]
    return images


def state(pipe: Any) -> dict[str, Any]:
    """What a pipeline is, down to the bits and layout of its weights and the hooks of its modules."""
    of_a_call = ("_kwargs", "_truncation", "num_timesteps", "_interrupt")  # every call writes them down
    kept = {name: id(value) for name, value in vars(pipe).items() if not name.endswith(of_a_call)}
    found: dict[str, Any] = {"class": type(pipe), **kept}
    for part, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for name, module in model.named_modules():
                own = vars(module)
                found[f"{part}.{name}"] = (
                    list(module._modules),
                    len(module._forward_hooks),
                    len(module._forward_pre_hooks),
                    {key: value if isinstance(value, bool | int | str) else None for key, value in own.items()},
                    dict(vars(getattr(module, "processor", module))) if hasattr(module, "processor") else None,
                )
            for name, weight in model.named_parameters():
                plain = type(weight.data) is torch.Tensor  # not quantised
                bits = weight.detach().contiguous().view(torch.uint8).numpy().tobytes() if plain else b""
                found[f"{part}.{name}"] = (id(weight), hash(bits), weight.stride() if plain else None, weight.dtype)
    return found
