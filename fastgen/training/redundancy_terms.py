"""Loss terms for drafters from the target's redundancy (section 7 of our specification of CASCADE-R, a
reconstruction).

At some places of a picture the target is evaluated after each of the m most likely tokens: one pass over depth-1
trees. If it predicts the same tokens after two of them, the drafter need not distinguish them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.drafters.cache import KVCache
from fastgen.drafters.cascade import form_classes
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.targets import Prefix, Target

__all__ = ["Siblings", "class_cross_entropy", "convergence_along", "probe_siblings", "soft_targets"]


@dataclass(frozen=True)
class Siblings:
    """The m most likely tokens at K places of every picture.

    Attributes:
        places: [B, K] index of the token in the picture.
        tokens: [B, K, m].
        alike: [B, K, m, m] cosine of the centred hidden states after each of them.
        redundancy: [B, K] in [0, 1]: mean similarity of different siblings, clamped at 0.
    """

    places: Tensor
    tokens: Tensor
    alike: Tensor
    redundancy: Tensor


@torch.no_grad()
def probe_siblings(
    target: Target, prefix: Prefix, law: TokenLaw, laws: Tensor, cache: KVCache, places: Tensor, count: int = 8
) -> Siblings:
    """Run the target on siblings.

    Args:
        target: the model.
        prefix: the prompts, P long.
        law: for the guidance scale.
        laws: [B, N, V], p at each token of the picture.
        cache: of a pass over the prompts and whole pictures; the slots after them are written.
        places: [B, K].
        count: m.
    """
    batch, probes = places.shape
    length = prefix.mask.shape[1]
    p = laws.gather(1, places[..., None].expand(-1, -1, laws.shape[-1]))
    tokens = p.topk(count, dim=-1).indices
    n = probes * count
    before = length + target.both_rows(places.repeat_interleave(count, dim=1), prefix)
    slot = torch.arange(cache.capacity, device=places.device)
    first = int(length + target.num_tokens)
    own = slot == first + torch.arange(n, device=places.device)[:, None]
    visible = ((slot < before[..., None]) & cache.visible[:, None]) | own
    positions = prefix.offset[:, None] + before - length
    slots = (first + torch.arange(n, device=places.device)).expand(len(before), -1)
    embeds = target.both_rows(target.embed(tokens.flatten(1)), prefix)
    output = target.run(embeds, positions, cache, slots, visible[:, None], ())
    states = target.guided(target.redundancy(output.hidden), prefix, law).unflatten(1, (probes, count))
    centred = torch.nn.functional.normalize(states - states.mean(dim=2, keepdim=True), dim=-1)
    alike = (centred @ centred.mT).float()  # autocast would leave it in half precision
    off = ~torch.eye(count, dtype=torch.bool, device=places.device)
    # Unrelated states, once centred, have a mean cosine of -1 / (m - 1): that maps to 0.
    level = (alike[..., off].mean(dim=-1) * (count - 1) + 1) / count
    return Siblings(places, tokens, alike, level.clamp(0, 1))


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """Values [B, N, …] at places [B, K]: [B, K, …]."""
    index = places[(...,) + (None,) * (values.ndim - 2)].expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def class_cross_entropy(siblings: Siblings, p: Tensor, log_q: Tensor, threshold: float = 0.9) -> Tensor:
    """-sum_K P(K) log Q(K) over classes of at least two siblings, [B, K] nats.

    Args:
        siblings: from `probe_siblings`.
        p, log_q: [B, K, V], target probabilities and draft log-probabilities at their places.
        threshold: minimum similarity within a class.
    """
    mass, log_mass = p.gather(-1, siblings.tokens), log_q.gather(-1, siblings.tokens)
    first, _ = form_classes(siblings.alike >= threshold, mass, torch.ones_like(mass))
    same = first[..., :, None] == first[..., None, :]
    heads = (same.sum(dim=-1) > 1) & (first == torch.arange(first.shape[-1], device=first.device))
    of_class = (mass[..., None, :] * same).sum(dim=-1)
    log_class = log_mass[..., None, :].masked_fill(~same, -torch.inf).logsumexp(dim=-1)
    return -(of_class * log_class * heads).sum(dim=-1)


def soft_targets(siblings: Siblings, p: Tensor, strength: float) -> Tensor:
    """p [B, K, V] with the siblings' mass spread among similar ones: (1 - gamma rho) p + gamma rho S p."""
    mass = p.gather(-1, siblings.tokens)
    kernel = siblings.alike.clamp_min(0)
    kernel = kernel / kernel.sum(dim=-2, keepdim=True)  # columns sum to 1, so the total mass stays
    share = (strength * siblings.redundancy)[..., None]
    spread = (1 - share) * mass + share * (kernel @ mass[..., None])[..., 0]
    return p.scatter(-1, siblings.tokens, spread)


def convergence_along(hidden: Tensor) -> Tensor:
    """Similarity [B, N] in [0, 1] of each hidden state [B, N, F] to the one before it, centred over the picture.

    It is high in flat regions, where early differences fade (D2 of our specification); 0 at the first.
    """
    centred = torch.nn.functional.normalize(hidden - hidden.mean(dim=1, keepdim=True), dim=-1)
    along = (centred[:, 1:] * centred[:, :-1]).sum(dim=-1).clamp(0, 1)
    return torch.nn.functional.pad(along, (1, 0))
