"""Dynamic chunking on the backbone's patch grid: it begins as the model it was upcycled from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, ZImagePipeline, ZImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_models import awake, micro_z_transformer
from tiny_pipelines import loaded

from fastgen.models.chunking import select_chunks
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.elastic import ElasticBudget
from fastgen.models.layers import rotary_factors
from fastgen.models.packing import Segments
from fastgen.models.patch_grid import unpatchify
from fastgen.models.upcycle import backbone_names, upcycle
from fastgen.models.z_image_batch import patchify
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.loading.checkpoint import embedded_folder


def stock(seed: int = 0) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    model = micro_z_transformer(n_layers=3)
    for parameter in model.parameters():  # near-closed gates would hide differences
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def fresh(**scaffold: Any) -> Any:
    return upcycle(stock(), **{"grid": "patch", **scaffold}).eval()


def micro(**scaffold: Any) -> Any:
    """With random weights where training starts from zero, and a router that keeps some and drops some."""
    model = awake(fresh(**scaffold))
    torch.nn.init.zeros_(model.scaffold.router.head.bias)
    return model


def inputs(
    lengths: tuple[int, ...] = (5, 33, 9), size: tuple[int, int] = (8, 16), seed: int = 0
) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(4, 1, *size, generator=generator) for _ in lengths]
    captions = [torch.randn(length, 24, generator=generator) for length in lengths]
    return images, torch.rand(len(lengths), generator=generator), captions


def run(model: Any, arguments: tuple[Any, Any, Any], **knobs: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(model(*arguments, return_dict=False, **knobs)[0])


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (16, 16), (4, 32)])
@pytest.mark.parametrize(("smoothing", "last"), [(None, 1), (1.0, 1), (1.0, 0), (1.0, 2)])
def test_upcycled_it_computes_what_its_teacher_computes(
    size: tuple[int, int], smoothing: float | None, last: int
) -> None:
    """The router keeps everything; up to the rounding of packed attention."""
    teacher, arguments = stock(), inputs(size=size)
    model: Any = upcycle(teacher, grid="patch", smoothing=smoothing, n_last_layers=last).eval()
    with torch.no_grad():
        output = model(*arguments, output_chunks=True)
    assert bool(output.chunks.natural.all()) and bool(output.chunks.mask.all())
    theirs = run(teacher, arguments)
    assert theirs.std() > 0.1
    torch.testing.assert_close(torch.stack(output.sample), theirs, rtol=1e-4, atol=1e-5)


def test_the_embedded_model_draws_the_same_picture_upcycled() -> None:
    pipe = loaded(ZImagePipeline, embedded_folder("tiny"))

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        images = pipe("a red circle", height=64, width=64, num_inference_steps=2, generator=generator)
        return np.asarray(images.images[0]).astype(int)

    before = draw()
    pipe.transformer = upcycle(pipe.transformer, grid="patch")
    assert np.abs(draw() - before).max() <= 1


def test_training_begins_there_too() -> None:
    """With gradients on, the confidence that carries them is one."""
    teacher, arguments = stock(), inputs()
    model = fresh().train()
    torch.testing.assert_close(torch.stack(model(*arguments).sample), run(teacher, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [None, 1.0])
def test_dropped_patches_take_the_update_of_their_nearest_kept_one(smoothing: float | None) -> None:
    """On top of their own features; kept ones are what the layers made of them, bit for bit."""
    model: Any = fresh(smoothing=smoothing)
    scaffold, generator = model.scaffold, torch.Generator().manual_seed(2)
    features, latents = torch.randn(2, 32, 32, generator=generator), torch.randn(2, 4, 8, 16, generator=generator)
    conditioning = torch.randn(2, 32, generator=generator)
    with torch.no_grad():
        chunked = scaffold.chunk(latents, conditioning, None, 5, features=features)
        hidden = torch.randn(10, 32, generator=generator)
        whole = scaffold.unchunk(hidden, chunked, conditioning)
    mask = chunked.chunks.mask
    assert torch.equal(whole[mask], hidden)
    for sample in range(2):
        kept = mask[sample].nonzero().flatten()
        for place in (~mask[sample]).nonzero().flatten().tolist():
            distance = (kept // 8 - place // 8) ** 2 + (kept % 8 - place % 8) ** 2
            nearest = int(kept[distance.argmin()])
            if smoothing is None:
                update = whole[sample, nearest] - features[sample, nearest]
                torch.testing.assert_close(whole[sample, place], features[sample, place] + update)
            else:  # the same for all that are nearest to it
                assert not torch.equal(whole[sample, place], features[sample, place])


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_a_flat_picture_needs_one_patch(size: tuple[int, int]) -> None:
    """Where the layers write the same to every patch, dropping all but one changes nothing."""
    model: Any = fresh(smoothing=None)
    conditioning, latents = torch.randn(1, 32), torch.randn(1, 4, *size)
    length = size[0] * size[1] // 4
    features, update = torch.randn(1, length, 32), torch.randn(32)
    with torch.no_grad():
        chunked = model.scaffold.chunk(latents, conditioning, None, 1, features=features)
        whole = model.scaffold.unchunk(chunked.tokens + update, chunked, conditioning)
    torch.testing.assert_close(whole, features + update)


@settings(max_examples=15, deadline=None)
@given(
    rhos=st.lists(st.floats(0, 0.95), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 100),
)
def test_a_batch_equals_its_samples_alone(rhos: list[float], size: tuple[int, int], seed: int) -> None:
    model = micro()
    images, t, captions = inputs((3, 40, 8)[: len(rhos)], (2 * size[0], 2 * size[1]), seed)
    with torch.no_grad():
        batch = model(images, t, captions, tail_drop=rhos, output_chunks=True)
        for i, rho in enumerate(rhos):
            alone = model([images[i]], t[i : i + 1], [captions[i]], tail_drop=rho, output_chunks=True)
            assert torch.equal(alone.chunks.mask[0], batch.chunks.mask[i])
            torch.testing.assert_close(alone.sample[0], batch.sample[i], rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (2, 3, 4, 6), (3, 16, 8, 2)])
def test_unpatchify_undoes_patchify(shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape)
    assert torch.equal(unpatchify(patchify(latents), (shape[2] // 2, shape[3] // 2)), latents)


def test_gradients_reach_the_router_and_everything_else() -> None:
    model = micro().train()
    sample = model(*inputs(), tail_drop=[0.0, 0.5, 0.9]).sample
    torch.stack(sample).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


def test_upcycling_copies_embedding_and_head_too() -> None:
    source = stock()
    model = fresh()
    before = source.state_dict()
    names = backbone_names(model)
    assert torch.equal(model.scaffold.embed.weight, before["all_x_embedder.2-1.weight"])
    assert torch.equal(model.scaffold.head.bias, before["all_final_layer.2-1.linear.bias"])
    assert {"scaffold.embed.weight", "scaffold.head.weight"} <= set(names)
    assert not any(name.startswith(("scaffold.router", "scaffold.share", "time_adaptor")) for name in names)
    for new, old in zip([*model.layers, *model.last_layers], source.layers, strict=True):
        assert torch.equal(new.feed_forward.w1.weight, old.feed_forward.w1.weight)


# --- floor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("floor", "least"), [(0.0, 1), (0.125, 4), (0.25, 8), (0.3, 10), (1.0, 32)])
def test_no_tail_drop_goes_below_the_floor(floor: float, least: int) -> None:
    model = micro(floor=floor)
    torch.nn.init.constant_(model.scaffold.router.head.bias, -50.0)  # the router keeps nothing
    with torch.no_grad():
        chunks = model(*inputs(), tail_drop=0.9, output_chunks=True).chunks
    assert chunks.lengths == (least,) * 3
    # They are the likeliest ones.
    for p, mask in zip(chunks.probabilities, chunks.mask, strict=True):
        assert p[mask].min() >= p[~mask].max() if least < 32 else mask.all()


def test_a_budget_below_the_floor_names_both_numbers() -> None:
    model = micro(floor=0.25)
    assert run(model, inputs(), token_budget=8).shape == (3, 4, 1, 8, 16)
    with pytest.raises(ValueError, match=r"token_budget: 7 is below the floor, 8 of 32 tokens"):
        run(model, inputs(), token_budget=7)
    with pytest.raises(ValueError, match=r"token_budget: 6 is below the floor, 8 of 32 tokens"):
        run(model, inputs(), token_budget=[8, 6, 32])


@pytest.mark.parametrize("grid", ["patch", "latent"])
def test_captions_are_read_once_a_generation(grid: str) -> None:
    """The very same tensors: the same velocities, bit for bit, with one reading; others are read again."""
    model = micro() if grid == "patch" else awake(upcycle(stock()).eval())
    images, t, captions = inputs()
    steps = [(images, t * share, captions) for share in (0.2, 0.6, 1.0)]
    expected = [run(model, step, tail_drop=0.3) for step in steps]
    calls: list[int] = []
    model.context_refiner[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with model.generation(ElasticBudget(0.3)):
        actual = [run(model, step) for step in steps]
        assert len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        captions[1].mul_(2)  # written to
        changed = run(model, steps[0])
        assert len(calls) == 2 and not torch.equal(changed, expected[0])
        run(model, (images[:2], t[:2], captions[:2]))  # fewer, as when guidance ends
        run(model, (images, t, [caption.clone() for caption in captions]))
        assert len(calls) == 4
        with torch.inference_mode():
            model(images, t, [caption.clone() for caption in captions])
        assert len(calls) == 5
    assert torch.equal(run(model, steps[0], tail_drop=0.3), changed) and len(calls) == 6


def test_captions_that_are_trained_are_read_every_time() -> None:
    model, (images, t, captions) = micro(), inputs()
    with model.generation(ElasticBudget()):
        run(model, (images, t, captions))
        torch.stack(model(images, t, captions, return_dict=False)[0]).sum().backward()
    assert model.cap_embedder[1].weight.grad is not None


@given(floor=st.floats(0, 1), length=st.integers(1, 200), seed=st.integers(0, 99))
def test_the_floor_is_the_least_number_that_reaches_the_share(floor: float, length: int, seed: int) -> None:
    p = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) * 0.4
    kept = select_chunks(p, (1, length), floor=floor).lengths[0]
    assert kept >= floor * length - 1e-6 and (kept == 1 or kept - 1 < floor * length)


@pytest.mark.parametrize("wrong", [{"floor": -0.1}, {"floor": 1.5}, {"grid": "latent", "floor": 0.1}])
def test_floors_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^floor: "):
        fresh(**wrong)


# --- bad input, files, pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 16), (8, 15), (3, 3)])
def test_sizes_that_do_not_divide_name_both_numbers(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} do not divide into patches of 2x2"):
        run(micro(), inputs(size=size))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": "hexagon"}, "grid: 'hexagon'"),
        ({"router": "cosine"}, "cosine"),
        ({"residual_gate": "mask"}, "mask"),
        ({"n_last_layers": 3}, "n_last_layers: needs 0 to 2"),
        ({"n_last_layers": -1}, "n_last_layers: -1 is not allowed"),
    ],
)
def test_choices_that_the_patch_grid_does_not_have(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(**wrong)


def test_save_and_load(tmp_path: Path) -> None:
    model = micro(floor=0.1)
    model.save_pretrained(tmp_path)
    again = DCZImageTransformer2DModel.from_pretrained(tmp_path)
    assert (again.config.grid, again.config.floor) == ("patch", 0.1)
    torch.testing.assert_close(run(again, inputs()), run(model, inputs()), rtol=1e-5, atol=1e-5)


def test_folders_from_before_load_with_the_papers_grid(tmp_path: Path) -> None:
    """Their configuration names no grid and nothing that belongs to one; the embedded `tiny` is their base."""
    shape = {"dim": 24, "n_heads": 2, "n_layers": 4, "axes_dims": [4, 4, 4], "scaffold_dim": 24, "scaffold_blocks": 1}
    DCZImageTransformer2DModel(in_channels=16, cap_feat_dim=160, **shape).save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer/config.json"
    new = ("grid", "floor", "n_last_layers")
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key not in new})
    )
    index = json.loads((embedded_folder("tiny") / "model_index.json").read_text())
    index["transformer"] = ["fastgen.models.dc_z_image", "DCZImageTransformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "fastgen.json").write_text(json.dumps({"base": "tiny"}))
    model = load_pipeline(str(tmp_path)).transformer
    assert model.config.grid == "latent" and model.config.floor == 0
    latents, captions = [torch.randn(16, 1, 5, 7)], [torch.randn(4, 160)]
    with torch.no_grad():
        chunks = model(latents, torch.tensor([0.5]), captions, output_chunks=True).chunks
    assert chunks.grid == (5, 7)


def test_step_caches_hold_its_kept_set() -> None:
    model, arguments = micro(), inputs()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with torch.no_grad(), model.cache_context("denoise"), model.record_chunks() as records:
        for step in range(5):
            images = [image + 0.3 * step for image in arguments[0]]
            model(images, arguments[1], arguments[2])
    assert [record.chunks.grid for record in records] == [(4, 8)] * 5
    assert all(torch.equal(record.chunks.mask, records[0].chunks.mask) for record in records[:4])
    model.disable_cache()


def test_budgets_of_a_stock_pipeline_reach_it(micro_z: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    model = awake(upcycle(pipe.transformer, grid="patch"))
    pipe.transformer = model
    pipe.set_progress_bar_config(disable=True)
    with model.generation(ElasticBudget(0.2, uncond_tail_drop=0.9, images=1)), model.record_chunks() as records:
        pipe("a red circle", height=32, width=32, num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    assert len(records) == 2
    for record in records:
        assert record.chunks.grid == (4, 4)
        assert record.chunks.lengths[0] > record.chunks.lengths[1]


@pytest.mark.parametrize(("held", "asked"), [("patch", "latent"), ("latent", "patch")])
def test_a_checkpoint_of_another_grid_is_refused(held: str, asked: str, tmp_path: Path) -> None:
    """Its weights would be left out, and random ones put in their place."""
    fresh(grid=held).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"grid: '{asked}' is not allowed, .* has '{held}'"):
        DCZImageTransformer2DModel.from_pretrained(tmp_path, grid=asked)
    assert DCZImageTransformer2DModel.from_pretrained(tmp_path, grid=held).config.grid == held
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("grid") == held
    if held == "latent":  # folders from before there was another one
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded, info = DCZImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
        assert loaded.config.grid == "latent" and not info["missing_keys"]


@pytest.mark.parametrize("lengths", [(5, 9), (5, 33, 9, 40)])
def test_what_both_branches_of_guidance_share_is_computed_once(lengths: tuple[int, ...]) -> None:
    """Also with captions of other lengths: the noise refiner sees differences of positions alone."""
    model, half = micro().double(), len(lengths) // 2
    images, time, captions = inputs(lengths)
    images, captions = ([x.double() for x in each] for each in (images, captions))
    rows: list[int] = []
    model.noise_refiner[0].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    guided = (images[:half] * 2, torch.cat([time[:half]] * 2).double(), captions)
    drops = [0.0] * half + [0.9] * half
    together = run(model, guided, tail_drop=drops)
    for i, drop in enumerate(drops):  # alone, no sample repeats another
        alone = run(model, tuple(each[i : i + 1] for each in guided), tail_drop=drop)  # type: ignore[arg-type]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    assert rows == [half * 32] + [32] * len(lengths)

    rows.clear()
    other = guided[1].clone()
    other[-1] += 0.1  # another noise level: nothing is shared
    unlike = run(model, (guided[0], other, captions), tail_drop=drops)
    assert rows == [len(lengths) * 32] and not torch.equal(unlike[-1], together[-1])


def test_a_block_computes_the_wanted_rows_alone() -> None:
    block = micro().last_layers[0]
    segments, own = Segments.of([7, 4], torch.device("cpu")), Segments.of([5, 2], torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden, time = torch.randn(11, 32, generator=generator), torch.randn(2, 32, generator=generator)
    rotary = rotary_factors(torch.rand(11, 3, generator=generator), [4, 6, 6], 256.0)
    wanted = torch.tensor([0, 1, 2, 3, 4, 7, 8])
    with torch.no_grad():
        whole, some = block(hidden, rotary, segments, time), block(hidden, rotary, segments, time, (wanted, own))
    torch.testing.assert_close(some, whole[wanted])


def test_without_gradients_memory_is_reused_and_nothing_changes() -> None:
    model, arguments = micro(), inputs()
    with torch.no_grad():
        outside = [value.clone() for value in (*arguments[0], *arguments[2], *model.state_dict().values())]
        output = torch.stack(model(*arguments, return_dict=False, token_budget=12)[0])
        after = [*arguments[0], *arguments[2], *model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(outside, after, strict=True))
    taped = torch.stack(model(*arguments, return_dict=False, token_budget=12)[0]).detach()
    torch.testing.assert_close(output, taped)
