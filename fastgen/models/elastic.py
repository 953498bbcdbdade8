"""The compute budget of a model with dynamic chunking, set from outside a pipeline that does not know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from inspect import Signature, signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastgen.accounting import add_tokens
from fastgen.checks import check_integer, check_one_budget, check_tail_drop
from fastgen.errors import FastgenError
from fastgen.models.caching import Held, HeldChunksMixin
from fastgen.models.chunking import Chunks, TailDrop, TokenBudget, check_budget
from fastgen.models.patch_grid import PatchChunking
from fastgen.models.scaffold import Chunked, DynamicChunking

Schedule: TypeAlias = float | Sequence[float] | Callable[[int, float], float]
"""A tail drop for all steps, one per step, or a function of (step, sigma); sigma falls from 1 (noise) to 0."""


@dataclass(frozen=True, slots=True)
class ElasticBudget:
    """Tail drops of the conditional and of the unconditional branch over the steps of a generation.

    Args:
        tail_drop: rho of the conditional branch.
        uncond_tail_drop: rho of the unconditional branch (Lite-CFG); None is `tail_drop`.
        token_budget: exact number of tokens of every sample, in place of the tail drops.
        images: samples of one branch; a batch of twice as many holds the conditional half first. None takes every
            batch as conditional.

    Raises:
        ValueError: a value out of range or of another type, or tail drops together with a token budget.
    """

    tail_drop: Schedule = 0.0
    uncond_tail_drop: Schedule | None = None
    token_budget: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        for name in ("tail_drop", "uncond_tail_drop"):
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.images is not None:
            check_integer("images", self.images, 1)
        if self.token_budget is not None:
            check_integer("token_budget", self.token_budget, 1)
        check_one_budget(self.token_budget, self.tail_drop, self.uncond_tail_drop)

    def check_steps(self, steps: int) -> None:
        """Refuse lists of another length.

        Raises:
            ValueError: names the list.
        """
        for name in ("tail_drop", "uncond_tail_drop"):
            drops = getattr(self, name)
            if isinstance(drops, tuple) and len(drops) != steps:
                raise FastgenError(f"{name}: needs one value per step ({steps}), got {len(drops)}")

    def of_batch(self, samples: int, sigma: float, step: int = 0) -> tuple[TailDrop | None, int | None]:
        """Tail drop and token budget of a forward pass.

        Raises:
            ValueError: the batch contradicts `images`, or a function returned something else than a number in [0, 1).
        """
        if self.images is not None and samples not in (self.images, 2 * self.images):
            raise FastgenError(
                f"images: {self.images} is not allowed for a batch of {samples}, needs it or half of it"
            )
        if self.token_budget is not None:
            return None, self.token_budget
        conditional = _at("tail_drop", self.tail_drop, step, sigma)
        if self.images is None or samples != 2 * self.images:
            return conditional, None
        schedule = self.tail_drop if self.uncond_tail_drop is None else self.uncond_tail_drop
        unconditional = _at("uncond_tail_drop", schedule, step, sigma)
        return [conditional] * self.images + [unconditional] * self.images, None


def _checked(name: str, schedule: Any) -> Any:
    """A schedule as a float, a tuple of floats, a function or None."""
    if callable(schedule) or (schedule is None and name != "tail_drop"):
        return schedule
    if hasattr(schedule, "tolist"):  # an array or a tensor
        schedule = schedule.tolist()
    if isinstance(schedule, Sequence) and not isinstance(schedule, (str, bytes)):
        return tuple(check_tail_drop(name, value) for value in schedule)
    return check_tail_drop(name, schedule)


def _at(name: str, schedule: Any, step: int, sigma: float) -> float:
    if callable(schedule):
        return check_tail_drop(f"{name}({step}, {sigma:g})", schedule(step, sigma))
    if isinstance(schedule, tuple):
        if step >= len(schedule):
            raise FastgenError(f"{name}: has {len(schedule)} values, and step {step + 1} needs one")
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


@dataclass(slots=True, eq=False)
class Generation:
    """One generation with a model: its budget, how far it has come, and the kept sets that it holds.

    Attributes:
        budget: of this generation.
        count_steps: returns the number of steps, called when the first one begins; None checks no lengths.
        step: forward passes so far.
        held: by cache context, see `HeldChunksMixin`.
        captions: what the model has read of them, where it does so once for all steps.
    """

    budget: ElasticBudget
    count_steps: Callable[[], int] | None = None
    step: int = 0
    held: dict[str, Held] = field(default_factory=dict)
    captions: Any = None


# What runs and what records in this context (thread or task), with the model it belongs to; innermost last.
_generations: ContextVar[tuple[tuple[nn.Module, Generation], ...]] = ContextVar("fastgen_generations", default=())
_recorders: ContextVar[tuple[tuple[nn.Module, list[StepRecord]], ...]] = ContextVar("fastgen_recorders", default=())


class ElasticModelMixin(HeldChunksMixin):
    """What a transformer with dynamic chunking offers to pipelines that only know its `forward`."""

    scaffold: DynamicChunking | PatchChunking
    _replaces: tuple[str, ...]
    """Names of the stock classes whose place it takes."""
    _inputs: tuple[str, str]
    """Arguments of `forward` that hold the samples and their times."""

    @contextmanager
    def generation(self, budget: ElasticBudget, count_steps: Callable[[], int] | None = None) -> Iterator[None]:
        """One generation with a budget of its own: calls in this context (thread or task) use it, others do not."""
        entry = (self, Generation(budget, count_steps))
        with _entered(_generations, entry):
            yield

    @contextmanager
    def record_chunks(self) -> Iterator[list[StepRecord]]:
        """Collects latents and chunks of every forward pass of this context inside the block."""
        records: list[StepRecord] = []
        with _entered(_recorders, (self, records)):
            yield records

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled_call_impl is not None and not torch.compiler.is_compiling():
            kwargs = self.with_budget(args, kwargs)
        return super().__call__(*args, **kwargs)

    def with_budget(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a forward pass with the budget of the running generation as arguments: compiled code
        cannot ask for it."""
        kind: Any = type(self)
        given = _signature(kind).bind(self, *args, **kwargs).arguments
        if given.get("tail_drop") is None and given.get("token_budget") is None and self._generation() is not None:
            samples, time = (given[name] for name in self._inputs)
            tail_drop, token_budget = self.resolve_budget(None, None, len(samples), self.sigma(time))
            kwargs = {**kwargs, "tail_drop": tail_drop, "token_budget": token_budget}
        return kwargs

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level of the times that `forward` takes."""
        raise NotImplementedError

    def resolve_budget(
        self, tail_drop: TailDrop | None, token_budget: TokenBudget | None, samples: int, sigma: Tensor
    ) -> tuple[TailDrop | None, TokenBudget | None]:
        """The budget of a forward pass: what the call says, else that of the generation."""
        if tail_drop is not None or token_budget is not None:
            return tail_drop, token_budget
        running = None if torch.compiler.is_compiling() else self._generation()
        if running is None:
            return None, None
        budget, step = running.budget, running.step
        if step == 0 and running.count_steps is not None:
            budget.check_steps(running.count_steps())
        running.step += 1
        needs_sigma = callable(budget.tail_drop) or callable(budget.uncond_tail_drop)
        return budget.of_batch(samples, float(sigma.flatten()[0]) if needs_sigma else 0.0, step)

    def chunk(
        self,
        latents: Tensor,
        conditioning: Tensor,
        tail_drop: TailDrop | None,
        token_budget: TokenBudget | None,
        **given: Tensor,
    ) -> Chunked:
        """Latents [n, C, H, W] to packed kept tokens, those of the held set where there is one; tells the account, and
        whoever records them, what was kept.

        Raises:
            ValueError: the budget does not fit the latents.
        """
        grid = self.scaffold.grid_of(latents)
        check_budget(tail_drop, token_budget, len(latents), grid[0] * grid[1])
        if torch.compiler.is_compiling() and token_budget is not None and self._hold is None:
            # All is known beforehand: one graph, which reports nothing.
            return self.scaffold.chunk(latents, conditioning, None, token_budget, None, **given)
        held = self.held_chunks(len(latents), grid)
        chunked = self.scaffold.chunk(latents, conditioning, tail_drop, token_budget, held, **given)
        chunks = chunked.chunks
        if held is None:
            self.keep_chunks(chunks)
        add_tokens(kept=sum(chunks.lengths), total=chunks.samples * chunks.grid_size)
        for model, records in _recorders.get():
            if model is self:
                records.append(StepRecord(latents, chunks))
        return chunked

    def _generation(self) -> Generation | None:
        """The innermost generation with this model in this context."""
        for model, running in reversed(_generations.get()):
            if model is self:
                return running
        return None

    def _held_sets(self) -> dict[str, Held]:
        running = self._generation()
        return super()._held_sets() if running is None else running.held


@contextmanager
def _entered(variable: ContextVar[tuple[Any, ...]], entry: Any) -> Iterator[None]:
    variable.set((*variable.get(), entry))
    try:
        yield
    finally:
        # By identity, not by a token: a generator may be closed late, or in another context.
        variable.set(tuple(other for other in variable.get() if other is not entry))


@cache
def _signature(model: type[nn.Module]) -> Signature:
    return signature(model.forward)
