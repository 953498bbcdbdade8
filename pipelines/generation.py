"""One call for any text-to-image pipeline: many prompts and seeds in, finished pictures out, one at a time.

Every picture has its own `torch.Generator` on the CPU, so that its random numbers depend only on its seed. Rounding
depends on the batch: matrix products and convolutions sum in another order when the batch has another shape, which
moves some pixels by one level. `generate_images` draws `batch_size` pictures together unless ``batch_invariant=True``
asks for pixels that do not depend on the batch.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from fastgen.accounting import Stats, add_note, count_flops, note_path
from fastgen.checks import check_bool, check_callable, check_integer
from fastgen.contracts import Loss
from fastgen.drafters.names import LOSSLESS
from fastgen.errors import FastgenError
from fastgen.models.chat_templates import check_chat_template
from fastgen.models.elastic import StepRecord
from fastgen.pipelines.finite import check_output
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, Checkpoint
from fastgen.pipelines.loading.faults import fault, is_out_of_memory
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.schema import SETTINGS, check_prompt
from fastgen.pipelines.settings import (
    class_number,
    draws_tokens,
    pipeline_arguments,
    resolve_settings,
    takes_classes,
)
from fastgen.pipelines.summary import reported
from fastgen.pipelines.watching import watched

__all__ = [
    "GeneratedImage",
    "Progress",
    "explained_drawing",
    "generate_images",
    "loaded_models",
    "model_fault",
    "set_checkpoint",
    "unknown_words",
]

T = TypeVar("T")

# Which model a pipeline was loaded from. Kept outside the pipeline: diffusers saves and compares its attributes.
_checkpoints: weakref.WeakKeyDictionary[DiffusionPipeline, Checkpoint] = weakref.WeakKeyDictionary()
_loaded: list[Checkpoint] = []


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """
    Args:
        image: RGB picture.
        prompt, seed: what it was made from.
        stats: what the call that made it did.
        images: how many that call made.
        loss: what the picture is to the one that the stock model makes of the same seed and settings.
        steps: latents and kept tokens of every step, if they were recorded; the picture is sample `sample` of them.
        sample: see `steps`.
        search: what the search for it did (`fastgen.pipelines.search.report.SearchReport.as_dict`), if there was one.
        interrupted: something ended that search before its time.
        others: notes of the call on its other pictures.
    """

    image: Image.Image
    prompt: str
    seed: int
    stats: Stats
    images: int
    loss: Loss
    steps: Sequence[StepRecord] | None = None
    sample: int = 0
    search: dict[str, Any] | None = None
    interrupted: bool = False
    others: frozenset[str] = frozenset()

    @property
    def record(self) -> dict[str, Any]:
        """`images` and `stats` for JSON, without the notes on other pictures."""
        found = self.stats.as_dict()
        return {"images": self.images, **found, "notes": [note for note in found["notes"] if note not in self.others]}


@dataclass(frozen=True, slots=True)
class Progress:
    """
    Args:
        images_done, images_total: pictures that are finished, and all of them.
        images_now: pictures in the making.
        step, steps: finished steps (of an autoregressive model: tokens) of the pictures in the making, and all.
        latents: of the pictures in the making after that step, as the pipeline has them; None where it shows none.
        visits: what a round of a search evaluated: picture in the making, chain, [number, parent, time, score].
    """

    images_done: int
    images_total: int
    images_now: int
    step: int
    steps: int
    latents: torch.Tensor | None = None
    visits: Sequence[tuple[int, int, list[float | None]]] = ()

    @property
    def fraction(self) -> float:
        """Finished part of the whole work."""
        return (self.images_done + self.images_now * self.step / max(1, self.steps)) / max(1, self.images_total)


def generate_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    batch_invariant: bool = False,
    flops: bool = False,
    callback: Callable[[Progress], None] | None = None,
    record_steps: bool = False,
    beginning: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[GeneratedImage]:
    """Make picture i from prompts[i] and seeds[i]; pictures are yielded in order, as soon as their batch is done.

    A setting that is None is taken from the model's fastgen.json, else from the pipeline's own default.

    Args:
        pipe: any diffusers text-to-image pipeline.
        prompts, seeds: of equal length.
        batch_size: how many pictures are made together, at most.
        batch_invariant: the same prompt, seed and settings give the same pixels for every batch size and whatever
            the other pictures are (same machine, same number of threads). A diffusion pipeline then draws one picture
            at a time, which is slower. False draws `batch_size` of them together, with pixels equal up to rounding.
        flops: count FLOPs as well; takes some time.
        callback: called after every step.
        record_steps: keep latents and kept tokens of every step (dynamic chunking only).
        beginning: what pictures begin with, for a pipeline that takes it: `image`, `mask_image`, `strength`.
        settings: those of `fastgen.pipelines.schema` that differ from the model's own: `steps`, `guidance_scale`,
            `height`, `temperature`, `tail_drop`, `acceptance` …

    Raises:
        FastgenError: an argument outside its range, or one that this pipeline does not take. Raised by this call,
            before the first picture is asked for.
    """
    prompts, seeds = _checked_lists(prompts, seeds)
    batch_size = check_integer("batch_size", batch_size, 1, 2**31 - 1)
    for name, flag in (("batch_invariant", batch_invariant), ("flops", flops), ("record_steps", record_steps)):
        check_bool(name, flag)
    check_callable("callback", callback)
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise FastgenError(f"{unknown[0]}: is no setting; there are {', '.join(SETTINGS)}")
    callback = None if callback is None else _of_caller(callback)
    asked = {name: settings.get(name) for name in SETTINGS}
    asked |= {name: _of_caller(value) for name, value in asked.items() if callable(value)}
    resolved = resolve_settings(type(pipe), _checkpoints.get(pipe), asked, getattr(pipe, "image_size", None))
    if record_steps:
        if "output_chunks" not in inspect.signature(type(pipe).__call__).parameters:
            raise FastgenError(f"record_steps: {type(pipe).__name__} has no dynamic chunking to record")
        resolved["output_chunks"] = True
    begin = {name: value for name, value in (beginning or {}).items() if value is not None}
    for name in begin:
        if name not in inspect.signature(type(pipe).__call__).parameters:
            raise FastgenError(f"{name}: {type(pipe).__name__} does not take it")
    negative_prompt = settings.get("negative_prompt")
    if takes_classes(type(pipe)):
        for prompt in prompts:
            class_label(pipe, prompt)
    checkpoint = _checkpoints.get(pipe)
    if checkpoint is not None and checkpoint.model not in EMBEDDED_MODELS:
        for part in pipe.components.values():
            check_chat_template(part, f"model {checkpoint.model!r}", list(dict.fromkeys(prompts)))
    with explained_drawing(checkpoint):  # reads the prompts with the model's tokenizer and template
        cut = check_prompt_lengths(pipe, [*prompts, *([negative_prompt] if negative_prompt else [])])
    notes = [[*cut.get(prompt, ()), *cut.get(negative_prompt or "", ())] for prompt in prompts]
    return _generate(pipe, prompts, seeds, notes, resolved, begin, batch_size, batch_invariant, flops, callback)


def _checked_lists(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    for name, values in (("prompts", prompts), ("seeds", seeds)):
        if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
            raise FastgenError(f"{name}: {values!r} is not allowed, needs a list")
    prompts, seeds = list(prompts), list(seeds)
    if len(prompts) != len(seeds):
        raise FastgenError(f"seeds: {len(seeds)} seeds for {len(prompts)} prompts; needs one seed per prompt")
    for prompt in prompts:
        check_prompt(prompt)
    seeds = [check_integer("seed", seed, 0, 2**63 - 1) for seed in seeds]
    return prompts, seeds


def unknown_words(pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[str]:
    """Words of the prompts that the model's tokenizer has no token for and the model therefore cannot see; sorted."""
    tokenizer: Any = getattr(pipe, "tokenizer", None)
    if getattr(tokenizer, "unk_token_id", None) is None or not getattr(tokenizer, "is_fast", False):
        return []
    found = set()
    for prompt in prompts:
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id:
                found.add(prompt[start:end])
    return sorted(found)


def class_label(pipe: Any, prompt: str) -> int:
    """The class that a prompt means to a pipeline that draws classes.

    Raises:
        FastgenError: the model has no such class.
    """
    count = int(getattr(pipe.transformer.config, "num_embeds_ada_norm", None) or 0)
    return class_number(prompt, getattr(pipe, "labels", None) or {}, count)


def set_checkpoint(pipe: DiffusionPipeline, checkpoint: Checkpoint) -> None:
    """Remember which model `pipe` was loaded from, for its defaults and its size limits."""
    _checkpoints[pipe] = checkpoint
    _loaded.append(checkpoint)


def loaded_models() -> int:
    """How many models this process has loaded so far."""
    return len(_loaded)


def model_fault(error: Exception, earlier: int) -> FastgenError | None:
    """The line for an error that ended a command, where it had loaded a model that the user brought; else None.

    Args:
        earlier: `loaded_models` before the command.
    """
    faults = (_drawing_fault(checkpoint, error) for checkpoint in _loaded[earlier:])
    return next((fault for fault in faults if fault is not None), None)


@contextmanager
def explained_drawing(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Errors of a user's model become one line that names the model.

    The first call shows what its configuration hides: shapes that do not fit, a missing token. A model that comes
    with the package has no such faults; there an error is a bug and keeps its traceback, and so it does without a
    checkpoint, in a pipeline that the user loaded.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or (found := _drawing_fault(checkpoint, error)) is None:
            raise
        raise found from error


def _of_caller(function: T) -> T:
    """A function that the caller gave: what it raises is the caller's, and no fault of the model."""

    @functools.wraps(function)  # type: ignore[arg-type]
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            error.of_caller = True  # type: ignore[attr-defined]
            raise

    return called  # type: ignore[return-value]


def _drawing_fault(checkpoint: Checkpoint, error: Exception) -> FastgenError | None:
    """The line for an error of drawing with a model; None where the error says enough, or is a bug of ours."""
    if isinstance(error, (FastgenError, OSError)) or getattr(error, "of_caller", False):
        return None
    if is_out_of_memory(error):
        return FastgenError(f"model {checkpoint.model!r}: drawing does not fit into memory")
    if checkpoint.model in EMBEDDED_MODELS:
        return None
    return FastgenError(
        f"{fault(f'model {checkpoint.model!r}', error, 'cannot draw')} (FASTGEN_DEBUG=1 shows the traceback)"
    )


def _generate(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    notes: list[list[str]],
    settings: dict[str, Any],
    begin: dict[str, Any],
    batch_size: int,
    batch_invariant: bool,
    flops: bool,
    callback: Callable[[Progress], None] | None,
) -> Iterator[GeneratedImage]:
    janus = draws_tokens(type(pipe))
    # A stock pipeline as it is; a Janus picture has random numbers of its own, stock `generate` the global ones.
    loss: Loss = "distribution" if janus and settings.get("temperature", 1.0) > 0 else getattr(pipe, "loss", "exact")
    if settings.get("acceptance", "exact") not in LOSSLESS:
        loss = "lossy"
    alone = batch_invariant and not janus
    size = 1 if alone else batch_size
    for start in range(0, len(prompts), size):
        chunk = slice(start, start + size)
        count = len(prompts[chunk])
        report = None
        if callback is not None:

            def report(step: int, steps: int, latents: Any, start: int = start, count: int = count) -> None:
                callback(Progress(start, len(prompts), count, step, steps, latents))

        arguments = pipeline_arguments(settings) | begin
        if janus:
            arguments["batch_invariant"] = batch_invariant
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * count
        with reported(pipe) as stats:
            for note in itertools.chain.from_iterable(notes[chunk]):
                add_note(note)
            note_path(
                "batch",
                "one picture at a time" if alone else f"up to {batch_size} pictures together",
                "batch_invariant: rounding depends on the batch shape" if alone and batch_size > 1 else None,
            )
            with explained_drawing(_checkpoints.get(pipe)), count_flops() if flops else nullcontext():
                pictures, steps = _call(pipe, prompts[chunk], seeds[chunk], arguments, report)
        every = frozenset(itertools.chain.from_iterable(notes[chunk]))
        for i, picture in enumerate(pictures, start):
            others = every.difference(notes[i])
            yield GeneratedImage(picture, prompts[i], seeds[i], stats, count, loss, steps, i - start, others=others)


def _call(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    arguments: dict[str, Any],
    report: Callable[[int, int, Any], None] | None,
) -> tuple[list[Image.Image], Sequence[StepRecord] | None]:
    """One call of the pipeline: one picture per prompt and seed, and the steps if they were recorded."""
    accepted = inspect.signature(type(pipe).__call__).parameters

    if report is not None and "callback_on_step_end" in accepted:

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            report(step + 1, int(pipeline.num_timesteps), tensors.get("latents"))
            return tensors

        arguments["callback_on_step_end"] = on_step_end
    bar = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(bar or {}), "disable": True})
    try:
        with watched(pipe):
            if "prompt" in accepted:
                arguments["prompt"] = list(prompts)  # some pipelines write into the list that they are given
            else:
                arguments["class_labels"] = [class_label(pipe, prompt) for prompt in prompts]
            output = pipe(
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
                **arguments,
            )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower the batch size" if len(prompts) > 1 else "make it smaller"
        raise FastgenError(f"{len(prompts)} picture(s) in one batch do not fit into memory; {hint}") from error
    finally:
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar
    check_output(output.images)  # NaN would silently become black
    return DiffusionPipeline.numpy_to_pil(output.images), getattr(output, "steps", None)
