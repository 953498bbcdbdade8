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
from fastgen.kernels.rejection import Outcome, Rejection, draw, follow, pick, reject
from fastgen.kernels.tree_verify import tree_verify

__all__ = [
    "Decisions",
    "Drafted",
    "Noise",
    "Outcome",
    "Rejection",
    "Walk",
    "decide",
    "draw",
    "reject_in_turn",
    "strict",
    "verified",
    "walk",
]


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
        return self.tree.inner.expand(len(self.tokens), -1, -1)

    def states(self) -> Tensor:
        """`hidden` in float32.

        Raises:
            ValueError: there are none.
        """
        if self.hidden is None:
            raise ValueError("hidden: needs the target's hidden states")
        return self.hidden.float()

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
        counts: for the log, by name: [B, n] number each, counted where the walk passes.
    """

    child: Tensor
    law: Tensor
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


def reject_in_turn(drafted: Drafted, coins: Tensor, rule: Rejection) -> Outcome:
    """Rejection sampling over the children of every node, in turn.

    Args:
        drafted: the tree.
        coins: [B, n].
        rule: what accepts a child.
    """
    children = drafted.inner_children()
    draft = None if drafted.draft is None else drafted.draft.index_select(1, drafted.tree.internal)
    coins = coins.gather(1, children.clamp_min(0).flatten(1)).view_as(children)
    given = (drafted.inner_target(), draft, drafted.child_tokens(), children >= 0, coins, drafted.inner_depth() + 1)
    return reject(*given, rule)


def turns(chance: Tensor) -> Tensor:
    """Probability [..., C] that it comes to each child: all before it are refused."""
    return torch.cat([torch.ones_like(chance[..., :1]), 1 - chance[..., :-1]], dim=-1).cumprod(dim=-1)


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


def verified(
    drafted: Drafted,
    noise: Noise | None,
    remaining: Tensor,
    factor: Tensor | None = None,
    classes: Tensor | None = None,
) -> Walk:
    """Decisions of the exact rule, or of one of its two relaxations, and the walk along them, all at once.

    Args:
        drafted: the tree.
        noise: of this verification; None is temperature 0, where a child is accepted if it is the most likely token.
        remaining: see `walk`.
        factor: [B, A], on the acceptance of the children of the A nodes that have some.
        classes: [B, A, V], tokens of one class lend each other their mass.
    """
    tree, gumbel = drafted.tree, None if noise is None else noise.gumbel
    result = tree_verify(
        drafted.target,
        drafted.draft,
        drafted.tokens,
        tree.children,
        tree.internal,
        None if noise is None else noise.coins,
        gumbel,
        remaining,
        tree.max_depth,
        factor,
        classes,
    )
    return Walk(result.nodes, result.length, result.bonus, {} if noise is None else {"stolen": result.stolen})


def walk(drafted: Drafted, decisions: Decisions, noise: Noise, remaining: Tensor) -> Walk:
    """Follow the accepted children from the root, and draw the token after them.

    Args:
        drafted: the tree.
        decisions: of all its nodes.
        noise: of this verification.
        remaining: [B] tokens that the image still lacks, the bonus counted (0: the image is finished).
    """
    path, length = follow(decisions.child, remaining, drafted.tree.max_depth)
    node = path[:, -1]
    law = decisions.law.gather(1, node[:, None, None].expand(-1, 1, decisions.law.shape[-1]))
    bonus = draw(law, noise.at(length[:, None]))[:, 0]
    # Where the image ends before the path, the accepted child is the last token: by itself it has the law of a node.
    child = pick(decisions.child, node)
    bonus = torch.where(child >= 0, pick(drafted.tokens, child.clamp_min(0)), bonus)
    passed = torch.arange(path.shape[1], device=path.device) <= length[:, None]
    counts = {name: (value.gather(1, path) * passed).sum(dim=1) for name, value in decisions.counts.items()}
    return Walk(path, length, bonus, counts)
