"""Heads that correct a Jacobi window: what they may read, and that the law of the pictures stays the target's."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from long_tail import long_tail
from micro_models import PROMPTS
from scipy import stats
from torch import Tensor

from fastgen.drafters.acceptance import AcceptanceRule, Block, Exact
from fastgen.drafters.decode import Decoded, decode_plain, decode_speculative
from fastgen.drafters.drafter import describe
from fastgen.drafters.heads import WindowHeads, read_round
from fastgen.drafters.heads_source import HeadsSource, window_source
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import heads_beside
from fastgen.drafters.sources import JacobiSource
from fastgen.drafters.targets import Prefix, Target, TargetPass
from fastgen.drafters.targets.janus import JanusTarget
from fastgen.drafters.verify import Drafted, Noise, Walk, verified
from fastgen.errors import NotFiniteError
from fastgen.pipelines.janus import JanusImagePipeline

WINDOW = 5


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def awake(target: Target, strength: float = 1.0, **config: Any) -> WindowHeads:
    """Heads of random weights, so that what they draft is far from the window's own laws."""
    torch.manual_seed(3)
    heads = WindowHeads.for_target(target, window=WINDOW, width=16, heads=2, **config)
    with torch.no_grad():
        for parameter in heads.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=strength * parameter.shape[1] ** -0.5)
        embeds = target.embed(torch.arange(target.vocab_size))
        heads.tokens.weight.div_(embeds.std())  # the vectors of random models are small
    return heads.eval().requires_grad_(False)


class FewTokens(JanusTarget):
    """The micro Janus with 4 codes, and pictures of a few tokens."""

    def __init__(self, janus: JanusImagePipeline, tokens: int) -> None:
        super().__init__(janus.model.requires_grad_(False), janus.tokenizer)
        self.num_tokens, self.num_codes, self.vocab_size = tokens, 4, 4
        self.forced = self.forced[:tokens]

    def head(self, hidden: Tensor) -> Tensor:
        return 0.5 * super().head(hidden)[..., :4]


def same_prompt(target: Target, count: int, guided: bool) -> Prefix:
    """A batch of one prompt."""
    with torch.no_grad():
        one = target.prefix(PROMPTS[:1], guided)
    return Prefix(one.embeds.repeat_interleave(count, 0), one.mask.repeat_interleave(count, 0), guided)


class Watched(HeadsSource):
    """Keeps what every round drafted, and what came of it."""

    def start(self, *arguments: Any) -> None:  # type: ignore[override]
        self.seen: list[tuple[Tensor, ...]] = []
        super().start(*arguments)

    def absorb(self, drafted: Drafted, way: Walk, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        assert drafted.draft is not None
        places = torch.arange(1, self.window + 1)
        # The last token of a picture ends it, accepted or not.
        judged = (places <= kept[:, None]) & (self.index[:, None] + places < self.target.num_tokens - 1)
        laws = drafted.draft[:, self.spine[:-1]], drafted.target[:, self.spine[:-1]]
        drawn = drafted.tokens[:, self.spine[1:]]
        self.seen.append((drawn, tokens[:, :-1], judged, judged & (places <= way.length[:, None]), *laws))
        super().absorb(drafted, way, tokens, kept, output)

    def acceptance_z(self) -> float:
        """z of how often drafted tokens were accepted, given p and q, where a = p/q < 1. Each counts by 1 / (1 - a),
        which tells best whether acceptances are a factor too high."""
        total = variance = 0.0
        for drawn, _, judged, accepted, q, p in self.seen:
            chance = (p / q).gather(-1, drawn[..., None])[..., 0].double()
            open_ = judged & (chance < 0.985)
            total += float(((accepted.double() - chance) / (1 - chance))[open_].sum())
            variance += float((chance / (1 - chance))[open_].sum())
        return total / variance**0.5

    def drafts_z(self) -> float:
        """z of the drafted tokens' surprise against their law's entropy, over all judged places."""
        total = variance = 0.0
        for drawn, _, judged, _, q, _ in self.seen:
            surprise, entropy, second = moments(q, drawn)
            total += float((surprise - entropy)[judged].sum())
            variance += float((second - entropy**2)[judged].sum())
        return total / variance**0.5

    def tokens_z(self) -> float:
        """The same of the tokens that came, against the target's law."""
        total = variance = 0.0
        for _, came, judged, _, _, p in self.seen:
            surprise, entropy, second = moments(p, came)
            total += float((surprise - entropy)[judged].sum())
            variance += float((second - entropy**2)[judged].sum())
        return total / variance**0.5


def moments(law: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Surprise of tokens, and its mean and mean square under their law."""
    own = -law.double().clamp_min(1e-30).log()
    return own.gather(-1, tokens[..., None])[..., 0], (law * own).sum(dim=-1), (law * own**2).sum(dim=-1)


class TooKind(Exact):
    """Accepts a factor more often."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> Walk:
        return verified(drafted, noise, remaining, torch.full_like(drafted.inner_target()[..., 0], self.factor))


def draw(
    target: Target, source: JacobiSource, rule: AcceptanceRule, law: TokenLaw, count: int, seed: int = 0
) -> Decoded:
    """Pictures of one prompt."""
    seeds = range(seed, seed + count)
    return decode_speculative(target, source, rule, same_prompt(target, count, law.guided), law, seeded(*seeds))


@torch.no_grad()
def law_of_pictures(target: Target, law: TokenLaw) -> Tensor:
    """Probability of every picture, in lexical order."""
    pictures = torch.tensor(list(product(range(target.vocab_size), repeat=target.num_tokens)))
    prefix = same_prompt(target, len(pictures), law.guided)
    length = prefix.mask.shape[1]
    output, _ = target.read(prefix, pictures, target.new_cache(prefix, 1))
    index = torch.arange(target.num_tokens).expand(len(pictures), -1)
    laws = target.token_law(target.head(output.hidden[:, length - 1 : -1]), prefix, law, index).double()
    return laws.gather(-1, pictures[..., None])[..., 0].prod(dim=1)


def p_value(tokens: Tensor, law: Tensor, vocabulary: int) -> float:
    """Chi-square of drawn pictures against the law of all of them; rare ones share a cell."""
    places = vocabulary ** torch.arange(tokens.shape[1]).flip(0)
    seen = torch.bincount((tokens * places).sum(dim=1), minlength=len(law)).double()
    assert not seen[law == 0].any()
    wanted = law / law.sum() * len(tokens)
    often = wanted >= 5
    pairs = [(seen[often], wanted[often])]
    if float(wanted[~often].sum()) >= 1:
        pairs.append((seen[~often].sum()[None], wanted[~often].sum()[None]))
    cells = [torch.cat(part) for part in zip(*pairs, strict=True)]
    return float(stats.chisquare(*(cell.numpy() for cell in cells)).pvalue)


class Leaking(HeadsSource):
    """A mutant: what a place's heads read is that of the next one, with the token that its noise gave."""

    def draft_laws(self, root: Tensor, index: Tensor, noise: Tensor | None) -> Tensor:
        super().draft_laws(root, index, noise)
        return super().draft_laws(self.before[:, 0], index, noise)


LAWS = {"plain": TokenLaw(1.0), "guided": TokenLaw(3.0, 0.8), "top-k": TokenLaw(3.0, top_k=3)}


@pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "drawn again"])
@pytest.mark.parametrize("law", long_tail(LAWS, fast=("guided",)))
def test_pictures_have_the_law_of_the_target(janus: JanusImagePipeline, law: str, coupled: bool) -> None:
    """All 64 pictures of 3 tokens against their probabilities."""
    target = FewTokens(janus, 3)
    source = HeadsSource(awake(target), 3, coupled=coupled)
    tokens = draw(target, source, Exact(), LAWS[law], 4000).tokens
    assert p_value(tokens, law_of_pictures(target, LAWS[law]), 4) > 1e-5


def test_the_test_of_the_law_sees_heads_that_know_the_noise_of_their_place(janus: JanusImagePipeline) -> None:
    target = FewTokens(janus, 3)
    tokens = draw(target, Leaking(awake(target), 3), Exact(), LAWS["plain"], 4000).tokens
    assert p_value(tokens, law_of_pictures(target, LAWS["plain"]), 4) < 1e-9


@pytest.mark.slow
def test_acceptances_drafts_and_tokens_have_their_laws_and_one_percent_is_seen(janus: JanusImagePipeline) -> None:
    """6,000 pictures of 16 tokens. Under the exact rule |z| > 4.5 has probability 7e-6; acceptances that are 1 % too
    high move z by 6.8, which 4.5 misses once in a hundred."""
    target = FewTokens(janus, 16)
    found = []
    for rule in (Exact(), TooKind(1.01)):
        source = Watched(awake(target, 0.1), WINDOW)
        draw(target, source, rule, LAWS["plain"], 6000)
        found.append(source)
    exact, kind = found
    assert abs(exact.acceptance_z()) < 4.5 and abs(exact.drafts_z()) < 4.5 and abs(exact.tokens_z()) < 4.5
    assert kind.acceptance_z() > 4.5


def test_untrained_heads_draw_what_the_window_draws(target: Target) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:3], True)
    heads = WindowHeads.for_target(target, window=WINDOW, width=16, heads=2).eval()
    sources = JacobiSource(WINDOW), HeadsSource(heads, WINDOW)
    results = [decode_speculative(target, each, Exact(), prefix, TokenLaw(3.0), seeded(0, 1, 2)) for each in sources]
    assert torch.equal(results[0].tokens, results[1].tokens) and results[0].accepted == results[1].accepted


@pytest.mark.parametrize("window", [1, 4, WINDOW])
@pytest.mark.parametrize("taps", [(), (1,)])
def test_greedy_pictures_are_those_of_the_plain_loop(target: Target, window: int, taps: tuple[int, ...]) -> None:
    """Also where two candidates a place are drafted."""
    greedy = TokenLaw(3.0, 0.0)
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:3], True)
    plain = decode_plain(target, prefix, greedy, seeded(0, 1, 2))
    for width in (1, 2):
        source = HeadsSource(awake(target, taps=taps), window, width)
        result = decode_speculative(target, source, Exact(), prefix, greedy, seeded(0, 1, 2))
        assert torch.equal(result.tokens, plain.tokens)


def test_a_place_reads_nothing_of_itself_or_later_ones(target: Target) -> None:
    """A window may keep its noise only because of this: what is said of place j does not change with the tokens at
    j and behind, old or new, nor with the states that read them; and it does change with those before."""
    heads, generator = awake(target), torch.Generator().manual_seed(0)
    batch, n, vocabulary = 2, WINDOW + 1, target.vocab_size
    laws = torch.rand(batch, WINDOW, vocabulary, generator=generator).softmax(dim=-1)
    length, index = torch.tensor([0, 2]), torch.tensor([3, 6])

    def tokens(*shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=generator)

    hidden = torch.randn(batch, n, 2 * target.hidden_size, generator=generator)
    then, root, window, picture = tokens(batch, n), tokens(batch), tokens(batch, WINDOW), tokens(batch, 30)
    tables = heads.tables(target)

    def said(hidden: Tensor, then: Tensor, window: Tensor, picture: Tensor) -> Tensor:
        reading = read_round(hidden, then, length, root, window, index, picture, 4, vocabulary)
        return heads(reading, tables, laws)

    before = said(hidden, then, window, picture)
    for place in range(1, WINDOW + 1):
        others = tokens(batch, WINDOW)
        changed = torch.where(torch.arange(1, WINDOW + 1) >= place, (window + 1 + others % 7) % vocabulary, window)
        known = picture.clone()
        states, old = hidden.clone(), then.clone()
        for row in range(batch):
            known[row, int(index[row]) + 1 :] += 1  # what lies behind the root is nobody's business
            # Place 0 of the new window, the root, is node `length` + 1 of the old one.
            states[row, int(length[row]) + 1 + place :] += 1.0
            old[row, int(length[row]) + 1 + place :] = (old[row, int(length[row]) + 1 + place :] + 1) % vocabulary
        after = said(states, old, changed, known % vocabulary)
        assert torch.equal(after[:, :place], before[:, :place])
        if place < WINDOW:
            assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)


def test_a_picture_does_not_depend_on_its_batch(target: Target) -> None:
    heads, law = awake(target), TokenLaw(3.0)
    with torch.no_grad():
        prefixes = [target.prefix(prompts, True) for prompts in (PROMPTS[:3], *([text] for text in PROMPTS[:3]))]
    together = decode_speculative(target, HeadsSource(heads, 4), Exact(), prefixes[0], law, seeded(5, 6, 7))
    for i in range(3):
        alone = decode_speculative(target, HeadsSource(heads, 4), Exact(), prefixes[1 + i], law, seeded(5 + i))
        assert torch.equal(alone.tokens[0], together.tokens[i])


def test_saved_heads_draft_the_same(target: Target, tmp_path: Path) -> None:
    heads = awake(target, taps=(1,))
    heads.save_pretrained(tmp_path / "heads")
    loaded = heads_beside(tmp_path)
    assert loaded is not None and heads_beside(tmp_path / "heads") is None
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
    sources = [window_source("heads-4", Exact(), each) for each in (heads, loaded)]
    results = [decode_speculative(target, each, Exact(), prefix, TokenLaw(3.0), seeded(0, 1)) for each in sources]
    assert torch.equal(results[0].tokens, results[1].tokens)


def test_what_does_not_fit_is_refused(target: Target) -> None:
    heads = awake(target)
    with pytest.raises(ValueError, match="window: 6 is not allowed, these heads correct up to 5"):
        HeadsSource(heads, 6)
    with pytest.raises(ValueError, match="heads-4' needs heads"):
        window_source("heads-4", Exact(), None)
    with pytest.raises(ValueError, match="looks ahead"):
        HeadsSource(heads, 4).check(target, TokenLaw(3.0), Block())
    assert not window_source("heads-4", Block(), heads).coupled
    for name, value in {"hidden_size": 64, "vocab_size": 9, "target_layers": 7, "row_length": 5}.items():
        other = WindowHeads(**{**describe(target), "row_length": 4, "width": 16, name: value})
        with pytest.raises(ValueError, match=f"made for a model of {name} {value}"):
            HeadsSource(other, 4).check(target, TokenLaw(3.0), Exact())
    for bad in ({"window": 0}, {"width": 0}, {"layers": 0}, {"heads": 3}, {"row_length": 0}, {"taps": (9,)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            WindowHeads.for_target(target, **{"width": 16, **bad})


def test_logits_that_are_no_numbers_are_refused(target: Target) -> None:
    heads = awake(target)
    heads.speak.bias[0] = float("nan")
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    with pytest.raises(NotFiniteError, match="the heads' logits"):
        decode_speculative(target, HeadsSource(heads, 4), Exact(), prefix, TokenLaw(3.0), seeded(0))
