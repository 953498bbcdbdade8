"""The decoding loops: plain autoregressive, and rounds of draft, verify and commit.

Each image has its own generator, used in a fixed order, so an image does not depend on the rest of the batch. Random
numbers are drawn outside the step; the step takes no decision on the host and can be compiled as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.accounting import add_accepted, add_passes
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.compiled import compiled, many_graphs
from fastgen.drafters.law import TokenLaw, gumbel_noise
from fastgen.drafters.sources import DraftSource, Proposal
from fastgen.drafters.targets import Prefix, Target, TargetPass
from fastgen.drafters.verify import AcceptedPath, Drafted, Noise, verify_and_walk

__all__ = ["Decoded", "PlainLoop", "Rounds", "decode_plain", "decode_speculative"]

OnToken = Callable[[int], None]
#: Compiled steps pad prompts to a multiple of this many tokens; otherwise every length would be compiled separately.
PROMPT_MULTIPLE = 16
#: Names the logits in the message about values that are not finite.
MODEL = "the model's logits"


@dataclass
class Decoded:
    """Tokens and statistics.

    Attributes:
        tokens: [B, N].
        target_passes: of the batch.
        rounds: [B], rounds of each image after its first token; in the plain loop, tokens.
        accepted: accepted lengths of all rounds of all images, without the bonus and without tokens that the grammar
            forces (ends of lines), which every draft gets right.
        counts: [B] each: what the rule counted ("stolen", "relaxed" …), and "forced", accepted tokens that the grammar
            forces, if there are any.
    """

    tokens: Tensor
    target_passes: int
    rounds: Tensor
    accepted: list[int] = field(default_factory=list)
    counts: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def decode_plain(
    target: Target,
    prefix: Prefix,
    law: TokenLaw,
    generators: Sequence[torch.Generator],
    on_token: OnToken | None = None,
    compile: bool = False,
) -> Decoded:
    """One token after the other.

    Args:
        target: the model.
        prefix: the prompts of B images.
        law: sampling settings.
        generators: one per image; each step draws V numbers from each (none at temperature 0).
        on_token: called after each token with its index.
        compile: compile the step, see `fastgen.drafters.compiled`.

    Raises:
        NotFiniteError: logits were NaN or infinite; raised at the end.
    """
    prefix = prefix.watched()
    if compile:
        prefix = prefix.padded(PROMPT_MULTIPLE)
    with many_graphs(compile):
        return PlainLoop(target, prefix, law, list(generators), compile).decode(on_token)


class PlainLoop:
    """State of one batch."""

    def __init__(
        self, target: Target, prefix: Prefix, law: TokenLaw, generators: list[torch.Generator], compile: bool
    ) -> None:
        self.target, self.prefix, self.law, self.generators = target, prefix, law, generators
        self.advance = compiled(PlainLoop.step) if compile else PlainLoop.step
        device = prefix.mask.device
        self.cache = target.new_cache(prefix, 1)
        self.depth = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.alone = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        self.index = torch.zeros(prefix.images, 1, dtype=torch.int64, device=device)

    def decode(self, on_token: OnToken | None) -> Decoded:
        output, tokens = self.target.prefill(self.prefix, self.cache), list[Tensor]()
        token = self._choose(output.hidden[:, -1:], self._noise())
        for i in range(self.target.num_tokens):
            if i:
                token = self.advance(self, token, self._noise())
            tokens.append(token)
            if on_token is not None:
                on_token(i)
        self.prefix.check(MODEL)
        add_passes("target", self.target.num_tokens)
        total = self.target.num_tokens
        return Decoded(torch.stack(tokens, dim=1), total, torch.full_like(token, total - 1))

    def step(self, token: Tensor, gumbel: Tensor | None) -> Tensor:
        """The next token [B]."""
        output = self.target.verify(token[:, None], self.depth, self.alone, self.cache, self.prefix)
        self.cache.advance(1, 1)
        self.index = self.index + 1
        return self._choose(output.hidden, gumbel)

    def _choose(self, hidden: Tensor, gumbel: Tensor | None) -> Tensor:
        return self.target.next_token(self.target.head(hidden), self.prefix, self.law, self.index, gumbel)

    def _noise(self) -> Tensor | None:
        return _noise_of_a_token(self.law, self.generators, self.target.vocab_size, self.index.device)


def _noise_of_a_token(
    law: TokenLaw, generators: Sequence[torch.Generator], vocabulary: int, device: torch.device
) -> Tensor | None:
    """Gumbel noise [B, V]; None at temperature 0."""
    return None if law.temperature == 0 else gumbel_noise(generators, vocabulary, device)


@torch.no_grad()
def decode_speculative(
    target: Target,
    source: DraftSource,
    rule: AcceptanceRule,
    prefix: Prefix,
    law: TokenLaw,
    generators: Sequence[torch.Generator],
    on_token: OnToken | None = None,
    compile: bool = False,
) -> Decoded:
    """Rounds of drafting, one target pass over the draft, and committing the accepted path and one more token.

    Args:
        target: the model.
        source: drafts tokens: a drafter with its tree, or a Jacobi window. It serves one batch at a time.
        rule: acceptance rule.
        prefix: the prompts of B images.
        law: sampling settings.
        generators: one per image.
        on_token: called after each round with the index of the last token that all images have.
        compile: compile the round, see `fastgen.drafters.compiled`.

    Raises:
        ValueError: the source cannot draft for this target or these settings, or the rule was made for another model.
        NotFiniteError: logits of the model or the drafter were NaN or infinite; raised at the next synchronisation.
    """
    source.check(target, law, rule)
    rule.check(target)
    rule = rule.to(prefix.mask.device)
    prefix = prefix.watched()
    if compile:
        prefix = prefix.padded(PROMPT_MULTIPLE)
    with many_graphs(compile):
        return Rounds(target, source, rule, prefix, law, list(generators), compile).decode(on_token)


def _sizes(batch: int) -> list[int]:
    """Batch sizes of compiled rounds, largest first: all images, a half and a quarter. Each size is another graph;
    below 4 images a graph costs more time than it saves."""
    return [batch, *(batch >> half for half in (1, 2) if batch >> half >= 4)]


class Rounds:
    """State of one batch."""

    def __init__(
        self,
        target: Target,
        source: DraftSource,
        rule: AcceptanceRule,
        prefix: Prefix,
        law: TokenLaw,
        generators: list[torch.Generator],
        compile: bool = False,
    ) -> None:
        self.target, self.source, self.rule, self.prefix, self.law = target, source, rule, prefix, law
        self.generators = generators
        self.advance = compiled(Rounds.step) if compile else Rounds.step
        device, batch = prefix.embeds.device, prefix.images
        # Indices of the images still being drawn, and the tokens of those that left the batch.
        self.images = torch.arange(batch, device=device)
        self.finished = torch.zeros(batch, target.num_tokens, dtype=torch.int64, device=device)
        self.sizes = _sizes(batch) if compile else None
        self.narrows = True
        self.path = source.max_depth + 1
        self.cache = target.new_cache(prefix, source.nodes + self.path)
        self.tokens = torch.zeros(batch, target.num_tokens + self.path, dtype=torch.int64, device=device)
        self.count = torch.ones(batch, dtype=torch.int64, device=device)
        self.spent = torch.zeros(batch, device=device)
        #: Of each round: which images it drew, their accepted lengths (-1 where finished) and the rule's counts.
        self.rounds: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        output = target.prefill(prefix, self.cache, source.taps)
        gumbel = _noise_of_a_token(law, generators, target.vocab_size, device)
        logits, start = target.head(output.hidden[:, -1:]), torch.zeros_like(self.count)[:, None]
        self.tokens[:, 0] = target.next_token(logits, prefix, law, start, gumbel)
        source.start(target, prefix, law, output, self.tokens[:, 0], generators)

    def decode(self, on_token: OnToken | None) -> Decoded:
        total, rounds = self.target.num_tokens, 0
        least = -(-(total - 1) // self.path)
        while True:
            # No host synchronisation before the images can be finished.
            if rounds >= least or on_token is not None:
                counts = self.count.tolist()
                done = min(counts)
                self.prefix.check(MODEL)
                self.source.check_finite()
                if on_token is not None:
                    on_token(min(done, total) - 1)
                if done >= total:
                    break
                if self.narrows:
                    self._drop_finished(counts)
            self.round()
            rounds += 1
        lengths, counted = self._collected()
        accepted = [length for length in lengths.flatten().tolist() if length >= 0]
        add_accepted(accepted)
        add_passes("target", rounds + 1)
        each, first = self.source.passes
        if each or first:
            add_passes("drafter", first + rounds * each)
        self.finished[self.images] = self.tokens[:, :total]
        return Decoded(self.finished, rounds + 1, (lengths >= 0).sum(dim=0), accepted, counted)

    def round(self) -> None:
        """Draft, verify, commit, and record the result."""
        self.rounds.append((self.images, *self.advance(self, *self.noise())))

    def _collected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Accepted lengths [rounds, B], -1 where an image was finished, and counts [B] by name."""
        lengths = torch.full((len(self.rounds), len(self.finished)), -1, device=self.count.device)
        counted: dict[str, Tensor] = {}
        for row, (images, length, counts) in zip(lengths, self.rounds, strict=True):
            row[images] = length
            for name, value in counts.items():
                counted.setdefault(name, value.new_zeros(len(self.finished))).index_add_(0, images, value)
        return lengths, counted

    def _drop_finished(self, counts: list[int]) -> None:
        """Remove finished images once they are a quarter of the batch; in compiled rounds, once the others fit into a
        smaller graph. Every image has its own generator, so the others change by rounding only."""
        here, total = len(counts), self.target.num_tokens
        drawn = sum(count < total for count in counts)
        if self.sizes is None:
            size = drawn if 4 * drawn <= 3 * here else here
        else:
            size = min(size for size in self.sizes if size >= drawn)
        if size == here:
            return
        # All unfinished images, filled up to the size with finished ones.
        chosen = sorted(sorted(range(here), key=lambda number: counts[number] >= total)[:size])
        stay = torch.tensor(chosen, device=self.count.device)
        if not self.source.narrow(stay, self.prefix):
            self.narrows = False
            return
        self.finished[self.images] = self.tokens[:, : self.target.num_tokens]
        self.cache.narrow(self.prefix.both(stay))
        self.prefix = self.prefix.narrowed(stay)
        self.images, self.tokens, self.count, self.spent = (
            values[stay] for values in (self.images, self.tokens, self.count, self.spent)
        )
        self.generators = [self.generators[number] for number in chosen]

    def step(self, noise: Noise, gumbel: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """A round without host decisions: draft, verify, commit.

        Returns:
            accepted lengths [B] without forced tokens (-1 where an image was finished), and counts.
        """
        remaining = self.target.num_tokens - self.count
        index = self.count - 1
        root = self.tokens.gather(1, index[:, None])[:, 0]
        proposal = self.source.propose(root, index, gumbel)
        drafted, output = self._verify(proposal, index)
        if self.law.temperature == 0:
            path = verify_and_walk(drafted, None, remaining)
        else:
            path = self.rule.walk(drafted, noise, self.spent, remaining)
        self._commit(drafted, path, output, remaining)
        active, length, counts = remaining > 0, path.length, path.counts
        if "stolen" in counts:
            self.spent = self.spent + counts["stolen"] * active
        if self.target.has_grammar:
            forced = (drafted.tokens.gather(1, path.nodes[:, 1:]) >= self.target.num_codes).cumsum(dim=1)
            forced = torch.nn.functional.pad(forced, (1, 0)).gather(1, length[:, None])[:, 0]
            length, counts = length - forced, counts | {"forced": forced}
        return torch.where(active, length, -1), {name: value * active for name, value in counts.items()}

    def _verify(self, proposal: Proposal, index: Tensor) -> tuple[Drafted, TargetPass]:
        target, tree = self.target, proposal.tree
        output = target.verify(proposal.tokens, tree.depth, tree.mask, self.cache, self.prefix, self.source.taps)
        following = index[:, None] + tree.depth + 1
        hidden = None
        if self.rule.reads_hidden(tree):
            logits, feature = target.head_and_redundancy(output.hidden)
            hidden = target.guided(feature, self.prefix, self.law)
        else:
            logits = target.head(output.hidden)
        p = target.token_law(logits, self.prefix, self.law, following)
        return Drafted(tree, proposal.tokens, p, proposal.draft, hidden), output

    def noise(self) -> tuple[Noise, Tensor | None]:
        """Random numbers of a round: coins, noise for drawn tokens, noise for the draft."""
        device, draws = self.count.device, self.source.draws
        if self.law.temperature == 0:
            empty = torch.empty(len(self.count), 0, device=device)
            return Noise(empty, empty), None
        vocabulary = self.target.vocab_size
        rows = [
            torch.rand(self.source.nodes, generator=g, dtype=torch.float64, device=g.device) for g in self.generators
        ]
        coins = torch.stack([row.to(device) for row in rows])
        gumbel = gumbel_noise(self.generators, (1 + draws) * vocabulary, device).unflatten(1, (1 + draws, vocabulary))
        return Noise(coins, gumbel[:, :1]), gumbel[:, 1:] if draws else None

    def _commit(self, drafted: Drafted, path: AcceptedPath, output: TargetPass, remaining: Tensor) -> None:
        kept = torch.where(remaining > 0, path.length + 1, 0)
        tokens = torch.cat([drafted.tokens.gather(1, path.nodes[:, 1:]), path.bonus[:, None]], dim=1)
        tokens = tokens.scatter(1, path.length[:, None], path.bonus[:, None])
        places = self.count[:, None] + torch.arange(self.path, device=tokens.device)
        # Tokens after the bonus are overwritten by the next round, or lie past the end of the picture.
        self.tokens.scatter_(1, places, tokens)
        self.count = self.count + kept
        self.cache.commit(self.target.both_rows(path.nodes, self.prefix), self.target.both_rows(kept, self.prefix))
        self.source.absorb(drafted, path, tokens, kept, output)
