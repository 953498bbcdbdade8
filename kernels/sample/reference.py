"""Reference implementation of next-token probabilities and samples, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["mix_logits", "restrict_logits", "sample_reference", "token_probabilities_reference"]


def mix_logits(cond: Tensor, uncond: Tensor | None, guidance_scale: float, temperature: float) -> Tensor:
    """Guidance u + s (c - u), if there is a u, then temperature (0 and 1 leave the logits unchanged), in float32."""
    logits = cond.float()
    if uncond is not None:
        base = uncond.float()
        # Equal logits have no difference, even if both are -inf: a masked token stays masked.
        logits = base + guidance_scale * torch.where(logits == base, 0.0, logits - base)
    return logits if temperature in (0, 1) else logits / temperature


def restrict_logits(
    logits: Tensor, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Top-k (and ties with the k-th), then top-p: the smallest set of largest logits whose mass reaches it.

    Returns:
        the logits with excluded tokens at -inf; the mask of kept tokens (None: all are); and with top-p, per token,
        the mass [..., V] of the tokens before it (of equal ones those with lower index), which decides whether it is
        kept.
    """
    keep: Tensor | None = None
    mass_before: Tensor | None = None
    if top_k is not None and top_k < logits.shape[-1]:
        keep = logits >= logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(~keep, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        # The most likely token has no mass before it, so it always stays.
        before = probability.cumsum(-1) - probability
        stays = (before < top_p) & (ordered > -math.inf)
        keep = torch.zeros_like(stays).scatter(-1, order, stays)
        mass_before = torch.zeros_like(before).scatter(-1, order, before)
        logits = logits.masked_fill(~keep, -math.inf)
    return logits, keep, mass_before


def sample_reference(
    cond: Tensor,
    uncond: Tensor | None,
    gumbel: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Reference implementation of `sample`."""
    logits = mix_logits(cond, uncond, guidance_scale, temperature)
    if temperature == 0 or gumbel is None:
        return logits.argmax(dim=-1)
    return (restrict_logits(logits, top_k, top_p)[0] + gumbel).argmax(dim=-1)


def token_probabilities_reference(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Reference implementation of `token_probabilities`."""
    logits = mix_logits(cond, uncond, guidance_scale, temperature)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return restrict_logits(logits, top_k, top_p)[0].softmax(dim=-1)
