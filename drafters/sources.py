"""Where drafted tokens come from: a drafter's tree, or the target's predictions from the round before (Jacobi)."""

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
from fastgen.drafters.verify import AcceptedPath, Drafted
from fastgen.errors import FastgenError

Generators = list[torch.Generator]

__all__ = ["DraftSource", "JacobiSource", "Proposal", "TreeSource"]


@dataclass(frozen=True)
class Proposal:
    """Tokens to verify.

    Attributes:
        tree: their topology.
        tokens: [B, n], the root's first.
        draft: q [B, n, V] at each node with children, or None (see `Drafted`).
    """

    tree: Tree
    tokens: Tensor
    draft: Tensor | None


class DraftSource(ABC):
    """Drafts the tokens of a round.

    Attributes:
        nodes: tokens of a target pass, root included.
        max_depth: the longest path.
        draws: rows of Gumbel noise per round.
        passes: drafter passes per round, and before the first round.
        taps: layers of the target whose inputs it reads.
    """

    nodes: int
    max_depth: int
    draws: int
    passes: tuple[int, int] = (0, 0)
    taps: tuple[int, ...] = ()

    @abstractmethod
    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        """Raises ValueError if it cannot draft for this target, these settings or this rule."""

    @abstractmethod
    def start(
        self, target: Target, prefix: Prefix, law: TokenLaw, output: TargetPass, first: Tensor, generators: Generators
    ) -> None:
        """Begin a batch, given the pass over the prompts and the first token [B] of each picture."""

    def check_finite(self) -> None:  # noqa: B027 - a source without a model has nothing to check
        """Raises NotFiniteError if its own logits were not finite. Synchronises with the device."""

    def narrow(self, images: Tensor, prefix: Prefix) -> bool:
        """Keep only these images of the batch. If it cannot, it returns False, and all stay.

        Args:
            images: their indices.
            prefix: of the whole batch.
        """
        return False

    @abstractmethod
    def propose(self, root: Tensor, index: Tensor, gumbel: Tensor | None) -> Proposal:
        """Draft after the root [B], token `index` [B] of its picture; gumbel is [B, draws, V]."""

    @abstractmethod
    def absorb(self, drafted: Drafted, path: AcceptedPath, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        """Read the results of a round.

        Args:
            drafted: what was verified.
            path: what was accepted.
            tokens: [B, max_depth + 1], accepted ones and the bonus after them.
            kept: [B], how many of them are valid: accepted + 1, or 0 for finished pictures.
            output: of the target.
        """


class TreeSource(DraftSource):
    """Drafts a tree with a drafter.

    Args:
        drafter: made for the target.
        tree: static topology, or the size of a dynamic one.
        sampled: draw children without replacement; otherwise take the most likely ones.

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
        # One per level (the root's reads the committed tokens); before the first round, one over the prompts.
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
        # A separate flag for the drafter's logits.
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

    def absorb(self, drafted: Drafted, path: AcceptedPath, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        features = self.drafter.features(output)
        nodes = Target.both_rows(path.nodes, self.state.prefix)
        features = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[-1]))
        self.drafter.absorb(self.state, tokens, features, kept)


class JacobiSource(DraftSource):
    """Speculative Jacobi decoding (arXiv 2410.01699), without a drafter: a window of tokens is drawn from what the
    target predicted for their places in the round before, in that round's context.

    A place's draft distribution is the target's from that round; new places use that of the last place. As with any
    draft, the exact rule keeps the target's distribution.

    Args:
        window: L, places in the window.
        width: candidates per place, drawn without replacement. The path continues from the first; the others are
            leaves, which end a path if accepted (and give rules that compare hidden states more to compare).
        wide_places: number of places, from the first, with `width` candidates; the others have one. None for all.
            Later places are seldom reached, and every candidate is a row of the target's pass.
        coupled: a place keeps its noise from round to round, so that its token changes only where its distribution
            does. Lossless if the rule does not look ahead: then what is accepted before a place does not depend on its
            noise. A lossy rule may look ahead; its measured loss includes the effect.

    Raises:
        ValueError: a window, a width or a `wide_places` below 1, or `wide_places` above the window.
    """

    def __init__(self, window: int = 12, width: int = 1, wide_places: int | None = None, coupled: bool = True) -> None:
        check_integer("window", window, 1)
        check_integer("width", width, 1)
        wide_places = window if wide_places is None else check_integer("wide_places", wide_places, 1, window)
        self.wide_places = wide_places if width > 1 else 0
        check_nodes("window", (window, width, wide_places), window + (width - 1) * wide_places)
        check_bool("coupled", coupled)
        self.window, self.width, self.coupled = window, width, coupled
        counts = [width] * self.wide_places + [1] * (window - self.wide_places)
        self.tree = static_tree([[0] * depth + [rank] for depth, count in enumerate(counts) for rank in range(count)])
        self.nodes, self.max_depth = self.tree.n, window
        self.draws = 0 if coupled else window

    @classmethod
    def of_name(cls, name: str, rule: AcceptanceRule) -> JacobiSource:
        """The window of a name, see `window_of`; coupled if the rule allows it.

        Raises:
            ValueError: not a window's name.
        """
        return cls(*window_of(name), coupled=not rule.needs_fresh_noise)

    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        if self.coupled and rule.needs_fresh_noise:
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
        # Node of the first candidate at each depth, after the root.
        steps = torch.arange(self.window, device=device)
        self.spine = torch.cat([first.new_zeros(1), 1 + steps + (self.width - 1) * steps.clamp_max(self.wide_places)])
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
        # Places with one candidate.
        drawn = scores[:, self.wide_places :].argmax(dim=-1)
        if self.wide_places:
            several = scores[:, : self.wide_places].topk(self.width, dim=-1).indices.flatten(1)
            drawn = torch.cat([several, drawn], dim=1)
        draft = laws.new_zeros(len(root), self.nodes, laws.shape[-1])
        draft[:, self.spine[:-1]] = laws
        return Proposal(self.tree, torch.cat([root[:, None], drawn], dim=1), draft)

    def draft_laws(self, root: Tensor, index: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draft probabilities [B, L, V] of the places, drawn with their noise [B, L, V], and their logarithms: those
        of the round before.

        A place's distribution may depend on the noise of earlier places, not on its own or that of later ones.
        """
        return self.laws, self.laws.log()

    def absorb(self, drafted: Drafted, path: AcceptedPath, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        # The root moves by accepted + 1 places: each place takes the distribution from `accepted` places further on.
        ahead = torch.arange(1, self.window + 1, device=tokens.device) + path.length[:, None]
        source = self.spine[ahead.clamp_max(self.window)]
        rows = torch.arange(len(source), device=source.device)[:, None]
        self.laws = drafted.target[rows, source]
