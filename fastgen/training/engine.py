"""The training loop of all recipes: accelerate, EMA, exact resume, atomic checkpoints.

A recipe's batch is a function of (seed, step, process), so a resumed run sees the same batches as an uninterrupted
one. Settings that change the weights are in the checkpoint; resuming with other values is an error. The number of
steps may change, and is recorded.
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

from fastgen.environment import commit, cpu_name
from fastgen.errors import FastgenError
from fastgen.io import check_writable
from fastgen.locks import locked_folder
from fastgen.training.checkpoints import (
    check_run,
    damaged,
    file_version,
    read_checkpoint,
    trim_log,
    write_checkpoint,
)
from fastgen.training.muon import build_optimizers
from fastgen.training.prefetch import Draw, Prefetcher
from fastgen.training.sharding import (
    clip_gradients,
    gather_weights,
    load_parts,
    remove_parts,
    save_parts,
    shard,
    sharding_asked,
)
from fastgen.training.train_config import FIXED, TrainConfig, learning_rate, resolve_precision


class Recipe(Protocol):
    """The interface between a recipe and the engine."""

    name: str

    def build(self) -> torch.nn.Module:
        """The module to train: its parameters with requires_grad."""

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Items start … start + size - 1, on the CPU."""

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch on the module's device, and numbers for the log."""

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Write the trained (EMA) weights in Hub layout, with the training record."""


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
        """The batch, and the generator after drawing it."""
        numbers = np.random.SeedSequence((self.seed, step, self.process)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(numbers[0]))
        return self.recipe.batch(self.start(step), self.batch_size // self.accumulate, generator), generator


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM stops the loop after its step; a second one acts as usual."""
    asked: list[int] = []
    previous: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread, which alone receives signals
        previous.clear()
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def asks_to_shard(config: TrainConfig) -> bool:
    """Whether the run was configured for sharding."""
    return config.shard or sharding_asked()


def run_settings(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Everything that the weights of a run depend on, except its data; JSON-ready."""
    found = {name: getattr(config, name) for name in FIXED}
    found |= {"precision": resolve_precision(config.precision), "processes": processes}
    return found | ({"shard": True} if asks_to_shard(config) else {})


def recompute_activations(module: torch.nn.Module, recipe: str) -> None:
    """Enable gradient checkpointing in the models of a module.

    Raises:
        FastgenError: no model supports it.
    """
    models = [part for part in module.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
    if not models:
        raise FastgenError(f"gradient_checkpointing: recipe {recipe} trains no model that supports it")
    for model in models:
        model.enable_gradient_checkpointing()  # type: ignore[operator]


class Trainer:
    """Trains one recipe; `run()` returns the record for the model card.

    Args:
        recipe: what to train.
        config: settings.
        report: called with each log record.
        data: identifies the training data, e.g. digests of folders, JSON-ready; a resumed run must have the same.

    Raises:
        FastgenError: the folder has a damaged checkpoint, or one with another recipe, seed, setting or data.
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
        # accelerate's precision is global to the process: a second run could not change it.
        self.accelerator = Accelerator(mixed_precision="no", cpu=not cuda)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        adamw = asks_to_shard(config)
        if adamw and not getattr(recipe, "shardable", False):
            raise FastgenError(f"shard: recipe {recipe.name} does not support sharding")
        self.sharded = adamw and processes > 1
        torch.manual_seed(config.seed)
        module = recipe.build()
        if config.gradient_checkpointing:
            recompute_activations(module, recipe.name)
        if config.compile:
            for name in getattr(module, "compiled_parts", ()):
                module.get_submodule(name).compile(dynamic=getattr(module, "compiled_shapes", False))
        if self.sharded:
            shard(module, self.accelerator.device)
        self.trained = [param for param in module.parameters() if param.requires_grad]
        self.optimizers = build_optimizers(module, config.lr, self.precision, adamw)
        self.module = module if self.sharded else self.accelerator.prepare(module)
        # DTensor lacks some foreach operations of the average.
        average: dict[str, Any] = {"decay": config.ema_decay, "use_ema_warmup": True, "power": 0.75}
        self.ema = EMAModel(self.trained, **average, foreach=not self.sharded)
        self.ema.to(self.accelerator.device)
        self.step, self.seconds = 0, 0.0
        self._parts = -1
        """Step of the shards that the checkpoint names."""
        self.logs: dict[str, float] = {}
        self.resumed: list[dict[str, int]] = []
        self.batches = _Batches(recipe, config.seed, process, processes, config.batch_size, config.accumulate)
        self.settings = run_settings(config, processes) | {"data": data}
        self.checkpoint = config.output_dir / "checkpoint.pt"
        self._loaded = file_version(self.checkpoint)
        if self._loaded is not None:
            self._load()

    def run(self) -> dict[str, Any]:
        """Train to the last step (or until stopped), save a checkpoint, export; returns the record.

        Raises:
            FastgenError: another run is using the folder, or the loss is not finite.
        """
        check_writable(self.config.output_dir)
        lock = locked_folder(self.config.output_dir, self.accelerator.process_index)
        with ExitStack() as stack:
            self.accelerator.wait_for_everyone()
            with self.accelerator.main_process_first():
                stack.enter_context(lock)
            if file_version(self.checkpoint) != self._loaded:  # another run has ended in the meantime
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
        self._export(config.output_dir / "model", record)
        return record

    def _export(self, folder: Path, record: dict[str, Any]) -> None:
        main = self.accelerator.is_main_process
        if self.sharded:
            self.ema.copy_to(self.trained)
            gather_weights(self.module, main)
            if main:
                self.recipe.export(self.module, folder, record)
        elif main:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
            self.recipe.export(self.accelerator.unwrap_model(self.module), folder, record)
            self.ema.restore(self.trained)

    def record(self, logs: dict[str, float]) -> dict[str, Any]:
        """The record of the run for the model card."""
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
            # Processes average their gradients once per step, with the last micro-batch; sharded ones with each,
            # because a process only stores its share.
            once = part + 1 < config.accumulate and not self.sharded
            with accelerator.no_sync(self.module) if once else nullcontext():
                accelerator.backward(loss / config.accumulate)
            for key, value in {"loss": float(loss.detach()), **logs}.items():
                totals[key] = totals.get(key, 0.0) + value / config.accumulate
        clip = clip_gradients if self.sharded else accelerator.clip_grad_norm_
        norm = clip(self.trained, config.grad_clip)
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
        """The source of batches from this step on."""
        if not self.config.workers:
            yield self.batches
            return
        prefetcher = Prefetcher(self.batches, self.config.workers, self.step, self.config.steps)
        try:
            yield prefetcher
        finally:
            prefetcher.close()

    def _any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all must stop after the same step."""
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
        """Write a checkpoint. Shards are complete on disk before the checkpoint that names their step is renamed."""
        folder, main = self.config.output_dir, self.accelerator.is_main_process
        if self.sharded:
            if self._parts == self.step:  # never overwrite the only shards
                return
            save_parts(folder, self.step, self.module, self.ema.shadow_params, self.optimizers)
            self._parts = self.step
        if not main:
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
            "ema": self.ema.state_dict(),
        }
        if self.sharded:
            state["ema"]["shadow_params"] = []
        else:
            state["module"] = self.accelerator.unwrap_model(self.module).state_dict()
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        write_checkpoint(self.checkpoint, state)
        if self.sharded:
            remove_parts(folder, self.step)

    def _load(self) -> None:
        state = read_checkpoint(self.checkpoint)
        try:
            check_run(self.checkpoint, state, self.recipe.name, self.config.seed, self.settings)
            self._load_weights(state)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.logs, self.resumed = dict(state.get("logs", {})), list(state.get("resumed", []))
            if state.get("steps", self.config.steps) != self.config.steps:
                self.resumed.append({"step": self.step, "steps_before": state["steps"], "steps": self.config.steps})
        except FastgenError:
            raise
        except Exception as error:  # torch and accelerate raise errors of a dozen types
            raise damaged(self.checkpoint, error) from error
        self._loaded = file_version(self.checkpoint)

    def _load_weights(self, state: dict[str, Any]) -> None:
        averages = self.ema.shadow_params
        if self.sharded:
            load_parts(self.config.output_dir, state["step"], self.module, averages, self.optimizers)
            self._parts = int(state["step"])
            self.ema.load_state_dict({**state["ema"], "shadow_params": averages})
            return
        self.accelerator.unwrap_model(self.module).load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
