"""The compute budget of a model with dynamic chunking, set from outside a pipeline that does not know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fastgen.accounting import add_tokens
from fastgen.models.caching import HeldChunksMixin
from fastgen.models.chunking import Chunks, TailDrop
from fastgen.models.scaffold import Chunked, DynamicChunking

Schedule: TypeAlias = float | Sequence[float] | Callable[[int, float], float]
"""A tail drop for all steps, one per step, or a function of (step, sigma); sigma falls from 1 (noise) to 0."""


@dataclass(slots=True)
class ElasticBudget:
    """Tail drops of the conditional and of the unconditional branch over the steps of one generation.

    Args:
        tail_drop: rho of the conditional branch.
        uncond_tail_drop: rho of the unconditional branch (Lite-CFG); None is `tail_drop`.
        token_budget: exact number of tokens of every sample, in place of the tail drops.
        images: samples of one branch; a batch of twice as many holds the conditional half first. None takes every
            batch as conditional.
        steps: number of steps, for a list to be checked against; None takes lists of any length.

    Raises:
        ValueError: a value out of range, a list of another length, or tail drops together with a token budget.
    """

    tail_drop: Schedule = 0.0
    uncond_tail_drop: Schedule | None = None
    token_budget: int | None = None
    images: int | None = None
    steps: int | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.token_budget is not None:
            if isinstance(self.token_budget, bool) or not isinstance(self.token_budget, int) or self.token_budget < 1:
                raise ValueError(f"token_budget: needs an integer >= 1, got {self.token_budget!r}")
            if self.uncond_tail_drop is not None or not _is_zero(self.tail_drop):
                raise ValueError("token_budget and tail_drop (or uncond_tail_drop) exclude each other")
        for name, schedule in (("tail_drop", self.tail_drop), ("uncond_tail_drop", self.uncond_tail_drop)):
            if schedule is None or callable(schedule):
                continue
            if isinstance(schedule, (str, bytes)):
                raise ValueError(f"{name}: needs numbers in [0, 1), got {schedule!r}")
            values = list(schedule) if isinstance(schedule, Sequence) else [schedule]
            if isinstance(schedule, Sequence) and self.steps is not None and len(values) != self.steps:
                raise ValueError(f"{name}: needs one value per step ({self.steps}), got {len(values)}")
            for value in values:
                _check(name, value)

    def of_batch(self, samples: int, sigma: float) -> tuple[TailDrop | None, int | None]:
        """Tail drop and token budget of the next forward pass; counts the step."""
        step, self.step = self.step, self.step + 1
        if self.token_budget is not None:
            return None, self.token_budget
        conditional = _at("tail_drop", self.tail_drop, step, sigma)
        if self.images is None or samples != 2 * self.images:
            return conditional, None
        schedule = self.tail_drop if self.uncond_tail_drop is None else self.uncond_tail_drop
        unconditional = _at("uncond_tail_drop", schedule, step, sigma)
        return [conditional] * self.images + [unconditional] * self.images, None


def _is_zero(schedule: Schedule) -> bool:
    return isinstance(schedule, (int, float)) and schedule == 0


def _check(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: needs numbers in [0, 1), got {value!r}") from error
    if not 0 <= number < 1:
        raise ValueError(f"{name}: needs numbers in [0, 1), got {value!r}")
    return number


def _at(name: str, schedule: Schedule, step: int, sigma: float) -> float:
    if callable(schedule):
        return _check(name, schedule(step, sigma))
    if isinstance(schedule, Sequence):
        if step >= len(schedule):
            raise ValueError(f"{name}: has {len(schedule)} values, and step {step + 1} needs one")
        return float(schedule[step])
    return float(schedule)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One forward pass.

    Attributes:
        latents: x_t [n, C, H, W].
        chunks: which of its positions were kept.
    """

    latents: Tensor
    chunks: Chunks


class ElasticModelMixin(HeldChunksMixin):
    """What a transformer with dynamic chunking offers to pipelines that only know its `forward`."""

    scaffold: DynamicChunking
    _budget: ElasticBudget | None = None
    _recorded: list[StepRecord] | None = None

    def set_budget(
        self,
        tail_drop: Schedule = 0.0,
        *,
        uncond_tail_drop: Schedule | None = None,
        token_budget: int | None = None,
        images: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Use this budget in every forward pass that is given none. Arguments: see `ElasticBudget`."""
        self._budget = ElasticBudget(tail_drop, uncond_tail_drop, token_budget, images, steps)

    def reset_budget(self) -> None:
        """Keep the whole natural set again."""
        self._budget = None

    @contextmanager
    def record_chunks(self) -> Iterator[list[StepRecord]]:
        """Collects latents and chunks of every forward pass inside the block."""
        before, self._recorded = self._recorded, []
        try:
            yield self._recorded
        finally:
            self._recorded = before

    def resolve_budget(
        self, tail_drop: TailDrop | None, token_budget: int | None, samples: int, sigma: Tensor
    ) -> tuple[TailDrop | None, int | None]:
        """The budget of a forward pass: what the call says, else what was set."""
        if tail_drop is not None or token_budget is not None or self._budget is None:
            return tail_drop, token_budget
        needs_sigma = callable(self._budget.tail_drop) or callable(self._budget.uncond_tail_drop)
        return self._budget.of_batch(samples, float(sigma.flatten()[0]) if needs_sigma else 0.0)

    def chunk(
        self, latents: Tensor, conditioning: Tensor, tail_drop: TailDrop | None, token_budget: int | None
    ) -> Chunked:
        """Latents [n, C, H, W] to packed kept tokens, those of the held set where there is one; tells the account, and
        whoever records them, what was kept."""
        held = self.held_chunks(len(latents), (latents.shape[2], latents.shape[3]))
        chunked = self.scaffold.chunk(latents, conditioning, tail_drop, token_budget, held)
        chunks = chunked.chunks
        if held is None:
            self.keep_chunks(chunks)
        add_tokens(kept=sum(chunks.lengths), total=chunks.samples * chunks.grid_size)
        if self._recorded is not None:
            self._recorded.append(StepRecord(latents, chunks))
        return chunked
