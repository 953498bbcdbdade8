"""A second-order Markov target and drafter over a few tokens: every law is known, thousands of images at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from fastgen.drafters.tree import Tree
from fastgen.drafters.verify import Decisions, Drafted, Noise, walk

Verify = Callable[[Drafted, Noise], Decisions]


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(2.0**-54)
    return -(-uniform.log()).log()


@dataclass
class Toy:
    """p and q [V, V, V]: law of the next token after (the one before the last, the last).

    `features` [V, F]: hidden state of a node by its token.
    """

    p: Tensor
    q: Tensor
    features: Tensor | None = None

    @classmethod
    def random(cls, vocabulary: int, seed: int, sharpness: float = 1.5, zeros: int = 0) -> Toy:
        """p and q differ; with `zeros`, p puts no mass on that many tokens of each context, as top-k does."""
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary,) * 3
        logits = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
        near = logits + torch.randn(shape, generator=generator, dtype=torch.float64)
        if zeros:
            cut = logits.topk(vocabulary - zeros, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < cut, -torch.inf)
        return cls(logits.softmax(-1), near.softmax(-1))

    @classmethod
    def twins(cls, classes: int, seed: int) -> Toy:
        """Tokens 2 c and 2 c + 1 mean the same: what follows depends on c alone, and so do the hidden states."""
        toy = cls.random(2 * classes, seed, sharpness=0.7)
        same = torch.arange(2 * classes) // 2 * 2
        toy.p = toy.p[same][:, same]
        toy.features = torch.eye(classes)[same // 2] + 0.001
        return toy

    @property
    def vocabulary(self) -> int:
        return self.p.shape[-1]

    def law_of_three(self, start: tuple[int, int]) -> Tensor:
        """The exact joint law [V, V, V] of the first three tokens."""
        a, b = start
        first = self.p[a, b]
        second = self.p[b]
        return first[:, None, None] * second[:, :, None] * self.p

    def draft(self, tree: Tree, context: Tensor, sampled: bool, generator: torch.Generator) -> Drafted:
        """A tree for each context [B, 2]; children by Gumbel-top-k, or the most likely ones."""
        batch, n = len(context), tree.n
        tokens = torch.zeros(batch, n, dtype=torch.int64)
        before = torch.zeros(batch, n, dtype=torch.int64)
        tokens[:, 0], before[:, 0] = context[:, 1], context[:, 0]
        q = torch.zeros(batch, n, self.vocabulary, dtype=torch.float64)
        for node in range(n):
            children = [child for child in tree.children[0, node].tolist() if child >= 0]
            q[:, node] = self.q[before[:, node], tokens[:, node]]
            if not children:
                continue
            scores = q[:, node].log()
            if sampled:
                scores = scores + gumbel(tuple(scores.shape), generator)
            chosen = scores.topk(len(children), dim=-1).indices
            for slot, child in enumerate(children):
                tokens[:, child], before[:, child] = chosen[:, slot], tokens[:, node]
        p = self.p[before, tokens]
        hidden = None if self.features is None else self.features[tokens]
        return Drafted(tree, tokens, p.float(), q.float() if sampled else None, hidden)

    def noise(self, batch: int, tree: Tree, generator: torch.Generator) -> Noise:
        coins = torch.rand((batch, tree.n), generator=generator)
        return Noise(coins, gumbel((batch, tree.max_depth + 1, self.vocabulary), generator).float())

    def first_three(
        self, tree: Tree, sampled: bool, verify: Verify, batch: int, seed: int, start: tuple[int, int] = (0, 1)
    ) -> tuple[Tensor, float]:
        """First three tokens [B, 3] of `batch` speculative images, and the mean accepted length (bonus counted)."""
        generator = torch.Generator().manual_seed(seed)
        emitted = torch.zeros(batch, 3 + tree.max_depth + 1, dtype=torch.int64)
        count = torch.zeros(batch, dtype=torch.int64)
        context = torch.tensor(start).expand(batch, 2).clone()
        lengths = []
        for _ in range(3):
            remaining = (3 - count).clamp_min(0)
            drafted = self.draft(tree, context, sampled, generator)
            noise = self.noise(batch, tree, generator)
            way = walk(drafted, verify(drafted, noise), noise, torch.full_like(remaining, tree.max_depth + 1))
            lengths.append(way.length[count == 0].double() + 1)
            new = torch.cat([drafted.tokens.gather(1, way.nodes[:, 1:]), way.bonus[:, None]], dim=1)
            # Path tokens, then the bonus right behind them.
            new.scatter_(1, way.length[:, None], way.bonus[:, None])
            places = torch.arange(new.shape[1])
            fresh = (places <= way.length[:, None]) & (count < 3)[:, None]
            target = (count[:, None] + places).clamp_max(emitted.shape[1] - 1)
            keep = emitted.gather(1, target)
            emitted.scatter_(1, target, torch.where(fresh, new, keep))
            count = count + torch.where(count < 3, way.length + 1, 0)
            last = emitted.gather(1, (count[:, None] - 1))[:, 0]
            previous = torch.where(count > 1, emitted.gather(1, (count[:, None] - 2).clamp_min(0))[:, 0], start[1])
            context = torch.stack([previous, last], dim=1)
        return emitted[:, :3], float(torch.cat(lengths).mean())


def chi_square(tokens: Tensor, law: Tensor) -> float:
    """p-value of tokens [B, 3] against their joint law; rare cells are pooled."""
    vocabulary = law.shape[-1]
    cells = (tokens[:, 0] * vocabulary + tokens[:, 1]) * vocabulary + tokens[:, 2]
    counts = torch.bincount(cells, minlength=vocabulary**3).double()
    expected = law.flatten() * len(tokens)
    rare = expected < 8
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was emitted"
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = wanted > 0
    return float(stats.chisquare(seen[keep], wanted[keep] * seen.sum() / wanted.sum()).pvalue)
