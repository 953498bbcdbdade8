"""Rejection sampling over the children of tree nodes, and the walk along accepted nodes, in plain PyTorch.

The reference of `fastgen.kernels.tree_verify`; verifiers with their own rules call it too. SpecInfer's multi-round
rule (arXiv 2305.09781): a child is accepted with probability p / q, decided by its own coin; after a rejection, p
becomes the positive part of p - q, and q loses the child, both normalised. In a tree of most likely tokens, q is a
point mass at each child in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Lent", "Outcome", "Rejection", "Scaled", "draw", "follow", "normalise", "pick", "reject"]

TINY = torch.finfo(torch.float32).tiny


def pick(values: Tensor, tokens: Tensor) -> Tensor:
    """Values [..., V] at tokens [...]."""
    return values.gather(-1, tokens[..., None])[..., 0]


def normalise(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [..., V] as probabilities; where all are 0 (rounding: p equals q), `otherwise`."""
    mass = weights.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.clamp_min(TINY), otherwise)


def draw(law: Tensor, gumbel: Tensor) -> Tensor:
    """Tokens [...] drawn from probabilities [..., V] by Gumbel-max."""
    return (law.log() + gumbel).argmax(dim=-1)


class Rejection:
    """Acceptance and residual of a child: the exact rule. Relaxed rules override it."""

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """Probability [B, A] that the children `tokens` [B, A] at `depth` [B, A] are accepted (section 2.2).

        Args:
            target, draft: [B, A, V], the residuals of p and q at their parents.
        """
        return pick(target, tokens) / pick(draft, tokens).clamp_min(TINY)

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """The residual of p [B, A, V] after the rejection, not normalised."""
        return (target - draft).clamp_min(0)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """[B, A]: mass that an accepted child takes from other tokens; 0 for the exact rule."""
        return torch.zeros_like(tokens, dtype=target.dtype)


class Scaled(Rejection):
    """Multiplies the acceptance by a factor [B, A] >= 1; the residual is the exact rule's."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self.factor * super().accept(target, draft, tokens, depth)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """At most (factor - 1) p: mass that acceptance above p takes from other tokens."""
        return (self.factor - 1) * pick(target, tokens)


class Lent(Rejection):
    """The drafted token has the mass of its class (LANTERN's form); the other tokens of the class have none.

    Args:
        classes: [B, A, V] int64, class of every token.
    """

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def _held(self, target: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`target` [B, A, V] at the tokens of each child's class, 0 at other tokens, and its sum [B, A]. Computed once
        per child."""
        if self._last is None or self._last[0] is not target or self._last[1] is not tokens:
            lent = torch.where(self.classes == pick(self.classes, tokens)[..., None], target, 0.0)
            self._last = (target, tokens, lent, lent.sum(dim=-1))
        return self._last[2], self._last[3]

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self._held(target, tokens)[1] / pick(draft, tokens).clamp_min(TINY)

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        lent, held = self._held(target, tokens)
        relaxed = (target - lent).scatter_(-1, tokens[..., None], held[..., None])
        return (relaxed - draft).clamp_min(0)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self._held(target, tokens)[1] - pick(target, tokens)


@dataclass(frozen=True)
class Outcome:
    """Result of `reject` for A nodes with children.

    Attributes:
        slot: [B, A] int64, the accepted child's index among its siblings; -1: none.
        residual: [B, A, V], distribution of the next token where none is accepted.
        chance: [B, A, C], probability that a child is accepted once all before it are rejected; it depends on p, q and
            the drawn tokens, not on the coins.
        stolen: [B, A], see `Rejection.stolen`; 0 where none is accepted.
    """

    slot: Tensor
    residual: Tensor
    chance: Tensor
    stolen: Tensor


def reject(
    left: Tensor, draft: Tensor | None, tokens: Tensor, exists: Tensor, coins: Tensor, depth: Tensor, rule: Rejection
) -> Outcome:
    """Rejection sampling over the children of every node, in turn.

    Args:
        left: p, [B, A, V].
        draft: q, [B, A, V], or None for a point mass at each child in turn.
        tokens: [B, A, C] of the children in the order in which they were drawn.
        exists: [B, A, C] bool, which children exist.
        coins: [B, A, C] uniform in [0, 1).
        depth: [B, A] of the children.
        rule: how a child is accepted.
    """
    chances, lent = [], []
    last = tokens.shape[-1] - 1
    for slot in range(last + 1):
        token = tokens[..., slot]
        law = torch.zeros_like(left).scatter_(-1, token[..., None], 1.0) if draft is None else draft
        # A child that the draft cannot have drawn (fewer tokens than children) is not a candidate.
        candidate = exists[..., slot] & (pick(law, token) > 0)
        chances.append(torch.where(candidate, rule.accept(left, law, token, depth), 0.0))
        lent.append(rule.stolen(left, token, depth))
        # As if rejected: after an acceptance nothing reads the residual.
        left = torch.where(candidate[..., None], normalise(rule.residual(left, law, token, depth), left), left)
        if draft is not None and slot < last:
            rest = draft.scatter(-1, token[..., None], 0.0)
            draft = normalise(rest, rest)
    chance = torch.stack(chances, dim=-1)
    # Strictly below: a coin may be 0, and a token of probability 0 is never accepted.
    wins = coins < chance
    first = torch.where(wins.any(dim=-1), wins.to(torch.uint8).argmax(dim=-1), -1)
    stolen = pick(torch.stack(lent, dim=-1), first.clamp_min(0)) * (first >= 0)
    return Outcome(first, left, chance.clamp_max(1.0), stolen)


def follow(child: Tensor, remaining: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """Follow the accepted children from the root.

    Args:
        child: [B, n] int64, each node's accepted child; -1: none.
        remaining: [B] tokens the image still needs, bonus included (0: the image is finished).
        max_depth: of the tree.

    Returns:
        nodes [B, max_depth + 1] from the root, where the last node repeats past the end; and the number accepted [B].
    """
    node = torch.zeros_like(child[:, 0])
    length = torch.zeros_like(node)
    nodes = [node]
    for _ in range(max_depth):
        following = pick(child, node)
        step = (following >= 0) & (length + 1 < remaining)
        node, length = torch.where(step, following, node), length + step
        nodes.append(node)
    return torch.stack(nodes, dim=1), length
