"""A stock diffusers pipeline whose `__call__` can be entered at any step of its schedule and left again.

A search evaluates the model of a pipeline at one step, for latents of its own, hundreds of times. The pipeline's own
`__call__` already does everything around that: text and image conditions, guidance, ControlNet, IP-Adapter, offload,
decoding. `Entry` runs that call on a shallow copy of the pipeline in which four things differ:

- `scheduler` is a probe: `set_timesteps` leaves only the step that is wanted, `step` hands out the model's output;
- `prepare_latents` returns the search's latents in place of the pipeline's first ones;
- `get_timesteps` (img2img, inpainting) leaves only the wanted step after it has applied `strength`;
- methods that compute conditions are run once and remembered.

A pipeline without `prepare_latents` must take `latents` in its call. Where the loop reads the number of the step
(`control_guidance_end`, `cfg_trunc_ratio`, guiders), the schedule is the whole one, and the steps before the wanted
one are skipped: where the loop asks `interrupt`, by that; elsewhere their models are not run.

The user's pipeline is never changed: the copy has its own attributes, and shares the models. So nothing has to be put
back after an error or Ctrl-C, and two threads do not meet.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.pipelines.search.denoisers.loops import asks_to_go_on, counts_steps
from fastgen.pipelines.search.denoisers.probes import Stepped, entered_class, probe_of
from fastgen.pipelines.search.denoisers.standins import DENOISERS, Encoding, NoBar, Passing, branching, fresh, shape_of

__all__ = ["Entry", "Left", "Said"]

#: Other networks of the loop.
HELPERS = ("controlnet", "adapter")
#: Methods that compute what stays the same over a search.
CONDITIONS = (
    "encode_prompt",
    "encode_image",
    "prepare_image",
    "prepare_image_latents",
    "prepare_control_image",
    "prepare_mask_latents",
    "prepare_ip_adapter_image_embeds",
    "generate_prior_tokens",
)


@dataclass(frozen=True)
class Said:
    """The pipeline's arguments of `scheduler.step`.

    Attributes:
        output: of the model, guided, [k, …].
        timestep: its timestep.
        sample: the latents that it read, [k, …].
        rows: of the model, in all its forward passes.
    """

    output: Tensor
    timestep: float
    sample: Tensor
    rows: int


class Left(BaseException):
    """Ends a call of the pipeline; not an `Exception`, so that no pipeline handles it."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


@dataclass
class _Visit:
    """One call of the pipeline: where it is entered, with what, and where it is left.

    Attributes:
        latents: those that replace the pipeline's own; None leaves them.
        times: timesteps that the loop runs over; None: the whole schedule.
        index: of the last of them in the schedule.
        skipping: how many rounds of the loop end at once, as if the user had interrupted them.
        passing: how many steps after these are passed over: the model is not run, `step` returns the latents.
        leave: "latents" (when they are prepared), "step", "grid" (when they are unpacked), or "" (the call returns
            pictures).
        grid: replaces what the pipeline unpacks for its decoder.
        start: what `prepare_latents` gave.
        rows: of the model until now.
        calls: of the methods that compute conditions.
    """

    latents: Tensor | None = None
    times: Tensor | None = None
    index: int = 0
    passing: int = 0
    skipping: int = 0
    leave: str = "step"
    grid: Tensor | None = None
    start: Tensor | None = None
    rows: int = 0
    calls: Counter[str] = field(default_factory=Counter)


class Entry:
    """See the module.

    Args:
        pipe: the pipeline; it is not changed.
        scheduler: in place of the pipeline's; is copied.
        arguments: of the call, without `generator`.

    Attributes:
        timesteps: the pipeline's schedule, after `strength`; known after `start`.
        scheduler: the probe; after `start` with the whole schedule set.
        batches: whether several samples can share a call; False where conditions depend on the generator.

    Raises:
        ValueError: the pipeline has neither `prepare_latents` nor an argument `latents`, or its scheduler no `step`.
    """

    def __init__(self, pipe: Any, scheduler: Any, arguments: Mapping[str, Any]) -> None:
        name = type(pipe).__name__
        for what, part in (("step", "scheduler step"), ("set_timesteps", "schedule")):
            if not callable(getattr(scheduler, what, None)):
                raise ValueError(f"pipe: {name} cannot be searched: its {part} was not found (no {what})")
        self.arguments = dict(arguments)
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        self._prepares = callable(getattr(pipe, "prepare_latents", None))
        if not self._prepares and "latents" not in self.accepted:
            raise ValueError(f"pipe: {name} cannot be searched: its start noise was not found (no prepare_latents)")
        self._packs = callable(getattr(pipe, "_unpack_latents", None))
        self._counts = counts_steps(type(pipe).__call__)
        self._interruptible = asks_to_go_on(type(pipe).__call__) and isinstance(
            getattr(type(pipe), "interrupt", None), property
        )
        self.masked = self.arguments.get("mask_image") is not None
        self.batches = "num_images_per_prompt" in self.accepted
        self.timesteps: Tensor = torch.empty(0)
        self._name = name
        self._offset = 0
        self._cut_later = False
        self.visit = _Visit()
        self._memory: dict[tuple[Any, ...], Any] = {}
        self._prepared: dict[int, Any] = {}
        self.outputs: dict[tuple[str, int], Any] = {}
        self.scheduler = probe_of(scheduler, self)
        self._pipe = self._copy(pipe)

    # ---- what a search asks for ----

    def begin(self, generator: torch.Generator) -> tuple[Tensor, Said]:
        """The latents [1, …] that the pipeline itself would start from with this generator, and what its model says of
        them. What the pipeline draws for its conditions (latents of images and masks) is kept for the other calls."""
        self._memory.clear()
        self._prepared.clear()
        visit = _Visit()
        said: Said = self._run(visit, generator)
        start = visit.start if self._prepares else said.sample
        if start is None or start.shape != said.sample.shape or not torch.equal(start.to(said.sample), said.sample):
            raise ValueError(f"pipe: {self._name} cannot be searched: its start noise was not found (prepare_latents)")
        return start, said

    def follow(self, other: Entry) -> None:
        """Take the schedule of an entry of the same pipeline and arguments that has begun."""
        self.timesteps, self._offset, self._cut_later = other.timesteps, other._offset, other._cut_later
        self.batches = other.batches

    def start(self, generator: torch.Generator) -> Tensor:
        """The latents [1, …] that the pipeline would start from with this generator, its conditions kept."""
        return self._run(_Visit(leave="latents"), generator)

    def output(self, latents: Tensor, timestep: float, index: int) -> Said:
        """The model's output for latents [k, …] of one time.

        Args:
            latents: k samples; k > 1 only where `batches`.
            timestep: of the model.
            index: of the timestep in the schedule, for schedulers that scale what the model reads.
        """
        # The known parts of an inpainted picture are put in after a step.
        passing = 1 if self.masked and index else 0
        skipping = 0
        if self._counts:
            times = self.timesteps.clone()
            times[index] = timestep
            if self._interruptible:
                skipping = index - passing
            else:
                passing = index
        else:
            times = self.timesteps.new_full((1 + passing,), timestep)
        return self._run(_Visit(latents, times, index, passing, skipping), None)

    def pictures(self, latents: Tensor, grid: Tensor | None = None) -> Tensor:
        """Pictures [k, 3, H, W] in [0, 1] of clean latents [k, …], by the pipeline's own decoding; of `grid` where it
        is given, unpacked latents of any height and width."""
        found = self._decode(latents, "", grid)
        images = getattr(found, "images", None)
        images = found[0] if images is None else images
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images).movedim(-1, 1)
        return torch.as_tensor(images).float()

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents [k, …, h, w] of samples [k, …]: the same, where the pipeline does not pack them into tokens."""
        return self._decode(latents, "grid", None) if self._packs else latents

    def _decode(self, latents: Tensor, leave: str, grid: Tensor | None) -> Any:
        # img2img asks for a step, and inpainting puts the known parts in after it: it is passed over.
        times, passing = (self.timesteps[-1:], 1) if self._cut_later else (self.timesteps[:0], 0)
        return self._run(_Visit(latents, times, len(self.timesteps) - 1, passing, leave=leave, grid=grid), None)

    # ---- a call ----

    def _run(self, visit: _Visit, generator: torch.Generator | None) -> Any:
        """Call the pipeline until it is left; what it was left with, or what it returned."""
        self.visit = visit
        count = 1 if visit.latents is None else len(visit.latents)
        arguments = dict(self.arguments)
        if count > 1:
            arguments["num_images_per_prompt"] = count
        if visit.latents is not None and not self._prepares:
            arguments["latents"] = visit.latents.to(self._dtype)
        if "output_type" in self.accepted:
            arguments["output_type"] = "pt"
        # The pipeline must not touch the global random state; what it draws here is not used.
        arguments["generator"] = torch.Generator().manual_seed(0) if generator is None else generator
        for name, value in arguments.items():
            if isinstance(value, list):  # some pipelines write into the lists that they are given
                arguments[name] = list(value)
        try:
            result = self._pipe(**arguments)
        except Left as left:
            return left.found
        if visit.leave:
            raise ValueError(f"pipe: {self._name} cannot be searched: its {visit.leave} was not found")
        return result

    def _copy(self, pipe: Any) -> Any:
        """A shallow copy with the probe and the wrapped methods. `__dict__` is written, not `setattr`: a pipeline's
        own records its components in its configuration, which the copy shares."""
        twin = copy.copy(pipe)
        changed: dict[str, Any] = {"scheduler": self.scheduler, "progress_bar": NoBar}
        if self._prepares:
            changed["prepare_latents"] = self._replacing(pipe.prepare_latents.__func__.__get__(twin))
        if hasattr(pipe, "get_timesteps"):
            changed["get_timesteps"] = self._cutting(pipe.get_timesteps.__func__.__get__(twin))
        for name in CONDITIONS:
            method = getattr(type(pipe), name, None)
            if callable(method):
                changed[name] = self.remembering(name, method.__get__(twin))
        if self._packs:
            changed["_unpack_latents"] = self._unpacking(pipe._unpack_latents)
        self._dtype = torch.float32
        for name in (*HELPERS, *DENOISERS):
            model = getattr(pipe, name, None)
            if isinstance(model, torch.nn.Module):
                changed[name] = Passing(model, self, name)
                self._dtype = getattr(model, "dtype", self._dtype)
        vae = getattr(pipe, "vae", None)
        if isinstance(vae, torch.nn.Module) and hasattr(vae, "encode"):
            changed["vae"] = Encoding(copy.copy(vae), self)  # causal ones keep features of the call as attributes
        # Sana sets the side on which its tokenizer pads, and leaves it.
        changed |= {name: copy.copy(part) for name, part in pipe.components.items() if name.startswith("tokenizer")}
        for name in ("guider", "ocr_guider"):
            if getattr(pipe, name, None) is not None:
                changed[name] = branching(getattr(pipe, name))
        vars(twin).update(changed)
        # Asked for many times in a call, by a walk over all modules each; it stays the same over a search.
        kind: Any = type(pipe)
        twin.__class__ = entered_class(kind, self._interruptible)
        vars(twin).update(_entered_device=pipe._execution_device, _entered=self)
        return twin

    def _replacing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`prepare_latents`: the search's latents, and what the pipeline itself prepares with its own."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            visit = self.visit
            count = 1 if visit.latents is None else len(visit.latents)
            prepared = self._prepared.get(count)
            if prepared is None or visit.latents is None:
                if signature.bind(*args, **kwargs).arguments.get("image") is not None:
                    self.batches = False
                prepared = original(*args, **kwargs)
                self._prepared.setdefault(count, prepared)
            first, *rest = prepared if isinstance(prepared, tuple) else (prepared,)
            if visit.leave == "latents":
                raise Left(first)
            visit.start = first
            if visit.latents is not None:
                first = visit.latents.to(first)
            return (first, *rest) if isinstance(prepared, tuple) else first

        return prepare_latents

    def _unpacking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`_unpack_latents`, which a pipeline of packed latents calls before it decodes."""

        @functools.wraps(original)
        def unpack_latents(*args: Any, **kwargs: Any) -> Any:
            if self.visit.grid is not None:
                return self.visit.grid
            grid = original(*args, **kwargs)
            if self.visit.leave == "grid":
                raise Left(grid)
            return grid

        return unpack_latents

    def _cutting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`get_timesteps`, which applies `strength`: the wanted step of what it leaves."""

        @functools.wraps(original)
        def get_timesteps(*args: Any, **kwargs: Any) -> Any:
            times, count = original(*args, **kwargs)
            self._cut_later = True
            self._offset = len(self.scheduler.timesteps) - len(times)
            self.timesteps = times
            if self.visit.times is None:
                return times, count
            self._enter(self.scheduler)
            return self.visit.times.to(times), len(self.visit.times)

        return get_timesteps

    def remembering(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A method whose result stays the same: computed once for each way in which a call asks for it."""

        @functools.wraps(original)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            visit = self.visit
            visit.calls[name] += 1
            given = [*args, *kwargs.items()]
            if any(isinstance(value, torch.Generator) for value in [*args, *kwargs.values()]):
                self.batches = False
            key = (name, visit.calls[name], tuple(map(shape_of, given)))
            if key not in self._memory:
                with torch.random.fork_rng(devices=[]):  # GLM-Image seeds the global state
                    self._memory[key] = original(*args, **kwargs)
            return fresh(self._memory[key])

        return remembered

    # ---- called by the probe and by the model ----

    def _scheduled(self, probe: Any) -> None:
        """After `set_timesteps`."""
        if self._cut_later:
            return
        self.timesteps = probe.timesteps
        if self.visit.times is not None and not hasattr(self._pipe, "get_timesteps"):
            self._enter(probe)
            probe.timesteps = self.visit.times.to(probe.timesteps)
            if hasattr(probe, "num_inference_steps"):
                probe.num_inference_steps = len(probe.timesteps)

    def _enter(self, probe: Any) -> None:
        probe._step_index = self._offset + self.visit.index

    def _stepped(self, probe: Any, output: Tensor, timestep: Any, sample: Tensor, return_dict: bool) -> Any:
        """In `step`."""
        visit = self.visit
        if visit.leave == "latents":
            raise Left(sample)
        if visit.passing:
            visit.passing -= 1
            self._enter(probe)
            # Not what inpainting has put together in steps that were passed over before.
            sample = sample if visit.latents is None else visit.latents.to(output)
            return Stepped(sample, sample) if return_dict else (sample, sample)
        raise Left(Said(output, float(timestep), sample, visit.rows))
