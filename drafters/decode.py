"""The loops: plain autoregressive decoding, and rounds of draft, verify, commit.

Random numbers come from one generator per image and in an order that nothing else has a say in, so an image does not
depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.accounting import add_accepted, add_passes
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.draft import StaticPlan, draft_dynamic, draft_static
from fastgen.drafters.drafter import Drafter, DraftState
from fastgen.drafters.law import TokenLaw, gumbel_noise
from fastgen.drafters.targets.base import Prefix, Target, TargetPass
from fastgen.drafters.tree import DynamicShape, Tree
from fastgen.drafters.verify import Decisions, Drafted, Noise, Walk, draw, greedy, walk

__all__ = ["Decoded", "decode_plain", "decode_speculative"]

OnToken = Callable[[int], None]


@dataclass
class Decoded:
    """Tokens and how they came about.

    Attributes:
        tokens: [B, N].
        target_passes: of the batch.
        accepted: accepted lengths of all rounds of all images, the bonus not counted.
        counts: what the rule counted ("stolen", "relaxed" …), [B] each.
    """

    tokens: Tensor
    target_passes: int
    accepted: list[int] = field(default_factory=list)
    counts: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def decode_plain(
    target: Target,
    prefix: Prefix,
    law: TokenLaw,
    generators: Sequence[torch.Generator],
    on_token: OnToken | None = None,
) -> Decoded:
    """One token after the other.

    Args:
        target: the model.
        prefix: the prompts of B images.
        law: the sampler's settings.
        generators: one per image; each step takes V numbers of each (none at temperature 0).
        on_token: called after each token with its index.
    """
    cache = target.new_cache(prefix, 1)
    hidden = target.prefill(prefix, cache).hidden[:, -1:]
    device, batch = hidden.device, prefix.images
    depth = torch.zeros(1, 1, dtype=torch.int64, device=device)
    alone = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    tokens = torch.empty(batch, target.num_tokens, dtype=torch.int64, device=device)
    for i in range(target.num_tokens):
        if i:
            hidden = target.verify(tokens[:, i - 1 : i], depth, alone, cache, prefix).hidden
            cache.advance(1, 1)
        index = torch.full((batch, 1), i, device=device)
        p = target.token_law(target.head(hidden), prefix, law, index)[:, 0]
        tokens[:, i] = _sample(p, law, generators)
        if on_token is not None:
            on_token(i)
    return Decoded(tokens, target.num_tokens)


def _sample(p: Tensor, law: TokenLaw, generators: Sequence[torch.Generator]) -> Tensor:
    """A token [B] of laws [B, V]."""
    if law.temperature == 0:
        return p.argmax(dim=-1)
    return draw(p, gumbel_noise(generators, p.shape[-1], p.device))


@torch.no_grad()
def decode_speculative(
    target: Target,
    drafter: Drafter,
    tree: Tree | DynamicShape,
    rule: AcceptanceRule,
    prefix: Prefix,
    law: TokenLaw,
    generators: Sequence[torch.Generator],
    sampled: bool = True,
    on_token: OnToken | None = None,
) -> Decoded:
    """Rounds of drafting a tree, one target pass over it, and committing the accepted path and one token more.

    Args:
        target: the model.
        drafter: made for it.
        tree: static topology, or the size of a dynamic one.
        rule: what is accepted.
        prefix: the prompts of B images.
        law: the sampler's settings.
        generators: one per image.
        sampled: children are drawn without replacement from the drafter's law; else they are its most likely tokens
            (always so in a dynamic tree and at temperature 0).
        on_token: called after each round with the index of the last token that all images have.

    Raises:
        ValueError: the drafter does not fit, or a sampled tree is asked for at temperature 0.
    """
    run = _Rounds(target, drafter, tree, rule, prefix, law, generators, sampled)
    return run.decode(on_token)


class _Rounds:
    """State of one batch."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        tree: Tree | DynamicShape,
        rule: AcceptanceRule,
        prefix: Prefix,
        law: TokenLaw,
        generators: Sequence[torch.Generator],
        sampled: bool,
    ) -> None:
        drafter.check(target)
        dynamic = isinstance(tree, DynamicShape)
        if sampled and (law.temperature == 0 or dynamic):
            kind = "a dynamic tree" if dynamic else "temperature 0"
            raise ValueError(f"tree: {kind} takes the most likely tokens; sampled=True is not possible")
        self.target, self.drafter, self.rule, self.prefix, self.law = target, drafter, rule, prefix, law
        self.generators, self.sampled = list(generators), sampled
        device = prefix.embeds.device
        if isinstance(tree, DynamicShape):
            self.shape, self.plan = tree, None
            self.nodes, self.max_depth, grown = tree.nodes + 1, tree.depth, (tree.depth - 1) * tree.top_k
            self.inner = 0
        else:
            self.plan = StaticPlan(tree.to(device))
            self.nodes, self.max_depth, grown = tree.n, tree.max_depth, self.plan.grown
            self.inner = grown + 1
        if drafter.max_depth is not None and self.max_depth > drafter.max_depth:
            raise ValueError(f"tree: {self.max_depth} levels, this drafter has {drafter.max_depth}")
        batch = prefix.images
        self.path = self.max_depth + 1
        self.cache = target.new_cache(prefix, self.nodes + self.path)
        self.tokens = torch.zeros(batch, target.num_tokens + self.path, dtype=torch.int64, device=device)
        self.count = torch.ones(batch, dtype=torch.int64, device=device)
        self.spent = torch.zeros(batch, device=device)
        self.counts: dict[str, Tensor] = {}
        self.lengths: list[Tensor] = []
        first = target.prefill(prefix, self.cache, drafter.taps)
        p = target.token_law(target.head(first.hidden[:, -1:]), prefix, law, torch.zeros_like(self.count)[:, None])
        self.tokens[:, 0] = _sample(p[:, 0], law, self.generators)
        room = grown + self.path
        self.state: DraftState = drafter.start(target, prefix, drafter.features(first), self.tokens[:, 0], room)
        add_passes("drafter")

    def decode(self, on_token: OnToken | None) -> Decoded:
        rounds = 0
        least = -(-(self.target.num_tokens - 1) // self.path)
        while True:
            # The device is asked only once the images may be finished.
            if rounds >= least or on_token is not None:
                done = int(self.count.min())
                if on_token is not None:
                    on_token(min(done, self.target.num_tokens) - 1)
                if done >= self.target.num_tokens:
                    break
            self.round()
            rounds += 1
        lengths = torch.stack(self.lengths).flatten().tolist() if self.lengths else []
        accepted = [length for length in lengths if length >= 0]
        add_accepted(accepted)
        return Decoded(self.tokens[:, : self.target.num_tokens], rounds + 1, accepted, self.counts)

    def round(self) -> None:
        """Draft, verify, commit: no decision of it is taken on the host."""
        remaining = self.target.num_tokens - self.count
        drafted, noise, output = self._draft_and_verify()
        if self.law.temperature == 0:
            decisions: Decisions = greedy(drafted)
        else:
            decisions = self.rule.verify(drafted, noise, self.spent)
        way = walk(drafted, decisions, noise, remaining)
        self._commit(drafted, way, output, remaining)

    def _draft_and_verify(self) -> tuple[Drafted, Noise, TargetPass]:
        target, law = self.target, self.law
        index = self.count - 1
        root = self.tokens.gather(1, index[:, None])[:, 0]
        noise, gumbel = self._noise()
        if self.plan is not None:
            tree = self.plan.tree
            tokens, q = draft_static(self.drafter, self.state, self.plan, root, law, index, gumbel)
            draft = q if self.sampled else None
            add_passes("drafter", len(self.plan.levels) - 1)
        else:
            tree, tokens = draft_dynamic(self.drafter, self.state, self.shape, root, law, index)
            draft = None
            add_passes("drafter", self.shape.depth - 1)
        output = target.verify(tokens, tree.depth, tree.mask, self.cache, self.prefix, self.drafter.taps)
        following = index[:, None] + tree.depth + 1
        p = target.token_law(target.head(output.hidden), self.prefix, law, following)
        hidden = None
        if self.rule.needs_hidden:
            hidden = target.guided(target.redundancy(output.hidden), self.prefix, law)
        return Drafted(tree, tokens, p, draft, hidden), noise, output

    def _noise(self) -> tuple[Noise, Tensor | None]:
        """Random numbers of a round: coins, noise of the tokens that are drawn, noise of the draft."""
        if self.law.temperature == 0:
            empty = torch.empty(len(self.count), 0, device=self.count.device)
            return Noise(empty, empty), None
        vocabulary = self.target.vocab_size
        drawn = self.path + (self.inner if self.sampled else 0)
        device = self.count.device
        rows = [torch.rand(self.nodes, generator=g, dtype=torch.float64, device=g.device) for g in self.generators]
        coins = torch.stack([row.to(device) for row in rows])
        gumbel = gumbel_noise(self.generators, drawn * vocabulary, device).unflatten(1, (drawn, vocabulary))
        return Noise(coins, gumbel[:, : self.path]), gumbel[:, self.path :] if self.sampled else None

    def _commit(self, drafted: Drafted, way: Walk, output: TargetPass, remaining: Tensor) -> None:
        active = remaining > 0
        kept = torch.where(active, way.length + 1, 0)
        tokens = torch.cat([drafted.tokens.gather(1, way.nodes[:, 1:]), way.bonus[:, None]], dim=1)
        tokens = tokens.scatter(1, way.length[:, None], way.bonus[:, None])
        places = self.count[:, None] + torch.arange(self.path, device=tokens.device)
        # What is written behind the bonus is overwritten by the next round, or lies behind the picture.
        self.tokens.scatter_(1, places, tokens)
        self.count = self.count + kept
        nodes, rows = self._rows(way.nodes), self._rows(kept)
        self.cache.commit(nodes, rows)
        features = self.drafter.features(output)
        features = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[-1]))
        self.drafter.absorb(self.state, tokens, features, kept)
        add_passes("drafter")
        self.lengths.append(torch.where(active, way.length, -1))
        for name, value in way.counts.items():
            value = value * active
            self.counts[name] = self.counts[name] + value if name in self.counts else value
        if "stolen" in way.counts:
            self.spent = self.counts["stolen"].float()

    def _rows(self, values: Tensor) -> Tensor:
        return torch.cat([values, values]) if self.prefix.guided else values
