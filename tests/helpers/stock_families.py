"""Pipelines of many families with a call of each: what a search of any pipeline is tried on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_families as more
import tiny_newer as newer
import tiny_variants as variants
import torch
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
    from diffusers import ZImagePipeline

    folder = Path(fastgen.__file__).parent / "assets/tiny"
    return quiet(ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32))


def _as(name: str, make: Callable[[], Any], **components: Any) -> Callable[[], Any]:
    """Another pipeline class of diffusers around the same parts."""

    def made() -> Any:
        import diffusers

        kind = getattr(diffusers, name)
        takes = inspect.signature(kind.__init__).parameters
        parts = {part: value for part, value in make().components.items() if part in takes}
        return quiet(kind(**{**parts, **components}))

    return made


_SQUARE = {"height": SIDE, "width": SIDE}
_WIDE = {"height": SIDE, "width": SIDE + 8}
_I2I = {"image": _picture(), "strength": 0.6}
_INPAINT = {**_SQUARE, "image": _picture(), "mask_image": _mask(), "strength": 0.8}
_CONTROL = {**_SQUARE, "control_image": _picture(), "control_guidance_end": 0.6}
_CHECKER = {"requires_safety_checker": False}
_PLAIN = {"add_watermarker": False}
_PAG = {"pag_applied_layers": ["mid"]}
_BLOCKS = {"pag_applied_layers": ["blocks.1"]}
_SANA = {"height": 64, "width": 64, "use_resolution_binning": False, "complex_human_instruction": None}
_PIXART = {**_SQUARE, "use_resolution_binning": False}
_SD, _XL, _FLUX = (lambda: tiny_sd(ddim())), (lambda: tiny_sdxl(euler())), (lambda: tiny_flux(True))
_QWEN = {**_SQUARE, "negative_prompt": "bad"}
_Z = {"height": 64, "width": 64, "guidance_scale": 2.0}
_PRIOR = torch.randint(0, 32, (1, 16), generator=torch.Generator().manual_seed(0))


def _controlled(name: str, make: Callable[[], Any], controlnet: Callable[..., Any], **components: Any) -> Any:
    def made() -> Any:
        pipe = make()
        reads = inspect.signature(controlnet).parameters
        return variants.with_controlnet(name, pipe, controlnet(pipe) if reads else controlnet(), **components)

    return made


#: name -> (maker, arguments of the call).
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable-diffusion": (_SD, {}),
    "stable-diffusion-euler": (lambda: tiny_sd(euler()), {"negative_prompt": "bad"}),
    "stable-diffusion-img2img": (_as("StableDiffusionImg2ImgPipeline", _SD, **_CHECKER), _I2I),
    "stable-diffusion-img2img-euler": (
        _as("StableDiffusionImg2ImgPipeline", lambda: tiny_sd(euler()), **_CHECKER),
        _I2I,
    ),
    "stable-diffusion-inpaint": (_as("StableDiffusionInpaintPipeline", _SD, **_CHECKER), _INPAINT),
    "stable-diffusion-pag": (_as("StableDiffusionPAGPipeline", _SD, **_CHECKER, **_PAG), {"pag_scale": 2.0}),
    "stable-diffusion-controlnet": (
        _controlled("StableDiffusionControlNetPipeline", _SD, variants.unet_controlnet, **_CHECKER),
        {**_SQUARE, "image": _picture(), "control_guidance_start": 0.3},
    ),
    "stable-diffusion-edit": (
        _as("StableDiffusionInstructPix2PixPipeline", lambda: tiny_sd(ddim(), reads=8), **_CHECKER),
        {"image": _picture(), "guidance_scale": 3.0},
    ),
    "sdxl": (_XL, {}),
    "sdxl-img2img": (_as("StableDiffusionXLImg2ImgPipeline", _XL, **_PLAIN), _I2I),
    "sdxl-inpaint": (_as("StableDiffusionXLInpaintPipeline", _XL, **_PLAIN), _INPAINT),
    "sdxl-edit": (
        _as("StableDiffusionXLInstructPix2PixPipeline", lambda: tiny_sdxl(euler(), reads=8), **_PLAIN),
        {**_SQUARE, "image": _picture(), "guidance_scale": 3.0},
    ),
    "sdxl-pag": (_as("StableDiffusionXLPAGPipeline", _XL, **_PLAIN, **_PAG), {"pag_scale": 2.0}),
    "sdxl-controlnet": (
        _controlled("StableDiffusionXLControlNetPipeline", _XL, variants.unet_controlnet, **_PLAIN),
        {**_SQUARE, "image": _picture(), "control_guidance_end": 0.6},
    ),
    "flux": (_FLUX, _SQUARE),
    "flux-true-guidance": (lambda: tiny_flux(False), {**_SQUARE, "negative_prompt": "bad", "true_cfg_scale": 3.0}),
    "flux-img2img": (_as("FluxImg2ImgPipeline", _FLUX), {**_SQUARE, **_I2I}),
    "flux-inpaint": (_as("FluxInpaintPipeline", _FLUX), _INPAINT),
    "flux-control": (
        _as("FluxControlPipeline", lambda: tiny_flux(True, reads=32)),
        {**_SQUARE, "control_image": _picture()},
    ),
    "flux-fill": (_as("FluxFillPipeline", lambda: tiny_flux(True, reads=96)), _INPAINT),
    "flux-kontext": (
        _as("FluxKontextPipeline", _FLUX),
        {**_SQUARE, "image": _picture(), "max_area": SIDE * SIDE, "_auto_resize": False},
    ),
    "flux-controlnet": (_controlled("FluxControlNetPipeline", _FLUX, variants.flux_controlnet), _CONTROL),
    "flux2": (newer.tiny_flux2, {**_SQUARE, "text_encoder_out_layers": (1, 2, 3)}),
    "flux2-klein": (newer.tiny_flux2_klein, {**_SQUARE, "text_encoder_out_layers": (1, 2, 3)}),
    "flux2-klein-edit": (
        newer.tiny_flux2_klein,
        {**_SQUARE, "text_encoder_out_layers": (1, 2, 3), "image": _picture(64)},
    ),
    "sd3": (lambda: tiny_sd3(True), _SQUARE),
    "sd3-skipped-layers": (
        tiny_sd3,
        {**_SQUARE, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7, "skip_layer_guidance_start": 0.1},
    ),
    "sd3-img2img": (_as("StableDiffusion3Img2ImgPipeline", tiny_sd3), {**_SQUARE, **_I2I}),
    "sd3-inpaint": (_as("StableDiffusion3InpaintPipeline", lambda: tiny_sd3(channels=16)), _INPAINT),
    "sd3-pag": (_as("StableDiffusion3PAGPipeline", tiny_sd3, **_BLOCKS), {**_SQUARE, "pag_scale": 2.0}),
    "sd3-controlnet": (
        _controlled("StableDiffusion3ControlNetPipeline", tiny_sd3, variants.sd3_controlnet),
        _CONTROL,
    ),
    "qwen-image": (tiny_qwen_image, _QWEN),
    "qwen-image-img2img": (_as("QwenImageImg2ImgPipeline", tiny_qwen_image), {**_QWEN, **_I2I}),
    "qwen-image-inpaint": (_as("QwenImageInpaintPipeline", tiny_qwen_image), {**_QWEN, **_INPAINT}),
    "qwen-image-edit": (lambda: variants.qwen_edit(tiny_qwen_image()), {**_QWEN, "image": _picture()}),
    "qwen-image-controlnet": (
        _controlled("QwenImageControlNetPipeline", tiny_qwen_image, variants.qwen_controlnet),
        {**_QWEN, **_CONTROL},
    ),
    "sana": (tiny_sana, _SANA),
    "sana-pag": (_as("SanaPAGPipeline", tiny_sana, pag_applied_layers="transformer_blocks.1"), _SANA),
    "z-image": (_tiny, {**_Z, "negative_prompt": "a green star"}),
    "z-image-truncated-guidance": (_tiny, {**_Z, "cfg_truncation": 0.5, "cfg_normalization": 1.0}),
    "z-image-img2img": (_as("ZImageImg2ImgPipeline", _tiny), {**_Z, "image": _picture(64), "strength": 0.6}),
    "z-image-inpaint": (
        _as("ZImageInpaintPipeline", _tiny),
        {**_Z, "image": _picture(64), "mask_image": _mask(64), "strength": 0.8},
    ),
    "z-image-controlnet": (
        _controlled("ZImageControlNetPipeline", _tiny, variants.z_image_controlnet),
        {**_Z, "control_image": _picture(64)},
    ),
    "pixart-alpha": (more.tiny_pixart_alpha, _PIXART),
    "pixart-sigma": (more.tiny_pixart_sigma, {**_PIXART, "negative_prompt": "bad"}),
    "pixart-sigma-pag": (_as("PixArtSigmaPAGPipeline", more.tiny_pixart_sigma, **_BLOCKS), _PIXART),
    "aura-flow": (more.tiny_aura_flow, _SQUARE),
    "chroma": (more.tiny_chroma, _SQUARE),
    "chroma-img2img": (_as("ChromaImg2ImgPipeline", more.tiny_chroma), {**_SQUARE, **_I2I}),
    "lumina2": (more.tiny_lumina2, {**_SQUARE, "cfg_trunc_ratio": 0.5}),
    "cogview4": (more.tiny_cogview4, _SQUARE),
    "cogview3-plus": (more.tiny_cogview3, _SQUARE),
    "hunyuan-dit": (more.tiny_hunyuan_dit, {"height": 64, "width": 64, "use_resolution_binning": False}),
    "hunyuan-image": (newer.tiny_hunyuan_image, _SQUARE),
    "hunyuan-image-meanflow": (lambda: newer.tiny_hunyuan_image(meanflow=True), _SQUARE),
    "ovis-image": (more.tiny_ovis_image, _SQUARE),
    "kandinsky3": (more.tiny_kandinsky3, {**_SQUARE, "guidance_scale": 1.5}),
    "kandinsky5": (newer.tiny_kandinsky5, {"height": 64, "width": 64}),
    "hidream": (newer.tiny_hidream, _SQUARE),
    "bria-fibo": (newer.tiny_bria_fibo, {"height": 64, "width": 64}),
    "prx": (newer.tiny_prx, {**_SQUARE, "use_resolution_binning": False, "skip_text_cleaning": True}),
    "krea2": (newer.tiny_krea2, _SQUARE),
    "glm-image": (newer.tiny_glm_image, {**_SQUARE, "prior_token_ids": _PRIOR}),
    "ernie-image": (newer.tiny_ernie_image, {**_SQUARE, "use_pe": False}),
}


@cache
def family(name: str) -> Any:
    """Its pipeline; made once."""
    return FAMILIES[name][0]()
