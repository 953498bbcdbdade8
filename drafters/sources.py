"""Where drafted tokens come from: a drafter and its tree, or the target's own guesses of the round before (Jacobi)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.checks import check_bool, check_integer
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.draft import StaticPlan, draft_dynamic, draft_static
from fastgen.drafters.drafter import Drafter, DraftState
from fastgen.drafters.law import TokenLaw, gumbel_noise
from fastgen.drafters.names import check_nodes, window_of
from fastgen.drafters.targets import Prefix, Target, TargetPass
from fastgen.drafters.tree import DynamicShape, Tree, static_tree
from fastgen.drafters.verify import Drafted, Walk
from fastgen.errors import FastgenError

Generators = list[torch.Generator]

__all__ = ["DraftSource", "JacobiSource", "Proposal", "TreeSource"]


@dataclass(frozen=True)
class Proposal:
    """Tokens to be verified.

    Attributes:
        tree: their topology.
        tokens: [B, n], the root's first.
        draft: q [B, n, V] at each node with children, or None (see `Drafted`).
    """

    tree: Tree
    tokens: Tensor
    draft: Tensor | None


class DraftSource(ABC):
    """What a round drafts.

    Attributes:
        nodes: tokens of a target pass, root included.
        max_depth: the longest path.
        draws: rows of Gumbel noise that a round takes.
        passes: of a drafter, in a round and before the first.
        taps: layers of the target whose inputs it reads.
    """

    nodes: int
    max_depth: int
    draws: int
    passes: tuple[int, int] = (0, 0)
    taps: tuple[int, ...] = ()

    @abstractmethod
    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        """Raises ValueError where it cannot draft for this target, law or rule."""

    @abstractmethod
    def start(
        self, target: Target, prefix: Prefix, law: TokenLaw, output: TargetPass, first: Tensor, generators: Generators
    ) -> None:
        """Begin a batch: the pass over the prompts, and the first token [B] of each picture."""

    def check_finite(self) -> None:  # noqa: B027 - a source without a model has nothing to check
        """Raises NotFiniteError where logits of its own were not numbers. Waits for the device."""

    def narrow(self, images: Tensor, prefix: Prefix) -> bool:
        """Go on with these images of the batch alone; False where it cannot, and all stay.

        Args:
            images: their numbers.
            prefix: of the whole batch.
        """
        return False

    @abstractmethod
    def propose(self, root: Tensor, index: Tensor, gumbel: Tensor | None) -> Proposal:
        """Draft behind the root [B], token number `index` [B] of its picture; gumbel is [B, draws, V]."""

    @abstractmethod
    def absorb(self, drafted: Drafted, way: Walk, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        """Read a round's end.

        Args:
            drafted: what was verified.
            way: what was accepted.
            tokens: [B, max_depth + 1], accepted ones and the bonus behind them.
            kept: [B], how many of them hold: accepted + 1, or 0 for finished pictures.
            output: of the target.
        """


class TreeSource(DraftSource):
    """A drafter fills a tree.

    Args:
        drafter: made for the target.
        tree: static topology, or the size of a dynamic one.
        sampled: draw children without replacement; else the most likely ones.

    Raises:
        ValueError: a sampled dynamic tree.
    """

    def __init__(self, drafter: Drafter, tree: Tree | DynamicShape, sampled: bool) -> None:
        self.drafter, self.tree, self.sampled, self.taps = drafter, tree, sampled, drafter.taps
        self.plan = tree if isinstance(tree, DynamicShape) else StaticPlan.of(tree)
        if isinstance(self.plan, DynamicShape):
            if sampled:
                raise ValueError("tree: a dynamic tree takes the most likely tokens; sampled=True is not possible")
            shape = self.plan
            self.nodes, self.max_depth, self.grown = shape.nodes + 1, shape.depth, (shape.depth - 1) * shape.top_k
            self.draws = 0
        else:
            static = self.plan.tree
            self.nodes, self.max_depth, self.grown = static.n, static.max_depth, self.plan.grown
            self.draws = self.grown + 1 if sampled else 0
        # A level each, the root's being what was absorbed; before the first round the prompts.
        self.passes = (self.max_depth, 1)

    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        self.drafter.check(target)
        widest = self.tree.top_k if isinstance(self.tree, DynamicShape) else self.tree.max_children
        if widest > target.vocab_size:
            raise FastgenError(f"tree: {widest} children of a node, the model has {target.vocab_size} tokens")
        rule.check_tree(widest, self.sampled, law.temperature)
        if self.sampled and law.temperature == 0:
            raise ValueError("tree: temperature 0 takes the most likely tokens; sampled=True is not possible")
        if self.drafter.max_depth is not None and self.max_depth > self.drafter.max_depth:
            raise ValueError(f"tree: {self.max_depth} levels, this drafter has {self.drafter.max_depth}")

    def start(
        self, target: Target, prefix: Prefix, law: TokenLaw, output: TargetPass, first: Tensor, generators: Generators
    ) -> None:
        if isinstance(self.plan, StaticPlan):
            self.plan = self.plan.to(first.device)
        self.law = law
        features, room = self.drafter.features(output), self.grown + self.max_depth + 1
        # A flag of its own for the drafter's logits.
        self.state: DraftState = self.drafter.start(target, prefix.watched(), features, first, room)

    def check_finite(self) -> None:
        self.state.prefix.check("the drafter's logits")

    def narrow(self, images: Tensor, prefix: Prefix) -> bool:
        return self.drafter.narrow(self.state, images, prefix)

    def propose(self, root: Tensor, index: Tensor, gumbel: Tensor | None) -> Proposal:
        if isinstance(self.plan, DynamicShape):
            tree, tokens = draft_dynamic(self.drafter, self.state, self.plan, root, self.law, index)
            return Proposal(tree, tokens, None)
        tokens, q = draft_static(self.drafter, self.state, self.plan, root, self.law, index, gumbel)
        return Proposal(self.plan.tree, tokens, q if self.sampled else None)

    def absorb(self, drafted: Drafted, way: Walk, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        features = self.drafter.features(output)
        nodes = Target.both_rows(way.nodes, self.state.prefix)
        features = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[-1]))
        self.drafter.absorb(self.state, tokens, features, kept)


class JacobiSource(DraftSource):
    """Speculative Jacobi decoding (arXiv 2410.01699): no drafter. A window of tokens is drawn from what the target
    said of their places in the round before, in the context that they had then.

    A place's draft law is the target's from that round; where the window is new it is that of its last place. Loss
    contract as of any draft: the exact rule keeps the target's law.

    Args:
        window: L, places of the window.
        width: candidates of a place, drawn without replacement. The path continues from the first; the others are
            leaves, which end a path when one of them is accepted (and show rules that read it what the target makes of
            them).
        wide: so many places, from the first on, have `width` candidates, the others one; None for all. The places
            behind are seldom reached, and every candidate is a row of the target's pass.
        coupled: a place keeps its noise from round to round, so that its tokens change only where its law does
            (the coupled variant, lossless as well: what is accepted before a place does not depend on its noise, as
            long as the rule does not look ahead). A lossy rule may look ahead all the same; what the pictures lose is
            measured with it.

    Raises:
        ValueError: a window, a width or a `wide` below 1, or more wide places than places.
    """

    def __init__(self, window: int = 12, width: int = 1, wide: int | None = None, coupled: bool = True) -> None:
        check_integer("window", window, 1)
        check_integer("width", width, 1)
        wide = window if wide is None else check_integer("wide", wide, 1, window)
        self.wide = wide if width > 1 else 0
        check_nodes("window", (window, width, wide), window + (width - 1) * wide)
        check_bool("coupled", coupled)
        self.window, self.width, self.coupled = window, width, coupled
        counts = [width] * self.wide + [1] * (window - self.wide)
        self.tree = static_tree([[0] * depth + [rank] for depth, count in enumerate(counts) for rank in range(count)])
        self.nodes, self.max_depth = self.tree.n, window
        self.draws = 0 if coupled else window

    @classmethod
    def of_name(cls, name: str, rule: AcceptanceRule) -> JacobiSource:
        """The window "jacobi-12", or "jacobi-12x4" with 4 candidates a place, or "jacobi-12x4-3" with as many at the
        first 3 places; coupled where the rule allows it.

        Raises:
            ValueError: no such name.
        """
        return cls(*window_of(name), coupled=not rule.draws_anew)

    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        if self.coupled and rule.draws_anew:
            raise FastgenError(f'coupled: acceptance "{rule.name}" looks ahead; it needs coupled=False')
        if self.window > target.num_tokens:
            raise FastgenError(f"tree: a window of {self.window} places, a picture has {target.num_tokens} tokens")
        if self.width > target.vocab_size:
            raise FastgenError(f"tree: {self.width} candidates of a place, the model has {target.vocab_size} tokens")
        rule.check_tree(self.width, True, law.temperature)

    def start(
        self, target: Target, prefix: Prefix, law: TokenLaw, output: TargetPass, first: Tensor, generators: Generators
    ) -> None:
        device = first.device
        self.tree = self.tree.to(device)
        # The first candidate of each depth, behind the root.
        steps = torch.arange(self.window, device=device)
        self.spine = torch.cat([first.new_zeros(1), 1 + steps + (self.width - 1) * steps.clamp_max(self.wide)])
        p = target.token_law(target.head(output.hidden[:, -1:]), prefix, law, torch.zeros_like(first)[:, None])
        self.laws = p.expand(-1, self.window, -1).contiguous()  # strides as in later rounds
        self.noise: Tensor | None = None
        if self.coupled and law.temperature > 0:
            places = target.num_tokens + self.window + 1
            noise = gumbel_noise(generators, places * target.vocab_size, device)
            self.noise = noise.unflatten(1, (places, target.vocab_size))

    def narrow(self, images: Tensor, prefix: Prefix) -> bool:
        self.laws = self.laws[images]
        self.noise = None if self.noise is None else self.noise[images]
        return True

    def propose(self, root: Tensor, index: Tensor, gumbel: Tensor | None) -> Proposal:
        noise = gumbel
        if self.noise is not None:
            places = index[:, None] + 1 + torch.arange(self.window, device=root.device)
            rows = torch.arange(len(root), device=root.device)[:, None]
            noise = self.noise[rows, places]
        laws, logs = self.draft_laws(root, index, noise)
        scores = logs if noise is None else logs + noise
        # Of one candidate a place: compilers make no kernel of their own for the first few.
        drawn = scores[:, self.wide :].argmax(dim=-1)
        if self.wide:
            several = scores[:, : self.wide].topk(self.width, dim=-1).indices.flatten(1)
            drawn = torch.cat([several, drawn], dim=1)
        draft = laws.new_zeros(len(root), self.nodes, laws.shape[-1])
        draft[:, self.spine[:-1]] = laws
        return Proposal(self.tree, torch.cat([root[:, None], drawn], dim=1), draft)

    def draft_laws(self, root: Tensor, index: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Laws [B, L, V] of the places, drawn with their noise [B, L, V], and their logarithms: what the round before
        left.

        A place's law may depend on the noise of places before it, not on its own or that of later ones.
        """
        return self.laws, self.laws.log()

    def absorb(self, drafted: Drafted, way: Walk, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        # The root moves on by accepted + 1 places: what was said `accepted` places further now stands for each place.
        ahead = torch.arange(1, self.window + 1, device=tokens.device) + way.length[:, None]
        source = self.spine[ahead.clamp_max(self.window)]
        rows = torch.arange(len(source), device=source.device)[:, None]
        self.laws = drafted.target[rows, source]
