"""Diffusers' step caches, offloading and LoRA on transformers with dynamic chunking."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiTPipeline,
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    ZImagePipeline,
    apply_first_block_cache,
    hooks,
)
from micro_models import micro_dc_dit
from safetensors.torch import save_file
from tiny_pipelines import loaded

import fastgen
from fastgen.models.caching import HELD_STEPS
from fastgen.pipelines.dc_dit import DCDiTPipeline
from fastgen.pipelines.dc_z_image import DCZImagePipeline

STEPS = 8


@pytest.fixture
def z(micro_dc: Path) -> DCZImagePipeline:
    return loaded(DCZImagePipeline, micro_dc)


@pytest.fixture
def dit() -> DCDiTPipeline:
    return micro_dc_dit(layers=3)


@pytest.fixture(params=["z", "dit"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def draw(pipe: Any, seed: int = 0, **knobs: Any) -> Any:
    arguments = {"num_inference_steps": STEPS, "output_type": "np", "generator": torch.Generator().manual_seed(seed)}
    if isinstance(pipe, DCDiTPipeline):
        return pipe([1, 3], **arguments, **knobs)
    return pipe(["a red circle", "two blue squares"], height=16, width=16, **arguments, **knobs)


def last_block(pipe: Any) -> torch.nn.Module:
    """A layer inside the last block, below every module that a cache replaces."""
    model = pipe.transformer
    return (
        model.transformer_blocks[-1].ff.net[2] if isinstance(pipe, DiTPipeline) else model.layers[-1].feed_forward.w1
    )


class Calls:
    """Counts forward passes of a module inside a block."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.count = module, 0

    def __enter__(self) -> Calls:
        self.handle = self.module.register_forward_hook(self._seen)
        return self

    def _seen(self, *arguments: Any) -> None:
        self.count += 1

    def __exit__(self, *arguments: object) -> None:
        self.handle.remove()


def masks(pipe: Any, **knobs: Any) -> Iterator[np.ndarray]:
    return (chunks.mask.numpy() for chunks in draw(pipe, output_chunks=True, **knobs).chunks)


def test_first_block_cache_triggers_and_is_reset_with_each_kept_set(pipe: Any) -> None:
    plain = draw(pipe).images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with Calls(last_block(pipe)) as calls:
        cached = draw(pipe).images
    assert calls.count == STEPS // HELD_STEPS  # every step of a held set but the first is skipped
    assert np.isfinite(cached).all() and not np.array_equal(cached, plain)
    pipe.transformer.disable_cache()
    with Calls(last_block(pipe)) as calls:
        assert np.array_equal(draw(pipe).images, plain)
    assert calls.count == STEPS


def test_a_cache_that_never_hits_changes_nothing(pipe: Any) -> None:
    """Threshold below any difference: the pictures are those of the held sets without a cache."""
    pipe.transformer.hold_chunks(3)
    held = draw(pipe).images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    assert np.array_equal(draw(pipe).images, held)


def test_diffusers_own_function_attaches_too(pipe: Any) -> None:
    draw(pipe)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=1e9))
    pipe.transformer._diffusers_hook.invalidate_child_registries_cache()
    with Calls(last_block(pipe)) as calls:
        draw(pipe)
    assert calls.count == STEPS // HELD_STEPS


def test_taylorseer_triggers(pipe: Any) -> None:
    plain = draw(pipe).images
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(layers|transformer_blocks)\.\d+\.(attention|attn1|feed_forward|ff)"],
    )
    pipe.transformer.enable_cache(config)
    with Calls(last_block(pipe)) as calls:
        images = draw(pipe).images
    assert 0 < calls.count < STEPS
    assert np.isfinite(images).all() and not np.array_equal(images, plain)
    pipe.transformer.disable_cache()
    assert np.array_equal(draw(pipe).images, plain)


def test_generations_do_not_see_each_other(pipe: Any) -> None:
    """Caching with another seed, another number of pictures or an interruption in between: same pictures."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    first = draw(pipe, seed=1).images
    draw(pipe, seed=2)
    assert np.array_equal(draw(pipe, seed=1).images, first)
    if isinstance(pipe, DCZImagePipeline):

        def interrupt(*arguments: Any) -> dict[str, Any]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            draw(pipe, seed=2, callback_on_step_end=interrupt)
        assert np.array_equal(draw(pipe, seed=1).images, first)


def test_held_sets(pipe: Any) -> None:
    free = list(masks(pipe))
    assert any((a.shape != b.shape) or (a != b).any() for a, b in zip(free, free[1:], strict=False))
    pipe.transformer.hold_chunks(3)
    held = list(masks(pipe))
    assert all((held[step] == held[3 * (step // 3)]).all() for step in range(STEPS))
    assert (held[0] == free[0]).all()
    probabilities = [chunks.probabilities for chunks in draw(pipe, output_chunks=True).chunks]
    assert not torch.equal(probabilities[0], probabilities[1])  # the router still runs
    pipe.transformer.hold_chunks(None)
    assert all((a == b).all() for a, b in zip(masks(pipe), free, strict=True))


def test_a_held_set_is_not_used_for_another_batch_or_in_training(dit: DCDiTPipeline) -> None:
    model = dit.transformer
    model.hold_chunks(100)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for samples, side in ((2, 4), (3, 4), (2, 6)):
            latents = torch.randn(samples, 4, side, side, generator=generator)
            output = model(latents, torch.full((samples,), 5), torch.arange(samples), output_chunks=True)
            assert output.chunks.samples == samples and output.chunks.grid == (side, side)
    model.train()
    latents = torch.randn(2, 4, 6, 6, generator=generator)
    before = model._held[""].used
    model(latents, torch.full((2,), 5), torch.arange(2)).sample.sum().backward()
    assert model._held[""].used == before


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bad_holds(dit: DCDiTPipeline, steps: Any) -> None:
    with pytest.raises(ValueError, match="steps"):
        dit.transformer.hold_chunks(steps)


CACHES = sorted(name for name in dir(hooks) if name.endswith(("CacheConfig", "BroadcastConfig")))
PARTS = [r"(layers|transformer_blocks)\.\d+\.(attention|attn1|feed_forward|ff)"]
REQUIRED: dict[str, dict[str, Any]] = {
    "FasterCacheConfig": {"current_timestep_callback": lambda: 500},
    "FirstBlockCacheConfig": {"threshold": 1e9},
    "MagCacheConfig": {"mag_ratios": [1.0] * STEPS, "num_inference_steps": STEPS, "threshold": 1e9},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500
    },
}  # fmt: skip


def what_a_cache_does(pipe: Any, config: Any) -> str:
    """A cell of the table in the docs."""
    try:
        pipe.transformer.enable_cache(config)
    except ValueError as error:
        assert str(error).startswith(f"config: {type(config).__name__} ") and not pipe.transformer.is_caching
        return "refused"
    arguments = {"output_type": "latent", "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    with Calls(last_block(pipe)) as calls:
        if isinstance(pipe, DiTPipeline):
            pipe([1], **{**arguments, "output_type": "np"})
        else:
            pipe("a red circle", height=16, width=16, **arguments)
    assert calls.count < STEPS, f"{type(config).__name__} attaches and saves nothing"
    return "attaches"


def test_the_table_of_step_caches_in_the_docs(micro_dc: Path) -> None:
    """Every cache of diffusers, in our pipelines and in stock ones with `enable_dc`."""
    rows = ["| Cache | Z-Image | Z-Image, stock pipeline | DiT | DiT, stock pipeline |", "|---|---|---|---|---|"]
    taylor = (("`TaylorSeerCacheConfig`", {}), ("`TaylorSeerCacheConfig` with `cache_identifiers`", {
        "cache_identifiers": PARTS, "taylor_factors_dtype": torch.float32}))  # fmt: skip
    for name in CACHES:
        variants = taylor if name == "TaylorSeerCacheConfig" else ((f"`{name}`", REQUIRED.get(name, {})),)
        for label, settings in variants:
            cells = []
            for kind, stock in ((DCZImagePipeline, ZImagePipeline), (DCDiTPipeline, DiTPipeline)):
                for plain in (False, True):
                    pipe = (kind.from_pretrained(micro_dc, torch_dtype=torch.float32) if kind is DCZImagePipeline
                            else micro_dc_dit(layers=3))  # fmt: skip
                    if plain:
                        pipe = stock(**pipe.components) if stock is ZImagePipeline else DiTPipeline(
                            pipe.transformer, pipe.vae, pipe.scheduler)  # fmt: skip
                        fastgen.enable_dc(pipe)
                    pipe.set_progress_bar_config(disable=True)
                    cells.append(what_a_cache_does(pipe, getattr(hooks, name)(**settings)))
            rows.append(f"| {label} | {' | '.join(cells)} |")
    documented = (Path(__file__).parents[2] / "docs" / "dynamic-chunking.md").read_text()
    # Row by row: older versions of diffusers have fewer caches.
    assert [row for row in rows if row not in documented] == []


def test_a_stock_pipeline_without_enable_dc_says_what_a_cache_needs(z: DCZImagePipeline) -> None:
    z.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    stock = ZImagePipeline(**z.components)
    with pytest.raises(ValueError, match=r"step cache .* call fastgen.enable_dc\(pipe\)"):
        stock("a red circle", height=16, width=16, num_inference_steps=2)


def test_one_generation_at_a_time_uses_a_cache(z: DCZImagePipeline) -> None:
    z.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))

    def nested(*_: Any) -> dict[str, Any]:
        draw(z)
        return {}

    with pytest.raises(ValueError, match="its step cache is in use by another generation"):
        draw(z, callback_on_step_end=nested)
    draw(z)


def test_copies_of_a_cached_model_cache_for_themselves(dit: DCDiTPipeline) -> None:
    plain = draw(dit).images
    dit.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    cached = draw(dit).images
    for twin in (copy.deepcopy(dit), pickle.loads(pickle.dumps(dit))):
        with Calls(last_block(dit)) as calls:
            assert np.array_equal(draw(twin).images, cached)
        assert calls.count == 0 and twin.transformer.is_cache_enabled
        twin.transformer.disable_cache()
        assert np.array_equal(draw(twin).images, plain)
    assert np.array_equal(draw(dit).images, cached)


@pytest.mark.slow
def test_compiled_transformers_take_the_budget_of_the_call(dit: DCDiTPipeline) -> None:
    expected = [draw(dit, token_budget=budget).images for budget in (5, 3)]
    dit.transformer.compile(backend="eager")
    inside = [draw(dit, token_budget=budget).images for budget in (5, 3)]
    other = micro_dc_dit(layers=3)
    other.transformer = torch.compile(other.transformer, backend="eager", fullgraph=True)
    outside = [draw(other, token_budget=budget).images for budget in (5, 3)]
    assert np.array_equal(inside, expected) and np.array_equal(outside, expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_gives_the_same_pictures(pipe: Any, kind: str) -> None:
    plain = draw(pipe).images
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **options
    )
    assert np.array_equal(draw(pipe).images, plain)


def test_a_lora_file_of_z_image_loads_into_both_pipelines(z: DCZImagePipeline, tmp_path: Path) -> None:
    """Names are Z-Image's own: what was trained for the stock transformer fits the upcycled one."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    weights = {}
    for name in ("layers.0.attention.to_q", "layers.1.feed_forward.w1"):
        rows, columns = z.transformer.get_submodule(name).weight.shape
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns)
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(weights, tmp_path / "lora.safetensors")
    stock = ZImagePipeline(**z.components)
    stock.set_progress_bar_config(disable=True)
    plain = draw(z).images
    for pipe in (z, stock):
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="style")
        changed = pipe(["a red circle", "two blue squares"], height=16, width=16, num_inference_steps=STEPS,
                       output_type="np", generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        assert np.isfinite(changed).all() and not np.array_equal(changed, plain)
        pipe.unload_lora_weights()
        assert np.array_equal(draw(z).images, plain)
