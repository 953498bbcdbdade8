"""Acceptance rules with one interface: the exact rule, and published relaxed rules.

A relaxed rule lets a drafted token use the probability mass of tokens that count as equivalent. That mass is *stolen*:
the result no longer has the target's distribution. The formulas follow arXiv 2410.03355 (LANTERN) and 2502.06352
(LANTERN++); those of GSD and Cool-SD come from secondary sources. CASCADE-R is in `cascade.py`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer, check_number
from fastgen.contracts import Loss
from fastgen.drafters.tree import Tree
from fastgen.drafters.verify import AcceptedPath, Decisions, Drafted, Noise, decide, strict, verify_and_walk, walk
from fastgen.errors import FastgenError
from fastgen.kernels.rejection import TINY, Rejection, Scaled, normalise, pick

if TYPE_CHECKING:
    from fastgen.drafters.targets import Target

__all__ = ["AcceptanceRule", "Block", "CoolSD", "Exact", "GSD", "Lantern", "Neighbours"]


@dataclass(frozen=True)
class Neighbours:
    """The nearest codes of every code of a VQ codebook.

    Attributes:
        codes: [V, k] int64, nearest first, the code itself left out.
        distances: [V, k] float32, Euclidean.
        codebook: [V, d] float32.
    """

    codes: Tensor
    distances: Tensor
    codebook: Tensor

    @classmethod
    def of(cls, codebook: Tensor, k: int) -> Neighbours:
        """Compute the neighbours, a few codes at a time.

        Args:
            codebook: [V, d]; rows that are not finite are tokens without a code and have no neighbours.
            k: neighbours per code.

        Raises:
            ValueError: k is not in 1 … V - 1.
        """
        codebook = codebook.detach().float()
        check_integer("k", k, 1, len(codebook) - 1)
        # One matrix product in float64: in float32 the differences between close codes would cancel.
        double = codebook if codebook.device.type == "mps" else codebook.double()
        squares, across = double.square().sum(dim=1), double.T.contiguous()
        codes, distances = [], []
        for start in range(0, len(double), _ROWS):
            rows = slice(start, start + _ROWS)
            apart = torch.addmm(squares, double[rows], across, alpha=-2).add_(squares[rows, None]).float()
            apart = apart.nan_to_num_(nan=math.inf).clamp_min_(0)
            own = torch.arange(start, start + len(apart), device=codebook.device)
            near = apart.scatter_(1, own[:, None], math.inf).topk(k, dim=1, largest=False)
            codes.append(near.indices)
            distances.append(near.values.sqrt())
        return cls(torch.cat(codes), torch.cat(distances), codebook)

    @classmethod
    def cached(cls, owner: nn.Module, codebook: Tensor, k: int) -> Neighbours:
        """The neighbours, cached per owner and k: moved with the codebook's device, recomputed when its values change.

        Args:
            owner: the model; the cache entry is deleted with it.
            codebook, k: see `of`.
        """
        tables = _TABLES.setdefault(owner, {})
        codebook = codebook.detach().float()
        built = tables.get(k)
        if built is not None and not codebook.is_meta and not built.codebook.is_meta:
            moved = built.to(codebook.device)
            if moved.codebook.shape == codebook.shape and torch.equal(
                moved.codebook.nan_to_num(), codebook.nan_to_num()
            ):
                tables[k] = moved
                return moved
        tables[k] = cls.of(codebook, k)
        return tables[k]

    def to(self, device: torch.device) -> Neighbours:
        """The same on another device."""
        if self.codebook.device == device:
            return self
        return Neighbours(self.codes.to(device), self.distances.to(device), self.codebook.to(device))


#: Codes processed at once: few enough that their distances to all others fit into a CPU's cache.
_ROWS = 64
_TABLES: WeakKeyDictionary[nn.Module, dict[int, Neighbours]] = WeakKeyDictionary()


class AcceptanceRule(ABC):
    """Decides which drafted tokens are accepted.

    Attributes:
        name: as on the command line.
        loss: "distribution" if it keeps the target's distribution, else "lossy".
        needs_hidden: whether it reads `Drafted.hidden`.
        looks_ahead: whether its decision at a node depends on the tokens drafted below.
        tables: names of its attributes that are codebook tables, with one row per token.
    """

    name: str = ""
    loss: Loss = "lossy"
    needs_hidden = False
    looks_ahead = False
    tables: tuple[str, ...] = ()

    @property
    def needs_fresh_noise(self) -> bool:
        """Whether a window must draw new noise in every round: a rule that looks ahead depends on the noise of places
        that it rejects, and using it again would change the distribution."""
        return self.looks_ahead and self.loss != "lossy"

    def check(self, target: Target) -> None:
        """Check that the tables fit the model's vocabulary.

        Raises:
            FastgenError: names the mismatch.
        """
        for table in (getattr(self, name) for name in self.tables):
            rows = len(table.codes if isinstance(table, Neighbours) else table) if table is not None else None
            if rows not in (None, target.vocab_size):
                raise FastgenError(
                    f"acceptance: {self.name} was made for {rows} tokens, the model has {target.vocab_size}"
                )

    def check_tree(self, children: int, drawn: bool, temperature: float) -> None:  # noqa: B027 - most rules take any
        """Raises FastgenError if it cannot verify trees with this many children per node, drawn or most likely."""

    def reads_hidden(self, tree: Tree) -> bool:
        """Whether it reads `Drafted.hidden` of this tree."""
        return self.needs_hidden

    def to(self, device: torch.device) -> AcceptanceRule:
        """The rule with its tables on another device."""
        tables = {name: getattr(self, name) for name in self.tables}
        moved = {name: table.to(device) for name, table in tables.items() if table is not None}
        if all(table is tables[name] for name, table in moved.items()):
            return self
        other = copy.copy(self)
        vars(other).update(moved)
        return other

    @abstractmethod
    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        """Decide at all nodes.

        Args:
            drafted: the tree.
            noise: random numbers.
            spent: [B] mass stolen in the image so far.
        """

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> AcceptedPath:
        """The accepted path and the token after it. Rules that the kernel supports compute both at once.

        Args:
            drafted, noise, spent: see `verify`.
            remaining: [B] tokens the image still needs, see `fastgen.drafters.verify.walk`.
        """
        return walk(drafted, self.verify(drafted, noise, spent), noise, remaining)


class Exact(AcceptanceRule):
    """Keeps the target's distribution (see `fastgen.drafters.verify`)."""

    name, loss = "exact", "distribution"

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        return strict(drafted, noise)

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> AcceptedPath:
        return verify_and_walk(drafted, noise, remaining)


_CHAINS = 'acceptance: "block" verifies chains of drawn tokens; use "exact" for other trees'


class Block(AcceptanceRule):
    """Block verification of a chain (arXiv 2403.10444): the target's distribution, with longer paths than `Exact`.

    Tokens are judged jointly: accepting a token accepts all before it. With w_i = min(w_{i-1} p / q, 1), the path may
    end at token i with probability h_i = E_i / (E_i + 1 - w_i), where E_i is the mass of the positive part of
    w_i p - q after token i (h = w at the last). The longest such path is accepted, and the next token is drawn from
    that positive part.
    """

    name, loss = "block", "distribution"
    looks_ahead = True

    def check_tree(self, children: int, drawn: bool, temperature: float) -> None:
        # At temperature 0 every rule accepts the most likely tokens.
        if temperature > 0 and (children != 1 or not drawn):
            raise FastgenError(_CHAINS)

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        tree = drafted.tree
        if tree.max_children != 1 or drafted.draft is None:
            raise FastgenError(_CHAINS)
        p, q, tokens = drafted.target, drafted.draft, drafted.tokens
        weight = torch.ones_like(p[:, 0, 0])
        laws, end = [p[:, 0] - q[:, 0]], torch.zeros_like(tokens[:, 0])
        for i in range(1, tree.n):
            ratio = pick(p[:, i - 1], tokens[:, i]) / pick(q[:, i - 1], tokens[:, i]).clamp_min(TINY)
            weight = (weight * ratio).clamp_max(1.0)
            last = i == tree.n - 1
            excess = p[:, i] if last else (weight[:, None] * p[:, i] - q[:, i]).clamp_min(0)
            mass = excess.sum(dim=-1)
            stop = weight if last else mass / (mass + 1 - weight).clamp_min(TINY)
            end = torch.where(noise.coins[:, i] < stop, i, end)
            laws.append(excess)
        law = normalise(torch.stack(laws, dim=1).clamp_min(0), p)
        order = torch.arange(tree.n, device=tokens.device)
        child = torch.where(order < end[:, None], order + 1, -1)
        return Decisions(child, law, counts={"stolen": torch.zeros_like(noise.coins, dtype=p.dtype)})


class Lantern(AcceptanceRule, Rejection):
    """A token may use the mass of its nearest codes, up to a cap.

    The set A(x) is the longest nearest-first run of codes whose mass stays within the cap. x is accepted with
    probability min(1, (p(x) + p(A)) / q(x)). After a rejection, x has the mass p(x) + p(A), A has none, and q is
    subtracted.

    Args:
        neighbours: of the codebook.
        delta: cap on the mass, which limits the total variation between p and x's relaxed target (LANTERN).
        factor: cap as a multiple: p(A) <= (factor - 1) p(x) (LANTERN++); None for no such cap.
        k: nearest codes considered, at most those in `neighbours`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, neighbours: Neighbours, delta: float = 0.2, factor: float | None = None, k: int = 1000) -> None:
        check_number("delta", delta, 0, 1)
        if factor is not None:
            check_number("factor", factor, 1)
        check_integer("k", k, 1)
        self.name = "lantern" if factor is None else "lantern++"
        self.codes = neighbours.codes[:, :k]
        self.delta, self.factor = delta, factor

    tables = ("codes",)

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        return decide(drafted, noise, self)

    def _set(self, target: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest codes [B, A, k] of the tokens, which of them are in the set, and the set's mass [B, A]."""
        near = self.codes[tokens]
        mass = target.gather(-1, near)
        cap = torch.full_like(target[..., :1], self.delta)
        if self.factor is not None:
            cap = torch.minimum(cap, (self.factor - 1) * pick(target, tokens)[..., None])
        inside = mass.cumsum(dim=-1) <= cap
        return near, inside, (mass * inside).sum(dim=-1)

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        lent = self._set(target, tokens)[2]
        return (pick(target, tokens) + lent) / pick(draft, tokens).clamp_min(TINY)

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        near, inside, lent = self._set(target, tokens)
        relaxed = target.scatter(-1, near, target.gather(-1, near) * ~inside)
        relaxed = relaxed.scatter_add(-1, tokens[..., None], lent[..., None])
        return (relaxed - draft).clamp_min(0)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        return self._set(target, tokens)[2]


class GSD(AcceptanceRule, Rejection):
    """Tokens with similar probability and code form a cluster, accepted with probability min(1, p(A) / q(A)).

    A(x) are the tokens within `group // 2` ranks of x in the order of p whose probability differs by less than `gap`
    and whose code by less than `radius` in squared distance.

    Args:
        codebook: [V, d].
        group: G, ranks in a cluster.
        gap, radius: see above.

    Raises:
        ValueError: a number out of range.
    """

    name = "gsd"
    tables = ("codebook",)

    def __init__(self, codebook: Tensor, group: int = 10, gap: float = 0.15, radius: float = 0.5) -> None:
        check_integer("group", group, 1)
        check_number("gap", gap, above=0)
        check_number("radius", radius, above=0)
        self.codebook = codebook.detach().float()
        self.group, self.gap, self.radius = group, gap, radius

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        return decide(drafted, noise, self)

    def _cluster(self, target: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, A, G'] around each token in the order of p, and which of them are in its cluster."""
        order = target.argsort(dim=-1, descending=True, stable=True)
        rank = (order == tokens[..., None]).to(torch.uint8).argmax(dim=-1)
        reach = torch.arange(-(self.group // 2), self.group // 2 + 1, device=tokens.device)
        places = rank[..., None] + reach
        exists = (places >= 0) & (places < target.shape[-1])
        around = order.gather(-1, places.clamp(0, target.shape[-1] - 1))
        alike = (target.gather(-1, around) - pick(target, tokens)[..., None]).abs() < self.gap
        apart = (self.codebook[around] - self.codebook[tokens][..., None, :]).square().sum(dim=-1)
        return around, exists & alike & (apart < self.radius) | (reach == 0)

    def accept(self, target: Tensor, draft: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        around, inside = self._cluster(target, tokens)
        masses = [(law.gather(-1, around) * inside).sum(dim=-1) for law in (target, draft)]
        return masses[0] / masses[1].clamp_min(TINY)

    def stolen(self, target: Tensor, tokens: Tensor, depth: Tensor) -> Tensor:
        around, inside = self._cluster(target, tokens)
        return (target.gather(-1, around) * inside).sum(dim=-1) - pick(target, tokens)


class CoolSD(AcceptanceRule):
    """Relax early draft positions more: min(1, omega p / q) with omega = delta exp(-nu (depth - 1) - mu).

    The exact rule applies where omega is below 1.

    Args:
        delta, nu, mu: see above; delta = 1, nu = mu = 0 is the exact rule.

    Raises:
        ValueError: a number out of range.
    """

    name = "cool-sd"

    def __init__(self, delta: float = 1.1, nu: float = 0.7, mu: float = 0.0) -> None:
        for name, value, least in (("delta", delta, 1), ("nu", nu, 0), ("mu", mu, 0)):
            check_number(name, value, least)
        self.delta, self.nu, self.mu = delta, nu, mu

    def _factor(self, drafted: Drafted) -> Tensor:
        """omega [B, A] for the children of each inner node."""
        depth = drafted.inner_depth().float()
        return (self.delta * torch.exp(-self.nu * depth - self.mu)).clamp_min(1.0)

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        return decide(drafted, noise, Scaled(self._factor(drafted)))

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> AcceptedPath:
        return verify_and_walk(drafted, noise, remaining, factor=self._factor(drafted))
