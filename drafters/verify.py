"""Lossless verification of token trees: which drafted tokens the target's law accepts, and what it says next.

Every node decides by itself, all at once: whether one of its children is accepted, and if none, by which law the token
that comes instead is drawn. A walk then follows the decisions from the root. A node's decision is rejection sampling
over its children in the order in which they were drawn: SpecInfer's multi-round rule (arXiv 2305.09781) for children
sampled without replacement; for a tree of most likely tokens the draft's law is a point mass at each child in its
turn. The law of the result is the target's, whatever the draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.drafters.tree import Tree

__all__ = [
    "Decisions",
    "Drafted",
    "Noise",
    "Outcome",
    "Rejection",
    "Walk",
    "decide",
    "greedy",
    "reject_in_turn",
    "strict",
    "walk",
]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Drafted:
    """A drafted tree with what the target says of it.

    Attributes:
        tree: its topology.
        tokens: [B, n] int64; the root's is the last committed token.
        target: p, [B, n, V] float32: the law of the token that follows each node, after guidance, grammar,
            temperature, top-k and top-p.
        draft: q, [B, n, V] float32, the drafter's law at each node with children; None for a tree of most likely
            tokens, whose draft law is a point mass at each child in its turn.
        hidden: [B, n, F] the target's redundancy feature of each node, for rules that look at it.
    """

    tree: Tree
    tokens: Tensor
    target: Tensor
    draft: Tensor | None = None
    hidden: Tensor | None = None

    def inner_children(self) -> Tensor:
        """Children [B, A, C] of the A nodes that have some."""
        return self.tree.children.index_select(1, self.tree.internal).expand(len(self.tokens), -1, -1)

    def inner_target(self) -> Tensor:
        """p [B, A, V] at the nodes that have children."""
        return self.target.index_select(1, self.tree.internal)

    def inner_depth(self) -> Tensor:
        """Depth [B, A] of the nodes that have children."""
        return self.tree.depth.index_select(1, self.tree.internal).expand(len(self.tokens), -1)

    def child_tokens(self) -> Tensor:
        """Tokens [B, A, C]; the root's where there is no child."""
        children = self.inner_children().clamp_min(0)
        return self.tokens.gather(1, children.flatten(1)).view_as(children)


@dataclass(frozen=True)
class Noise:
    """Random numbers of one verification, from the images' own generators.

    Attributes:
        coins: [B, n] uniform in [0, 1): whether a node is accepted in its turn.
        gumbel: [B, max_depth + 1, V] standard Gumbel: the token drawn at the depth where the walk is. A rule that
            draws but one token a round does with a single row for all depths, [B, 1, V].
    """

    coins: Tensor
    gumbel: Tensor

    def at(self, depth: Tensor) -> Tensor:
        """Gumbel noise [B, m, V] of depths [B, m]."""
        if self.gumbel.shape[1] == 1:
            return self.gumbel.expand(-1, depth.shape[1], -1)
        return self.gumbel.gather(1, depth[..., None].expand(-1, -1, self.gumbel.shape[-1]))


@dataclass(frozen=True)
class Decisions:
    """What every node says.

    Attributes:
        child: [B, n] int64, the child that is accepted; -1: none.
        law: [B, n, V], the law of the token that comes instead; where there are no children, p.
        token: [B, n] int64, that token where the rule has drawn it already.
        counts: for the log, by name: [B, n] number each, counted where the walk passes.
    """

    child: Tensor
    law: Tensor
    token: Tensor | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """An accepted path.

    Attributes:
        nodes: [B, max_depth + 1] int64, from the root; past the end the last node repeats.
        length: [B] int64, accepted nodes, root not counted.
        bonus: [B] int64, the token after them.
        counts: the decisions' counts summed over the nodes of the path, [B] each.
    """

    nodes: Tensor
    length: Tensor
    bonus: Tensor
    counts: dict[str, Tensor]


class Rejection:
    """How a child is accepted and what its rejection leaves: the exact rule. Relaxed rules override it."""

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """Probability [B, A] that the children `tokens` [B, A] at `depth` [B, A] are accepted (section 2.2).

        Args:
            target, draft: [B, A, V], what is left of p and q at their parents.
        """
        return pick(target, tokens) / pick(draft, tokens).clamp_min(_TINY)

    def leave(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """What is left of p [B, A, V] after the rejection, not normalised."""
        return (target - draft).clamp_min(0)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        """[B, A]: mass of other tokens that an accepted child is given; 0 for the exact rule."""
        return torch.zeros_like(tokens, dtype=target.dtype)


@dataclass(frozen=True)
class Outcome:
    """Result of `reject_in_turn` for the A nodes with children.

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


def pick(values: Tensor, tokens: Tensor) -> Tensor:
    """values [..., V] at tokens [...]."""
    return values.gather(-1, tokens[..., None])[..., 0]


def normalise(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [..., V] as a law; where nothing is left (rounding: p equals q), `otherwise`."""
    mass = weights.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.clamp_min(_TINY), otherwise)


def reject_in_turn(drafted: Drafted, coins: Tensor, rule: Rejection) -> Outcome:
    """Rejection sampling over the children of every node, in turn.

    Args:
        drafted: the tree.
        coins: [B, n].
        rule: what accepts a child.
    """
    inner = drafted.tree.internal
    children, tokens, depth = drafted.inner_children(), drafted.child_tokens(), drafted.inner_depth() + 1
    left = drafted.inner_target()
    draft = None if drafted.draft is None else drafted.draft.index_select(1, inner)
    chances, lent = [], []
    last = children.shape[-1] - 1
    for slot in range(last + 1):
        token = tokens[..., slot]
        law = torch.zeros_like(left).scatter_(-1, token[..., None], 1.0) if draft is None else draft
        # A child that the draft could not have drawn (fewer tokens than children) is no candidate.
        candidate = (children[..., slot] >= 0) & (pick(law, token) > 0)
        chances.append(torch.where(candidate, rule.accept(left, law, token, depth), 0.0))
        lent.append(rule.stolen(left, token, depth))
        # As if refused: where it is not, what is left is never looked at.
        left = torch.where(candidate[..., None], normalise(rule.leave(left, law, token, depth), left), left)
        if draft is not None and slot < last:
            spent = draft.scatter(-1, token[..., None], 0.0)
            draft = normalise(spent, spent)
    chance = torch.stack(chances, dim=-1)
    # Strictly below: a coin may be 0, and a token of probability 0 is never accepted.
    wins = coins.gather(1, children.clamp_min(0).flatten(1)).view_as(children) < chance
    first = torch.where(wins.any(dim=-1), wins.to(torch.uint8).argmax(dim=-1), -1)
    stolen = pick(torch.stack(lent, dim=-1), first.clamp_min(0)) * (first >= 0)
    return Outcome(first, left, chance.clamp_max(1.0), stolen)


def turns(chance: Tensor) -> Tensor:
    """Probability [..., C] that it comes to each child: all before it are refused."""
    return torch.cat([torch.ones_like(chance[..., :1]), 1 - chance[..., :-1]], dim=-1).cumprod(dim=-1)


def expected_length(drafted: Drafted, chance: Tensor) -> Tensor:
    """How many tokens below each node will be accepted on average, [B, n], from p, q and the drawn tokens alone.

    V(v) = sum_j prod_{i<j} (1 - chance_i) chance_j (1 + V(c_j)).
    """
    children = drafted.inner_children()
    first = turns(chance) * chance
    value = torch.zeros_like(drafted.tokens, dtype=chance.dtype)
    for _ in range(drafted.tree.max_depth):
        below = value.gather(1, children.clamp_min(0).flatten(1)).view_as(children)
        value = spread(drafted, (first * (1 + below)).sum(dim=-1), 0.0)
    return value


def child_of(drafted: Drafted, slot: Tensor) -> Tensor:
    """Slots [B, A] of the nodes with children as accepted children [B, n]; -1 stays -1."""
    child = torch.where(slot >= 0, pick(drafted.inner_children(), slot.clamp_min(0)), -1)
    return spread(drafted, child, -1)


def spread(drafted: Drafted, values: Tensor, fill: float) -> Tensor:
    """Values [B, A] of the nodes with children, and `fill` for all others: [B, n]."""
    whole = torch.full_like(drafted.tokens, fill, dtype=values.dtype)
    return whole.index_copy(1, drafted.tree.internal, values)


def decide(drafted: Drafted, noise: Noise, rule: Rejection) -> Decisions:
    """Decisions by rejection in turn."""
    outcome = reject_in_turn(drafted, noise.coins, rule)
    # A leaf's token comes from p itself: the law after the same processors as everywhere.
    law = drafted.target.index_copy(1, drafted.tree.internal, outcome.left)
    counts = {"stolen": spread(drafted, outcome.stolen, 0)}
    return Decisions(child_of(drafted, outcome.slot), law, counts=counts)


def strict(drafted: Drafted, noise: Noise) -> Decisions:
    """The exact verifier."""
    return decide(drafted, noise, Rejection())


def greedy(drafted: Drafted) -> Decisions:
    """Temperature 0: a child is accepted if it is the most likely token."""
    best = drafted.target.argmax(dim=-1)
    children = drafted.tree.children.expand(len(best), -1, -1)
    tokens = drafted.tokens.gather(1, children.clamp_min(0).flatten(1)).view_as(children)
    match = (tokens == best[..., None]) & (children >= 0)
    return Decisions(torch.where(match, children, -1).amax(dim=-1), drafted.target, best)


def draw(law: Tensor, gumbel: Tensor) -> Tensor:
    """Tokens [...] of laws [..., V] by Gumbel-max."""
    return (law.log() + gumbel).argmax(dim=-1)


def walk(drafted: Drafted, decisions: Decisions, noise: Noise, remaining: Tensor) -> Walk:
    """Follow the accepted children from the root, and draw the token after them.

    Args:
        drafted: the tree.
        decisions: of all its nodes.
        noise: of this verification.
        remaining: [B] tokens that the image still lacks, the bonus counted (0: the image is finished).
    """
    node = torch.zeros_like(drafted.tokens[:, 0])
    length = torch.zeros_like(node)
    nodes = [node]
    for _ in range(drafted.tree.max_depth):
        child = pick(decisions.child, node)
        step = (child >= 0) & (length + 1 < remaining)
        node, length = torch.where(step, child, node), length + step
        nodes.append(node)
    if decisions.token is None:
        law = decisions.law.gather(1, node[:, None, None].expand(-1, 1, decisions.law.shape[-1]))
        bonus = draw(law, noise.at(length[:, None]))[:, 0]
    else:
        bonus = pick(decisions.token, node)
    # Where the image ends before the path, the accepted child is the last token: by itself it has the law of a node.
    child = pick(decisions.child, node)
    bonus = torch.where(child >= 0, pick(drafted.tokens, child.clamp_min(0)), bonus)
    path = torch.stack(nodes, dim=1)
    passed = torch.arange(path.shape[1], device=path.device) <= length[:, None]
    counts = {name: (value.gather(1, path) * passed).sum(dim=1) for name, value in decisions.counts.items()}
    return Walk(path, length, bonus, counts)
