"""Rejection sampling over the children of tree nodes, and the walk along what was accepted: plain PyTorch.

The specification of `fastgen.kernels.tree_verify`, and what verifiers with rules of their own call. SpecInfer's
multi-round rule (arXiv 2305.09781): a child is accepted with probability p / q, strictly by its own coin; a rejection
leaves the positive part of p - q, and q without the child, both normalised. In a tree of most likely tokens q is a
point mass at each child in its turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Lent", "Outcome", "Rejection", "Scaled", "draw", "follow", "normalise", "pick", "reject"]

TINY = torch.finfo(torch.float32).tiny


def pick(values: Tensor, tokens: Tensor) -> Tensor:
    """values [..., V] at tokens [...]."""
    return values.gather(-1, tokens[..., None])[..., 0]


def normalise(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [..., V] as a law; where nothing is left (rounding: p equals q), `otherwise`."""
    mass = weights.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.clamp_min(TINY), otherwise)


def draw(law: Tensor, gumbel: Tensor) -> Tensor:
    """Tokens [...] of laws [..., V] by Gumbel-max."""
    return (law.log() + gumbel).argmax(dim=-1)


class Rejection:
    """How a child is accepted and what its rejection leaves: the exact rule. Relaxed rules override it."""

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """Probability [B, A] that the children `tokens` [B, A] at `depth` [B, A] are accepted (section 2.2).

        Args:
            target, draft: [B, A, V], what is left of p and q at their parents.
        """
        return pick(target, tokens) / pick(draft, tokens).clamp_min(TINY)

    def leave(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """What is left of p [B, A, V] after the rejection, not normalised."""
        return (target - draft).clamp_min(0)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """[B, A]: mass of other tokens that an accepted child is given; 0 for the exact rule."""
        return torch.zeros_like(tokens, dtype=target.dtype)


class Scaled(Rejection):
    """A factor [B, A] >= 1 on the acceptance; what is left after a rejection is the exact rule's."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self.factor * super().accept(target, draft, tokens, depth)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """At most (factor - 1) p: what an acceptance beyond p takes from the others."""
        return (self.factor - 1) * pick(target, tokens)


class Lent(Rejection):
    """The drafted token holds the mass of its class (LANTERN's form); its class mates are left none.

    Args:
        classes: [B, A, V] int64, class of every token.
    """

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def _held(self, target: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the class mates of `tokens` have of `target` [B, A, V], 0 for other tokens, and their mass [B, A]. All
        that is asked of a child is answered from one computation."""
        if self._last is None or self._last[0] is not target or self._last[1] is not tokens:
            lent = torch.where(self.classes == pick(self.classes, tokens)[..., None], target, 0.0)
            self._last = (target, tokens, lent, lent.sum(dim=-1))
        return self._last[2], self._last[3]

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self._held(target, tokens)[1] / pick(draft, tokens).clamp_min(TINY)

    def leave(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        lent, held = self._held(target, tokens)
        relaxed = (target - lent).scatter_(-1, tokens[..., None], held[..., None])
        return (relaxed - draft).clamp_min(0)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self._held(target, tokens)[1] - pick(target, tokens)


@dataclass(frozen=True)
class Outcome:
    """Result of `reject` for A nodes with children.

    Attributes:
        slot: [B, A] int64, the accepted child's place among its siblings; -1: none.
        left: [B, A, V], the law of the token that comes where none is accepted.
        chance: [B, A, C], probability that a child is accepted once all before it are refused; it depends on p, q and
            the drawn tokens, not on the coins.
        stolen: [B, A], see `Rejection.stolen`; 0 where none is accepted.
    """

    slot: Tensor
    left: Tensor
    chance: Tensor
    stolen: Tensor


def reject(
    left: Tensor, draft: Tensor | None, tokens: Tensor, exists: Tensor, coins: Tensor, depth: Tensor, rule: Rejection
) -> Outcome:
    """Rejection sampling over the children of every node, in turn.

    Args:
        left: p, [B, A, V].
        draft: q, [B, A, V], or None for a point mass at each child in its turn.
        tokens: [B, A, C] of the children in the order in which they were drawn.
        exists: [B, A, C] bool, which of them there are.
        coins: [B, A, C] uniform in [0, 1).
        depth: [B, A] of the children.
        rule: what accepts a child.
    """
    chances, lent = [], []
    last = tokens.shape[-1] - 1
    for slot in range(last + 1):
        token = tokens[..., slot]
        law = torch.zeros_like(left).scatter_(-1, token[..., None], 1.0) if draft is None else draft
        # A child that the draft could not have drawn (fewer tokens than children) is no candidate.
        candidate = exists[..., slot] & (pick(law, token) > 0)
        chances.append(torch.where(candidate, rule.accept(left, law, token, depth), 0.0))
        lent.append(rule.stolen(left, token, depth))
        # As if refused: where it is not, what is left is never looked at.
        left = torch.where(candidate[..., None], normalise(rule.leave(left, law, token, depth), left), left)
        if draft is not None and slot < last:
            spent = draft.scatter(-1, token[..., None], 0.0)
            draft = normalise(spent, spent)
    chance = torch.stack(chances, dim=-1)
    # Strictly below: a coin may be 0, and a token of probability 0 is never accepted.
    wins = coins < chance
    first = torch.where(wins.any(dim=-1), wins.to(torch.uint8).argmax(dim=-1), -1)
    stolen = pick(torch.stack(lent, dim=-1), first.clamp_min(0)) * (first >= 0)
    return Outcome(first, left, chance.clamp_max(1.0), stolen)


def follow(child: Tensor, remaining: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """The accepted children from the root on.

    Args:
        child: [B, n] int64, each node's accepted child; -1: none.
        remaining: [B] tokens that the image still lacks, the bonus counted (0: the image is finished).
        max_depth: of the tree.

    Returns:
        nodes [B, max_depth + 1] from the root, past the end the last node repeats; and how many were accepted [B].
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
