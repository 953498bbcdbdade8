"""Settings of a training run, its learning rate and its precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.environment import native_bfloat16
from fastgen.errors import FastgenError

PRECISIONS = ("auto", "bf16", "fp32")
# Settings that change the weights of a resumed run. The number of steps is not one of them, although the learning rate
# decays towards the last step: a run may be extended, and its record says so.
FIXED = ("batch_size", "accumulate", "lr", "warmup", "decay", "ema_decay", "grad_clip")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a run.

    Args:
        output_dir: folder of checkpoint, log and exported model.
        steps: total optimizer steps.
        batch_size: items per step and process.
        accumulate: gradient-accumulation steps, a divisor of batch_size. Small micro-batches stay in the CPU's cache:
            with four, the tiny Janus trains about 1.3 times as fast as with one.
        compile: `torch.compile` the sub-modules in the `compiled_parts` of the recipe's module (tiny Janus on one CPU
            core: 1.26 times as fast, after 80 s of compiling).
        lr: peak learning rate.
        seed: seeds weights, data and noise.
        warmup: steps of linear warm-up.
        decay: last share of the run, in which the learning rate decays linearly to zero.
        ema_decay: decay of the weight average.
        grad_clip: gradient norm limit.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        max_seconds: save a checkpoint and stop after this wall time; 0 = never.
        precision: "bf16" (autocast; weights, optimizers and EMA stay float32), "fp32", or "auto": bf16 if the device
            supports it natively.
        workers: processes that prepare the same batches in advance; 0 = this process does. Needs accumulate 1, because
            a micro-batch continues the random numbers of the loss before it.
        shard: shard weights, gradients and optimizer state across processes (FSDP2) and train everything with AdamW,
            for large models; `accelerate launch` with FSDP sets it too. The recipe must support it.
        gradient_checkpointing: recompute a block's activations in the backward pass instead of storing them.

    Raises:
        FastgenError: a value is out of range; the message names the setting.
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
    shard: bool = False
    gradient_checkpointing: bool = False

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


def learning_rate(config: TrainConfig, step: int) -> float:
    """Warm-up, constant, linear decay to zero over the last `decay` share of the run."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall_steps = config.decay * config.steps
    fall = 1.0 if fall_steps == 0 else min(1.0, (config.steps - step) / fall_steps)
    return config.lr * rise * fall


def resolve_precision(name: str) -> str:
    """Resolve "auto" to "fp32" or "bf16" for this machine; other names are returned unchanged."""
    if name != "auto":
        return name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if native_bfloat16(device) else "fp32"
