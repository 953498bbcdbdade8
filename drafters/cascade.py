"""CASCADE-R: relaxed acceptance based on the redundancy of the target's hidden states in the tree.

Our reconstruction: only the abstract of CASCADE (arXiv 2605.07230) was available. Siblings can be related in two ways:
**interchangeability** (breadth): their hidden states are similar, so the target predicts the same tokens after either;
**convergence** (depth): their descendants at equal depth are similar, so the difference fades. Related siblings form
classes, with a cap on the mass that a class lends; undrafted codes join the class of the nearest child where the
target is insensitive (a context-scaled LANTERN). A relaxation is lossless up to classes if the distribution over
classes is the target's.

As in LANTERN, a drafted token has the mass of its class, up to a cap; the other tokens of the class have none. The
distribution is no longer the target's; the calibration measures by how much, and the effect on pictures.

A chain has no siblings, so nothing in the pass tells how sensitive the target is. There the median of the calibration
counts: CASCADE-R becomes a LANTERN with a calibrated radius and a cap, and reads no hidden states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fastgen.checks import check_integer, check_number
from fastgen.drafters.acceptance import AcceptanceRule, Neighbours
from fastgen.drafters.redundancy import (
    convergence,
    node_similarity,
    sensitivity,
    sibling_pairs,
    sibling_states,
    similarity,
)
from fastgen.drafters.tree import Tree
from fastgen.drafters.verify import AcceptedPath, Decisions, Drafted, Noise, decide, strict, verify_and_walk
from fastgen.kernels.rejection import Lent

__all__ = ["Cascade", "CascadeConfig", "Classes", "form_classes"]


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """Thresholds of CASCADE-R (section 6.8 of our specification; not the paper's).

    Breadth, depth and radius come from a calibration. The mass that a class may lend (delta) matters as well: a little
    avoids most rejections of flat distributions, a lot spoils pictures.

    Attributes:
        breadth: siblings whose centred hidden states have at least this cosine are interchangeable; above 1 none are.
        depth: siblings whose descendants are at least this similar converge; above 1 none do.
        horizon: levels of descendants compared.
        delta: a class lends at most this mass.
        image_budget: mass that may be stolen per image; after that the exact rule applies.
        radius: undrafted codes join a class where the target's hidden state is predicted to move by at most this, in
            units of the mean norm of the hidden states in the tree; 0 for none.
        sensitivity: how far the hidden state moves with the code (that unit over the codebook's), for a draft without
            pairs of siblings to measure it from; infinity: no undrafted code joins a class there.
        near: nearest codes considered for each child.

    Raises:
        ValueError: a number out of range.
    """

    breadth: float = 0.9
    depth: float = 0.95
    horizon: int = 2
    delta: float = 0.05
    image_budget: float = math.inf
    radius: float = 0.0
    sensitivity: float = math.inf
    near: int = 64

    def __post_init__(self) -> None:
        check_integer("horizon", self.horizon, 0)
        check_integer("near", self.near, 1)
        for name, least in (("breadth", -math.inf), ("depth", -math.inf), ("delta", 0), ("radius", 0)):
            check_number(name, getattr(self, name), least)
        if self.image_budget != math.inf:
            check_number("image_budget", self.image_budget, 0)
        if self.sensitivity != math.inf:
            check_number("sensitivity", self.sensitivity, above=0)

    @classmethod
    def off(cls) -> CascadeConfig:
        """Nothing is relaxed: bit-identical to the exact rule."""
        return cls(breadth=2.0, depth=2.0, radius=0.0)

    @property
    def relaxes(self) -> bool:
        """Whether two tokens can share a class."""
        return self.delta > 0 and (self.breadth <= 1 or self.converges or self.radius > 0)

    @property
    def converges(self) -> bool:
        """Whether similar descendants can relate two siblings."""
        return self.horizon > 0 and self.depth <= 1


@dataclass(frozen=True)
class Classes:
    """Equivalence classes of tokens at the A nodes with children.

    Attributes:
        of_slot: [B, A, C] int64: each child's class, given by the slot of the class's first member.
        of_token: [B, A, V] int64: each token's class: a slot, or C if it has none.
    """

    of_slot: Tensor
    of_token: Tensor


def form_classes(link: Tensor, mass: Tensor, caps: Tensor) -> tuple[Tensor, Tensor]:
    """Complete linkage in draft order: a child joins the first class whose members are all linked to it and whose cap
    has room for its mass.

    Args:
        link: [B, A, C, C] bool, symmetric.
        mass: [B, A, C], p of each child.
        caps: [B, A, C], mass that a class may lend if this child is its first member.

    Returns:
        [B, A, C] the slot of the first member of each child's class, and [B, A, C] the mass that a class lends so far
        (at the first member's slot).
    """
    count = link.shape[-1]
    slots = torch.arange(count, device=link.device)
    first, lent = slots.expand(mass.shape).clone(), torch.zeros_like(mass)
    for slot in range(1, count):  # all nodes and all classes at once
        head, weight = slots[:slot], mass[..., slot, None]
        member = first[..., None, :slot] == head[:, None]
        fits = (link[..., slot, None, :slot] >= member).all(dim=-1) & member.diagonal(dim1=-2, dim2=-1)
        fits &= lent[..., :slot] + weight <= caps[..., :slot]
        found = torch.where(fits, head, slot).amin(dim=-1)
        first[..., slot] = found
        lent[..., :slot] += weight * (head == found[..., None])
    return first, lent


class Cascade(AcceptanceRule):
    """CASCADE-R.

    Args:
        config: thresholds.
        neighbours: of the codebook; needed with a radius above 0.

    Raises:
        ValueError: a radius without neighbours.
    """

    name = "cascade"
    tables = ("neighbours",)
    needs_hidden = True
    looks_ahead = True  # convergence does

    def __init__(self, config: CascadeConfig, neighbours: Neighbours | None = None) -> None:
        if config.radius > 0 and neighbours is None:
            raise ValueError("neighbours: needed with a radius above 0")
        self.config, self.neighbours = config, neighbours
        self.needs_hidden = config.relaxes

    def reads_hidden(self, tree: Tree) -> bool:
        # Without siblings there is no pair to compare.
        return self.needs_hidden and tree.max_children > 1

    def _relaxes(self, tree: Tree) -> bool:
        """Whether two tokens can share a class in a draft of this shape."""
        alone = self.config.delta * self.config.radius > 0 and self.config.sensitivity < math.inf
        return self.config.relaxes if tree.max_children > 1 else alone

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        if not self._relaxes(drafted.tree):
            return strict(drafted, noise)
        return decide(drafted, noise, Lent(self.classes(drafted, spent).of_token))

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> AcceptedPath:
        if not self._relaxes(drafted.tree):
            return verify_and_walk(drafted, noise, remaining)
        return verify_and_walk(drafted, noise, remaining, classes=self.classes(drafted, spent).of_token)

    def classes(self, drafted: Drafted, spent: Tensor) -> Classes:
        """Classes of siblings and of the codes that join them, for all nodes at once."""
        config, p, tokens = self.config, drafted.inner_target(), drafted.child_tokens()
        count, vocabulary = tokens.shape[-1], p.shape[-1]
        first = torch.arange(count, device=p.device).expand(tokens.shape)
        states = sibling_states(drafted) if count > 1 else None
        room = p.new_full(tokens.shape, config.delta)
        if config.image_budget < math.inf:
            room = room.where((spent <= config.image_budget)[:, None, None], -1.0)
        if states is not None and (config.breadth <= 1 or config.converges):
            first, lent = form_classes(self._links(drafted, states), p.gather(-1, tokens), room)
            room = room - lent
        # The last column collects what is written for no token.
        of_token = tokens.new_full((*p.shape[:2], vocabulary + 1), count)
        if config.radius > 0 and self.neighbours is not None:
            near = embedding(tokens, self.neighbours.codes[:, : config.near])
            inside = self._near(drafted, states, near, self.neighbours)
            fits = _within(p.gather(-1, near.flatten(2)).view_as(near) * inside, inside, first, room)
            heads = first[..., None].expand_as(near).flatten(2)
            of_token.scatter_(-1, near.where(fits, vocabulary).flatten(2), heads)
        # Children last: a drafted token keeps its own class.
        of_token.scatter_(-1, tokens.where(drafted.inner_children() >= 0, vocabulary), first)
        return Classes(first, of_token[..., :vocabulary])

    def _links(self, drafted: Drafted, states: Tensor) -> Tensor:
        """Which siblings [B, A, C, C] are interchangeable or converge, in the row of the later one of each pair."""
        config, linked = self.config, []
        if config.breadth <= 1:
            linked.append(similarity(states, drafted.states().mean(dim=1)[:, None, None]) >= config.breadth)
        if config.converges:
            met = convergence(node_similarity(drafted), drafted.tree, config.horizon)
            linked.append(sibling_pairs(met, drafted.inner_children()) >= config.depth)
        return reduce(torch.logical_or, linked) & drafted.tree.pairs

    def _near(self, drafted: Drafted, states: Tensor | None, near: Tensor, neighbours: Neighbours) -> Tensor:
        """Section 6.6: which of the codes [B, A, C, k] near existing children are predicted to move the target little
        enough."""
        tokens, children = drafted.child_tokens(), drafted.inner_children()
        distances = embedding(tokens, neighbours.distances[:, : near.shape[-1]])
        if states is None:
            return distances <= self.config.radius / self.config.sensitivity
        spots, slots = embedding(tokens, neighbours.codebook), torch.arange(near.shape[2], device=near.device)
        moved = sensitivity(drafted, states, spots)
        reach = self.config.radius / moved.where(moved.isfinite(), self.config.sensitivity)
        inside = distances <= reach[..., None, None]
        # A code belongs to the nearest child only, the first of equally near ones. Distances are squared, without the
        # square of the code itself, which is the same for all children.
        own = spots.square().sum(dim=-1, keepdim=True).where(children[..., None] >= 0, torch.inf)
        across = spots @ embedding(near.flatten(2), neighbours.codebook).mT
        nearest = torch.add(own, across, alpha=-2).nan_to_num(nan=torch.inf).min(dim=2).indices
        return inside & (nearest.view_as(near) == slots[:, None])


def _within(mass: Tensor, inside: Tensor, first: Tensor, room: Tensor) -> Tensor:
    """For each child in turn, which of the nearest codes its class still has room for, [B, A, C, k]."""
    before, fits = mass.cumsum(dim=-1), []
    for slot in range(mass.shape[2]):  # all nodes at once; a class's members share its room
        head = first[..., slot : slot + 1]
        fits.append(inside[..., slot, :] & (before[..., slot, :] <= room.gather(-1, head)))
        if slot + 1 < mass.shape[2]:
            room = room.scatter_add(-1, head, -(mass[..., slot, :] * fits[-1]).sum(dim=-1, keepdim=True))
    return torch.stack(fits, dim=2)
