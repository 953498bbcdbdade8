"""Each part: what its contract promises, that off is bit for bit what it was, and where it does not apply."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import draw, state
from diffusers import DiffusionPipeline
from stock_families import family

import fastgen
from fastgen.environment import native_bfloat16
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.parts import (
    PARTS,
    Attention,
    BFloat16,
    ChannelsLast,
    ContextParallel,
    DBCache,
    FewerSteps,
    Guidance,
    Kernels,
    Part,
    PromptPadding,
    Quantize,
    QuantizedAttention,
    Solver,
    StepCache,
    TailDrops,
    TextEncoder,
    VaeSlicing,
    VaeTiling,
)

torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
bfloat16 = pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="this CPU does not multiply bfloat16")
cache_dit = pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="needs cache-dit")

#: A family and a part that can be used with it here.
ON: list[Any] = [
    ("sana", ChannelsLast()),
    ("flux", Attention("_native_math")),
    ("z-image", Attention("_native_math")),
    ("z-image", PromptPadding()),
    ("flux", VaeSlicing()),
    ("flux", VaeTiling()),
    ("stable-diffusion", TextEncoder()),
    ("qwen-image", TextEncoder()),
    ("flux", Solver()),
    ("flux", StepCache("taylor-seer", interval=2)),
    ("stable-diffusion", Guidance(0.5)),
    ("flux", FewerSteps(0.5)),
    ("z-image", Solver()),
    *(pytest.param(name, BFloat16(), marks=bfloat16) for name in ("flux", "z-image", "stable-diffusion")),
    *(pytest.param(name, Quantize("int8"), marks=torchao) for name in ("flux", "stable-diffusion")),
    pytest.param("z-image", Quantize("int8-dynamic"), marks=torchao),
    *(pytest.param(name, DBCache(1e9, warmup=1), marks=cache_dit) for name in ("flux", "z-image", "qwen-image")),
]


@pytest.mark.parametrize(("name", "part"), ON)
def test_a_part_keeps_its_contract_and_leaves_nothing(name: str, part: Part) -> None:
    pipe = family(name)
    expected, before = draw(pipe, name), state(pipe)
    with fastgen.accelerated(pipe, plan=[part]) as plan:
        assert plan.loss == part.loss and state(pipe) != before
        drawn, again = draw(pipe, name), draw(pipe, name)
    assert torch.equal(drawn, again), "a second call depends on the first"
    difference = float((drawn - expected).abs().max())
    if part.loss == "exact":
        assert difference <= 1e-3 * max(1.0, float(expected.std()))
    else:  # tiles are larger than a tiny picture
        assert torch.isfinite(drawn).all() and (difference > 0) == (part.name != "vae_tiling")
    assert state(pipe) == before
    assert torch.equal(draw(pipe, name), expected)


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("flux", Kernels(), "Triton kernels need a GPU"),
        ("flux", Attention(), "PyTorch's own attention is the fastest without a GPU"),
        ("flux", Attention("flash"), "flash does not work here: Flash Attention backend"),
        ("flux", QuantizedAttention(), "sage does not work here: Sage Attention backend"),
        ("flux", Attention("_native_cudnn"), "_native_cudnn does not work here"),
        ("stable-diffusion", Attention("_native_math"), "its attention takes no backends"),
        ("stable-diffusion", StepCache(), "its denoiser takes none"),
        ("stable-diffusion", TailDrops(), "its denoiser has no dynamic chunking"),
        ("stable-diffusion", ContextParallel(), "one process only"),
        ("flux", Guidance(), "it is not known how its branches"),
        ("stable-diffusion", PromptPadding(), "its pipeline reads padding"),
        ("stable-diffusion", Solver(), "its scheduler does not take the Euler steps"),
        pytest.param("sdxl", DBCache(), "cache-dit does not know UNet2DConditionModel", marks=cache_dit),
        pytest.param("flux", Quantize("fp8"), "fp8 needs a GPU", marks=torchao),
        pytest.param("flux", Quantize("int4"), "int4 needs a GPU", marks=torchao),
    ],
)
def test_a_part_that_does_not_apply_says_why_and_changes_nothing(name: str, part: Part, reason: str) -> None:
    pipe = family(name)
    before = state(pipe)
    with pytest.raises(FastgenError, match=f"{part.name} cannot be used with this {type(pipe).__name__}: {reason}"):
        fastgen.accelerate(pipe, plan=[part])
    assert state(pipe) == before


class _Stepless(DiffusionPipeline):
    """Its denoiser runs once; it has no encoder of texts and decodes nothing."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    def __call__(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.transformer(latents),)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (ChannelsLast(), "no 2D convolutions"),
        (VaeSlicing(), "it has no VAE with slicing"),
        (VaeTiling(), "it has no VAE with tiling"),
        (TextEncoder(), "it has no text encoder"),
        (FewerSteps(), "its call takes no number of steps"),
    ],
)
def test_a_pipeline_without_what_a_part_changes_stays_and_the_error_says_why(part: Part, reason: str) -> None:
    pipe, latents = _Stepless(torch.nn.Linear(4, 4)), torch.randn(2, 4)
    expected, before = pipe(latents)[0], state(pipe)
    with pytest.raises(FastgenError, match=f"{part.name} cannot be used with this _Stepless: {reason}"):
        fastgen.accelerate(pipe, plan=[part])
    assert state(pipe) == before and torch.equal(pipe(latents)[0], expected)


def test_kernels_draw_the_picture_up_to_rounding_and_leave_nothing() -> None:
    """By the part itself: as a rule it refuses a CPU, where the references run."""
    pipe = family("flux")
    expected, before = draw(pipe, "flux"), state(pipe)
    undo = Kernels().enable(pipe)
    assert state(pipe) != before
    drawn = draw(pipe, "flux")
    undo()
    assert float((drawn - expected).abs().max()) <= 1e-3 * max(1.0, float(expected.std()))
    assert state(pipe) == before and torch.equal(draw(pipe, "flux"), expected)


def test_tail_drops_are_those_of_the_call_and_leave_nothing(micro_dc: Path) -> None:
    pipe: Any = fastgen.load_pipeline(str(micro_dc))
    pipe.set_progress_bar_config(disable=True)

    def drawn(**given: Any) -> torch.Tensor:
        images: torch.Tensor = pipe(
            "a red circle", height=32, width=32, num_inference_steps=2, output_type="pt",
            generator=torch.Generator().manual_seed(3), **given,
        ).images  # fmt: skip
        return images

    expected, dropped, before = drawn(), drawn(tail_drop=0.3, uncond_tail_drop=0.5), state(pipe)
    with fastgen.accelerated(pipe, plan=[TailDrops(0.3, 0.5)]) as plan:
        assert plan.loss == "lossy" and torch.equal(drawn(), dropped)
        assert torch.equal(drawn(tail_drop=0.0), expected)  # what a call asks for counts
    assert not torch.equal(dropped, expected)
    assert state(pipe) == before and torch.equal(drawn(), expected)


def test_every_part_has_a_case() -> None:
    tried = {getattr(case, "values", case)[1].name for case in ON}
    elsewhere = {"compile", "kernels", "quantized_attention", "tail_drop", "context_parallel", "token_stage"}
    assert tried | elsewhere == set(PARTS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attention("fast"),
        lambda: QuantizedAttention("flash"),
        lambda: Quantize("int3"),
        lambda: DBCache(threshold=0),
        lambda: DBCache(first=0),
        lambda: TextEncoder(free="maybe"),
        lambda: TextEncoder(prompts=-1),
    ],
)
def test_a_setting_that_is_not_allowed_is_an_error(make: Any) -> None:
    with pytest.raises(FastgenError, match="is not allowed, needs"):
        make()


# ---- channels_last ----


def stored(pipe: Any) -> int:
    """Bytes of all tensors that its models and the closures of its parts hold."""
    import gc

    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def test_channels_last_keeps_no_second_copy_of_the_weights() -> None:
    pipe = family("stable-diffusion")
    size = sum(weight.numel() * weight.element_size() for weight in pipe.unet.parameters() if weight.ndim == 4)
    before = stored(pipe)
    with fastgen.accelerated(pipe, plan=[ChannelsLast()]):
        assert stored(pipe) - before < size / 10


def test_channels_last_keeps_what_a_user_loads_meanwhile() -> None:
    pipe = family("sana")
    layer = next(m for m in pipe.vae.modules() if type(m) is torch.nn.Conv2d and m.kernel_size != (1, 1))
    old = layer.weight.detach().clone()
    with fastgen.accelerated(pipe, plan=[ChannelsLast()]), torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.weight, 2 * old) and layer.weight.is_contiguous()
    with torch.no_grad():
        layer.weight.copy_(old)


# ---- attention ----


def test_a_backend_is_set_for_this_model_only() -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    everywhere = _AttentionBackendRegistry.get_active_backend()
    with fastgen.accelerated(family("flux"), plan=[Attention("_native_math")]):
        assert _AttentionBackendRegistry.get_active_backend() == everywhere


def test_a_users_backend_and_a_users_processor_stay() -> None:
    pipe = family("flux")
    attention = pipe.transformer.transformer_blocks[0].attn
    stock = attention.processor
    pipe.transformer.set_attention_backend("native")
    try:
        assert Attention("_native_math").why_not(pipe) == "a backend is set already"
    finally:
        for module in pipe.transformer.modules():
            vars(getattr(module, "processor", pipe)).pop("_attention_backend", None)

    class Own:
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return stock(attn, *args, **kwargs)

    attention.set_processor(own := Own())
    try:
        expected = draw(pipe, "flux")
        with fastgen.accelerated(pipe, plan=[Attention("_native_math")]):
            assert attention.processor is own and not hasattr(own, "_attention_backend")
            torch.testing.assert_close(draw(pipe, "flux"), expected, atol=1e-4, rtol=0)
        assert torch.equal(draw(pipe, "flux"), expected)
    finally:
        attention.set_processor(stock)


# ---- text encoders ----


def encodings(pipe: Any) -> list[int]:
    passes: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: passes.append(1))
    return passes


def test_a_prompt_is_encoded_once_and_again_when_anything_changed() -> None:
    pipe = family("stable-diffusion")
    pipe.text_encoder._forward_hooks.clear()
    expected, passes = draw(pipe, "stable-diffusion"), encodings(pipe)
    other = draw(pipe, "stable-diffusion", prompt="two blue squares", negative_prompt="bad")
    one_call = len(passes)
    try:
        with fastgen.accelerated(pipe, plan=[TextEncoder()]):
            passes.clear()
            for _ in range(3):
                assert torch.equal(draw(pipe, "stable-diffusion"), expected)
            assert len(passes) == one_call
            changed = draw(pipe, "stable-diffusion", prompt="two blue squares", negative_prompt="bad")
            assert torch.equal(changed, other) and len(passes) == 2 * one_call
            with torch.no_grad():
                weight = next(pipe.text_encoder.parameters())
                old = weight.clone()
                weight.mul_(1.5)
            try:
                assert not torch.equal(draw(pipe, "stable-diffusion"), expected)
            finally:
                with torch.no_grad():
                    weight.copy_(old)
    finally:
        pipe.text_encoder._forward_hooks.clear()


def test_a_caller_that_changes_embeddings_in_place_changes_its_own_copy() -> None:
    pipe = family("stable-diffusion")
    given = {
        "prompt": "a red circle",
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }
    with fastgen.accelerated(pipe, plan=[TextEncoder()]), torch.no_grad():
        first = [each.clone() for each in pipe.encode_prompt(**given)]
        for _ in range(2):
            for ours, expected in zip(pipe.encode_prompt(**given), first, strict=True):
                assert torch.equal(ours, expected)
                ours.zero_()


def test_few_prompts_are_remembered() -> None:
    pipe = family("stable-diffusion")
    passes = encodings(pipe)
    try:
        with fastgen.accelerated(pipe, plan=[TextEncoder(prompts=1)]):
            for prompt in ("a", "b", "a"):
                draw(pipe, "stable-diffusion", prompt=prompt, steps=1)
        count = len(passes)
        with fastgen.accelerated(pipe, plan=[TextEncoder(prompts=2)]):
            for prompt in ("a", "b", "a"):
                draw(pipe, "stable-diffusion", prompt=prompt, steps=1)
        assert len(passes) - count == count * 2 // 3
    finally:
        pipe.text_encoder._forward_hooks.clear()


def test_encoders_leave_before_denoising_and_are_back_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/gpu/test_text_encoder.py sees on a GPU, in the order of events: here all memory is main memory."""
    pipe = family("stable-diffusion")
    events: list[str] = []
    encoder = pipe.text_encoder
    hooks = [
        encoder.register_forward_hook(lambda *given: events.append("encode")),
        pipe.unet.register_forward_hook(lambda *given: events.append("denoise")),
    ]
    monkeypatch.setattr(TextEncoder, "_frees", lambda self, pipe: True)
    monkeypatch.setattr(type(encoder), "cpu", lambda self: events.append("away") or self, raising=False)
    monkeypatch.setattr(type(encoder), "to", lambda self, *given: events.append("back") or self, raising=False)
    try:
        with fastgen.accelerated(pipe, plan=[TextEncoder()]):
            for prompt in ("a red circle", "a red circle", "two blue squares"):
                draw(pipe, "stable-diffusion", prompt=prompt, steps=2)
    finally:
        for hook in hooks:
            hook.remove()
    order = [event for i, event in enumerate(events) if i == 0 or events[i - 1] != event]
    assert order == ["encode", "away", "denoise", "back", "encode", "away", "denoise", "back"]


# ---- padding of prompts ----


def test_a_text_encoder_computes_the_tokens_of_the_longest_prompt_only() -> None:
    pipe = family("z-image")
    lengths: list[int] = []
    hook = pipe.text_encoder.embed_tokens.register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1])
    )
    prompts = [
        "a red circle",
        "two blue squares left of a green star",
    ]
    try:
        with torch.no_grad():
            expected, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
            with fastgen.accelerated(pipe) as plan:
                ours, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
                short, _ = pipe.encode_prompt("x", do_classifier_free_guidance=False, max_sequence_length=4)
    finally:
        hook.remove()
    assert "prompt_padding" in {part.name for part in plan.parts}
    assert lengths == [512, max(map(len, expected)), 4] and len(short[0]) == 4
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# ---- bfloat16 ----


def test_only_linear_layers_of_blocks_multiply_in_bfloat16_and_the_picture_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastgen.pipelines.accelerate.bfloat16.native_bfloat16", lambda device: True)
    pipe = family("flux")
    expected = draw(pipe, "flux")
    with fastgen.accelerated(pipe, plan=[BFloat16()]):
        half = {name for name, weight in pipe.transformer.named_parameters() if weight.dtype == torch.bfloat16}
        assert half and all("blocks." in name and "norm" not in name for name in half)
        assert pipe.transformer.dtype == torch.float32
        assert BFloat16().why_not(pipe) == (
            "its denoiser has no linear layers in float32 in its blocks, or their weights are not in memory"
        )
        difference = (draw(pipe, "flux") - expected).abs()
    assert 0 < float(difference.mean()) < 0.05 * float(expected.std())
    monkeypatch.setattr("fastgen.pipelines.accelerate.bfloat16.native_bfloat16", lambda device: False)
    assert BFloat16().why_not(pipe) == "the processor does not multiply bfloat16 natively"


def test_weights_that_a_user_put_in_meanwhile_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.pipelines.accelerate.bfloat16.native_bfloat16", lambda device: True)
    pipe = family("flux")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    stock, own = layer.weight, torch.nn.Parameter(torch.zeros_like(layer.weight))
    try:
        with fastgen.accelerated(pipe, plan=[BFloat16()]):
            layer.weight = own
        assert layer.weight is own
    finally:
        layer.weight = stock


# ---- step caches ----


@cache_dit
def test_a_step_cache_works_after_another_one_was_taken_back() -> None:
    pipe = family("flux")
    for part in (DBCache(1e9, warmup=1), StepCache(threshold=1e9), DBCache(1e9, warmup=1)):
        with fastgen.accelerated(pipe, plan=[part]):
            assert torch.isfinite(draw(pipe, "flux")).all()


# ---- quantised weights ----


@torchao
def test_quantised_weights_are_small_and_sensitive_layers_stay_whole() -> None:
    pipe = family("flux")
    with fastgen.accelerated(pipe, plan=[Quantize()]):
        layers = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
        quantised = [name for name, m in layers.items() if type(m.weight.data) is not torch.Tensor]
        assert quantised and not any("norm" in name for name in quantised)
        assert all(hasattr(layers[name].weight, "qdata") for name in quantised)
        assert layers[quantised[0]].weight.qdata.dtype == torch.int8
        assert Quantize().why_not(pipe) is not None
    assert Quantize().why_not(pipe) is None


@torchao
def test_quantising_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchao.quantization

    pipe = family("flux")
    before, whole = state(pipe), torchao.quantization.quantize_

    def fail(model: Any, config: Any, chosen: Any) -> None:
        left = iter(range(3))
        whole(model, config, lambda module, name: chosen(module, name) and next(left, None) is not None)
        raise RuntimeError("no room")

    monkeypatch.setattr(torchao.quantization, "quantize_", fail)
    with pytest.raises(FastgenError, match="quantize: int8 does not work here: no room"):
        fastgen.accelerate(pipe, plan=[VaeSlicing(), Quantize()])
    assert state(pipe) == before
