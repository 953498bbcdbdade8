"""JanusImagePipeline: the stock model behind a diffusers interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from long_tail import long_tail
from micro_models import PROMPTS
from tiny_pipelines import loaded
from transformers import AutoTokenizer, JanusForConditionalGeneration

from fastgen.drafters.law import TokenLaw, token_logits
from fastgen.models.janus_prompts import format_prompt
from fastgen.pipelines import sampling
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.sampling import GuidedGumbelSampler


@pytest.fixture(scope="module")
def pipe(micro_janus: Path) -> JanusImagePipeline:
    return loaded(JanusImagePipeline, micro_janus)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stock_inputs(pipe: JanusImagePipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    texts = [text + "<begin_of_image>" for text in prompts]
    return pipe.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:4]], ids=["one", "padded batch"])
@pytest.mark.parametrize("guidance", [2.0, 6.0])
def test_greedy_tokens_equal_stock_generate(pipe: JanusImagePipeline, prompts: list[str], guidance: float) -> None:
    stock = pipe.model.generate(
        **stock_inputs(pipe, prompts), generation_mode="image", do_sample=False, guidance_scale=guidance
    )
    ours = pipe(prompts, guidance_scale=guidance, temperature=0.0)
    assert torch.equal(ours.tokens, stock)
    pixels = pipe.model.decode_image_tokens(stock[:1])[0]
    expected = ((pixels + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    assert np.array_equal(np.asarray(ours.images[0]), expected)


def test_first_and_later_tokens_follow_the_stock_distribution(pipe: JanusImagePipeline) -> None:
    """Through the whole pipeline: 600 images of one prompt, first token against its exact law, at level 1e-6."""
    from scipy import stats

    n, law = 600, TokenLaw(3.0, 1.0, top_k=12)
    seen: list[torch.Tensor] = []
    original = GuidedGumbelSampler.__call__

    def spy(self: GuidedGumbelSampler, ids: Any, scores: torch.Tensor) -> Any:
        seen.append(scores)
        return original(self, ids, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedGumbelSampler, "__call__", spy)
        output = pipe(
            ["a red circle"] * n,
            guidance_scale=3.0,
            top_k=12,
            generator=seeded(*range(n)),
            output_type="tokens",
            batch_invariant=False,
        )
    cond, uncond = seen[0].chunk(2)
    expected = token_logits(cond[:1], uncond[:1], law).double().softmax(-1)[0].numpy()
    counts = np.bincount(output.tokens[:, 0].numpy(), minlength=len(expected))
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] / expected.sum() * n).pvalue > 1e-6
    flat = np.full(int(kept.sum()), n / kept.sum())
    assert stats.chisquare(counts[kept], flat).pvalue < 1e-6  # a uniform law would have been noticed
    # Later tokens: each row's own law; the log-likelihood must be what its entropy says.
    laws = [token_logits(*scores.chunk(2), law).double().log_softmax(-1) for scores in seen[1:]]
    surprise = torch.stack([-p.gather(-1, output.tokens[:, i + 1 :][:, :1])[:, 0] for i, p in enumerate(laws)], 1)
    entropy = torch.stack([-(p.exp() * p.nan_to_num(neginf=0.0)).sum(-1) for p in laws], 1)
    excess = (surprise - entropy).flatten()
    assert abs(excess.mean() / (excess.std() / excess.numel() ** 0.5)) < 5


@pytest.mark.parametrize("options", long_tail([{}, {"top_k": 9}, {"top_p": 0.8}], fast=({"top_p": 0.8},)), ids=str)
def test_batch_composition_does_not_change_an_image(pipe: JanusImagePipeline, options: dict[str, Any]) -> None:
    alone = [pipe(p, generator=seeded(i), guidance_scale=3.0, **options) for i, p in enumerate(PROMPTS)]
    for size in (2, 3, 5, 8):
        for start in range(0, len(PROMPTS), size):
            batch = range(start, min(start + size, len(PROMPTS)))
            output = pipe(
                [PROMPTS[i] for i in batch],
                generator=seeded(*batch),
                guidance_scale=3.0,
                batch_invariant=True,
                **options,
            )
            for row, i in enumerate(batch):
                assert torch.equal(output.tokens[row], alone[i].tokens[0])
                assert np.array_equal(np.asarray(output.images[row]), np.asarray(alone[i].images[0]))
    assert len({output.tokens.numpy().tobytes() for output in alone}) == len(PROMPTS)


@pytest.mark.parametrize("options", long_tail([{}, {"top_k": 9}, {"top_p": 0.8}], fast=({"top_k": 9},)), ids=str)
def test_close_decisions_are_made_again_alone(
    pipe: JanusImagePipeline, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding made large: batched scores are moved by up to its bound, single ones are not."""
    monkeypatch.setattr(sampling, "ROUNDING", 0.002)
    base = sampling.mix

    def rounded(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
        logits = base(cond, uncond, law)
        if len(cond) == 1:
            return logits
        bound = GuidedGumbelSampler(law, [])._rounding(cond, uncond)
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(int(cond.abs().sum() * 1e3) % 2**31))
        return logits + (noise * 2 - 1) * bound

    monkeypatch.setattr(sampling, "mix", rounded)
    n = 24
    prompts = [PROMPTS[i % 8] for i in range(n)]
    call = {"guidance_scale": 3.0, "output_type": "tokens", "batch_invariant": True, **options}
    alone = torch.cat([pipe(p, generator=seeded(i), **call).tokens for i, p in enumerate(prompts)])
    batch = pipe(prompts, generator=seeded(*range(n)), **call)
    assert torch.equal(batch.tokens, alone)
    loose = pipe(prompts, generator=seeded(*range(n)), **{**call, "batch_invariant": False}).tokens
    assert not torch.equal(loose, alone)  # the disturbance is large enough to matter
    assert 1 < batch.stats.passes["target"] // pipe.num_image_tokens <= n  # not all of them were made again


def test_rounding_bound_holds_for_the_real_scores(pipe: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a padded batch of 8 and of single prompts differ by a small part of what the margin allows."""
    recorded: list[torch.Tensor] = []
    original = sampling.mix
    monkeypatch.setattr(sampling, "mix", lambda *a: recorded.append(original(*a)) or recorded[-1])
    call = {"guidance_scale": 3.0, "temperature": 0.0, "output_type": "tokens", "batch_invariant": False}
    pipe(PROMPTS, **call)
    batch, recorded[:] = torch.stack(recorded, 1), []
    bound = 3 * sampling.ROUNDING * batch.abs().max()
    for i, prompt in enumerate(PROMPTS):
        pipe(prompt, **call)
        single, recorded[:] = torch.stack(recorded, 1), []
        assert (single[0] - batch[i]).abs().max() < bound / 4


def test_generators(pipe: JanusImagePipeline) -> None:
    call = {"output_type": "tokens", "return_dict": True}
    one = pipe("a ring", generator=torch.Generator().manual_seed(3), **call).tokens
    assert torch.equal(one, pipe("a ring", generator=seeded(3), **call).tokens)
    assert not torch.equal(one, pipe("a ring", generator=seeded(4), **call).tokens)
    several = pipe("a ring", num_images_per_prompt=3, generator=torch.Generator().manual_seed(3), **call).tokens
    again = pipe("a ring", num_images_per_prompt=3, generator=torch.Generator().manual_seed(3), **call).tokens
    assert torch.equal(several, again) and len({row.numpy().tobytes() for row in several}) == 3
    fewer = pipe("a ring", num_images_per_prompt=2, generator=torch.Generator().manual_seed(3), **call).tokens
    assert torch.equal(fewer, several[:2])
    torch.manual_seed(0)
    first = pipe("a ring", **call).tokens
    assert not torch.equal(first, pipe("a ring", **call).tokens)
    torch.manual_seed(0)
    assert torch.equal(first, pipe("a ring", **call).tokens)
    state = torch.get_rng_state()
    pipe("a ring", generator=seeded(0), **call)
    assert torch.equal(state, torch.get_rng_state())  # the global state is left alone


def test_output_types_order_and_callback(pipe: JanusImagePipeline) -> None:
    steps: list[int] = []
    output = pipe(
        PROMPTS[:2],
        num_images_per_prompt=2,
        generator=seeded(0, 1, 2, 3),
        batch_invariant=True,
        output_type="pt",
        callback_on_step_end=lambda p, i, t, kwargs: steps.append(i),
    )
    assert steps == list(range(pipe.num_image_tokens))
    assert output.images.shape == (4, 3, 16, 16) and output.images.min() >= 0 and output.images.max() <= 1
    second = pipe(PROMPTS[0], generator=seeded(1), output_type="np")
    assert second.images.shape == (1, 16, 16, 3)
    assert np.array_equal(second.images[0], output.images[1].permute(1, 2, 0).numpy())
    (pictures,) = pipe(PROMPTS[1], generator=seeded(2), return_dict=False)
    assert pictures[0].size == (16, 16)
    assert np.array_equal(np.asarray(pictures[0]), (output.images[2] * 255).round().byte().permute(1, 2, 0).numpy())
    assert output.stats.passes["target"] >= 16 and {"tokens", "decode"} <= set(output.stats.seconds)


def test_half_precision_runs_image_by_image(micro_janus: Path) -> None:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.bfloat16)
    steps: list[int] = []
    output = pipe(
        PROMPTS[:3],
        generator=seeded(0, 1, 2),
        batch_invariant=True,
        output_type="tokens",
        callback_on_step_end=lambda p, i, t, kwargs: steps.append(i),
    )
    assert torch.equal(output.tokens[2], pipe(PROMPTS[2], generator=seeded(2), output_type="tokens").tokens[0])
    assert output.stats.paths["janus batch"] == {"one image at a time": "batch_invariant with torch.bfloat16"}
    assert steps == sorted(steps) and steps[-1] == pipe.num_image_tokens - 1


def test_logits_that_are_not_numbers(pipe: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    head = pipe.model.model.generation_head
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: forward(hidden) * float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        pipe("a ring", generator=seeded(0))


def test_saves_a_plain_transformers_folder(pipe: JanusImagePipeline, tmp_path: Path) -> None:
    pipe._processor_files["processor_config.json"] = '{"kept": true}'
    pipe.save_pretrained(tmp_path / "copy")
    pipe._processor_files.clear()
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= names
    assert "model_index.json" not in names
    stock = JanusForConditionalGeneration.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), pipe.model.parameters(), strict=True))
    again = JanusImagePipeline(stock.eval(), AutoTokenizer.from_pretrained(tmp_path / "copy"))
    call = {"output_type": "tokens", "guidance_scale": 3.0}
    assert torch.equal(
        again("a ring", generator=seeded(1), **call).tokens, pipe("a ring", generator=seeded(1), **call).tokens
    )


def test_chat_template_is_used(pipe: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates for a list of parts (Janus-Pro) and for a string; the text reaches the model once in either form."""
    parts = "{% for m in messages %}U: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %} A:"
    plain = "{% for m in messages %}U: {{ m['content'] }}{% endfor %} A:"
    for template in (parts, plain):
        monkeypatch.setattr(pipe.tokenizer, "chat_template", template)
        assert format_prompt(pipe.model, pipe.tokenizer, "a ring") == "U: a ring A:<begin_of_image>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": ["a", " "]}, "empty"),
        ({"prompt": 3}, "needs a string"),
        ({"prompt": ["a", None]}, "needs a string"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": "a", "output_type": "latent"}, "output_type"),
        ({"prompt": "a", "generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a <begin_of_image> b"}, "special token"),
    ],
)
def test_bad_input(pipe: JanusImagePipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**arguments)
