"""Heads that correct a Jacobi window: what they may read, and that pictures keep the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads, read_round
from fastgen.drafters.heads_source import HeadsSource, window_source
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import load_heads
from fastgen.drafters.sources import DraftSource, JacobiSource, TreeSource
from fastgen.drafters.targets import Prefix, Target
from fastgen.drafters.targets.janus import JanusTarget
from fastgen.drafters.tree import named_tree
from fastgen.drafters.verify import AcceptedPath, Drafted, Noise
from fastgen.errors import NotFiniteError
from fastgen.pipelines.janus import JanusImagePipeline

WINDOW = 5


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def awake(target: Target, strength: float = 1.0, **config: Any) -> WindowHeads:
    """Heads with random weights, so that their draft is far from the window's own predictions."""
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


class Judge(Exact):
    """The exact rule, which keeps what every round judged and by which coins; it may accept a factor more often."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.rounds: list[tuple[Drafted, Noise, Tensor, AcceptedPath]] = []

    def walk(self, drafted: Drafted, noise: Noise, spent: Tensor, remaining: Tensor) -> AcceptedPath:
        coins = (noise.coins / self.factor).clamp_max(1 - 1e-9)
        path = super().walk(drafted, replace(noise, coins=coins), spent, remaining)
        self.rounds.append((drafted, noise, remaining, path))
        return path


@dataclass
class Replay:
    """Every decision of a `Judge` once more, in float64 and by the definition of the exact rule.

    Attributes:
        wrong: decisions that are others.
        seen: how many of them acceptances that are 1 % too high or too low would change, on average.
    """

    wrong: int = 0
    seen: float = 0.0

    def follow(self, drafted: Drafted, noise: Noise, remaining: Tensor, accepted: AcceptedPath) -> None:
        assert drafted.draft is not None
        for row in (remaining > 0).nonzero()[:, 0].tolist():
            path, length = accepted.nodes[row].tolist(), int(accepted.length[row])
            for depth in range(min(length + 1, int(remaining[row]) - 1)):
                node = path[depth]
                taken = path[depth + 1] if depth < length else -1
                children = [child for child in drafted.tree.children[0, node].tolist() if child >= 0]
                p, q = (law[row, node].double() for law in (drafted.target, drafted.draft))
                judged = self._judge(drafted.tokens[row], children, p, q, noise.coins[row])
                self.wrong += judged not in (taken, None)

    def _judge(self, tokens: Tensor, children: list[int], p: Tensor, q: Tensor, coins: Tensor) -> int | None:
        """The accepted child, -1 for none, None where rounding decides."""
        for child in children:
            token, coin = int(tokens[child]), float(coins[child])
            chance = float(p[token] / q[token])
            self.seen += 0.01 * chance * (chance < 0.99)
            if abs(coin - chance) < 1e-4 * chance:
                return None
            if coin < chance:
                return child
            p = (p - q).clamp_min(0)
            q = q.index_fill(0, torch.tensor(token), 0.0)
            p, q = p / p.sum(), q / q.sum()
        return -1


def draw(
    target: Target, source: DraftSource, rule: AcceptanceRule, law: TokenLaw, count: int, seed: int = 0
) -> Decoded:
    """Pictures of one prompt."""
    seeds = range(seed, seed + count)
    return decode_speculative(target, source, rule, same_prompt(target, count, law.guided), law, seeded(*seeds))


@torch.no_grad()
def law_of_pictures(target: Target, law: TokenLaw) -> Tensor:
    """Probability of every picture, in lexical order."""
    pictures = torch.tensor(list(product(range(target.vocab_size), repeat=target.num_tokens)))
    return laws_of(target, pictures, law).double().gather(-1, pictures[..., None])[..., 0].prod(dim=1)


@torch.no_grad()
def laws_of(target: Target, pictures: Tensor, law: TokenLaw) -> Tensor:
    """The probabilities [B, N, V] of every token of finished pictures, from one pass."""
    prefix = same_prompt(target, len(pictures), law.guided)
    length = prefix.mask.shape[1]
    output, _ = target.read(prefix, pictures, target.new_cache(prefix, 1))
    index = torch.arange(target.num_tokens).expand(len(pictures), -1)
    return target.token_law(target.head(output.hidden[:, length - 1 : -1]), prefix, law, index)


def p_value(tokens: Tensor, law: Tensor, vocabulary: int) -> float:
    """Chi-square of drawn pictures against the distribution of pictures; rare ones share a cell."""
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

    def draft_laws(self, root: Tensor, index: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        super().draft_laws(root, index, noise)
        return super().draft_laws(self.before[:, 0], index, noise)


LAWS = {"plain": TokenLaw(1.0), "guided": TokenLaw(3.0, 0.8), "top-k": TokenLaw(3.0, top_k=3)}


@pytest.mark.parametrize("size", [(3,), (3, 2, 1)], ids=["one", "two at the first place"])
@pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "drawn again"])
@pytest.mark.parametrize("law", long_tail(LAWS, fast=("guided",)))
def test_pictures_have_the_targets_distribution(
    janus: JanusImagePipeline, law: str, coupled: bool, size: tuple[int, ...]
) -> None:
    """All 64 pictures of 3 tokens against their probabilities."""
    target = FewTokens(janus, 3)
    source = HeadsSource(awake(target), *size, coupled=coupled)
    tokens = draw(target, source, Exact(), LAWS[law], 4000).tokens
    assert p_value(tokens, law_of_pictures(target, LAWS[law]), 4) > 1e-5


def test_the_test_detects_heads_that_read_the_noise_of_their_place(janus: JanusImagePipeline) -> None:
    target = FewTokens(janus, 3)
    tokens = draw(target, Leaking(awake(target), 3), Exact(), LAWS["plain"], 4000).tokens
    assert p_value(tokens, law_of_pictures(target, LAWS["plain"]), 4) < 1e-9


def sources_of(target: Target) -> dict[str, DraftSource]:
    heads = awake(target, 0.1)
    torch.manual_seed(3)
    drafter = EagleDrafter.for_target(target, heads=2).eval().requires_grad_(False)
    return {
        "tree": TreeSource(drafter, named_tree("2-2-1"), sampled=True),
        "window": JacobiSource(WINDOW),
        "window drawn again": JacobiSource(WINDOW, coupled=False),
        "wide window": JacobiSource(WINDOW, width=2),
        "partly wide window": JacobiSource(WINDOW, width=3, wide_places=2),
        "heads": HeadsSource(heads, WINDOW),
        "wide heads": HeadsSource(heads, WINDOW, width=2),
        "partly wide heads": HeadsSource(heads, WINDOW, width=2, wide_places=2),
    }


@pytest.mark.parametrize(
    "name",
    [
        "tree",
        "window",
        "window drawn again",
        "wide window",
        "partly wide window",
        "heads",
        "wide heads",
        "partly wide heads",
    ],
)
def test_every_decision_is_that_of_the_exact_rule_and_one_percent_is_seen(
    janus: JanusImagePipeline, name: str
) -> None:
    """Coins and probabilities are known, so each decision of 300 pictures is checked exactly.
    A change of 1 % in the acceptances flips a decision where the coin lies between the two thresholds. How many that
    are is Poisson with a mean of `seen`: above 8, none are found once in 3,000 changes. For a drafter's
    tree, whose children are drawn without replacement, the mean is 14: none are found once in a million changes.

    The probabilities are those of the finished picture."""
    target = FewTokens(janus, 16)
    for factor in (1.0, 1.01, 0.99):
        judge, replay = Judge(factor), Replay()
        tokens = draw(target, sources_of(target)[name], judge, LAWS["plain"], 300).tokens
        for judged in judge.rounds:
            replay.follow(*judged)
        assert replay.seen > 8
        assert (replay.wrong == 0) == (factor == 1.0)
    laws, images, unfinished = laws_of(target, tokens, LAWS["plain"]), torch.arange(len(tokens)), torch.tensor([])
    for drafted, _, remaining, path in judge.rounds:
        if len(remaining) < len(images):  # those that are finished have left the batch
            images = images[unfinished]
        unfinished = remaining > path.length + 1
        depth = torch.arange(path.nodes.shape[1])
        place = target.num_tokens - remaining[:, None] + depth
        read = (depth <= path.length[:, None]) & (place < target.num_tokens)
        rows, places = torch.arange(len(images))[:, None], place.clamp_max(target.num_tokens - 1)
        said, wanted = drafted.target[rows, path.nodes], laws[images[:, None], places]
        assert torch.allclose(said[read], wanted[read], atol=1e-4)


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
    """Also where two candidates a place are drafted, or of the first place alone."""
    greedy = TokenLaw(3.0, 0.0)
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:3], True)
    plain = decode_plain(target, prefix, greedy, seeded(0, 1, 2))
    for size in ((1,), (2,), (2, 1)):
        source = HeadsSource(awake(target, taps=taps), window, *size)
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
            known[row, int(index[row]) + 1 :] += 1  # tokens after the root must not be read
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
    loaded = load_heads(tmp_path)
    assert loaded is not None and load_heads(tmp_path / "heads") is None
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
    sources = [window_source("heads-4", Exact(), each) for each in (heads, loaded)]
    results = [decode_speculative(target, each, Exact(), prefix, TokenLaw(3.0), seeded(0, 1)) for each in sources]
    assert torch.equal(results[0].tokens, results[1].tokens)


def test_heads_for_longer_windows_start_as_the_shorter_ones(target: Target) -> None:
    heads = awake(target, taps=(1,))
    longer = heads.lengthened(WINDOW + 3)
    assert longer.config.window == WINDOW + 3 and heads.config.window == WINDOW
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
    same = [HeadsSource(each, WINDOW) for each in (heads, longer)]
    results = [decode_speculative(target, each, Exact(), prefix, TokenLaw(3.0), seeded(0, 1)) for each in same]
    assert torch.equal(results[0].tokens, results[1].tokens) and results[0].accepted == results[1].accepted
    greedy = TokenLaw(3.0, 0.0)
    plain = decode_plain(target, prefix, greedy, seeded(0, 1))
    drawn = decode_speculative(target, HeadsSource(longer, WINDOW + 3), Exact(), prefix, greedy, seeded(0, 1))
    assert torch.equal(drawn.tokens, plain.tokens)
    for name in ("place", "fresh"):
        rows = getattr(longer, name).weight
        assert torch.equal(rows[WINDOW:], getattr(heads, name).weight[-1:].expand(4, -1))
    with pytest.raises(ValueError, match="window"):
        heads.lengthened(WINDOW - 1)


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
