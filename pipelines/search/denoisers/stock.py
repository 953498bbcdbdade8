"""Any diffusers pipeline as a denoiser, through its own `__call__`."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_number
from fastgen.errors import FastgenError, one_line
from fastgen.pipelines.search.denoisers.base import Denoiser
from fastgen.pipelines.search.denoisers.entry import Entry, Said
from fastgen.pipelines.search.denoisers.schedules import flow_levels, noise_levels, noise_prediction
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.schedulers import flow_scheduler, is_flow, noise_scheduler
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["StockDenoiser"]


class StockDenoiser(Denoiser):
    """A pipeline of any family: its `__call__` is entered at the step that a search wants and left behind the model.

    `settings.extra` may have every argument of the pipeline's `__call__`: `image`, `strength`, `mask_image`,
    `control_image`, `true_cfg_scale` … Samples of one prompt and time share a forward pass where the pipeline takes
    `num_images_per_prompt` and nothing that it is given is encoded with random numbers.
    """

    def prepare(self) -> None:
        self.flow = is_flow(self.pipe.scheduler)
        scheduler = (flow_scheduler if self.flow else noise_scheduler)(self.pipe.scheduler)
        self.entries = [Entry(self.pipe, scheduler, self._arguments(place)) for place in range(len(self.prompts))]
        first = self.entries[0]
        start, said = self._begun_by(first)
        for other in self.entries[1:]:
            other.follow(first)
        self._shape = tuple(start.shape)
        self.forwards = max(1, said.rows)
        self.interpolant, self.times, self.final = (
            flow_levels(first.scheduler, len(first.timesteps))
            if self.flow
            else noise_levels(first.scheduler, first.timesteps)
        )
        self._stamps = dict(zip(self.times, first.timesteps.tolist(), strict=True))
        self._begun: set[int] = set()
        self._shared = False  # whether several samples have gone through a call together

    def _begun_by(self, entry: Entry) -> tuple[Tensor, Said]:
        """The first call of the pipeline, which finds out what it does.

        Raises:
            FastgenError: the pipeline does not take its arguments, or does not work with its scheduler.
        """
        try:
            return entry.begin(torch.Generator().manual_seed(0))
        except (FastgenError, torch.OutOfMemoryError):
            raise
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            said = one_line(error)
            if isinstance(error, ValueError):
                raise FastgenError(said) from error
            name, scheduler = type(self.pipe).__name__, type(self.pipe.scheduler).__name__
            given = ", ".join(self._asked) or "its defaults"
            reason = f"{type(error).__name__}: {said}"
            raise FastgenError(f"pipe: {name} does not run with {given} and {scheduler}: {reason}") from error

    @property
    def _asked(self) -> dict[str, Any]:
        """What the settings ask for."""
        own = {name: value for name, value in vars(self.settings).items() if name != "extra" and value is not None}
        return {**self.settings.extra, **own}

    def _arguments(self, place: int) -> dict[str, Any]:
        """The arguments of the pipeline's call for one prompt.

        Raises:
            ValueError: one that the pipeline does not take, or that a search sets itself.
        """
        asked, count = self._asked, len(self.prompts)
        name = type(self.pipe).__name__
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        for argument in asked:
            if argument not in accepted or argument in _SET_BY_SEARCH:
                raise ValueError(f"{argument}: a search of {name} does not take it")
            if isinstance(asked[argument], float):
                check_number(argument, asked[argument])
        encoded = any(argument.startswith("prompt_embeds") for argument in asked)
        prompt = {} if encoded else {"prompt": self.prompts[place]}
        return prompt | {argument: _of_prompt(argument, value, place, count) for argument, value in asked.items()}

    def begin(self, generator: torch.Generator, prompt: int) -> Tensor:
        """The first of a prompt also draws what its conditions need, as the pipeline does."""
        entry = self.entries[prompt]
        if prompt in self._begun or (entry.batches and not entry.masked):
            return entry.start(generator).float()
        self._begun.add(prompt)
        return entry.begin(generator)[0].float()

    def noise(self, generator: torch.Generator) -> Tensor:
        return self.begin(generator, 0)

    def evaluate(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
        groups: dict[tuple[int, float], list[int]] = defaultdict(list)
        for row, (prompt, time) in enumerate(zip(which.tolist(), times.tolist(), strict=True)):
            groups[prompt, time].append(row)
        if len(groups) == 1 and (len(latents) == 1 or self._shared):  # mostly: nothing to put together
            ((prompt, time),) = groups
            if len(latents) == 1 or self.entries[prompt].batches:
                said = self._predict(self.entries[prompt], latents, time)
                return Prediction(said.clean.to(latents), said.noise.to(latents))
        clean, noise = torch.empty_like(latents), torch.empty_like(latents)
        for (prompt, time), rows in groups.items():
            entry = self.entries[prompt]
            for part in [rows] if entry.batches else [[row] for row in rows]:
                try:
                    said = self._predict(entry, latents[part], time)
                except (RuntimeError, ValueError) as error:
                    explained = isinstance(error, FastgenError | torch.OutOfMemoryError)
                    if explained or len(part) == 1 or self._shared:
                        raise
                    entry.batches = False  # PRX takes several images in its signature only
                    return self.evaluate(latents, times, which)
                self._shared |= len(part) > 1
                clean[part], noise[part] = said.clean.to(latents), said.noise.to(latents)
        return Prediction(clean, noise)

    def _predict(self, entry: Entry, latents: Tensor, time: float) -> Prediction:
        # A time between those of the schedule, of another sampler, replaces the next one.
        index = next((i for i, own in enumerate(self.times) if own <= time), len(self.times) - 1)
        stamp = self._stamps.get(time, time * float(entry.scheduler.config.num_train_timesteps))
        said: Said = entry.output(latents, stamp, index)
        # DiT hands both halves of its guidance to the scheduler.
        sample, output = (part[: len(latents)].float() for part in (said.sample, said.output))
        level = self.interpolant.level(time)
        if self.flow:
            return Prediction.of_velocity(sample, output, level.alpha, level.sigma)
        scale = math.hypot(level.alpha, level.sigma)
        return noise_prediction(entry.scheduler, sample / scale, output, level.alpha / scale, level.sigma / scale)

    @property
    def resizes(self) -> bool:
        name, call = "use_resolution_binning", inspect.unwrap(type(self.pipe).__call__)
        asked = self.entries[0].arguments.get(name, defaults_of(type(self.pipe)).get(name))
        return bool(asked) and "resize_and_crop_tensor" in call.__code__.co_names

    def unpacked(self, latents: Tensor) -> Tensor:
        return torch.cat([self.entries[0].unpacked(part) for part in self._parts(latents)])

    def decode(self, grid: Tensor) -> Tensor:
        return self.decode_of(grid, torch.zeros(len(grid), dtype=torch.int64))

    def decode_of(self, grid: Tensor, which: Tensor) -> Tensor:
        prompts = which.tolist() if not self.entries[0].batches else [0]
        rows = zip(prompts, self._parts(grid), strict=True)
        return torch.cat([self._pictures(self.entries[prompt], part) for prompt, part in rows])

    def _parts(self, latents: Tensor) -> Sequence[Tensor]:
        """The rows of one call."""
        return [latents] if self.entries[0].batches else latents.split(1)

    def _pictures(self, entry: Entry, grid: Tensor) -> Tensor:
        if grid.ndim == len(self.shape):
            return entry.pictures(grid)
        return entry.pictures(grid.new_zeros(len(grid), *self.shape[1:]), grid)


_SET_BY_SEARCH = (
    "prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
    "callback",
    "eta",
    "callback_on_step_end",
)


def _of_prompt(name: str, value: Any, place: int, count: int) -> Any:
    """The part of an argument that belongs to one prompt: of texts, embeddings and their masks."""
    if isinstance(value, list | tuple) and len(value) == count and "prompt" in name:
        return value[place] if isinstance(value[place], str) else value[place : place + 1]
    if isinstance(value, Tensor) and ("embeds" in name or "attention_mask" in name) and len(value) == count:
        return value[place : place + 1]
    return value
