"""Pipelines whose weights are elsewhere outside their own module's forward draw the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.hooks import apply_group_offloading
from micro_models import PROMPTS, micro_dc_dit
from torch import Tensor, nn

from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.loading import build_rule
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.targets import target_of
from fastgen.models.upcycle import upcycle
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.elastic import enable_dc
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.speculative import SpeculativeImagePipeline

CPU = torch.device("cpu")
Pipe = Any
Draw = Callable[[Pipe], Tensor]
Folders = dict[str, Path]


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


# ---- where weights are outside their module's forward ----


def sequential(model: nn.Module, folder: Path) -> None:
    """As `enable_sequential_cpu_offload` does, which takes no CPU as the device to compute on: weights are on meta."""
    accelerate.cpu_offload(model, CPU, offload_buffers=False)
    assert all(parameter.is_meta for parameter in model.parameters())


def leaf_level(model: nn.Module, folder: Path) -> None:
    """Weights are on disk; in memory there are NaN."""
    arguments: Any = {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **arguments)
    assert all(parameter.isnan().all() for parameter in model.parameters())


HOW = {"sequential": sequential, "leaf_level": leaf_level}


@pytest.fixture
def memory_without_weights_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills `torch.empty`
    yield
    torch.use_deterministic_algorithms(False)


# ---- pipelines ----


@pytest.fixture
def folders(micro_z: Path, micro_dc: Path, micro_janus: Path) -> Folders:
    return {"z": micro_z, "dc": micro_dc, "janus": micro_janus}


def dc_z_image(folders: Folders) -> tuple[Pipe, Draw]:
    pipe = DCZImagePipeline.from_pretrained(folders["dc"], torch_dtype=torch.float32)
    return pipe, lambda pipe: images(pipe, uncond_tail_drop=0.5, tail_drop=0.3)


def patch_grid(folders: Folders) -> tuple[Pipe, Draw]:
    pipe = ZImagePipeline.from_pretrained(folders["z"], torch_dtype=torch.float32)
    enable_dc(pipe, upcycle(pipe.transformer, grid="patch"), tail_drop=0.3)
    return pipe, images


def stock_z_image(folders: Folders) -> tuple[Pipe, Draw]:
    pipe = ZImagePipeline.from_pretrained(folders["dc"], torch_dtype=torch.float32)
    enable_dc(pipe, tail_drop=0.3)
    return pipe, images


def dc_dit(folders: Folders) -> tuple[Pipe, Draw]:
    def draw(pipe: Pipe) -> Tensor:
        picture = pipe([1, 7], num_inference_steps=2, generator=seeded(), tail_drop=0.3, output_type="np").images
        return torch.from_numpy(picture)

    return micro_dc_dit(), draw


def images(pipe: Pipe, **knobs: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0}
    return pipe(PROMPTS[:2], generator=seeded(), output_type="pt", **size, **knobs).images


def janus(folders: Folders) -> tuple[Pipe, Draw]:
    return JanusImagePipeline.from_pretrained(folders["janus"], torch_dtype=torch.float32), token_images


def token_images(pipe: Pipe, **knobs: Any) -> Tensor:
    drawn = pipe(PROMPTS[:2], generator=seeded(), guidance_scale=3.0, output_type="pt", **knobs)
    return torch.cat([drawn.images.flatten(), drawn.tokens.flatten()])


def speculative(drafter: str | None, **knobs: Any) -> Callable[[Folders], tuple[Pipe, Draw]]:
    def build(folders: Folders) -> tuple[Pipe, Draw]:
        plain = JanusImagePipeline.from_pretrained(folders["janus"], torch_dtype=torch.float32)
        target = target_of(plain.model, plain.tokenizer)
        torch.manual_seed(0)
        kinds: dict[str | None, Callable[[], Any]] = {
            "eagle-1": lambda: EagleDrafter.for_target(target, heads=2),
            "eagle-3": lambda: EagleDrafter.for_target(target, heads=2, variant=3),
            "medusa": lambda: MedusaDrafter.for_target(target),
            None: lambda: None,
        }
        pipe = SpeculativeImagePipeline(plain.model, plain.tokenizer, kinds[drafter]())
        return pipe, lambda pipe: token_images(pipe, **knobs)

    return build


def with_classes(folders: Folders) -> tuple[Pipe, Draw]:
    """CASCADE with a radius: its tables are made of the codebook."""
    pipe, _ = speculative("eagle-1")(folders)

    def draw(pipe: Pipe) -> Tensor:
        rule = build_rule("cascade", pipe.target, breadth=0.2, depth=0.0, radius=2.0, near=8, boost=1.0)
        return token_images(pipe, acceptance=rule, tree="3-2")

    return pipe, draw


PIPELINES = {
    "dc-z-image": dc_z_image,
    "patch-grid": patch_grid,
    "stock-z-image": stock_z_image,
    "dc-dit": dc_dit,
    "janus": janus,
    "jacobi": speculative(None, tree="jacobi-4"),
    "eagle-1": speculative("eagle-1", tree="3-2"),
    "eagle-3": speculative("eagle-3", tree="3-2"),
    "medusa": speculative("medusa", tree="3-2"),
    "lantern": speculative("eagle-1", tree="3-2", acceptance="lantern"),
    "gsd": speculative(None, tree="jacobi-4", acceptance="gsd"),
    "cascade": with_classes,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.usefixtures("memory_without_weights_is_nan")
def test_pictures_are_those_without_offload(name: str, how: str, folders: Folders, tmp_path: Path) -> None:
    pipe, draw = PIPELINES[name](folders)
    expected = draw(pipe)
    assert expected.isfinite().all()
    for part, model in pipe.components.items():
        if isinstance(model, nn.Module):
            HOW[how](model, tmp_path / part)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)  # what was built from the weights before is not taken for gone
