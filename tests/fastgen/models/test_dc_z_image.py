"""DCZImageTransformer2DModel and upcycling: the backbone is Z-Image's (or DiT's), bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, ZImagePipeline, ZImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_models import awake, micro_z_transformer

from fastgen.models.chunking import select_chunks
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.elastic import ElasticBudget
from fastgen.models.upcycle import backbone_names, upcycle


def stock(seed: int = 0) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    model = micro_z_transformer()
    torch.nn.init.normal_(model.cap_pad_token)
    return model.eval()


def micro(**scaffold: Any) -> DCZImageTransformer2DModel:
    return awake(upcycle(stock(), **scaffold))


def inputs(
    lengths: tuple[int, ...] = (5, 33, 9), size: tuple[int, int] = (6, 5), seed: int = 0
) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(4, 1, *size, generator=generator) for _ in lengths]
    captions = [torch.randn(length, 24, generator=generator) for length in lengths]
    return images, torch.rand(len(lengths), generator=generator), captions


def test_backbone_equals_the_stock_transformer() -> None:
    """With one token per 2 x 2 patch at the positions of the patches, both compute the same up to rounding."""
    source = stock()
    model = upcycle(source, position_scale=1.0).eval()
    images, t, captions = inputs(size=(8, 16))
    seen: dict[str, torch.Tensor] = {}
    final = source.all_final_layer["2-1"]
    final.linear.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    with torch.no_grad():
        source(images, t, captions)
        patches = torch.cat([source._patchify_image(image, 2, 1)[0] for image in images])
        tokens = source.all_x_embedder["2-1"](patches)
        time = model.t_embedder(t * 1000.0)
        text = model.read_captions(captions)  # type: ignore[operator]
        chunks = select_chunks(torch.rand(3, 32), (4, 8), token_budget=32)
        ours = model.backbone(tokens, text, time, chunks)
    # The stock sequence: image tokens (32, a multiple of 32, so no padding), then the caption.
    torch.testing.assert_close(ours.view(3, 32, 32), seen["hidden"][:, :32], rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    rhos=st.lists(st.floats(0, 0.95), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 100),
)
def test_a_batch_equals_its_samples_alone(rhos: list[float], size: tuple[int, int], seed: int) -> None:
    model = micro()
    images, t, captions = inputs((3, 40, 8)[: len(rhos)], size, seed)
    with torch.no_grad():
        batch = model(images, t, captions, tail_drop=rhos, output_chunks=True)
        for i, rho in enumerate(rhos):
            alone = model([images[i]], t[i : i + 1], [captions[i]], tail_drop=rho, output_chunks=True)
            assert torch.equal(alone.chunks.mask[0], batch.chunks.mask[i])
            torch.testing.assert_close(alone.sample[0], batch.sample[i], rtol=1e-3, atol=5e-5)


def test_upcycling_keeps_the_backbone_bit_for_bit() -> None:
    source = stock()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    model = upcycle(source)
    copied = set(backbone_names(model))
    for name, value in model.state_dict().items():
        if name.startswith("adaLN_out."):
            name = name.replace("adaLN_out", "all_final_layer.2-1.adaLN_modulation")
            assert torch.equal(value, before.pop(name))
        elif name in copied:
            assert torch.equal(value, before.pop(name)), name
    # Left behind: what belongs to fixed patches.
    assert set(before) == {
        "x_pad_token",
        "all_x_embedder.2-1.weight",
        "all_x_embedder.2-1.bias",
        "all_final_layer.2-1.linear.weight",
        "all_final_layer.2-1.linear.bias",
    }
    assert all(torch.equal(source.state_dict()[name], value) for name, value in before.items())


def test_upcycling_a_dit_keeps_the_backbone_bit_for_bit() -> None:
    torch.manual_seed(0)
    source = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        out_channels=8,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    with pytest.raises(ValueError, match="embed timesteps"):
        upcycle(source)
    for block in source.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(source.transformer_blocks[0].norm1.emb.state_dict())
    model = upcycle(source, router="cosine").eval()
    assert model.config.router == "cosine" and model.config.position_scale == 0.5
    for new, old in zip(model.transformer_blocks, source.transformer_blocks, strict=True):  # type: ignore[arg-type]
        assert torch.equal(new.modulation.weight, old.norm1.linear.weight)
        assert torch.equal(new.attn1.to_out[0].bias, old.attn1.to_out[0].bias)
        assert torch.equal(new.ff.net[0].proj.weight, old.ff.net[0].proj.weight)
    # The blocks compute what the stock blocks compute.
    source.eval()
    hidden, timestep, labels = torch.randn(2, 16, 32), torch.tensor([7, 900]), torch.tensor([3, 10])
    from fastgen.models.packing import Segments

    with torch.no_grad():
        conditioning = torch.nn.functional.silu(model.embedder(timestep, labels, hidden_dtype=torch.float32))  # type: ignore[operator]
        for new, old in zip(model.transformer_blocks, source.transformer_blocks, strict=True):  # type: ignore[arg-type]
            ours = new(hidden.flatten(0, 1), conditioning, Segments.of((16, 16), hidden.device))
            theirs = old(hidden, timestep=timestep, class_labels=labels)
            torch.testing.assert_close(ours.view_as(theirs), theirs, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_upcycled() -> None:
    with pytest.raises(ValueError, match="Linear cannot be upcycled"):
        upcycle(torch.nn.Linear(1, 1))


def test_gradients_reach_everything() -> None:
    model = micro().train()
    images, t, captions = inputs()
    sample = model(images, t, captions, tail_drop=[0.0, 0.5, 0.9]).sample
    torch.stack(sample).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


def test_save_and_load(tmp_path: Path) -> None:
    model = micro(residual_gate="mask")
    model.save_pretrained(tmp_path)
    again = DCZImageTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    arguments = inputs()
    with torch.no_grad():
        # Loaded weights are not aligned like fresh ones, and a processor may add up in another order for that.
        for a, b in zip(model(*arguments).sample, again(*arguments).sample, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_stock_pipeline_takes_it(micro_z: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    pipe.transformer = awake(upcycle(pipe.transformer))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a red circle", height=16, width=24, num_inference_steps=2, generator=generator, output_type="np"
        ).images

    full = draw()
    assert full.shape == (1, 16, 24, 3)
    with pipe.transformer.generation(ElasticBudget(token_budget=3)):
        assert not (draw() == full).all()
    assert (draw() == full).all()


def test_unsupported_inputs_are_named() -> None:
    model = micro()
    images, t, captions = inputs()
    with pytest.raises(ValueError, match="siglip_feats"):
        model(images, t, captions, siglip_feats=[])
    with pytest.raises(ValueError, match="of one size"):
        model([images[0], images[1][..., :3], images[2]], t, captions)
    with pytest.raises(ValueError, match="tail_drop"):
        model(images, t, captions, tail_drop=[0.1])
    with pytest.raises(ValueError, match="axes_dims"):
        DCZImageTransformer2DModel(dim=32, n_heads=2, axes_dims=(4, 4, 4))


def test_lora_loads_and_unloads() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = micro()
    arguments = inputs()
    with torch.no_grad():
        plain = model(*arguments).sample[0]
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        assert not torch.allclose(model(*arguments).sample[0], plain)
        model.disable_adapters()
        torch.testing.assert_close(model(*arguments).sample[0], plain)
