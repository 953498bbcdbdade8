"""CASCADE-R: relaxed acceptance from the redundancy that the target's own hidden states show in the tree.

Our reconstruction: of CASCADE (arXiv 2605.07230) only the abstract was available. Two relations between siblings:
**interchangeability** (breadth): their hidden states are alike, so the target predicts the same future after either;
and **convergence** (depth): descendants at equal depth are alike, so the difference washes out. Related siblings form
classes, under caps on the mass that a class lends; undrafted codes join the class of the nearest child where the
target is insensitive (a context-scaled LANTERN). A relaxation counts as lossless up to classes when the law over
classes is the target's.

Modes: "substitute" (S) runs the exact verifier and then exchanges the result inside its class: the law over classes
stays the target's. "quotient" (Q) does rejection sampling on class masses: it keeps that law in trees of most likely
tokens; in sampled trees only as far as the classes do not depend on which tokens were drawn (measured, see the tests).
"lantern" (L) and "scale" (W) do not keep it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastgen.checks import check_bool, check_choice, check_integer, check_number
from fastgen.drafters.acceptance import AcceptanceRule, Neighbours
from fastgen.drafters.redundancy import (
    Similarity,
    are_siblings,
    convergence,
    sensitivity,
    sibling_pairs,
    similarity,
)
from fastgen.drafters.verify import (
    Decisions,
    Drafted,
    Noise,
    Walk,
    child_of,
    decide,
    expected_length,
    reject_in_turn,
    spread,
    verified,
    walk,
)
from fastgen.kernels.rejection import TINY, Lent, Rejection, Scaled, class_mass, draw, pick

__all__ = ["Cascade", "CascadeConfig", "Classes", "form_classes"]

Mode = Literal["substitute", "quotient", "lantern", "scale"]


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """Thresholds of CASCADE-R (section 6.8 of our specification; not the paper's).

    Breadth, depth and radius come from a calibration. What decides beside them is how much mass a class may lend: a
    little of it (delta) is what most rejections of flat laws lack, and much of it is what spoils pictures.

    Attributes:
        mode: see the module.
        similarity: "cosine" of centred hidden states, "l2" (1 less the relative distance), or "tv" (1 less the total
            variation of the processed laws). All are at most 1.
        breadth: siblings at least so similar are interchangeable; above 1 none are.
        depth: siblings whose descendants are at least so similar converge; above 1 none do.
        horizon: levels of descendants looked at.
        delta: a class lends at most this mass ...
        factor: ... and at most (factor_d - 1) times its first member's (None: whatever that is), with
        decay: factor_d = 1 + (factor - 1) exp(-decay (d - 1)) at depth d.
        min_entropy: nats; below it a node relaxes nothing.
        image_budget: mass that may be stolen in an image; then the exact rule holds.
        radius: undrafted codes join a class where the target's hidden state is predicted to move by at most this, in
            units of the mean norm of the hidden states in the tree; 0 for none.
        near: codes looked at around each child.
        routing: an accepted token may be exchanged for its class mate with the longer expected path.
        boost: beta of mode "scale".

    Raises:
        ValueError: a number out of range.
    """

    mode: Mode = "lantern"
    similarity: Similarity = "cosine"
    breadth: float = 0.9
    depth: float = 0.95
    horizon: int = 2
    delta: float = 0.02
    factor: float | None = None
    decay: float = 0.7
    min_entropy: float = 0.0
    image_budget: float = math.inf
    radius: float = 0.0
    near: int = 64
    routing: bool = True
    boost: float = 0.0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("similarity", self.similarity, get_args(Similarity))
        check_integer("horizon", self.horizon, 0)
        check_integer("near", self.near, 1)
        check_bool("routing", self.routing)
        least = {"delta": 0, "factor": 1, "decay": 0, "min_entropy": 0, "image_budget": 0, "radius": 0, "boost": 0}
        for name in ("breadth", "depth", *least):
            value = getattr(self, name)
            unlimited = (name == "factor" and value is None) or (name == "image_budget" and value == math.inf)
            if not unlimited:
                check_number(name, value, least.get(name, -math.inf))

    @classmethod
    def off(cls) -> CascadeConfig:
        """Nothing is relaxed: the exact rule bit for bit."""
        return cls(breadth=2.0, depth=2.0, radius=0.0, boost=0.0)


@dataclass(frozen=True)
class Classes:
    """Equivalence classes of tokens at the A nodes with children.

    Attributes:
        of_slot: [B, A, C] int64: a child's class, named by the slot of its first member.
        of_token: [B, A, V] int64: a token's class: a slot, or C + token for a token that stands for itself.
    """

    of_slot: Tensor
    of_token: Tensor

    def mass(self, law: Tensor) -> Tensor:
        """Mass of every token's class under law [B, A, V]: [B, A, V]."""
        return class_mass(self.of_token, self.count, law)

    @property
    def count(self) -> int:
        """Bound of the classes' names."""
        return int(self.of_slot.shape[-1] + self.of_token.shape[-1])

    def members(self, slot: Tensor) -> Tensor:
        """[B, A, C] bool: children in the class of child `slot` [B, A]."""
        return self.of_slot == pick(self.of_slot, slot)[..., None]


def form_classes(link: Tensor, mass: Tensor, caps: Tensor) -> tuple[Tensor, Tensor]:
    """Complete linkage in draft order: a child joins the first class all of whose members it is linked to and whose
    cap has room for its mass.

    Args:
        link: [B, A, C, C] bool, symmetric.
        mass: [B, A, C], p of each child.
        caps: [B, A, C], what a class may lend when this child is its first member.

    Returns:
        [B, A, C] the slot of each child's first class mate, and [B, A, C] what its class lends so far (at the first
        member's slot).
    """
    count = link.shape[-1]
    first = torch.arange(count, device=link.device).expand(mass.shape).clone()
    lent = torch.zeros_like(mass)
    for slot in range(1, count):
        free = torch.ones_like(first[..., 0], dtype=torch.bool)
        for head in range(slot):
            member = first[..., :slot] == head
            fits = (link[..., slot, :slot] | ~member).all(dim=-1) & (first[..., head] == head)
            fits &= free & (lent[..., head] + mass[..., slot] <= caps[..., head])
            first[..., slot] = torch.where(fits, head, first[..., slot])
            lent[..., head] = torch.where(fits, lent[..., head] + mass[..., slot], lent[..., head])
            free &= ~fits
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
    draws_everywhere = True  # mode S does
    looks_ahead = True  # convergence and routing do

    def __init__(self, config: CascadeConfig, neighbours: Neighbours | None = None) -> None:
        if config.radius > 0 and neighbours is None:
            raise ValueError("neighbours: needed with a radius above 0")
        self.config, self.neighbours = config, neighbours

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        alike = self._alike(drafted)
        if self.config.mode == "scale":
            return decide(drafted, noise, Scaled(self._boost(drafted, alike, spent)))
        classes = self.classes(drafted, alike, spent)
        if self.config.mode == "substitute":
            return self._substitute(drafted, noise, classes)
        if self.config.mode == "quotient":
            return decide(drafted, noise, _Quotient(classes))
        return decide(drafted, noise, Lent(classes.of_token, classes.count))

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> Walk:
        if self.config.mode == "scale":
            boost = self._boost(drafted, self._alike(drafted), spent)
            return verified(drafted, noise, remaining, factor=boost)
        if self.config.mode == "lantern":
            classes = self.classes(drafted, self._alike(drafted), spent)
            return verified(drafted, noise, remaining, classes=classes.of_token)
        return walk(drafted, self.verify(drafted, noise, spent), noise, remaining)

    def _alike(self, drafted: Drafted) -> Tensor:
        if drafted.hidden is None:
            raise ValueError("drafted: CASCADE-R needs the target's hidden states")
        return similarity(drafted, self.config.similarity)

    # ---- classes ----

    def may_relax(self, drafted: Drafted, spent: Tensor) -> Tensor:
        """[B, A]: nodes that are uncertain enough, in images with budget left."""
        p = drafted.inner_target()
        entropy = -torch.special.xlogy(p, p).sum(dim=-1)
        return (entropy >= self.config.min_entropy) & (spent <= self.config.image_budget)[:, None]

    def classes(self, drafted: Drafted, alike: Tensor, spent: Tensor) -> Classes:
        """Classes of siblings, and of the codes that join them."""
        config, children = self.config, drafted.inner_children()
        p, exists, may = drafted.inner_target(), children >= 0, self.may_relax(drafted, spent)
        mass = p.gather(-1, drafted.child_tokens()) * exists
        linked = sibling_pairs(alike, children) >= config.breadth
        if config.horizon > 0:
            met = convergence(alike, drafted.tree, config.horizon)
            linked |= sibling_pairs(met, children) >= config.depth
        linked &= are_siblings(children) & may[..., None, None]
        caps = torch.full_like(mass, config.delta)
        if config.factor is not None:
            factor = (config.factor - 1) * torch.exp(-config.decay * drafted.inner_depth().float())
            caps = (factor[..., None] * mass).clamp_max(config.delta)
        first, lent = form_classes(linked, mass, caps)
        count, vocabulary = children.shape[-1], p.shape[-1]
        of_token = (count + torch.arange(vocabulary, device=p.device)).expand(p.shape).clone()
        if config.radius > 0 and self.neighbours is not None:
            self._extend(of_token, drafted, first, caps - lent, may, self.neighbours)
        # Children last: a drafted token is in its own class whatever its neighbours say.
        tokens = torch.where(exists, drafted.child_tokens(), vocabulary)
        of_token = torch.cat([of_token, of_token[..., :1]], dim=-1)
        of_token = of_token.scatter(-1, tokens, first)[..., :vocabulary]
        return Classes(first, of_token)

    def _extend(
        self, of_token: Tensor, drafted: Drafted, first: Tensor, room: Tensor, may: Tensor, neighbours: Neighbours
    ) -> None:
        """Section 6.6: write undrafted codes near a child into its class, as far as the class has room."""
        children, tokens, book = drafted.inner_children(), drafted.child_tokens(), neighbours.codebook
        reach = self.config.radius / sensitivity(drafted, book)
        near = neighbours.codes[:, : self.config.near][tokens]
        apart = neighbours.distances[:, : self.config.near][tokens]
        inside = (apart <= reach[..., None, None]) & (children >= 0)[..., None] & may[..., None, None]
        # A code belongs to the nearest child only; among equally near ones to the first.
        spots = book[tokens].where((children >= 0)[..., None], torch.inf)
        to_each = (book[near][..., None, :] - spots[:, :, None, None]).square().sum(dim=-1).nan_to_num(nan=torch.inf)
        inside &= to_each.argmin(dim=-1) == torch.arange(children.shape[-1], device=children.device)[:, None]
        p = drafted.inner_target()
        for slot in range(children.shape[-1]):
            head, codes, wanted = first[..., slot : slot + 1], near[..., slot, :], inside[..., slot, :]
            mass = p.gather(-1, codes) * wanted
            fits = wanted & (mass.cumsum(dim=-1) <= room.gather(-1, head))
            room.scatter_add_(-1, head, -(mass * fits).sum(dim=-1, keepdim=True))
            of_token.scatter_(-1, codes, torch.where(fits, head, of_token.gather(-1, codes)))

    # ---- mode S ----

    def _substitute(self, drafted: Drafted, noise: Noise, classes: Classes) -> Decisions:
        outcome = reject_in_turn(drafted, noise.coins, Rejection())
        inner, children = drafted.tree.internal, drafted.inner_children()
        law = drafted.target.index_copy(1, inner, outcome.left)
        depth = drafted.tree.depth.expand(len(drafted.tokens), -1)
        token = draw(law, noise.at(depth))
        # All refused: the token drawn instead is an exact sample. If its class has a child, the walk goes on there.
        of_drawn = pick(classes.of_token, token.index_select(1, inner))
        refused = outcome.slot < 0
        substituted = refused & (of_drawn < children.shape[-1])
        slot = torch.where(substituted, of_drawn, outcome.slot)
        best = slot
        if self.config.routing:
            value = expected_length(drafted, outcome.chance).gather(1, children.clamp_min(0).flatten(1))
            mates = classes.members(slot.clamp_min(0)) & (children >= 0)
            best = value.view_as(children).float().where(mates, -1.0).argmax(dim=-1)
            # Of equally good mates the accepted one itself.
            own = pick(value.view_as(children), slot.clamp_min(0))
            best = torch.where(own >= pick(value.view_as(children), best), slot, best).where(slot >= 0, -1)
        p = drafted.inner_target()
        chosen = pick(drafted.child_tokens(), best.clamp_min(0))
        lent = pick(classes.mass(p), chosen) - pick(p, chosen)
        rerouted = (best != slot) & ~substituted
        changed = substituted | rerouted
        counts = {
            "stolen": spread(drafted, lent * changed, 0),
            "relaxed": spread(drafted, substituted.long(), 0),
            "rerouted": spread(drafted, rerouted.long(), 0),
        }
        return Decisions(child_of(drafted, best), law, token, counts)

    def _boost(self, drafted: Drafted, alike: Tensor, spent: Tensor) -> Tensor:
        """omega [B, A] of mode W: 1 + beta times the mean similarity of siblings above that of all nodes."""
        children = drafted.inner_children()
        pairs = are_siblings(children).triu(1)
        between = torch.where(pairs, sibling_pairs(alike, children), 0.0).sum(dim=(-1, -2))
        count = pairs.sum(dim=(-1, -2))
        everywhere = alike.mean(dim=(-1, -2))[:, None]
        above = (between / count.clamp_min(1) - everywhere).clamp_min(0) * (count > 0)
        return 1 + self.config.boost * above * self.may_relax(drafted, spent)


class _Quotient(Rejection):
    """Mode Q: rejection sampling on class masses."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        p, q = (pick(self.classes.mass(law), tokens) for law in (target, draft))
        return p / q.clamp_min(TINY)

    def leave(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        p, q = self.classes.mass(target), self.classes.mass(draft)
        # Inside a class p's proportions stay.
        return target * ((p - q).clamp_min(0) / p.clamp_min(TINY))

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return pick(self.classes.mass(target), tokens) - pick(target, tokens)
