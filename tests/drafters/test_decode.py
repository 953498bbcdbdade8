"""Speculative decoding of a real (micro) Janus: caches, trees, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from long_tail import long_tail
from micro_models import JANUS_TOKENS, PROMPTS
from oracle_drafter import OracleDrafter
from torch import Tensor

from fastgen.accounting import account
from fastgen.drafters.acceptance import Block, CoolSD, Exact
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.drafter import Drafter
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import HeadsSource
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule, load_drafter
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.sources import DraftSource, JacobiSource, TreeSource
from fastgen.drafters.targets import Prefix, Target, target_of
from fastgen.drafters.tree import DynamicShape, Tree, chain, named_tree
from fastgen.pipelines.janus import JanusImagePipeline

GREEDY = TokenLaw(3.0, 0.0)
TREES: dict[str, Tree | DynamicShape] = {
    "chain": chain(3),
    "bushy": named_tree("3-4-2"),
    "dynamic": DynamicShape(nodes=8, depth=3, top_k=3),
    "deeper than the image": chain(20),
}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def prefix_of(target: Target, count: int, guided: bool = True) -> Prefix:
    with torch.no_grad():
        return target.prefix(PROMPTS[:count], guided)


@pytest.mark.parametrize("count", [1, 4], ids=["one", "padded batch"])
@pytest.mark.parametrize("law", [TokenLaw(3.0), TokenLaw(3.0, 0.7, top_k=9, top_p=0.9), GREEDY, TokenLaw(1.0)])
def test_our_plain_loop_equals_stock_generate(
    janus: JanusImagePipeline, target: Target, count: int, law: TokenLaw
) -> None:
    """Same sampler, same generators, float32."""
    stock = janus(
        PROMPTS[:count],
        guidance_scale=law.guidance_scale,
        temperature=law.temperature,
        top_k=law.top_k,
        top_p=law.top_p,
        generator=seeded(*range(count)),
        output_type="tokens",
        batch_invariant=False,
    )
    ours = decode_plain(target, prefix_of(target, count, law.guided), law, seeded(*range(count)))
    assert torch.equal(ours.tokens, stock.tokens)
    assert ours.target_passes == JANUS_TOKENS


@torch.no_grad()
def test_a_tree_pass_equals_its_paths(target: Target) -> None:
    """Every node of a tree against its path alone, both rows, behind committed tokens."""
    tree = named_tree("3-4-2")
    prefix = prefix_of(target, 3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (3, tree.n), generator=generator)
    cache = target.new_cache(prefix, 30)
    target.prefill(prefix, cache)
    whole = target.verify(tokens, tree.depth, tree.mask, cache, prefix).hidden
    for node in range(tree.n):
        path = torch.where(tree.mask[0, node])[0]
        line = Tree.of_parents(torch.arange(-1, len(path) - 1).clamp_min(0)[None], len(path), 1)
        alone = target.verify(tokens[:, path], line.depth, line.mask, cache, prefix).hidden[:, -1]
        assert torch.allclose(whole[:, node], alone, atol=1e-5)


@torch.no_grad()
def test_the_cache_after_random_paths_equals_a_fresh_one(target: Target) -> None:
    """Rounds that keep paths of other lengths in every image; then keys and values against one pass over all."""
    tree, batch = named_tree("3-4-2"), 3
    prefix = prefix_of(target, batch)
    generator = torch.Generator().manual_seed(1)
    cache = target.new_cache(prefix, tree.n + 4)
    target.prefill(prefix, cache)
    kept: list[list[int]] = [[] for _ in range(batch)]
    capacity = cache.capacity
    for _ in range(4):
        tokens = torch.randint(target.vocab_size, (batch, tree.n), generator=generator)
        target.verify(tokens, tree.depth, tree.mask, cache, prefix)
        ends = torch.randint(tree.n, (batch,), generator=generator).tolist()
        paths = [torch.where(tree.mask[0, end])[0].tolist() for end in ends]
        nodes = torch.tensor([path + [path[-1]] * (4 - len(path)) for path in paths])
        for row, path in enumerate(paths):
            kept[row] += tokens[row, path].tolist()
        count = torch.tensor([len(path) for path in paths])
        cache.commit(torch.cat([nodes, nodes]), torch.cat([count, count]))
    assert cache.capacity == capacity and len({len(tokens) for tokens in kept}) > 1
    for row, line in enumerate(kept):
        fresh = target.new_cache(prefix, 30)
        target.prefill(prefix, fresh)
        n = len(line)
        chain_mask = torch.ones(1, n, n, dtype=torch.bool).tril()
        target.verify(torch.tensor([line] * batch), torch.arange(n)[None], chain_mask, fresh, prefix)
        length = prefix.mask.shape[1] + n
        for half in (row, row + batch):
            assert int(cache.lengths[half]) == length
            assert torch.allclose(cache.store[:, :, half, :length], fresh.store[:, :, half, :length], atol=1e-5)


@pytest.mark.parametrize(
    "drafter", long_tail(["eagle-1", "eagle-3", "medusa", "oracle", "noisy oracle"], fast=("eagle-3", "medusa"))
)
@pytest.mark.parametrize("tree", TREES)
def test_greedy_output_equals_the_plain_loop(target: Target, tree: str, drafter: str) -> None:
    """Token for token, in a batch whose images accept other lengths."""
    torch.manual_seed(0)
    drafters: dict[str, Drafter] = {
        "eagle-1": EagleDrafter.for_target(target, variant=1, heads=2),
        "eagle-3": EagleDrafter.for_target(target, variant=3, heads=2),
        "medusa": MedusaDrafter.for_target(target, depth=20),
        "oracle": OracleDrafter(),
        "noisy oracle": OracleDrafter(noise=1.5),
    }
    prefix = prefix_of(target, 4)
    plain = decode_plain(target, prefix, GREEDY, seeded(*range(4)))
    source = TreeSource(drafters[drafter], TREES[tree], sampled=False)
    result = decode_speculative(target, source, Exact(), prefix, GREEDY, seeded(*range(4)))
    assert torch.equal(result.tokens, plain.tokens)
    if drafter == "oracle":
        depth = {"dynamic": 3, "deeper than the image": 20}.get(tree, 3)
        assert result.target_passes == 1 + -(-(JANUS_TOKENS - 1) // (depth + 1))
        assert sum(result.accepted) / len(result.accepted) > 2
    elif drafter == "noisy oracle":
        assert 0 < sum(result.accepted) / len(result.accepted) < 3


def test_an_oracle_chain_is_always_accepted(target: Target) -> None:
    """q is p: strict rejection sampling accepts everything, and the picture ends in the middle of a path."""
    source = TreeSource(OracleDrafter(), chain(5), sampled=True)
    result = decode_speculative(target, source, Exact(), prefix_of(target, 2), TokenLaw(3.0), seeded(0, 1))
    assert result.tokens.shape == (2, JANUS_TOKENS)
    assert result.target_passes == 1 + -(-(JANUS_TOKENS - 1) // 6)


def make_source(name: str) -> DraftSource:
    if name.startswith("jacobi"):
        return JacobiSource(5, width=3 if "wide" in name else 1, coupled="coupled" in name)
    return TreeSource(OracleDrafter(1.0), TREES[name], sampled=name != "dynamic")


@pytest.mark.parametrize(
    "name",
    long_tail(["bushy", "dynamic", "jacobi", "jacobi coupled", "jacobi coupled wide"], fast=("bushy", "jacobi")),
)
def test_later_tokens_follow_the_target(target: Target, name: str) -> None:
    """400 pictures through a disturbed drafter: the log-likelihood of all their tokens under the target is what the
    target's entropy says, within five standard errors; a sampler of the draft distribution would be off by more."""
    law, n = TokenLaw(3.0, 0.8), 400
    prefix = prefix_of(target, 1)
    wide = Prefix(prefix.embeds.repeat_interleave(n, 0), prefix.mask.repeat_interleave(n, 0), True)
    result = decode_speculative(target, make_source(name), Exact(), wide, law, seeded(*range(n)))
    assert sum(result.accepted) / len(result.accepted) > 0.25
    with torch.no_grad():
        cache = target.new_cache(wide, 1)
        first = target.prefill(wide, cache).hidden[:, -1:]
        m = JANUS_TOKENS - 1
        causal = torch.ones(1, m, m, dtype=torch.bool).tril()
        rest = target.verify(result.tokens[:, :-1], torch.arange(m)[None], causal, cache, wide).hidden
        index = torch.arange(JANUS_TOKENS).expand(n, -1)
        p = target.token_law(target.head(torch.cat([first, rest], dim=1)), wide, law, index).double()
    surprise = -p.gather(-1, result.tokens[..., None])[..., 0].log()
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    excess = (surprise - entropy).sum(dim=1)
    assert abs(float(excess.mean())) < 5 * float(excess.std()) / n**0.5


@pytest.mark.parametrize("name", ["bushy", "chain", "jacobi", "jacobi coupled", "jacobi wide"])
def test_an_image_does_not_depend_on_the_batch(target: Target, name: str) -> None:
    law = TokenLaw(3.0)
    together = decode_speculative(target, make_source(name), Exact(), prefix_of(target, 3), law, seeded(5, 6, 7))
    for i in range(3):
        with torch.no_grad():
            prefix = target.prefix([PROMPTS[i]], True)
        alone = decode_speculative(target, make_source(name), Exact(), prefix, law, seeded(5 + i))
        assert torch.equal(alone.tokens[0], together.tokens[i])


@pytest.mark.parametrize(
    ("name", "guided"),
    long_tail(
        [(n, g) for n in ("bushy", "dynamic", "jacobi", "jacobi coupled wide", "heads") for g in (True, False)],
        fast=[("bushy", True), ("dynamic", False), ("jacobi", True), ("jacobi coupled wide", True), ("heads", False)],
        unpack=True,
    ),
)
def test_images_that_are_done_leave_the_batch(
    target: Target, name: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes get narrower, and each image is what it is alone, with its own rounds and counts."""
    widths: list[int] = []
    verify = Target.verify

    def seen(self: Target, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append(len(tokens))
        return verify(self, tokens, *args, **kwargs)

    def make() -> DraftSource:
        if name.startswith("jacobi"):
            return JacobiSource(2, width=2 if "wide" in name else 1, coupled="coupled" in name)
        torch.manual_seed(3)
        if name != "heads":
            return TreeSource(EagleDrafter.for_target(target, heads=2).eval(), TREES[name], sampled=name != "dynamic")
        heads = WindowHeads.for_target(target, window=4, width=16, heads=2).eval()
        torch.nn.init.normal_(heads.speak.weight)
        return HeadsSource(heads, 2)

    law, rule = TokenLaw(3.0 if guided else 1.0), CoolSD(delta=1.2)

    def draw(prompts: list[str], first: int) -> Any:
        generators = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
        with torch.no_grad():
            return decode_speculative(target, make(), rule, target.prefix(prompts, guided), law, generators)

    monkeypatch.setattr(Target, "verify", seen)
    together = draw(PROMPTS, 0)
    assert widths[0] == len(PROMPTS) and widths == sorted(widths, reverse=True) and widths[-1] <= 6
    for number, prompt in enumerate(PROMPTS):
        alone = draw([prompt], number)
        assert torch.equal(alone.tokens[0], together.tokens[number])
        assert alone.rounds[0] == together.rounds[number]
        assert float(alone.counts["stolen"][0]) == pytest.approx(float(together.counts["stolen"][number]), rel=1e-4)


def test_the_head_is_computed_once_a_round(target: Target) -> None:
    """Logits and the feature that CASCADE compares come from one pass through the head, as those of each alone."""
    hidden = torch.randn(2, 3, target.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, feature = target.head_and_redundancy(hidden)
        assert torch.equal(logits, target.head(hidden)) and torch.equal(feature, target.redundancy(hidden))
    calls: list[int] = []
    hook = target.model.model.generation_head.proj_out.register_forward_hook(lambda *call: calls.append(1))
    rule = build_rule("cascade", target, breadth=0.5, radius=0.5)
    try:
        result = decode_speculative(
            target, JacobiSource(3, width=2), rule, prefix_of(target, 1), TokenLaw(3.0), seeded(0)
        )
    finally:
        hook.remove()
    assert len(calls) == result.target_passes + 1  # the first token, and the window that starts from its distribution


def test_accounting(target: Target) -> None:
    with account() as stats:
        result = decode_speculative(
            target, make_source("chain"), Exact(), prefix_of(target, 2), TokenLaw(3.0), seeded(0, 1)
        )
    assert sorted(stats.accepted_lengths) == sorted(result.accepted)
    # What an image emits: its first token, and accepted + 1 a round.
    assert sum(result.accepted) + len(result.accepted) + 2 == 2 * JANUS_TOKENS
    assert float(result.counts["stolen"].sum()) == 0
    assert int(result.rounds.sum()) == len(result.accepted) and int(result.rounds.max()) + 1 == result.target_passes
    assert stats.passes == {"target": result.target_passes, "drafter": 1 + 3 * (result.target_passes - 1)}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"law": GREEDY}, "temperature 0"),
        ({"tree": DynamicShape(4, 2, 2)}, "dynamic tree"),
    ],
)
def test_bad_combinations(target: Target, arguments: dict[str, Any], word: str) -> None:
    call: dict[str, Any] = {"law": TokenLaw(3.0), "tree": chain(2), **arguments}
    with pytest.raises(ValueError, match=word):
        source = TreeSource(OracleDrafter(), call["tree"], sampled=True)
        decode_speculative(target, source, Exact(), prefix_of(target, 1), call["law"], seeded(0))


def test_a_tree_deeper_than_the_heads_is_refused(target: Target) -> None:
    source = TreeSource(MedusaDrafter.for_target(target, depth=2), chain(3), sampled=True)
    with pytest.raises(ValueError, match="3 levels, this drafter has 2"):
        decode_speculative(target, source, Exact(), prefix_of(target, 1), TokenLaw(3.0), seeded(0))
    with pytest.raises(ValueError, match="depth"):
        MedusaDrafter.for_target(target, depth=0)


def test_a_drafter_of_another_target_is_refused(target: Target, janus: JanusImagePipeline) -> None:
    drafter = EagleDrafter(hidden_size=64, vocab_size=target.vocab_size, target_layers=2, heads=2)
    with pytest.raises(ValueError, match="hidden_size 64"):
        source = TreeSource(drafter, chain(2), sampled=True)
        decode_speculative(target, source, Exact(), prefix_of(target, 1), TokenLaw(3.0), seeded(0))
    with pytest.raises(ValueError, match="Linear has no adapter"):
        target_of(torch.nn.Linear(1, 1), janus.tokenizer)


@pytest.mark.parametrize("kind", ["eagle-1", "eagle-3", "medusa"])
def test_a_saved_drafter_is_the_same(target: Target, kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    drafter: Any = MedusaDrafter.for_target(target, depth=2)
    if kind.startswith("eagle"):
        drafter = EagleDrafter.for_target(target, variant=int(kind[-1]), heads=2, width=16)
    drafter.save_pretrained(tmp_path)
    loaded = load_drafter(tmp_path)
    assert type(loaded) is type(drafter)
    sources = [TreeSource(each, named_tree("2-2"), sampled=True) for each in (drafter, loaded)]
    prefix, law = prefix_of(target, 2), TokenLaw(3.0)
    results = [decode_speculative(target, each, Exact(), prefix, law, seeded(0, 1)).tokens for each in sources]
    assert torch.equal(*results)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("window", [1, 4, JANUS_TOKENS])
def test_greedy_jacobi_equals_the_plain_loop(target: Target, window: int, width: int) -> None:
    """And takes fewer passes than tokens: guesses settle before they are reached."""
    prefix = prefix_of(target, 3)
    plain = decode_plain(target, prefix, GREEDY, seeded(0, 1, 2))
    result = decode_speculative(target, JacobiSource(window, width), Exact(), prefix, GREEDY, seeded(0, 1, 2))
    assert torch.equal(result.tokens, plain.tokens)
    assert result.target_passes <= JANUS_TOKENS
    for bad in ((0, 1), (3, 0), (3, 2, 4)):
        with pytest.raises(ValueError, match="window|width|wide"):
            JacobiSource(*bad)
    with pytest.raises(ValueError, match="looks ahead"):
        decode_speculative(target, JacobiSource(4), Block(), prefix, TokenLaw(3.0), seeded(0, 1, 2))
    source = JacobiSource(2, width=target.vocab_size + 1)
    with pytest.raises(ValueError, match="candidates of a place"):
        decode_speculative(target, source, Exact(), prefix, GREEDY, seeded(0, 1, 2))
