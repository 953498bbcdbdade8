"""LlamaGen: rotary table, the whole forward against cached passes, and both converters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_drafter import OracleDrafter
from tiny_tokens import llamagen

from fastgen.drafters.acceptance import Exact
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.sources import JacobiSource, TreeSource
from fastgen.drafters.targets.llamagen import LlamaGenTarget
from fastgen.drafters.tree import chain, named_tree
from fastgen.models.llamagen import PRESETS, LlamaGenTransformer, convert_llamagen, convert_vq, rotary_table

PROMPTS = ["a red circle", "two blue squares and one green star", "a ring"]


def micro_transformer(**config: Any) -> LlamaGenTransformer:
    torch.manual_seed(0)
    return LlamaGenTransformer(
        **{
            "vocab_size": 40,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "grid": 4,
            "caption_dim": 24,
            "caption_tokens": 12,
            "multiple_of": 16,
            **config,
        }
    ).eval()


@pytest.fixture(scope="module")
def target() -> LlamaGenTarget:
    found = llamagen()
    assert isinstance(found, LlamaGenTarget)
    return found


def test_rotary_factors_by_row_and_column() -> None:
    """Condition slots are zero, not identity; then feature pairs of the first half turn by row, of the second by
    column; places behind the picture repeat the last."""
    table = rotary_table(grid=3, head_dim=8, base=100.0, condition=2, spare=2)
    assert table.shape == (2 + 9 + 2, 4, 2)
    assert not table[:2].any()
    frequencies = torch.tensor([1.0, 100.0**-0.5])
    for row in range(3):
        for column in range(3):
            angles = torch.cat([row * frequencies, column * frequencies])
            place = table[2 + 3 * row + column]
            assert torch.allclose(place[:, 0], angles.cos()) and torch.allclose(place[:, 1], angles.sin())
    assert torch.equal(table[11], table[10]) and torch.equal(table[12], table[10])


@torch.no_grad()
def test_cached_passes_equal_the_whole_forward(target: LlamaGenTarget) -> None:
    """Both rows of guidance, captions of unequal length, teacher forcing against one token after the other."""
    prefix = target.prefix(PROMPTS, True)
    tokens = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(0))
    both = torch.cat([tokens, tokens])
    whole = target.transformer(prefix.embeds, both[:, :-1], prefix.mask)
    cache = target.new_cache(prefix, 1)
    hidden = target.prefill(prefix, cache).hidden[:, -1:]
    for i in range(16):
        assert torch.allclose(target.head(hidden)[:, 0], whole[:, i], atol=1e-4), i
        one = torch.ones(1, 1, 1, dtype=torch.bool)
        hidden = target.verify(tokens[:, i : i + 1], torch.zeros(1, 1, dtype=torch.int64), one, cache, prefix).hidden
        cache.advance(1, 1)


@torch.no_grad()
def test_captions_are_padded_on_the_left(target: LlamaGenTarget) -> None:
    prefix = target.prefix(PROMPTS, True)
    lengths = prefix.mask.sum(dim=1)
    assert lengths[0] < lengths[1] and torch.equal(lengths[:3], lengths[3:])
    for row in range(6):
        assert prefix.mask[row].tolist() == [False] * (12 - int(lengths[row])) + [True] * int(lengths[row])
    assert prefix.offset.tolist() == [12] * 6
    alone = target.prefix(PROMPTS[:1], False)
    assert torch.allclose(alone.embeds[0], prefix.embeds[0], atol=1e-5)
    assert torch.allclose(prefix.embeds[3], target.transformer.embed_caption(None)[0])


@pytest.mark.parametrize("tree", [chain(3), named_tree("3-4-2"), chain(20)], ids=["chain", "bushy", "long"])
def test_greedy_trees_equal_the_plain_loop(target: LlamaGenTarget, tree: Any) -> None:
    """The 2-D table holds in trees too, beyond the last token as well."""
    law = TokenLaw(3.0, 0.0)
    with torch.no_grad():
        prefix = target.prefix(PROMPTS, True)
    generators = [torch.Generator() for _ in PROMPTS]
    plain = decode_plain(target, prefix, law, generators)
    for source in (TreeSource(OracleDrafter(1.0), tree, sampled=False), JacobiSource(4)):
        result = decode_speculative(target, source, Exact(), prefix, law, generators)
        assert torch.equal(result.tokens, plain.tokens)
        assert result.target_passes < 16
    assert target.pixels(plain.tokens).shape == (3, 8, 8, 3)


def published_names(model: LlamaGenTransformer) -> dict[str, torch.Tensor]:
    """The state dict as the published checkpoints name it."""
    names = {"o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3"}
    names |= {"mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    tops = {
        "uncond_embedding": "cls_embedding.uncond_embedding",
        "caption_fc1.weight": "cls_embedding.cap_proj.fc1.weight",
        "caption_fc2.weight": "cls_embedding.cap_proj.fc2.weight",
        "class_embedding.weight": "cls_embedding.embedding_table.weight",
    }
    weights = {}
    state = model.state_dict()
    for name, value in state.items():
        if name.startswith("layers.") and ".q_proj" in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            weights[name.replace("q_proj", "attention.wqkv")] = torch.cat(parts)
        elif name.startswith("layers.") and "_proj" in name and ".mlp." not in name and ".o_proj" not in name:
            continue
        elif name.startswith("layers."):
            layer, part = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:-1])
            weights[f"{layer}.{names[part]}.weight"] = value
        else:
            weights[tops.get(name, name)] = value
    return weights


@pytest.mark.parametrize("config", [{"dim": 128, "n_kv_heads": 1}, {"dim": 128, "num_classes": 10}])
def test_a_published_checkpoint_converts(config: dict[str, Any]) -> None:
    model = micro_transformer(**config)
    weights = published_names(model)
    converted = convert_llamagen({**weights, "freqs_cis": torch.zeros(1)}, grid=4)
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in converted.state_dict().items())
    assert converted.config.n_heads == 2 and converted.condition_tokens == model.condition_tokens
    with pytest.raises(ValueError, match="not those of a LlamaGen"):
        convert_llamagen({"x": torch.zeros(1)})


def test_a_published_vq_converts() -> None:
    """Every name of the Janus class is reached from the name that the published file has."""
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    vq = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=40,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 2],
            num_res_blocks=1,
        )
    )
    published = {}
    for name, value in vq.state_dict().items():
        name = name.replace(".mid.block_1.", ".mid.0.").replace(".mid.attn_1.", ".mid.1.")
        name = name.replace(".mid.block_2.", ".mid.2.").replace(".block.", ".res.")
        name = name.replace("encoder.down.", "encoder.conv_blocks.").replace("decoder.up.", "decoder.conv_blocks.")
        published[name] = value
    assert any("conv_blocks" in name and ".res." in name for name in published)
    published["quantize.codebook_used"] = torch.zeros(3)
    converted = convert_vq(published)
    assert converted.keys() == vq.state_dict().keys()
    vq.load_state_dict(converted)


def test_published_sizes() -> None:
    """Parameters of the published models (LlamaGen, table of models: 111 M, 343 M, 775 M, 1.4 B)."""
    with torch.device("meta"):
        for name, millions in (("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411)):
            model = LlamaGenTransformer.from_preset(name, num_classes=1000)
            count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            assert abs(count / millions - 1) < 0.02, (name, count)
    assert set(PRESETS) >= {"1B", "3B", "7B"}
    with pytest.raises(ValueError, match="name"):
        LlamaGenTransformer.from_preset("tiny")
    with pytest.raises(ValueError, match="divide"):
        micro_transformer(n_heads=3)


def test_a_saved_transformer_is_the_same(tmp_path: Any) -> None:
    model = micro_transformer()
    model.save_pretrained(tmp_path)
    again = LlamaGenTransformer.from_pretrained(tmp_path)
    tokens = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = model.embed_caption(None, 2)
        assert torch.equal(model(condition, tokens), again(again.embed_caption(None, 2), tokens))


def test_captions_that_would_be_cut_are_refused(target: LlamaGenTarget) -> None:
    frame = target.lengths(["red"])[0] - 1
    longest = " ".join(["red"] * (12 - frame))
    assert target.prefix([longest], False).mask.all()
    with pytest.raises(ValueError, match="prompt: .* has 13 tokens with its frame, the model takes at most 12"):
        target.prefix(["red", longest + " red"], True)


def test_logits_that_are_no_numbers_are_an_error(target: LlamaGenTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    real = target.head
    monkeypatch.setattr(target, "head", lambda hidden: real(hidden).index_fill(-1, torch.tensor([3]), torch.nan))
    with torch.no_grad():
        prefix = target.prefix(PROMPTS, True)
    for law in (TokenLaw(3.0, 1.0, top_k=4), TokenLaw(3.0, 0.0)):
        with pytest.raises(ValueError, match="model's logits"):
            decode_speculative(target, JacobiSource(4), Exact(), prefix, law, [torch.Generator() for _ in PROMPTS])
