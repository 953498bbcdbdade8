"""Processes that start in milliseconds, because their parent has imported everything, and that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "killed",
        "fastgen.cli.generate",
        "fastgen.cli.eval",
        "fastgen.evaluation.runner",
        "fastgen.evaluation.fid.evaluate",
        "fastgen.evaluation.geneval.named_judges",
        "fastgen.evaluation.shapesworld",
        "fastgen.pipelines.dc_z_image",
        "fastgen.pipelines.loading.loader",
        "fastgen.pipelines.speculative",
        "fastgen.training.engine",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "transformers.models.clip.modeling_clip",
        "transformers.models.janus.modeling_janus",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """A real process that ends in any way without the parent's help."""
    process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def command(folder: Path, arguments: list[str], rank: int = 0, size: int = 1, port: int = 0) -> None:
    """`fastgen` in `folder`; what it says goes into said-RANK.txt next to the folder."""
    torch.set_num_threads(1)
    os.chdir(folder)
    said = os.open(folder.with_name(f"{folder.name}-said-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.environ |= {"FASTGEN_CACHE": str(folder.parent / "cache")}
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from fastgen.cli.main import run
    from fastgen.evaluation.distributed import Group

    meet = Group.from_environment

    def met(device: str = "cpu") -> Group:
        group = meet(device, silence=4.0)
        (folder.parent / f"{folder.name}-met-{rank}").touch()
        return group

    Group.from_environment = met  # type: ignore[method-assign, assignment]
    code = run(arguments)
    sys.stdout.flush()
    os._exit(code)


class LineRecipe:
    """Fits a small network to a line, slowly."""

    name = "line"

    def build(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        time.sleep(0.004)
        x = torch.randn(size, 2, generator=generator)
        return {"x": x, "y": x.sum(dim=1, keepdim=True)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return (module(batch["x"]) - batch["y"]).square().mean(), {}

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), folder / "weights.pt")
        (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def train(folder: Path) -> None:
    """Forty steps with a checkpoint after every third."""
    torch.set_num_threads(1)
    from fastgen.training.engine import Trainer
    from fastgen.training.train_config import TrainConfig

    settings: dict[str, Any] = {"lr": 1e-2, "warmup": 3, "log_every": 1, "checkpoint_every": 3, "precision": "fp32"}
    Trainer(LineRecipe(), TrainConfig(output_dir=folder, steps=40, batch_size=4, **settings)).run()
    os._exit(0)
