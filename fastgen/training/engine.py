"""The training loop that all recipes share: accelerate, EMA, exact resume, atomic checkpoints.

A recipe's batch is a function of (seed, step, process), so a resumed run sees exactly what the interrupted one
would have seen. It goes on under the settings it began with: those that change its weights are in the checkpoint, and
others are refused. More or fewer steps are allowed, and recorded.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.environment import commit, cpu_name, native_bfloat16
from fastgen.errors import FastgenError
from fastgen.io import check_writable
from fastgen.locks import locked_folder
from fastgen.training.ahead import Ahead, Draw
from fastgen.training.checkpoints import (
    check_run,
    damaged,
    file_version,
    read_checkpoint,
    trim_log,
    write_checkpoint,
)
from fastgen.training.muon import Muon

PRECISIONS = ("auto", "bf16", "fp32")
# With another value of these a resumed run has other weights. The number of steps is not among them, although the
# learning rate falls towards the last one: a run may be made longer, and its record says so.
_FIXED = ("batch_size", "accumulate", "lr", "warmup", "decay", "ema_decay", "grad_clip")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a run.

    Args:
        output_dir: folder of checkpoint, log and exported model.
        steps: total optimizer steps.
        batch_size: items per step and process.
        accumulate: gradient-accumulation steps, a divisor of batch_size. Small parts stay in the CPU's cache: four
            parts train the tiny Janus about 1.3 times as fast as one.
        compile: `torch.compile` the sub-modules that the recipe's module names in `compiled_parts` (tiny Janus on one
            CPU core: 1.26 times as fast, after 80 s of compiling).
        lr: peak learning rate.
        seed: seeds weights, data and noise.
        warmup: steps of linear warm-up.
        decay: share of the run, at its end, in which the learning rate falls linearly to zero.
        ema_decay: decay of the weight average.
        grad_clip: gradient norm limit.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        max_seconds: save a checkpoint and stop after this wall time; 0 = never.
        precision: "bf16" (autocast; weights, optimizers and EMA stay float32), "fp32", or "auto": bf16 where the
            device multiplies it natively.
        workers: processes that draw the batches of the next steps, the same batches; 0 = this one draws them. Needs
            accumulate 1, because a part's batch begins where the loss of the one before left the random numbers.

    Raises:
        FastgenError: a value is out of range; names the setting.
    """

    output_dir: Path
    steps: int
    batch_size: int
    lr: float
    seed: int = 0
    warmup: int = 100
    decay: float = 0.3
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    checkpoint_every: int = 200
    log_every: int = 20
    max_seconds: float = 0.0
    accumulate: int = 1
    compile: bool = False
    precision: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "accumulate"):
            check_integer(name, getattr(self, name), 1)
        for name in ("warmup", "workers"):
            check_integer(name, getattr(self, name), 0)
        for name in ("lr", "grad_clip"):
            check_number(name, getattr(self, name), above=0)
        check_number("decay", self.decay, 0, 1)
        check_number("ema_decay", self.ema_decay, 0, below=1)
        check_number("max_seconds", self.max_seconds, 0)
        check_choice("precision", self.precision, PRECISIONS)
        if self.batch_size % self.accumulate:
            raise FastgenError(
                f"accumulate: {self.accumulate} is not allowed, needs a divisor of batch_size {self.batch_size}"
            )
        if self.workers and self.accumulate > 1:
            raise FastgenError(f"workers: {self.workers} is not allowed, needs 0 with accumulate {self.accumulate}")


class Recipe(Protocol):
    """What a recipe tells the engine."""

    name: str

    def build(self) -> torch.nn.Module:
        """The module whose parameters are trained (those with requires_grad)."""

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Items start … start + size - 1, on the CPU."""

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch that is on the module's device, and numbers for the log."""

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Write the trained (EMA) weights in Hub layout with a model card."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Warm-up, constant, linear decay to zero over the last `decay` share of the run."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall_steps = config.decay * config.steps
    fall = 1.0 if fall_steps == 0 else min(1.0, (config.steps - step) / fall_steps)
    return config.lr * rise * fall


def resolve_precision(name: str) -> str:
    """ "fp32" or "bf16": what "auto" means on this machine, anything else as it is."""
    if name != "auto":
        return name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if native_bfloat16(device) else "fp32"


def build_optimizers(module: torch.nn.Module, lr: float, precision: str = "fp32") -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices; AdamW for embeddings, output heads, convolutions, norms and biases.

    A module may name further AdamW parameters by a substring in its attribute `adamw_names`. With `precision` "bf16"
    Muon orthogonalises in bfloat16, as its reference does.
    """
    names: tuple[str, ...] = getattr(module, "adamw_names", ())
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    hidden: list[torch.nn.Parameter] = []
    other: list[torch.nn.Parameter] = []
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        special = param.ndim != 2 or id(param) in embeddings or any(part in name for part in names)
        (other if special else hidden).append(param)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(Muon(hidden, lr=lr, weight_decay=0.01, bfloat16=precision == "bf16"))
    if other:
        optimizers.append(torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


@dataclass(frozen=True)
class _Batches:
    """The first (or only) batch of each step of one process."""

    recipe: Recipe
    seed: int
    process: int
    processes: int
    batch_size: int
    accumulate: int

    def start(self, step: int) -> int:
        return (step * self.processes + self.process) * self.batch_size

    def __call__(self, step: int) -> tuple[dict[str, Any], torch.Generator]:
        """The batch, and the generator behind it."""
        numbers = np.random.SeedSequence((self.seed, step, self.process)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(numbers[0]))
        return self.recipe.batch(self.start(step), self.batch_size // self.accumulate, generator), generator


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks the loop to stop after its step; a second one acts as usual."""
    asked: list[int] = []
    previous: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread: nobody can interrupt us
        previous.clear()
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


class Trainer:
    """Runs one recipe; `run()` returns the record that went into the model card.

    Args:
        recipe: what to train.
        config: how.
        report: called with each log record.
        data: what the recipe learns from, e.g. digests of folders, JSON-ready; a run does not go on with other data.

    Raises:
        FastgenError: the folder holds a damaged checkpoint, or one of another recipe, seed, setting or data.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainConfig,
        report: Callable[[dict[str, Any]], None] | None = None,
        data: Any = None,
    ) -> None:
        self.recipe, self.config, self.report = recipe, config, report
        cuda = torch.cuda.is_available()
        self.precision = resolve_precision(config.precision)
        # accelerate's own precision is one for the whole process: a second run could not have another.
        self.accelerator = Accelerator(mixed_precision="no", cpu=not cuda)
        torch.manual_seed(config.seed)
        module = recipe.build()
        self.trained = [param for param in module.parameters() if param.requires_grad]
        self.optimizers = build_optimizers(module, config.lr, self.precision)
        if config.compile:
            for name in getattr(module, "compiled_parts", ()):
                module.get_submodule(name).compile(dynamic=getattr(module, "compiled_shapes", False))
        self.module = self.accelerator.prepare(module)
        self.ema = EMAModel(self.trained, decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.ema.to(self.accelerator.device)
        self.step, self.seconds = 0, 0.0
        self.logs: dict[str, float] = {}
        self.resumed: list[dict[str, int]] = []
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = _Batches(recipe, config.seed, process, processes, config.batch_size, config.accumulate)
        self.settings = {name: getattr(config, name) for name in _FIXED}
        self.settings |= {"precision": self.precision, "processes": processes, "data": data}
        self.checkpoint = config.output_dir / "checkpoint.pt"
        self._loaded = file_version(self.checkpoint)
        if self._loaded is not None:
            self._load()

    def run(self) -> dict[str, Any]:
        """Train to the last step (or until asked to stop), checkpoint, export; returns the record.

        Raises:
            FastgenError: another run is using the folder, or the loss is not finite.
        """
        check_writable(self.config.output_dir)
        lock = locked_folder(self.config.output_dir, self.accelerator.process_index)
        with ExitStack() as stack:
            self.accelerator.wait_for_everyone()
            with self.accelerator.main_process_first():
                stack.enter_context(lock)
            if file_version(self.checkpoint) != self._loaded:  # another run has ended since
                self._load()
            return self._run()

    def _run(self) -> dict[str, Any]:
        config, begin, before = self.config, time.monotonic(), self.seconds
        if self.accelerator.is_main_process:
            trim_log(config.output_dir / "log.jsonl", self.step)
        self.module.train()
        with self._drawing() as draw, _stop_on_signal() as stop:
            while self.step < config.steps:
                self.logs = self._train_step(draw)
                self.step += 1
                self.seconds = before + time.monotonic() - begin
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self._log(self.logs)
                out_of_time = 0 < config.max_seconds <= time.monotonic() - begin
                if self._any_process(stop() or out_of_time):
                    break
                if self.step % config.checkpoint_every == 0:
                    self._save()
            self._save()
        record = self.record(self.logs)
        if self.accelerator.is_main_process:
            module = self.accelerator.unwrap_model(self.module)
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
            self.recipe.export(module, config.output_dir / "model", record)
            self.ema.restore(self.trained)
        return record

    def record(self, logs: dict[str, float]) -> dict[str, Any]:
        """What a model card says of the run."""
        settings = asdict(self.config)
        settings.pop("output_dir")
        return {
            "recipe": self.recipe.name,
            "config": settings,
            "steps_done": self.step,
            "items_seen": self.step * self.config.batch_size * self.accelerator.num_processes,
            "seconds": round(self.seconds, 1),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "commit": commit(),
            "last": {key: round(value, 5) for key, value in logs.items()},
            **({"resumed": self.resumed} if self.resumed else {}),
        }

    def _train_step(self, draw: Draw) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        drawn, generator = draw(self.step)
        start, size = self.batches.start(self.step), config.batch_size // config.accumulate
        totals: dict[str, float] = {}
        for part in range(config.accumulate):
            if part:
                drawn = self.recipe.batch(start + part * size, size, generator)
            batch = _move(drawn, accelerator.device)
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss, logs = self.recipe.loss(self.module, batch, generator)
            if not torch.isfinite(loss):
                raise FastgenError(
                    f"the loss is {float(loss.detach())} at step {self.step}; lower --lr and start again"
                )
            # Processes average their gradients once a step, with the last part.
            with nullcontext() if part + 1 == config.accumulate else accelerator.no_sync(self.module):
                accelerator.backward(loss / config.accumulate)
            for key, value in {"loss": float(loss.detach()), **logs}.items():
                totals[key] = totals.get(key, 0.0) + value / config.accumulate
        norm = accelerator.clip_grad_norm_(self.trained, config.grad_clip)
        rate = learning_rate(config, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.trained)
        return {**totals, "grad_norm": float(norm), "lr": rate}

    @contextmanager
    def _drawing(self) -> Iterator[Draw]:
        """What draws the batches from this step on."""
        if not self.config.workers:
            yield self.batches
            return
        ahead = Ahead(self.batches, self.config.workers, self.step, self.config.steps)
        try:
            yield ahead
        finally:
            ahead.close()

    def _any_process(self, flag: bool) -> bool:
        """Whether any process says so: all of them must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return float(total) > 0

    def _log(self, logs: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        record = {"step": self.step, "seconds": round(self.seconds, 1), **logs}
        with open(self.config.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.report is not None:
            self.report(record)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "recipe": self.recipe.name,
            "seed": self.config.seed,
            "settings": json.dumps(self.settings),
            "steps": self.config.steps,
            "resumed": self.resumed,
            "step": self.step,
            "seconds": self.seconds,
            "logs": self.logs,
            "module": self.accelerator.unwrap_model(self.module).state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_checkpoint(self.checkpoint, state)

    def _load(self) -> None:
        state = read_checkpoint(self.checkpoint)
        try:
            check_run(self.checkpoint, state, self.recipe.name, self.config.seed, self.settings)
            self.accelerator.unwrap_model(self.module).load_state_dict(state["module"])
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.logs, self.resumed = dict(state.get("logs", {})), list(state.get("resumed", []))
            if state.get("steps", self.config.steps) != self.config.steps:
                self.resumed.append({"step": self.step, "steps_before": state["steps"], "steps": self.config.steps})
        except FastgenError:
            raise
        except Exception as error:  # torch and accelerate raise errors of a dozen types
            raise damaged(self.checkpoint, error) from error
        self._loaded = file_version(self.checkpoint)
