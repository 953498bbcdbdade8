"""ControlNets and editing pipelines around the parts of tiny pipelines."""

from __future__ import annotations

import inspect
from typing import Any

from tiny_flows import QWEN, SD3
from tiny_pipelines import begin_template, joint, quiet, shaken


def with_controlnet(name: str, pipe: Any, controlnet: Any, **components: Any) -> Any:
    """A pipeline class of diffusers around the same parts and a ControlNet that says something."""
    import diffusers

    kind = getattr(diffusers, name)
    takes = inspect.signature(kind.__init__).parameters
    parts = {part: value for part, value in pipe.components.items() if part in takes}
    return quiet(kind(**{**parts, "controlnet": shaken(controlnet, 7), **components}))


def unet_controlnet(pipe: Any) -> Any:
    """For Stable Diffusion and its XL."""
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(4, 8, 8), load_weights_from_unet=False
    )


def flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel

    return FluxControlNetModel(in_channels=16, **joint(), pooled_projection_dim=16, guidance_embeds=True)


def sd3_controlnet() -> Any:
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel(**SD3, num_layers=1)


def qwen_controlnet() -> Any:
    from diffusers import QwenImageControlNetModel

    return QwenImageControlNetModel(**QWEN, num_layers=1)


def z_image_controlnet(pipe: Any) -> Any:
    from diffusers import ZImageControlNetModel

    config = pipe.transformer.config
    return ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0],
        control_in_dim=config.in_channels,
        dim=config.dim,
        n_refiner_layers=1,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
    )


class Texts:
    """A processor that reads texts only."""

    def __init__(self, words: Any) -> None:
        self._words = words

    def __call__(self, text: Any, images: Any = None, videos: None = None, **how: Any) -> Any:
        return self._words(text, **how)

    def num_special_tokens_to_add(self) -> int:
        return int(self._words.num_special_tokens_to_add())


def qwen_edit(pipe: Any) -> Any:
    """Qwen-Image-Edit; its text encoder sees the text only, its transformer the picture."""
    from diffusers import QwenImageEditPipeline
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

    sizes = getattr(module.calculate_dimensions, "plain", module.calculate_dimensions)

    def small(area: int, ratio: float) -> Any:
        return sizes(area // 1024, ratio)

    small.plain = sizes  # type: ignore[attr-defined]
    module.calculate_dimensions = small
    edit = QwenImageEditPipeline(**pipe.components, processor=Texts(pipe.tokenizer))
    begin_template(edit, edit.prompt_template_encode)
    return quiet(edit)
