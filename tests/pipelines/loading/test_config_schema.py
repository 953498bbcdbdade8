"""Configurations against the classes that they build: wrong kinds and ranges are refused, what libraries write not."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import ConfigMixin

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.config_schema import check_arguments

FILE = Path("config.json")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("UNet2DConditionModel", "in_channels", True),
        ("UNet2DConditionModel", "in_channels", "4"),
        ("UNet2DConditionModel", "in_channels", -4),
        ("UNet2DConditionModel", "in_channels", 4.5),
        ("UNet2DConditionModel", "in_channels", [4]),
        ("UNet2DConditionModel", "sample_size", [64, 64, 64]),
        ("UNet2DConditionModel", "block_out_channels", [8, "16"]),
        ("UNet2DConditionModel", "block_out_channels", 8),
        ("UNet2DConditionModel", "down_block_types", [[["x"]]]),
        ("UNet2DConditionModel", "center_input_sample", 1),
        ("FluxTransformer2DModel", "num_layers", -1),
        ("FluxTransformer2DModel", "guidance_embeds", "yes"),
        ("FluxTransformer2DModel", "axes_dims_rope", [16, None, {}]),
        ("ZImageTransformer2DModel", "n_layers", "30"),
        ("ZImageTransformer2DModel", "axes_dims", {"a": 1}),
        ("ZImageTransformer2DModel", "norm_eps", -1.0),
        ("AutoencoderKL", "scaling_factor", {}),
        ("AutoencoderKL", "scaling_factor", -0.5),
        ("AutoencoderKL", "shift_factor", {}),
        ("AutoencoderKL", "latents_mean", "../../nowhere"),
        ("DDIMScheduler", "beta_schedule", 5),
        ("DDIMScheduler", "num_train_timesteps", -1000),
        ("DDIMScheduler", "beta_end", float("inf")),
        ("FlowMatchEulerDiscreteScheduler", "shift_terminal", {"a": {"b": []}}),
        ("FlowMatchEulerDiscreteScheduler", "max_shift", {}),
        ("StableDiffusionPipeline", "requires_safety_checker", "no"),
        ("StableDiffusionPipeline", "unet", 5),
    ],
)
def test_a_value_that_the_class_cannot_take_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(FastgenError, match=f"config.json: {key} is "):
        check_arguments({key: value}, getattr(diffusers, name), FILE)


@pytest.mark.parametrize("config", [[], "x", None, 5])
def test_a_configuration_is_an_object(config: Any) -> None:
    with pytest.raises(FastgenError, match="needs a JSON object"):
        check_arguments(config, diffusers.AutoencoderKL, FILE)


def classes() -> Iterator[tuple[Any, dict[str, Any]]]:
    """All of diffusers with their own defaults, as they are saved."""
    for name in dir(diffusers):
        found = getattr(diffusers, name, None)
        if isinstance(found, type) and issubclass(found, ConfigMixin):
            given = inspect.signature(found.__init__).parameters.values()  # type: ignore[misc]
            config = {each.name: each.default for each in given if each.default is not each.empty}
            try:
                yield found, json.loads(json.dumps(config))
            except TypeError:  # a default that no file can hold
                continue


def test_every_class_of_diffusers_takes_its_own_defaults() -> None:
    count = 0
    for found, config in classes():
        check_arguments(config, found, Path(found.__name__))
        count += 1
    assert count > 300


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UNet2DConditionModel", {"attention_head_dim": [5, 10, 20, 20], "transformer_layers_per_block": [1, 2, 10]}),
        ("UNet2DConditionModel", {"transformer_layers_per_block": [[1, 2], 3], "cross_attention_dim": 2048}),
        ("UNet2DConditionModel", {"sample_size": [64, 96], "freq_shift": 0, "num_class_embeds": None}),
        ("AutoencoderKL", {"shift_factor": -0.1, "scaling_factor": 1, "latents_mean": [-0.5, 0.5]}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": float("-inf"), "trained_betas": [0.1, 0.2]}),
        ("FluxTransformer2DModel", {"axes_dims_rope": [16, 56, 56], "out_channels": None, "num_single_layers": 0}),
        ("StableDiffusionPipeline", {"requires_safety_checker": True, "feature_extractor": None}),
    ],
)
def test_what_published_configurations_hold_passes(name: str, config: dict[str, Any]) -> None:
    check_arguments(config, getattr(diffusers, name), FILE)


def test_a_scheduler_with_an_infinite_default_is_read_from_its_folder(micro_z: Path, tmp_path: Path) -> None:
    """JSON of libraries holds -Infinity there."""
    import shutil

    from fastgen.pipelines.loading.checkpoint import find_checkpoint

    folder = shutil.copytree(micro_z, tmp_path / "z")
    diffusers.DPMSolverMultistepScheduler().save_pretrained(Path(folder) / "scheduler")
    assert "Infinity" in (Path(folder) / "scheduler" / "scheduler_config.json").read_text()
    find_checkpoint(folder)


def test_a_list_whose_members_have_no_type_takes_any() -> None:
    class Model:
        def __init__(self, places: list | None = None, mixed: int | list | tuple[int] = 1) -> None: ...  # type: ignore[type-arg]

    check_arguments({"places": [1, "a"], "mixed": [[1], 2]}, Model, FILE)
    with pytest.raises(FastgenError, match="places is 'x', needs"):
        check_arguments({"places": "x"}, Model, FILE)
