"""Emu3 and Chameleon: forced tokens, rows of unequal length, and the stock models as judges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from oracle_drafter import OracleDrafter
from tiny_tokens import CODES, SIZE, WORDS, chameleon, emu3, tokenizer
from transformers import LogitsProcessorList

from fastgen.drafters.acceptance import Exact
from fastgen.drafters.cascade import Cascade, CascadeConfig
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.law import TokenLaw, gumbel_noise
from fastgen.drafters.sources import JacobiSource, TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import chain, named_tree
from fastgen.errors import FastgenError, NotFiniteError
from fastgen.pipelines.speculative import SpeculativeImagePipeline

TARGETS = {
    "emu3": emu3,
    "anole": chameleon,
    "lumina": lambda: chameleon(line_end=WORDS.index("<eol>")),
    "swin": lambda: chameleon(swin=True),
}
PROMPTS = ["a red ring", "ring"]


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@torch.no_grad()
def test_our_pass_equals_the_stock_decoder(target: Any) -> None:
    """Hidden states of prompt and picture, padded rows of both kinds."""
    prefix = target.prefix(PROMPTS, True)
    lengths = prefix.mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 1, "rows of unequal length are the point"
    tokens = torch.randint(CODES, (2, target.num_tokens), generator=torch.Generator().manual_seed(0))
    ours, embeds = target.read(prefix, tokens, target.new_cache(prefix, 1))
    for row, length in enumerate(lengths):
        start = prefix.mask.shape[1] - length
        stock = target.decoder(inputs_embeds=embeds[row : row + 1, start:], use_cache=False).last_hidden_state[0]
        assert torch.allclose(ours.hidden[row, start:], stock, atol=1e-4)
    stock_logits = target.model.lm_head(ours.hidden)[..., target.ids]
    assert torch.allclose(target.head(ours.hidden), stock_logits, atol=1e-5)


@torch.no_grad()
def test_a_tree_pass_equals_its_paths(target: Target) -> None:
    tree, prefix = named_tree("3-4-2"), target.prefix(PROMPTS, True)
    tokens = torch.randint(CODES, (2, tree.n), generator=torch.Generator().manual_seed(0))
    cache = target.new_cache(prefix, 30)
    target.prefill(prefix, cache)
    whole = target.verify(tokens, tree.depth, tree.mask, cache, prefix).hidden
    for node in range(tree.n):
        path = torch.where(tree.mask[0, node])[0]
        n = len(path)
        line = torch.ones(1, n, n, dtype=torch.bool).tril()
        alone = target.verify(tokens[:, path], torch.arange(n)[None], line, cache, prefix).hidden[:, -1]
        assert torch.allclose(whole[:, node], alone, atol=1e-4)


@pytest.mark.parametrize("source", ["chain", "bushy", "jacobi"])
def test_greedy_trees_equal_the_plain_loop_and_obey_the_grammar(target: Target, source: str) -> None:
    law = TokenLaw(3.0, 0.0)
    with torch.no_grad():
        prefix = target.prefix(PROMPTS, True)
    plain = decode_plain(target, prefix, law, generators(2))
    forced = target.forced >= 0
    assert (plain.tokens[:, forced] == target.forced[forced]).all() and (plain.tokens[:, ~forced] < CODES).all()
    draft = {
        "chain": lambda: TreeSource(OracleDrafter(2.0), chain(4), sampled=False),
        "bushy": lambda: TreeSource(OracleDrafter(2.0), named_tree("2-3-2"), sampled=False),
        "jacobi": lambda: JacobiSource(4),
    }[source]()
    result = decode_speculative(target, draft, Exact(), prefix, law, generators(2))
    assert torch.equal(result.tokens, plain.tokens)


@pytest.mark.parametrize("rule", [Exact(), Cascade(CascadeConfig(breadth=0.0))], ids=["exact", "cascade"])
def test_sampled_trees_obey_the_grammar(target: Target, rule: Any) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS, True)
    draft = TreeSource(OracleDrafter(1.0), named_tree("2-3-2"), sampled=True)
    result = decode_speculative(target, draft, rule, prefix, TokenLaw(3.0), generators(2))
    forced = target.forced >= 0
    assert (result.tokens[:, forced] == target.forced[forced]).all() and (result.tokens[:, ~forced] < CODES).all()
    # Every token is the first of a picture, the bonus of a round, or accepted; forced ones are counted separately.
    by_grammar = result.counts.get("forced", torch.zeros(2))
    assert (by_grammar <= forced.sum()).all() and bool((by_grammar > 0).any()) == bool(forced.any())
    assert sum(result.accepted) + int(by_grammar.sum()) + len(result.accepted) + 2 == 2 * target.num_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_plain_loop_equals_stock_generate_of_emu3(temperature: float) -> None:
    """Greedy, and sampled with the same noise, with the grammar and guidance of the stock loop."""
    target: Any = emu3()
    height, width = SIZE
    model, ids = target.model, target.ids
    codes, end_of_line = ids[:CODES].tolist(), int(ids[CODES])
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    end = [*target.tokenizer("<boi>3*4<wrapper>", add_special_tokens=False)["input_ids"]]
    prompt = torch.tensor([[2, *target.tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"], *end]])
    blank = torch.tensor([[2, *end]])
    assert prefix.mask.sum(dim=1).tolist() == [prompt.shape[1], blank.shape[1]]
    noise = torch.Generator().manual_seed(0)

    def allowed(batch: int, line: torch.Tensor) -> list[int]:
        return [end_of_line] if (len(line) - prompt.shape[1]) % (width + 1) == width else codes

    def add_noise(line: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if temperature == 0:
            return scores
        scores[:, ids] += gumbel_noise([noise], len(ids), "cpu")
        return scores

    stock = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        negative_prompt_ids=blank,
        negative_prompt_attention_mask=torch.ones_like(blank),
        guidance_scale=2.5,
        prefix_allowed_tokens_fn=allowed,
        logits_processor=LogitsProcessorList([add_noise]),
        do_sample=False,
        max_new_tokens=target.num_tokens,
        min_new_tokens=target.num_tokens,
    )[:, prompt.shape[1] :]
    ours = decode_plain(target, prefix, TokenLaw(2.5, temperature), generators(1))
    assert torch.equal(ids[ours.tokens], stock)
    pixels = target.pixels(ours.tokens)
    padded = torch.cat([stock, stock[:, :3]], dim=1)  # stock decoding cuts three closing tokens
    expected = model.decode_image_tokens(image_tokens=padded, height=height, width=width)
    assert torch.allclose(pixels[0], expected[0].permute(1, 2, 0).add(1).div(2).clamp(0, 1), atol=1e-5)


def test_chameleon_pixels_need_a_decoder() -> None:
    target: Any = chameleon(line_end=WORDS.index("<eol>"))
    tokens = torch.arange(CODES).repeat(2)[: target.num_tokens][None]
    with pytest.raises(ValueError, match="no decoder"):
        target.pixels(tokens)
    target.decode = lambda codes: codes
    assert target.pixels(tokens).shape == (1, 3, 4)
    for model in (target.model, emu3().model):
        with pytest.raises(ValueError, match="size"):
            target_of(model, target.tokenizer, size=(0, 4))
        with pytest.raises(ValueError, match="does not take"):
            target_of(model, target.tokenizer, depth=3)


def test_options_reach_the_model_through_the_pipeline(tmp_path: Path) -> None:
    """Its size and line ends; a saved pipeline keeps them, but for functions."""
    line_end = WORDS.index("<eol>")
    model = chameleon(line_end=line_end).model

    def decode(codes: torch.Tensor) -> torch.Tensor:
        return codes[..., None].expand(-1, -1, -1, 3) / CODES

    options = {"size": [2, 3], "line_end": line_end, "decode": decode}
    pipe = SpeculativeImagePipeline(model, tokenizer(), options=options)
    output = pipe("red ring", output_type="np", generator=torch.Generator().manual_seed(0))
    assert output.tokens.shape == (1, 2 * (3 + 1)) and output.images.shape == (1, 2, 3, 3)
    pipe.save_pretrained(tmp_path)
    again = SpeculativeImagePipeline.from_pretrained(tmp_path)
    assert again.options == {"size": [2, 3], "line_end": line_end}
    drawn = again("red ring", output_type="tokens", generator=torch.Generator().manual_seed(0)).tokens
    assert torch.equal(drawn, output.tokens)
    for wrong in ({"size": 3}, {"size": [0, 3]}, {"size": ["a", 3]}, {"line_end": "x"}, {"decode": 3}, {"depth": 3}):
        with pytest.raises(FastgenError, match="size|line_end|decode|does not take"):
            SpeculativeImagePipeline(model, tokenizer(), options=wrong)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(target: Any, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of the last row, which top-k would leave out without a word."""
    real = target.head

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = real(hidden)
        logits[-1, -1, 3] = value
        return logits

    monkeypatch.setattr(target, "head", spoiled)
    with torch.no_grad():
        prefix = target.prefix(PROMPTS, True)
    for law in (TokenLaw(3.0, 1.0, top_k=4), TokenLaw(3.0, 0.0)):
        with pytest.raises(NotFiniteError, match="model's logits"):
            decode_plain(target, prefix, law, generators(2))
        with pytest.raises(NotFiniteError, match="model's logits"):
            decode_speculative(target, JacobiSource(4), Exact(), prefix, law, generators(2))


def test_prompts_without_room_for_the_picture_are_refused(target: Any) -> None:
    room = 128 - target.num_tokens
    frame = target.lengths(["red"])[0] - 1
    longest = " ".join(["red"] * (room - frame))
    assert target.prefix([longest], False).mask.shape[1] == room
    with pytest.raises(ValueError, match=f"prompt: .* has {room + 1} tokens with its frame, .* at most {room}"):
        target.prefix(["red", longest + " red"], True)


@torch.no_grad()
def test_a_model_with_sequential_offload_draws_the_same_tokens(target: Any) -> None:
    moved = copy.deepcopy(target.model)
    accelerate.cpu_offload(moved, torch.device("cpu"), offload_buffers=False)
    assert moved.lm_head.weight.is_meta
    options = {"line_end": target.line_end} if hasattr(target, "line_end") else {}
    away = target_of(moved, target.tokenizer, size=target.size, **options)
    law, source = TokenLaw(3.0), JacobiSource(4)
    expected, tokens = (
        decode_speculative(one, source, Exact(), one.prefix(PROMPTS, True), law, generators(2)).tokens
        for one in (target, away)
    )
    assert torch.equal(tokens, expected)
    assert torch.equal(away.codebook.nan_to_num(), target.codebook.nan_to_num())
