"""The protocol of a denoiser: the model of a diffusers pipeline, one evaluation at a time.

A search needs four things of a pipeline that its `__call__` does not give: the noise that it starts from, the model's
prediction for samples at any place of their trajectories, the pictures that latents decode to, and the noise levels
between. An adapter gives them for one kind of pipeline; `register_denoiser` makes it known.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.accounting import add_nfe, phase
from fastgen.checks import check_finite, check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.pipelines.finite import finite_decoder
from fastgen.pipelines.search.denoisers.loops import denoising_loops
from fastgen.pipelines.search.fitting import Fit
from fastgen.pipelines.search.interpolants import Interpolant, Level, Linear, Prediction
from fastgen.pipelines.search.schedulers import check_times, flow_scheduler, timesteps_of
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["Denoiser", "FlowDenoiser", "Settings", "as_bytes", "denoiser_of", "register_denoiser"]


@dataclass(frozen=True)
class Settings:
    """What a user may ask of the pipeline; None takes what the pipeline takes.

    Attributes:
        num_inference_steps, guidance_scale, height, width: as the pipeline's own.
        negative_prompt: one for all prompts, or a list with one for each.
        extra: further arguments of the adapter.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | Sequence[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def checked(self, prompts: int) -> Settings:
        """The same, as Python's own numbers.

        Raises:
            FastgenError: a value that no pipeline can take, or another number of negative prompts than of prompts.
        """
        found: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else check_integer(name, value, 1)
            for name in ("num_inference_steps", "height", "width")
        }
        if self.guidance_scale is not None:
            found["guidance_scale"] = check_number("guidance_scale", self.guidance_scale)
        negative = self.negative_prompt
        several = isinstance(negative, list | tuple)
        texts = list(negative) if several else [negative]  # type: ignore[arg-type]
        if negative is not None and not all(isinstance(text, str) for text in texts):
            raise FastgenError(f"negative_prompt: {negative!r} is not allowed, needs a text or a list of texts")
        if several and len(texts) != prompts:
            raise FastgenError(f"negative_prompt: {len(texts)} texts for {prompts} prompts; needs one, or one each")
        return replace(self, **found)

    def negatives(self, prompts: int) -> list[str] | None:
        """One for each prompt; None: there is none."""
        negative = self.negative_prompt
        return [negative] * prompts if isinstance(negative, str) else None if negative is None else list(negative)


class Denoiser(ABC):
    """The prompts of one call with their pipeline.

    An adapter fills the attributes in `prepare`. Rows of latents are samples; `which` says whose prompt each has, so
    that candidates of several prompts, at different times, share a forward pass.

    Args:
        pipe: the pipeline; it is not changed.
        prompts: P texts (of a class-conditional model: classes).
        settings: what the user asks for.

    Attributes:
        interpolant: of the model.
        times: N noise levels of the pipeline's own schedule in it, falling.
        final: the level at which the pipeline decodes.
        forwards: rows of the model that one evaluation takes: 2 with classifier-free guidance.
        fits, decodes: how many samples memory takes in an evaluation and in a decode.
        guided_above: the guidance scale above which an evaluation takes two forward passes; None where the scale alone
            does not tell.

    Raises:
        ValueError: a setting that the pipeline cannot do.
    """

    interpolant: Interpolant
    times: list[float]
    forwards: int = 1
    final: Level = Level(1.0, 0.0)
    guided_above: ClassVar[float | None] = None

    def __init__(self, pipe: Any, prompts: Sequence[Any], settings: Settings) -> None:
        self.pipe, self.prompts = pipe, list(prompts)
        self.check_prompts()
        self.settings = settings.checked(len(self.prompts))
        self.fits, self.decodes = Fit(), Fit()
        with phase("text"), torch.no_grad():
            self.prepare()
        check_times(getattr(pipe, "scheduler", None), self.times)

    # ---- what an adapter defines ----

    def check_prompts(self) -> None:
        """Refuse what is not a text; an adapter of a model that draws classes overrides this.

        Raises:
            FastgenError: names the prompt.
        """
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                raise FastgenError(f"prompt: {prompt!r} is not allowed, needs a text or a list of texts")

    @abstractmethod
    def prepare(self) -> None:
        """Encode the prompts, and set `interpolant`, `times` and `forwards`."""

    @abstractmethod
    def noise(self, generator: torch.Generator) -> Tensor:
        """Latents [1, …] of pure noise as the pipeline draws them with this generator."""

    def begin(self, generator: torch.Generator, prompt: int) -> Tensor:
        """The same, of a prompt; where the pipeline starts from an image too, they differ by prompt."""
        return self.noise(generator)

    @abstractmethod
    def evaluate(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
        """One evaluation of the model.

        Args:
            latents: [k, …].
            times: [k] float64, in the model's own interpolant.
            which: [k] int64, prompts.
        """

    @abstractmethod
    def decode(self, grid: Tensor) -> Tensor:
        """Pictures [k, 3, H, W] in [0, 1] of latents as `unpacked` gives them, of any height and width."""

    def decode_of(self, grid: Tensor, which: Tensor) -> Tensor:
        """The same, of latents of prompts `which` [k]; inpainting puts the known parts of each prompt in."""
        return self.decode(grid)

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents [k, …, h, w] of samples [k, …]: the same, where the model does not read them as tokens."""
        return latents

    @property
    def resizes(self) -> bool:
        """Whether pictures of latents of any size are brought to the size that the user asked for."""
        return False

    # ---- derived ----

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.pipe._execution_device

    @torch.no_grad()
    def predict(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
        """See `evaluate`; accounted."""
        with phase("denoise"):
            add_nfe(self.forwards * len(latents))
            return self.evaluate(latents, times, which)

    @torch.no_grad()
    def pictures(self, prediction: Prediction, which: Tensor | None = None) -> Tensor:
        """Pictures [k, 3, H, W] uint8 of the clean samples of prompts `which` [k]; None: of the first prompt.

        Raises:
            NotFiniteError: some pixels are not numbers.
        """
        which = torch.zeros(len(prediction.clean), dtype=torch.int64) if which is None else which
        with phase("decode"):
            return as_bytes(self.decoded(self.unpacked(prediction.at(self.final)), which))

    def decoded(self, grid: Tensor, which: Tensor | None = None) -> Tensor:
        """See `decode_of`; latents and pixels are checked in the pipeline's decoder, before it clamps them.

        Raises:
            NotFiniteError: they are not numbers.
        """
        with finite_decoder(self.pipe):
            return self.decode(grid) if which is None else self.decode_of(grid, which)

    def transition_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal noise [1, …] for a transition."""
        return torch.randn(self.shape, generator=generator, device=generator.device).to(self.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, [1, …]."""
        if not hasattr(self, "_shape"):
            self._shape = tuple(self.noise(torch.Generator().manual_seed(0)).shape)
        return self._shape


class FlowDenoiser(Denoiser):
    """A flow-matching model: x = (1 - t) x_0 + t eps, velocity eps - x_0.

    An adapter gives `velocity` in place of `evaluate`.
    """

    interpolant = Linear()

    @abstractmethod
    def velocity(self, latents: Tensor, times: Tensor, which: Tensor) -> Tensor:
        """u [k, …] of latents [k, …] at times [k] float64."""

    def evaluate(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
        u = self.velocity(latents, times, which)
        t = times.to(latents).view(-1, *[1] * (latents.ndim - 1))
        return Prediction.of_velocity(latents, u, 1 - t, t)

    def schedule(self, steps: int, **kwargs: Any) -> list[float]:
        """Times of the pipeline's own scheduler after `set_timesteps(steps, **kwargs)`, the last one (0) left out."""
        scheduler = flow_scheduler(self.pipe.scheduler)
        timesteps_of(scheduler, steps, **kwargs)
        return [float(sigma) for sigma in scheduler.sigmas[:-1]]


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8.

    Raises:
        NotFiniteError: pixels are not numbers.
    """
    check_finite(pictures, "pixels")
    return pictures.mul(255).round().clamp(0, 255).to(torch.uint8)


_DENOISERS: dict[str, type[Denoiser]] = {}


def register_denoiser(*pipelines: str) -> Any:
    """Class decorator: this adapter serves pipelines of these class names, and what is derived from them."""

    def register(adapter: type[Denoiser]) -> type[Denoiser]:
        _DENOISERS.update(dict.fromkeys(pipelines, adapter))
        return adapter

    return register


def denoiser_of(pipe: Any) -> type[Denoiser]:
    """The adapter of a pipeline, or of a class of pipelines; without one of its family, its own call serves.

    Raises:
        ValueError: it cannot be searched.
    """
    for module in ("dit", "z_image"):  # those that come with fastgen register themselves
        importlib.import_module(f"{__package__}.{module}")
    found = pipe if isinstance(pipe, type) else type(pipe)
    for kind in found.__mro__:
        if kind.__name__ in _DENOISERS:
            return _DENOISERS[kind.__name__]
    if hasattr(found, "prepare_latents") or _starts_from_latents(found):
        from fastgen.pipelines.search.denoisers.stock import StockDenoiser

        return StockDenoiser
    raise ValueError(
        f"pipe: {found.__name__} cannot be searched: its start noise was not found (no prepare_latents); "
        "fastgen.pipelines.search.denoisers.base.register_denoiser takes an adapter of yours"
    )


def _starts_from_latents(pipeline: type) -> bool:
    """Whether a class without `prepare_latents` denoises the `latents` of its call itself."""
    call: Any = pipeline.__call__
    return "__call__" in vars(pipeline) and "latents" in defaults_of(pipeline) and bool(denoising_loops(call))
