"""Pipelines of many families with a call of each: what a search of any pipeline is tried on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_families as more
from PIL import Image
from tiny_flows import tiny_flux, tiny_qwen_image, tiny_sana, tiny_sd3
from tiny_pipelines import quiet
from tiny_unets import ddim, euler, tiny_sd, tiny_sdxl

import fastgen

SIDE = 32


def _picture(side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def _mask(side: int = SIDE) -> Image.Image:
    upper = np.arange(side)[:, None] < np.full(side, side // 2)[None]
    return Image.fromarray(upper.astype(np.uint8) * 255)


def _tiny() -> Any:
    import torch
    from diffusers import ZImagePipeline

    folder = Path(fastgen.__file__).parent / "assets/tiny"
    return quiet(ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32))


def _as(name: str, make: Callable[[], Any], **components: Any) -> Callable[[], Any]:
    """Another pipeline class of diffusers around the same parts."""

    def made() -> Any:
        import diffusers

        return quiet(getattr(diffusers, name)(**{**make().components, **components}))

    return made


_SQUARE = {"height": SIDE, "width": SIDE}
_WIDE = {"height": SIDE, "width": SIDE + 8}
_I2I = {"image": _picture(), "strength": 0.6}
_INPAINT = {**_SQUARE, "image": _picture(), "mask_image": _mask(), "strength": 0.8}
_CHECKER = {"requires_safety_checker": False}
_PLAIN = {"add_watermarker": False}
_PAG = {"pag_applied_layers": ["mid"]}
_SANA = {"height": 64, "width": 64, "use_resolution_binning": False, "complex_human_instruction": None}
_PIXART = {**_SQUARE, "use_resolution_binning": False}
_SD, _XL = (lambda: tiny_sd(ddim())), (lambda: tiny_sdxl(euler()))
_QWEN = {**_SQUARE, "negative_prompt": "bad"}

#: name -> (maker, arguments of the call).
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable-diffusion": (_SD, {}),
    "stable-diffusion-euler": (lambda: tiny_sd(euler()), {"negative_prompt": "bad"}),
    "stable-diffusion-unguided": (_SD, {"guidance_scale": 1.0}),
    "stable-diffusion-img2img": (_as("StableDiffusionImg2ImgPipeline", _SD, **_CHECKER), _I2I),
    "stable-diffusion-img2img-euler": (
        _as("StableDiffusionImg2ImgPipeline", lambda: tiny_sd(euler()), **_CHECKER),
        _I2I,
    ),
    "stable-diffusion-inpaint": (_as("StableDiffusionInpaintPipeline", _SD, **_CHECKER), _INPAINT),
    "stable-diffusion-pag": (_as("StableDiffusionPAGPipeline", _SD, **_CHECKER, **_PAG), {"pag_scale": 2.0}),
    "sdxl": (_XL, {}),
    "sdxl-img2img": (_as("StableDiffusionXLImg2ImgPipeline", _XL, **_PLAIN), _I2I),
    "sdxl-inpaint": (_as("StableDiffusionXLInpaintPipeline", _XL, **_PLAIN), _INPAINT),
    "sdxl-pag": (_as("StableDiffusionXLPAGPipeline", _XL, **_PLAIN, **_PAG), {"pag_scale": 2.0}),
    "flux": (lambda: tiny_flux(True), _WIDE),
    "flux-true-guidance": (lambda: tiny_flux(False), {**_WIDE, "negative_prompt": "bad", "true_cfg_scale": 3.0}),
    "flux-img2img": (_as("FluxImg2ImgPipeline", lambda: tiny_flux(True)), {**_SQUARE, **_I2I}),
    "flux-inpaint": (_as("FluxInpaintPipeline", lambda: tiny_flux(True)), _INPAINT),
    "sd3": (lambda: tiny_sd3(True), _WIDE),
    "sd3-img2img": (_as("StableDiffusion3Img2ImgPipeline", tiny_sd3), {**_SQUARE, **_I2I}),
    "qwen-image": (tiny_qwen_image, _QWEN),
    "qwen-image-img2img": (_as("QwenImageImg2ImgPipeline", tiny_qwen_image), {**_QWEN, **_I2I}),
    "qwen-image-inpaint": (_as("QwenImageInpaintPipeline", tiny_qwen_image), {**_QWEN, **_INPAINT}),
    "sana": (tiny_sana, _SANA),
    "z-image": (_tiny, {"height": 64, "width": 96, "guidance_scale": 2.0, "negative_prompt": "a green star"}),
    "z-image-img2img": (
        _as("ZImageImg2ImgPipeline", _tiny),
        {"height": 64, "width": 64, "guidance_scale": 2.0, "image": _picture(64), "strength": 0.6},
    ),
    "z-image-inpaint": (
        _as("ZImageInpaintPipeline", _tiny),
        {"height": 64, "width": 64, "image": _picture(64), "mask_image": _mask(64), "strength": 0.8},
    ),
    "pixart-alpha": (more.tiny_pixart_alpha, _PIXART),
    "pixart-sigma": (more.tiny_pixart_sigma, {**_PIXART, "negative_prompt": "bad"}),
    "aura-flow": (more.tiny_aura_flow, _SQUARE),
    "chroma": (more.tiny_chroma, _WIDE),
    "lumina2": (more.tiny_lumina2, _SQUARE),
    "cogview4": (more.tiny_cogview4, _SQUARE),
    "cogview3-plus": (more.tiny_cogview3, _SQUARE),
    "hunyuan-dit": (more.tiny_hunyuan_dit, {"height": 64, "width": 64, "use_resolution_binning": False}),
    "ovis-image": (more.tiny_ovis_image, _SQUARE),
    "kandinsky3": (more.tiny_kandinsky3, _SQUARE),
}


@cache
def family(name: str) -> Any:
    """Its pipeline; made once."""
    return FAMILIES[name][0]()
