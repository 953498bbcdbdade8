"""Pipelines whose weights are elsewhere outside their own module's forward draw the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import accelerate.big_modeling
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiTPipeline, ZImagePipeline
from diffusers.hooks import apply_group_offloading
from micro_models import PROMPTS, micro_dc_dit
from torch import Tensor, nn

from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.loading import build_rule
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.targets import target_of
from fastgen.models.upcycle import upcycle
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.elastic import enable_dc
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.names import named_policy
from fastgen.pipelines.speculative import SpeculativeImagePipeline

CPU = torch.device("cpu")
Pipe = Any
Draw = Callable[[Pipe], Tensor]
Folders = dict[str, Path]


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


# ---- where weights are outside their module's forward ----


def models_of(pipe: Pipe) -> dict[str, nn.Module]:
    parts = pipe.components.items()
    return {name: model for name, model in parts if isinstance(model, nn.Module)}


def sequential(pipe: Pipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `enable_sequential_cpu_offload` does, which takes no CPU as the device to compute on: weights are on meta."""
    for model in models_of(pipe).values():
        accelerate.cpu_offload(model, CPU, offload_buffers=False)
        assert all(parameter.is_meta for parameter in model.parameters())


def to_disk(model: nn.Module, folder: Path, **arguments: Any) -> None:
    """Weights are on disk; in memory there are NaN."""
    arguments |= {"offload_to_disk_path": str(folder)}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **arguments)
    assert all(parameter.isnan().all() for parameter in model.parameters())


def leaf_level(pipe: Pipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in models_of(pipe).items():
        to_disk(model, folder / name, offload_type="leaf_level")


def block_level(pipe: Pipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in models_of(pipe).items():
        to_disk(model, folder / name, offload_type="block_level", num_blocks_per_group=1)


def blocks_inside(pipe: Pipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks of the decoder inside an autoregressive model, two in a group, and of its other parts."""
    for name, model in models_of(pipe).items():
        # The parts that a Janus draws with, which lie two levels down.
        inner = dict(model.model.named_children()) if hasattr(model, "lm_head") else {"": model}
        for part, module in inner.items():
            if next(module.parameters(), None) is not None:
                to_disk(module, folder / name / part, offload_type="block_level", num_blocks_per_group=2)


class Away(CpuOffload):
    """As accelerate's, with the meta device as the CPU that keeps weights, and the CPU as the device that computes."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        if not hasattr(module, "kept"):  # pipelines make new hooks after each call
            owners = [owner for owner in module.modules() if owner._parameters]
            module.kept = [(owner, dict(owner._parameters)) for owner in owners]  # type: ignore[assignment]
        self.put(module, "meta")
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        self.put(module, "cpu")
        return args, kwargs

    @staticmethod
    def put(module: Any, device: str) -> None:
        for owner, kept in module.kept:
            for name, parameter in kept.items():
                owner._parameters[name] = None if parameter is None else moved(parameter, device)


def moved(parameter: nn.Parameter, device: str) -> nn.Parameter:
    return parameter if device == "cpu" else nn.Parameter(parameter.detach().to(device), requires_grad=False)


def whole_models(pipe: Pipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.big_modeling, "CpuOffload", Away)
    inside = getattr(pipe, "pipe", pipe)  # a search is not a DiffusionPipeline
    parts = models_of(pipe).values()
    # It moves a pipeline to the CPU before, where these weights are.
    monkeypatch.setattr(type(inside), "to", lambda self, *args, **kwargs: self, raising=False)
    inside.enable_model_cpu_offload(device="cpu")
    assert all(parameter.is_meta for model in parts for parameter in model.parameters())


HOW = {
    "sequential": sequential,
    "leaf_level": leaf_level,
    "block_level": block_level,
    "blocks_inside": blocks_inside,
    "whole_models": whole_models,
}


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


def stock_dit(folders: Folders) -> tuple[Pipe, Draw]:
    ours, _ = dc_dit(folders)
    pipe = DiTPipeline(ours.transformer, ours.vae, ours.scheduler)
    pipe.set_progress_bar_config(disable=True)
    enable_dc(pipe, token_budget=3)

    def draw(pipe: Pipe) -> Tensor:
        return torch.from_numpy(pipe([1, 7], num_inference_steps=2, generator=seeded(), output_type="np").images)

    return pipe, draw


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


def with_heads(folders: Folders) -> tuple[Pipe, Draw]:
    pipe, _ = speculative(None)(folders)
    heads = WindowHeads.for_target(pipe.target, window=6, width=16, heads=2).eval()
    nn.init.normal_(heads.speak.weight)
    drafter = EagleDrafter.for_target(pipe.target, heads=2)
    pipe = SpeculativeImagePipeline(pipe.model, pipe.tokenizer, drafter, heads=heads)

    def draw(pipe: Pipe) -> Tensor:
        return torch.cat([token_images(pipe, tree="heads-4"), token_images(pipe, tree="3-2")])

    return pipe, draw


def with_classes(folders: Folders) -> tuple[Pipe, Draw]:
    """CASCADE with a radius: its tables are made of the codebook."""
    pipe, _ = speculative("eagle-1")(folders)
    rule = build_rule("cascade", pipe.target, breadth=0.2, depth=0.0, radius=2.0, near=8)
    return pipe, lambda pipe: token_images(pipe, acceptance=rule, tree="3-2")


def brightness(pictures: Tensor, prompts: list[str]) -> Tensor:
    return pictures.float().mean(dim=(1, 2, 3)) / 255


def search(build: Callable[[Folders], tuple[Pipe, Draw]]) -> Callable[[Folders], tuple[Pipe, Draw]]:
    """Best of three around a pipeline, with previews in between where the policy asks for them."""

    def build_search(folders: Folders) -> tuple[Pipe, Draw]:
        inner, _ = build(folders)
        inner.set_progress_bar_config(disable=True)
        pipe = NoiseSearchPipeline(inner, brightness, named_policy("svdd", candidates=2))

        def draw(pipe: Pipe) -> Tensor:
            call: dict[str, Any] = {"generator": seeded(), "num_inference_steps": 2, "output_type": "pt"}
            if isinstance(inner, DiTPipeline):
                return pipe([1, 7], **call).images
            return pipe(PROMPTS[:2], height=16, width=16, guidance_scale=2.0, **call).images

        return pipe, draw

    return build_search


def search_without_policy(folders: Folders) -> tuple[Pipe, Draw]:
    inner, _ = speculative("eagle-1")(folders)
    return NoiseSearchPipeline(inner, policy=None), lambda pipe: token_images(pipe, pipeline_kwargs={"tree": "3-2"})


PIPELINES = {
    "dc-z-image": dc_z_image,
    "patch-grid": patch_grid,
    "stock-z-image": stock_z_image,
    "dc-dit": dc_dit,
    "stock-dit": stock_dit,
    "search-dc-z-image": search(dc_z_image),
    "search-patch-grid": search(patch_grid),
    "search-stock-z-image": search(stock_z_image),
    "search-dc-dit": search(dc_dit),
    "search-speculative": search_without_policy,
    "janus": janus,
    "jacobi": speculative(None, tree="jacobi-4"),
    "eagle-1": speculative("eagle-1", tree="3-2"),
    "eagle-3": speculative("eagle-3", tree="3-2"),
    "medusa": speculative("medusa", tree="3-2"),
    "lantern": speculative("eagle-1", tree="3-2", acceptance="lantern"),
    "gsd": speculative(None, tree="jacobi-4", acceptance="gsd"),
    "cascade": with_classes,
    "heads": with_heads,
}


ALL_WAYS = ("dc-z-image", "eagle-1", "heads", "search-patch-grid")
PAIRS = [
    pytest.param(name, how, marks=() if name in ALL_WAYS or how == "leaf_level" else pytest.mark.slow)
    for name in PIPELINES
    for how in HOW
]


@pytest.mark.parametrize(("name", "how"), PAIRS)
@pytest.mark.usefixtures("memory_without_weights_is_nan")
def test_pictures_are_those_without_offload(
    name: str, how: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, draw = PIPELINES[name](folders)
    expected = draw(pipe)
    assert expected.isfinite().all()
    HOW[how](pipe, tmp_path, monkeypatch)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)  # what was built from the weights before is not taken for gone
