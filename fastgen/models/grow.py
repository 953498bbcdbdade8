"""A deeper Z-Image from a trained one, for larger pictures.

Every weight of the trained model is copied. A new block is a copy of the block before it with closed gates, which
makes it the identity; it opens with the first optimizer steps and then already knows what a block does.
"""

from __future__ import annotations

import re

from diffusers import ZImageTransformer2DModel
from torch import Tensor

__all__ = ["grow", "source_blocks"]


def source_blocks(old: int, new: int) -> list[tuple[int, bool]]:
    """For each of `new` blocks the one of `old` blocks it is copied from, and whether it is a further copy.

    Raises:
        ValueError: fewer new blocks than old ones.
    """
    if not 1 <= old <= new:
        raise ValueError(f"n_layers: needs at least the {old} blocks of the trained model, got {new}")
    sources = [index * old // new for index in range(new)]
    return [(source, index > 0 and source == sources[index - 1]) for index, source in enumerate(sources)]


def grow(model: ZImageTransformer2DModel, n_layers: int, rope_theta: float | None = None) -> ZImageTransformer2DModel:
    """A stock transformer of `n_layers` blocks that computes what `model` computes.

    Args:
        model: the trained transformer; it stays as it is.
        n_layers: blocks of the new one, at least those of `model`.
        rope_theta: base of the rotary frequencies, higher for larger pictures; None keeps that of `model`. With
            another one the function changes.

    Raises:
        ValueError: fewer blocks than `model` has.
    """
    sources = source_blocks(model.config.n_layers, n_layers)
    changes = {"n_layers": n_layers, "rope_theta": model.config.rope_theta if rope_theta is None else rope_theta}
    grown: ZImageTransformer2DModel = ZImageTransformer2DModel.from_config({**model.config, **changes})
    parameter = next(model.parameters())
    grown.to(device=parameter.device, dtype=parameter.dtype)
    trained = model.state_dict()
    state = {name: value for name, value in trained.items() if not name.startswith("layers.")}
    for index, (source, closed) in enumerate(sources):
        for name, value in _block(trained, source).items():
            state[f"layers.{index}.{name}"] = _close_gates(value) if closed and "adaLN" in name else value
    grown.load_state_dict(state)
    return grown


def _block(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = re.compile(rf"layers\.{index}\.")
    return {name[match.end() :]: value for name, value in state.items() if (match := prefix.match(name))}


def _close_gates(modulation: Tensor) -> Tensor:
    """Weight or bias [4 D, …] of a block's modulation (scale, gate, scale, gate) with both gates zero."""
    closed = modulation.clone()
    for gate in closed.chunk(4)[1::2]:
        gate.zero_()
    return closed
