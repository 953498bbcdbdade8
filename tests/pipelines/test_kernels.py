"""Fused kernels in stock pipelines: equal pictures up to rounding, and everything back afterwards, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from long_tail import long_tail
from tiny_flows import tiny_flux, tiny_qwen_image, tiny_sd3
from tiny_pipelines import quiet, shaken, vae
from torch import Tensor, nn

import fastgen
from fastgen.accounting import account
from fastgen.kernels.dispatch import ran, reset_ran, use_kernels

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def tiny_dit() -> Any:
    """A DiT of four latent positions a side."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    return quiet(DiTPipeline(shaken(transformer, 3), vae(1), DDIMScheduler()))


def call_dit(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe([1], generator=generator, num_inference_steps=1, output_type="pt").images


def caller(**arguments: Any) -> Callable[[Any], Tensor]:
    def call(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        chosen = {"prompt": "a red circle", "height": 16, "width": 16, "num_inference_steps": 1, "output_type": "pt"}
        return pipe(**{**chosen, **arguments}, generator=generator).images

    return call


def micro_z_image(folder: Any) -> Any:
    return quiet(fastgen.load_pipeline(str(folder)))


# Pipeline, how to call it, and the operations that kernels do in it.
PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], set[str]]] = {
    "dit": (tiny_dit, call_dit, {"adaln", "group_norm_silu"}),
    "flux": (
        lambda: tiny_flux(True),
        caller(max_sequence_length=16),
        {"adaln", "qk_norm_rope", "group_norm_silu"},
    ),
    "sd3": (
        tiny_sd3,
        caller(max_sequence_length=16, guidance_scale=1.0),
        {"adaln", "qk_norm_rope", "group_norm_silu"},
    ),
    "qwen": (tiny_qwen_image, caller(num_inference_steps=2), {"adaln", "qk_norm_rope"}),
}


@pytest.fixture(params=long_tail(["dit", "flux", "sd3", "qwen", "z_image"], fast=("dit", "qwen", "z_image")))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Callable[[Any], Tensor], set[str]]]:
    """A pipeline with a picture already made, so that every cache is filled."""
    if request.param == "z_image":
        pipe = micro_z_image(request.getfixturevalue("micro_z"))
        call, ops = caller(height=32, width=32, guidance_scale=0.0), {"adaln", "qk_norm_rope", "group_norm_silu"}
    else:
        build, call, ops = PIPELINES[request.param]
        pipe = build()
    pipe = pipe.to(DEVICE)
    reset_ran()
    yield pipe, call, ops


def state(pipe: Any) -> dict[str, Any]:
    """What an installation could leave behind: forwards, processors, layouts."""
    found: dict[str, Any] = {}
    for part, model in pipe.components.items():
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                found[f"{part}.{name}"] = (vars(module).get("forward"), getattr(module, "processor", None))
            for name, parameter in model.named_parameters():
                found[f"{part}.{name}"] = (parameter.data_ptr(), parameter.stride())
    return found


def test_pictures_are_equal_and_everything_comes_back(case: Any) -> None:
    pipe, call, ops = case
    before, stock = state(pipe), call(pipe)
    counts = fastgen.enable_kernels(pipe)
    assert counts["blocks"] > 0
    with account() as stats, use_kernels("triton"):
        fused = call(pipe)
    assert {op for op, used in ran().items() if used == "triton"} == ops
    assert all(set(stats.paths[op]) == {"triton"} for op in ops)
    assert float((fused - stock).abs().max()) < 2e-4, "fused code computes something else"
    assert fastgen.enable_kernels(pipe) == counts  # twice is once
    with use_kernels("reference"):
        assert torch.equal(call(pipe), stock)
    fastgen.disable_kernels(pipe)
    assert state(pipe) == before
    with use_kernels("triton"):
        assert torch.equal(call(pipe), stock)
    fastgen.disable_kernels(pipe)
    assert state(pipe) == before


def test_every_block_is_served() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    pipe = tiny_sd3()
    resnets = sum(isinstance(module, ResnetBlock2D) for module in pipe.vae.modules())
    attention = sum(hasattr(module, "processor") for module in pipe.transformer.modules())
    counts = fastgen.enable_kernels(pipe)
    assert counts == {"blocks": 2, "attention": attention, "decoder": resnets + 2}


@pytest.mark.skipif(ON_GPU, reason="on a GPU kernels run by default")
def test_on_a_cpu_the_stock_code_runs() -> None:
    pipe = tiny_flux(False)
    stock = caller(max_sequence_length=16)(pipe)
    fastgen.enable_kernels(pipe)
    reset_ran()
    assert torch.equal(caller(max_sequence_length=16)(pipe), stock)
    assert ran() == {}


def block_inputs(pipe: Any) -> dict[str, Tensor]:
    made = {name: torch.randn(1, n, 32) for name, n in (("hidden_states", 5), ("encoder_hidden_states", 3))}
    return {**made, "temb": torch.randn(1, 32)}


def test_wrong_code_would_be_noticed() -> None:
    """The block alone, whose output every weight and every argument changes."""
    block = tiny_flux(False).transformer.transformer_blocks[0].double()
    angles = torch.randn(8, 8).repeat_interleave(2, dim=1)
    inputs = {name: value.double() for name, value in block_inputs(None).items()}
    inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    with torch.no_grad():
        stock = block(**inputs)
        fastgen.enable_kernels(block)
        single = {
            name: tuple(x.float() for x in value) if isinstance(value, tuple) else value.float()
            for name, value in inputs.items()
        }
        with use_kernels("triton"):
            fused = block.float()(**single)
    for actual, expected in zip(fused, stock, strict=True):
        assert float((actual.double() - expected).norm() / expected.norm()) < 3e-6


def test_gradients_pass_through_fused_blocks() -> None:
    block = tiny_sd3().transformer.transformer_blocks[0].requires_grad_(True)
    inputs = block_inputs(None)
    grads = []
    for mode in ("reference", "triton"):
        block.zero_grad()
        fastgen.enable_kernels(block)
        with use_kernels(mode):
            text, image = block(**inputs)
            (text.square().sum() + image.square().sum()).backward()
        grads.append({name: parameter.grad.clone() for name, parameter in block.named_parameters()})
    for name, expected in grads[0].items():
        # Biases of keys have no gradient but rounding: softmax is blind to them.
        scale = max(float(expected.norm()), 1e-2)
        assert float((grads[1][name] - expected).norm()) / scale < 1e-4, name


def test_a_copy_computes_with_its_own_weights() -> None:
    block = tiny_flux(False).transformer.transformer_blocks[0]
    fastgen.enable_kernels(block)
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        inputs = block_inputs(None)
        with use_kernels("triton"):
            first, second = block(**inputs)[1], other(**inputs)[1]
        assert not torch.equal(first, second)
        fastgen.disable_kernels(other)
        with use_kernels("triton"):
            assert torch.equal(block(**inputs)[1], first)
        assert torch.allclose(other(**inputs)[1], second, atol=1e-5)


def test_hooks_that_came_later_stay_and_ours_leaves() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.hooks.hooks import ModelHook as DiffusersHook

    inputs = block_inputs(None)
    for kind in ("accelerate", "diffusers"):
        block = tiny_flux(False).transformer.transformer_blocks[0]
        with torch.no_grad():
            stock = block(**inputs)[1]
            fastgen.enable_kernels(block)
            if kind == "accelerate":
                add_hook_to_module(block, ModelHook())
            else:
                HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersHook(), "test")
            reset_ran()
            with use_kernels("triton"):
                assert torch.allclose(block(**inputs)[1], stock, atol=1e-5)
            assert ran()["adaln"] == "triton"
            assert fastgen.enable_kernels(block)["blocks"] == 1
            fastgen.disable_kernels(block)
            reset_ran()
            with use_kernels("triton"):
                assert torch.equal(block(**inputs)[1], stock)
                if kind == "accelerate":
                    remove_hook_from_module(block)
                else:
                    block._diffusers_hook.remove_hook("test")
                assert torch.equal(block(**inputs)[1], stock)
            assert ran() == {}


def test_a_block_with_a_hook_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    block = tiny_flux(False).transformer.transformer_blocks[0]
    add_hook_to_module(block, ModelHook())
    with caplog.at_level("INFO", logger="fastgen"):
        assert fastgen.enable_kernels(block) == {"attention": 1}
    assert "another hook owns its forward" in caplog.text


def test_lora_and_attention_backends_still_work(micro_z: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe = micro_z_image(micro_z)
    call = caller(height=32, width=32, guidance_scale=0.0, output_type="latent")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    fastgen.enable_kernels(pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    pipe.transformer.set_attention_backend("native")
    with use_kernels("triton"):
        fused = call(pipe)
    fastgen.disable_kernels(pipe)
    assert float((call(pipe) - fused).abs().max()) < 2e-4
    backends = {
        module.processor._attention_backend for module in pipe.transformer.modules() if hasattr(module, "processor")
    }
    assert {str(getattr(backend, "value", backend)) for backend in backends} == {"native"}


def test_compiled_blocks_have_no_graph_breaks() -> None:
    block = tiny_flux(False).transformer.transformer_blocks[0]
    inputs = block_inputs(None)
    angles = torch.randn(8, 8).repeat_interleave(2, dim=1)
    inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    fastgen.enable_kernels(block)
    with torch.no_grad(), use_kernels("triton"):
        expected = block(**inputs)
        reset_ran()
        actual = torch.compile(block, fullgraph=True, backend="aot_eager")(**inputs)
    assert ran()["adaln"] == ran()["qk_norm_rope"] == "triton"
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_vq_decoder_of_janus(micro_janus: Any) -> None:
    from transformers import JanusForConditionalGeneration

    model = JanusForConditionalGeneration.from_pretrained(micro_janus).eval()
    decoder = model.model.vqmodel.decoder
    latents = torch.randn(1, decoder.conv_in.in_channels, 2, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = decoder(latents)
        assert fastgen.enable_kernels(model)["decoder"] > 0
        reset_ran()
        with use_kernels("triton"):
            fused = decoder(latents)
        assert ran() == {"group_norm_silu": "triton"}
        assert fused.is_contiguous()
        assert float((fused - stock).abs().max()) < 1e-4 * float(stock.abs().max())
        fastgen.disable_kernels(model)
        assert torch.equal(decoder(latents), stock)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("latents", long_tail([1, 4], fast=(1,)))
def test_images_and_latents_of_one_channel(latents: int, channels: int) -> None:
    """Whose memory format says nothing of the layout that convolutions shall keep."""
    from diffusers import AutoencoderKL

    blocks = (8, 8)
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=latents, block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False,
    ).to(DEVICE).eval()  # fmt: skip
    image = torch.randn(1, channels, 6, 4, device=DEVICE)
    code = torch.randn(1, latents, 3, 2, device=DEVICE)
    with torch.no_grad():
        stock = model.encode(image).latent_dist.mean, model.decode(code).sample
        fastgen.enable_kernels(model)
        reset_ran()
        with use_kernels("triton"):
            fused = model.encode(image).latent_dist.mean, model.decode(code).sample
    assert ran() == {"group_norm_silu": "triton"}
    for a, b in zip(fused, stock, strict=True):
        assert a.is_contiguous() and torch.allclose(a, b, atol=2e-5)


def test_what_is_not_served_is_refused() -> None:
    with pytest.raises(ValueError, match="pipe: Linear has nothing that kernels serve; there are DiT, FLUX"):
        fastgen.enable_kernels(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pipe: needs a diffusers pipeline or a model, got str"):
        fastgen.enable_kernels("tiny")


def test_enabled_models_can_be_saved_and_copied(tmp_path: Any) -> None:
    """Pickle, `torch.save` and another process bring them back with kernels; the copy can be disabled alone."""
    block = tiny_flux(False).transformer.transformer_blocks[0]
    inputs = block_inputs(None)
    fastgen.enable_kernels(block)
    torch.save(block, tmp_path / "block.pt")
    copies = [pickle.loads(pickle.dumps(block)), torch.load(tmp_path / "block.pt", weights_only=False)]
    with torch.no_grad(), use_kernels("triton"):
        expected = block(**inputs)[1]
        for other in copies:
            reset_ran()
            assert torch.equal(other(**inputs)[1], expected) and ran()["adaln"] == "triton"
            fastgen.disable_kernels(other)
            reset_ran()
            assert torch.allclose(other(**inputs)[1], expected, atol=1e-5) and ran() == {}
        for parameter in copies[0].parameters():
            parameter.zero_()
        assert torch.equal(block(**inputs)[1], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_of_enabled_pipelines_are_enabled(copied: Callable[[Any], Any]) -> None:
    """Those in another process are drawn with in test_pickling."""
    pipe = tiny_dit()
    expected = call_dit(pipe)
    counts = fastgen.enable_kernels(pipe)
    again = copied(pipe)
    assert fastgen.enable_kernels(again) == counts
    fastgen.disable_kernels(again)
    assert torch.equal(call_dit(again), expected)
