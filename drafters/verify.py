"""Lossless verification of token trees: which drafted tokens are accepted, and which token follows them.

All nodes are decided independently and at once: which child is accepted, and if none, which distribution the next
token is drawn from. A walk then follows the decisions from the root. A decision is rejection sampling over the
children in draft order: SpecInfer's multi-round rule (arXiv 2305.09781) for children sampled without replacement; in a
tree of most likely tokens, the draft's distribution is a point mass at each child in turn. The result has the target's
distribution, whatever the draft.
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
    "AcceptedPath",
    "decide",
    "draw",
    "reject_in_turn",
    "strict",
    "verify_and_walk",
    "walk",
]


@dataclass(frozen=True)
class Drafted:
    """A drafted tree with the target's predictions.

    Attributes:
        tree: its topology.
        tokens: [B, n] int64; the root's is the last committed token.
        target: p, [B, n, V] float32: distribution of the token after each node, after guidance, grammar, temperature,
            top-k and top-p.
        draft: q, [B, n, V] float32, the drafter's distribution at each inner node; None for a tree of most likely
            tokens, a point mass at each child in turn.
        hidden: [B, n, F] the target's redundancy feature of each node, for rules that read it.
    """

    tree: Tree
    tokens: Tensor
    target: Tensor
    draft: Tensor | None = None
    hidden: Tensor | None = None

    def inner_children(self) -> Tensor:
        """Children [B, A, C] of the A inner nodes."""
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
        """p [B, A, V] at the inner nodes."""
        return self.target.index_select(1, self.tree.internal)

    def inner_depth(self) -> Tensor:
        """Depth [B, A] of the inner nodes."""
        return self.tree.depth.index_select(1, self.tree.internal).expand(len(self.tokens), -1)

    def child_tokens(self) -> Tensor:
        """Tokens [B, A, C] of the children; the root's where there is no child."""
        children = self.inner_children().clamp_min(0)
        return self.tokens.gather(1, children.flatten(1)).view_as(children)


@dataclass(frozen=True)
class Noise:
    """Random numbers of one verification, from the images' own generators.

    Attributes:
        coins: [B, n] uniform in [0, 1), which decide whether a node is accepted.
        gumbel: [B, max_depth + 1, V] standard Gumbel, for the token drawn where the walk ends. One row for all depths,
            [B, 1, V], is enough if a round draws one token.
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
    """The decision at every node.

    Attributes:
        child: [B, n] int64, the accepted child; -1: none.
        law: [B, n, V], distribution of the token drawn instead; p at leaves.
        counts: statistics by name, [B, n] each, summed along the walk.
    """

    child: Tensor
    law: Tensor
    counts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class AcceptedPath:
    """An accepted path.

    Attributes:
        nodes: [B, max_depth + 1] int64, from the root; the last node repeats past the end.
        length: [B] int64, accepted nodes, without the root.
        bonus: [B] int64, the token after them.
        counts: the decisions' counts summed over the path, [B] each.
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
        rule: how a child is accepted.
    """
    children = drafted.inner_children()
    draft = None if drafted.draft is None else drafted.draft.index_select(1, drafted.tree.internal)
    coins = coins.gather(1, children.clamp_min(0).flatten(1)).view_as(children)
    given = (drafted.inner_target(), draft, drafted.child_tokens(), children >= 0, coins, drafted.inner_depth() + 1)
    return reject(*given, rule)


def reach_probability(chance: Tensor) -> Tensor:
    """Probability [..., C] that each child's turn comes: all before it are rejected."""
    return torch.cat([torch.ones_like(chance[..., :1]), 1 - chance[..., :-1]], dim=-1).cumprod(dim=-1)


def child_of(drafted: Drafted, slot: Tensor) -> Tensor:
    """Accepted children [B, n] from slots [B, A] at the inner nodes; -1 stays -1."""
    child = torch.where(slot >= 0, pick(drafted.inner_children(), slot.clamp_min(0)), -1)
    return spread(drafted, child, -1)


def spread(drafted: Drafted, values: Tensor, fill: float) -> Tensor:
    """Values [B, n]: those of the inner nodes [B, A], and `fill` for leaves."""
    whole = torch.full_like(drafted.tokens, fill, dtype=values.dtype)
    return whole.index_copy(1, drafted.tree.internal, values)


def decide(drafted: Drafted, noise: Noise, rule: Rejection) -> Decisions:
    """Decisions by rejection in turn."""
    outcome = reject_in_turn(drafted, noise.coins, rule)
    # A leaf's token is drawn from p itself.
    law = drafted.target.index_copy(1, drafted.tree.internal, outcome.residual)
    counts = {"stolen": spread(drafted, outcome.stolen, 0)}
    return Decisions(child_of(drafted, outcome.slot), law, counts=counts)


def strict(drafted: Drafted, noise: Noise) -> Decisions:
    """The exact verifier."""
    return decide(drafted, noise, Rejection())


def verify_and_walk(
    drafted: Drafted,
    noise: Noise | None,
    remaining: Tensor,
    factor: Tensor | None = None,
    classes: Tensor | None = None,
) -> AcceptedPath:
    """Decisions of the exact rule, or of one of its two relaxations, and the walk along them, in one call.

    Args:
        drafted: the tree.
        noise: of this verification; None means temperature 0: a child is accepted if it is the most likely token.
        remaining: see `walk`.
        factor: [B, A], multiplies the acceptance probability of the inner nodes' children.
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
    return AcceptedPath(result.nodes, result.length, result.bonus, {} if noise is None else {"stolen": result.stolen})


def walk(drafted: Drafted, decisions: Decisions, noise: Noise, remaining: Tensor) -> AcceptedPath:
    """Follow the accepted children from the root, and draw the token after them.

    Args:
        drafted: the tree.
        decisions: of all its nodes.
        noise: of this verification.
        remaining: [B] tokens the image still needs, bonus included (0: the image is finished).
    """
    path, length = follow(decisions.child, remaining, drafted.tree.max_depth)
    node = path[:, -1]
    law = decisions.law.gather(1, node[:, None, None].expand(-1, 1, decisions.law.shape[-1]))
    bonus = draw(law, noise.at(length[:, None]))[:, 0]
    # If the image ends before the path, the accepted child is the last token: it has the node's distribution.
    child = pick(decisions.child, node)
    bonus = torch.where(child >= 0, pick(drafted.tokens, child.clamp_min(0)), bonus)
    passed = torch.arange(path.shape[1], device=path.device) <= length[:, None]
    counts = {name: (value.gather(1, path) * passed).sum(dim=1) for name, value in decisions.counts.items()}
    return AcceptedPath(path, length, bonus, counts)
