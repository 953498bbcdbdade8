"""Which class a checkpoint becomes, and which settings its pictures get, all before weights load."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pipelines.loading.checkpoint import Checkpoint
from fastgen.pipelines.schema import DRAWING, SCHEMA

__all__ = [
    "check_classes",
    "class_number",
    "draws_tokens",
    "pipeline_arguments",
    "pipeline_class",
    "resolve_settings",
    "takes_classes",
]

# Our names of arguments -> those of diffusers pipelines, where they differ.
_PIPELINE_NAMES = {"steps": "num_inference_steps"}
# Settings that pipelines of tokens do not take, and why.
_NOT_FOR_TOKENS = {
    "negative_prompt": "; its row without a prompt is the prompt blanked out",
    "steps": "; it draws one token after the other",
}


# Names of pipelines that begin with a picture, also where diffusers gives that argument a default.
_FROM_IMAGE = "Img2Img|Inpaint|Edit|Upscale|ControlNet|Pix2Pix|Depth|Fill|Redux|Variation"


def draws_tokens(pipe_class: type) -> bool:
    """Whether it draws tokens, not latents, without importing its pipelines, which costs a second."""
    ours = ("JanusImagePipeline", "SpeculativeImagePipeline")
    return any(base.__name__ in ours for base in pipe_class.__mro__)


_BUDGET = ("tail_drop", "uncond_tail_drop", "token_budget")
_MOST_STEPS = 10_000  # that a list of budgets is fitted to


def pipeline_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings under the names that diffusers pipelines have for them."""
    return {_PIPELINE_NAMES.get(name, name): value for name, value in settings.items()}


def resolve_settings(
    pipe_class: type, checkpoint: Checkpoint | None, asked: dict[str, Any], image_size: int | None = None
) -> dict[str, Any]:
    """Settings of all pictures: what the user asked for, else the model's own. Needs no loaded model.

    Args:
        pipe_class: the pipeline's class.
        checkpoint: for the model's defaults and size limits.
        asked: argument name -> value, None where the user gave none.
        image_size: side in pixels of the only pictures that a Janus model draws.

    Raises:
        FastgenError: a value outside its range, or an argument that the pipeline does not take.
    """
    accepted = inspect.signature(pipe_class.__call__).parameters
    janus = draws_tokens(pipe_class)
    defaults: dict[str, Any] = {}
    if checkpoint is not None:
        defaults, image_size = checkpoint.defaults, checkpoint.fixed_size or image_size
    defaults = _own_budget(defaults, asked)
    settings: dict[str, Any] = {}
    for name, value in asked.items():
        origin, value = ("fastgen.json: ", defaults.get(name)) if value is None else ("", value)
        if value is None:
            continue
        SCHEMA[name].check(origin + name, value)
        if janus and name in ("height", "width"):
            if checkpoint is not None and checkpoint.speculative_only:
                hint = ", by its option size" if "size" in checkpoint.target_options else ""
                raise FastgenError(f"{origin}{name}: not in pixels, {checkpoint.model} has tokens{hint}")
            if image_size is not None and value != image_size:
                raise FastgenError(f"{origin}{name}: {value} is not allowed, the model draws {image_size} pixels only")
            continue
        known = _PIPELINE_NAMES.get(name, name) in accepted
        if not known or (janus and name == "negative_prompt"):
            hint = _NOT_FOR_TOKENS.get(name, "") if janus else ""
            if name == "negative_prompt" and checkpoint is not None and "negative" in checkpoint.target_options:
                hint = "; the model's option negative does that"
            raise FastgenError(f"{origin}{name}: {pipe_class.__name__} does not take it{hint}")
        settings[name] = value
    for method in DRAWING:
        method.of(settings).check_together()
    if checkpoint is not None:
        checkpoint.check_size(settings.get("height"), settings.get("width"))
        sides = (settings.get(name, accepted[name].default) for name in ("height", "width") if name in accepted)
        _check_token_budget(settings.get("token_budget"), checkpoint, *sides)
    guidance = settings.get("guidance_scale")
    if asked.get("negative_prompt") is not None and guidance is not None and guidance <= 0:
        raise FastgenError(f"negative_prompt: has no effect with guidance_scale {guidance}; needs one above 0")
    return settings


def _own_budget(defaults: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """A model's defaults with its budget of dynamic chunking for the steps that are asked for: a list, one a step, is
    read at the same shares of the way. A budget that the user asks for takes the place of all of it."""
    knobs = {name: value for name, value in defaults.items() if name in _BUDGET and value is not None}
    if not knobs:
        return defaults
    others = {name: value for name, value in defaults.items() if name not in _BUDGET}
    if any(asked.get(name) is not None for name in _BUDGET):
        return others
    steps = asked.get("steps") or defaults.get("steps")
    for name, value in knobs.items():
        if isinstance(value, list) and value and isinstance(steps, int) and steps <= _MOST_STEPS:
            knobs[name] = [value[min(len(value) - 1, (2 * i + 1) * len(value) // (2 * steps))] for i in range(steps)]
    return others | knobs


def _check_token_budget(
    budget: int | None, checkpoint: Checkpoint, height: object = None, width: object = None
) -> None:
    """Refuse more tokens than a picture of that size has, or fewer than the model keeps at least, as far as the
    configuration tells."""
    if budget is None or not checkpoint.has_dynamic_chunking:
        return
    config = read_object(checkpoint.component("transformer") / "config.json")
    side = checkpoint.size_multiple if config.get("grid") == "patch" else checkpoint.size_multiple // 2
    if side and isinstance(height, int) and isinstance(width, int):
        length, floor = (height // side) * (width // side), config.get("floor", 0.0)
        least = math.ceil(check_number("floor", floor, 0, 1) * length - 1e-9)
        check_integer("token_budget", budget, max(1, least), length)


def takes_classes(pipe_class: type) -> bool:
    """Whether the pipeline draws classes, as DiT does: a prompt is the name or the number of one."""
    accepted = inspect.signature(pipe_class.__call__).parameters
    return "class_labels" in accepted and "prompt" not in accepted


def class_number(prompt: str, names: Mapping[str, int], count: int) -> int:
    """The class that a prompt means: its number, or one of its names.

    Args:
        prompt: of the user.
        names: of the classes.
        count: of classes; 0 where it is not known.

    Raises:
        FastgenError: the model has no such class.
    """
    text = prompt.strip()
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else names.get(text, -1)
    if not 0 <= number < (count or number + 1):
        numbers = f"a number below {count}" if count else "a number"
        raise FastgenError(f"prompt: the model has no class {text[:40]!r}, needs {numbers} or the name of a class")
    return number


def check_classes(checkpoint: Checkpoint, prompts: Iterable[str]) -> None:
    """Refuse prompts that name no class of a model that draws classes; other models take any. Needs no weights.

    Raises:
        FastgenError: names the first such prompt.
    """
    if checkpoint.draws_tokens or not takes_classes(pipeline_class(checkpoint)):
        return
    file = checkpoint.folder / "model_index.json"
    listed = read_object(file).get("id2label") or {}
    if not isinstance(listed, dict) or not all(
        number.isdecimal() and isinstance(label, str) for number, label in listed.items()
    ):
        raise FastgenError(f"{file}: id2label is no table of numbers and names")
    names = {name.strip(): int(number) for number, label in listed.items() for name in label.split(",")}
    count = read_object(checkpoint.component("transformer") / "config.json").get("num_embeds_ada_norm")
    for prompt in dict.fromkeys(prompts):
        class_number(prompt, names, count if isinstance(count, int) else 0)


def pipeline_class(checkpoint: Checkpoint, method: str | None = None, begins: str | None = None) -> type:
    """The class that `load_pipeline` makes of a checkpoint; loads no weights.

    Args:
        checkpoint: of the model.
        method: "speculative" for speculative decoding of a model that draws tokens.
        begins: "image" or "mask_image": the class that begins with a picture, or with a part of one.

    Raises:
        FastgenError: the installed diffusers has no such class.
    """
    if begins is not None and (checkpoint.draws_tokens or checkpoint.has_dynamic_chunking):
        raise FastgenError(f"--image: model {checkpoint.model!r} begins with no picture")
    if checkpoint.speculative_only and method not in (None, "speculative"):
        raise FastgenError(
            f"method {method}: model {checkpoint.model!r} draws by method speculative; tree 'plain' is its plain loop"
        )
    if method == "speculative" or checkpoint.speculative_only:
        if not checkpoint.draws_tokens:
            raise FastgenError(f"method speculative: model {checkpoint.model!r} does not draw tokens")
        from fastgen.pipelines.speculative import SpeculativeImagePipeline

        return SpeculativeImagePipeline
    if checkpoint.kind == "janus":
        from fastgen.pipelines.janus import JanusImagePipeline

        return JanusImagePipeline
    import diffusers

    if checkpoint.has_dynamic_chunking:
        from fastgen.pipelines.dc_z_image import DCZImagePipeline

        return DCZImagePipeline
    found = getattr(diffusers, checkpoint.pipeline_class, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise FastgenError(
            f"model {checkpoint.model!r} needs {checkpoint.pipeline_class}, which the installed diffusers "
            "does not have; update it (the code of custom pipelines is not run)"
        )
    if begins is not None:
        return _from_image(checkpoint, found, begins)
    takes = inspect.signature(found.__call__).parameters
    from_image = re.search(_FROM_IMAGE, found.__name__)
    needs_more = [
        name
        for name, parameter in takes.items()
        if name not in ("self", "prompt", "class_labels")
        and parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if from_image or needs_more or not {"prompt", "class_labels"} & takes.keys():
        raise FastgenError(
            f"model {checkpoint.model!r} is a {found.__name__}; only pipelines that draw from a text or a class are "
            "supported"
        )
    return found


def _from_image(checkpoint: Checkpoint, found: type, begins: str) -> type:
    """The class itself, or that of the same parts in diffusers, whose call takes `begins`."""
    from diffusers.pipelines import auto_pipeline

    if begins in inspect.signature(found.__call__).parameters:
        return found
    tables = {
        "image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "mask_image": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    }
    for name, kind in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items():
        other: type | None = tables[begins].get(name)
        if kind is found and other is not None:
            return other
    option = {"image": "--image", "mask_image": "--mask"}[begins]
    raise FastgenError(
        f"{option}: model {checkpoint.model!r} is a {found.__name__}, and diffusers has no pipeline for that"
    )
