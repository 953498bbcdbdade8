"""The training loop: exact resume, schedule, EMA export, interruption, bad settings."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_process import other
from short_recipes import build_recipe

from fastgen.errors import FastgenError
from fastgen.training.engine import Trainer
from fastgen.training.muon import build_optimizers
from fastgen.training.train_config import TrainConfig, learning_rate, resolve_precision


class LineRecipe:
    """Fits a small network to a line with noise; records which items each step saw."""

    name = "line"

    def __init__(self, explode_at: int | None = None) -> None:
        self.starts: list[int] = []
        self.exported: dict[str, torch.Tensor] = {}
        self.explode_at = explode_at
        self.on_batch: Any = None

    def build(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        self.starts.append(start)
        if self.on_batch is not None:
            self.on_batch(len(self.starts))
        x = torch.randn(size, 2, generator=generator)
        return {"x": x, "y": x.sum(dim=1, keepdim=True), "label": "text stays on the CPU"}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        noise = 0.01 * torch.randn(batch["y"].shape, generator=generator)
        loss = (module(batch["x"]) - batch["y"] - noise.to(batch["y"])).square().mean()
        if self.explode_at is not None and len(self.starts) > self.explode_at:
            loss = loss * float("nan")
        return loss, {"extra": 1.0}

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.exported = {name: value.clone() for name, value in module.state_dict().items()}
        (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def _config(folder: Path, **overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 12, "batch_size": 8, "lr": 1e-2, "warmup": 3, "log_every": 1}
    values["precision"] = "fp32"
    return TrainConfig(output_dir=folder, **{**values, **overrides})


def _run(folder: Path, **overrides: Any) -> tuple[dict[str, Any], LineRecipe]:
    recipe = LineRecipe()
    return Trainer(recipe, _config(folder, **overrides)).run(), recipe


def test_learns_and_writes_what_it_promises(tmp_path: Path) -> None:
    record, recipe = _run(tmp_path, steps=300, ema_decay=0.9)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]
    assert record["steps_done"] == 300 and record["items_seen"] == 2400
    assert recipe.starts == list(range(0, 2400, 8))
    assert json.loads((tmp_path / "model" / "record.json").read_text())["recipe"] == "line"


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop_at: int) -> None:
    """Stopped by a signal after `stop_at` steps and started again: same weights, EMA and items, bit for bit."""
    _, whole = _run(tmp_path / "whole")
    recipe = LineRecipe()
    recipe.on_batch = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == stop_at else None
    trainer = Trainer(recipe, _config(tmp_path / "parts"))
    assert trainer.run()["steps_done"] == stop_at
    record, resumed = _run(tmp_path / "parts")
    assert record["steps_done"] == 12
    assert recipe.starts + resumed.starts == whole.starts
    assert all(torch.equal(whole.exported[name], resumed.exported[name]) for name in whole.exported)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_reaches_the_module_and_nothing_that_is_kept(tmp_path: Path, precision: str) -> None:
    """Under bf16 the products are bfloat16; weights, EMA and what is exported stay float32."""
    seen: list[torch.dtype] = []

    class Watched(LineRecipe):
        def loss(
            self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
        ) -> tuple[torch.Tensor, dict[str, float]]:
            output = module(batch["x"])
            seen.append((batch["x"] @ batch["x"].T).dtype)
            return (output - batch["y"]).square().mean(), {}

    recipe = Watched()
    record = Trainer(recipe, _config(tmp_path, precision=precision, steps=200, ema_decay=0.9)).run()
    assert record["precision"] == precision
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(value.dtype == torch.float32 for value in recipe.exported.values())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


def test_precision_auto_names_a_real_one() -> None:
    assert resolve_precision("auto") in ("bf16", "fp32")
    assert resolve_precision("fp32") == "fp32" and resolve_precision("bf16") == "bf16"


def test_parts_of_a_batch_give_the_step_of_the_whole(tmp_path: Path) -> None:
    """Accumulated gradients equal those of the undivided batch, and the same items are used."""

    class Indexed(LineRecipe):
        def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
            self.starts.append(start)
            items = torch.arange(start, start + size, dtype=torch.float32)
            x = torch.stack([torch.sin(items), torch.cos(3 * items)], dim=1)
            return {"x": x, "y": x.prod(dim=1, keepdim=True)}

        def loss(
            self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
        ) -> tuple[torch.Tensor, dict[str, float]]:
            return (module(batch["x"]) - batch["y"]).square().mean(), {}

    results = []
    for parts in (1, 4):
        recipe = Indexed()
        Trainer(recipe, _config(tmp_path / str(parts), accumulate=parts)).run()
        results.append(recipe)
    assert results[1].starts == list(range(0, 96, 2)) and results[0].starts == list(range(0, 96, 8))
    for name, value in results[0].exported.items():
        torch.testing.assert_close(value, results[1].exported[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_batches_drawn_ahead_are_the_same(tmp_path: Path) -> None:
    """Also what the loss draws behind them, and in a run that was stopped."""
    sizes: dict[str, Any] = {"steps": 5, "batch_size": 4, "lr": 1e-3, "precision": "fp32"}
    Trainer(build_recipe("detector", 0), TrainConfig(tmp_path / "alone", **sizes)).run()
    ahead = TrainConfig(tmp_path / "ahead", **sizes, workers=2)
    Trainer(build_recipe("detector", 0), replace(ahead, max_seconds=1e-9)).run()
    again = Trainer(build_recipe("detector", 0), ahead)
    assert again.step == 1
    again.run()
    alone, together = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("alone", "ahead"))
    assert together["step"] == 5
    for name, value in alone["module"].items():
        assert torch.equal(value, together["module"][name]), name
    assert not multiprocessing.active_children()


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    _run(tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_runs_outside_the_main_thread(tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(_run(tmp_path)[0]["steps_done"]))
    thread.start()
    thread.join()
    assert done == [12]


def test_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    record, _ = _run(tmp_path, steps=10**6, max_seconds=0.3)
    assert 0 < record["steps_done"] < 10**6
    assert (tmp_path / "checkpoint.pt").exists()


def test_export_holds_the_average_and_leaves_the_weights(tmp_path: Path) -> None:
    recipe = LineRecipe()
    trainer = Trainer(recipe, _config(tmp_path, ema_decay=0.99))
    trainer.run()
    weights = trainer.module.state_dict()
    assert any(not torch.equal(weights[name], recipe.exported[name]) for name in weights)
    for shadow, exported in zip(trainer.ema.shadow_params, recipe.exported.values(), strict=True):
        assert torch.equal(shadow, exported)


def test_a_diverged_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    recipe = LineRecipe(explode_at=6)
    trainer = Trainer(recipe, _config(tmp_path, checkpoint_every=2))
    with pytest.raises(FastgenError, match="loss is nan at step 6"):
        trainer.run()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


def _broken(path: Path, damage: str) -> None:
    """Damage a checkpoint in one of many ways."""
    data = path.read_bytes()
    state = torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        weights = max((archive.read(name) for name in archive.namelist() if "/data/" in name), key=len)
    places = {"flipped early": 100, "flipped weight": data.index(weights) + 9}
    places["flipped in the directory"] = len(data) - 300
    if damage in places:
        place = places[damage]
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
    elif damage in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": data[:1000], "empty": b"", "text": b"nonsense\n" * 50}[damage])
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "list":
        torch.save([1], path)
    elif damage.startswith("no "):
        del state[damage.removeprefix("no ")]
        torch.save(state, path)
    else:
        change = {
            "other recipe": {"recipe": "circle"},
            "other weights": {"module": {"0.weight": torch.zeros(3)}},
            "other optimizers": {"optimizers": []},
            "words": {"step": "many"},
            "settings that are no JSON": {"settings": "{"},
        }[damage]
        torch.save({**state, **change}, path)


@pytest.mark.parametrize(
    "damage",
    [
        *(
            "truncated",
            "empty",
            "text",
            "folder",
            "list",
            "flipped early",
            "flipped weight",
            "flipped in the directory",
        ),
        *("no recipe", "no step", "no module", "no ema", "no optimizers"),
        *("other recipe", "other weights", "other optimizers", "words", "settings that are no JSON"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    _run(tmp_path)
    _broken(tmp_path / "checkpoint.pt", damage)
    with pytest.raises(FastgenError, match="checkpoint") as error:
        Trainer(LineRecipe(), _config(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"seed": 1}, None, "with seed 0"),
        ({"lr": 2e-2}, None, "lr is 0.01 there and 0.02 now"),
        ({"batch_size": 16}, None, "batch_size is 8 there and 16 now"),
        ({"accumulate": 2}, None, "accumulate is 1 there and 2 now"),
        ({"precision": "bf16"}, None, "precision is 'fp32' there and 'bf16' now"),
        ({"warmup": 4}, None, "warmup"),
        ({"decay": 0.5}, None, "decay"),
        ({"ema_decay": 0.9}, None, "ema_decay"),
        ({"grad_clip": 2.0}, None, "grad_clip"),
        ({}, {"data": "2"}, "data is {'data': '1'} there and {'data': '2'} now"),
    ],
)
def test_a_run_does_not_continue_with_other_settings(
    tmp_path: Path, change: dict[str, Any], data: Any, message: str
) -> None:
    Trainer(LineRecipe(), _config(tmp_path), data={"data": "1"}).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FastgenError, match=message):
        Trainer(LineRecipe(), _config(tmp_path, **change), data=data or {"data": "1"})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_more_steps_are_recorded(tmp_path: Path) -> None:
    assert "resumed" not in _run(tmp_path)[0]
    record, _ = _run(tmp_path, steps=15)
    assert record["steps_done"] == 15 and record["resumed"] == [{"step": 12, "steps_before": 12, "steps": 15}]


def test_a_finished_run_keeps_its_last_numbers(tmp_path: Path) -> None:
    first, _ = _run(tmp_path)
    assert _run(tmp_path)[0]["last"] == first["last"] != {}


def test_steps_are_logged_once_after_a_kill_between_log_and_checkpoint(tmp_path: Path) -> None:
    _run(tmp_path / "whole")
    recipe = LineRecipe(explode_at=8)
    with pytest.raises(FastgenError, match="loss is nan at step 8"):  # as a kill: the last checkpoint is of step 5
        Trainer(recipe, _config(tmp_path / "parts", checkpoint_every=5)).run()
    with (tmp_path / "parts/log.jsonl").open("a") as file:
        file.write('{"step": 9, "los')  # what a kill leaves of a line
    _run(tmp_path / "parts", checkpoint_every=5)
    steps, losses = [], []
    for folder in ("whole", "parts"):
        records = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        steps.append([record["step"] for record in records])
        losses.append([record["loss"] for record in records])
    assert steps[0] == steps[1] == list(range(1, 13)) and losses[0] == losses[1]


def test_a_log_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    recipe = LineRecipe(explode_at=3)
    with pytest.raises(FastgenError):
        Trainer(recipe, _config(tmp_path)).run()
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3
    _run(tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [*range(1, 13)]


def test_a_folder_in_use_is_refused_and_a_run_that_ended_meanwhile_is_resumed(tmp_path: Path) -> None:
    waiting = Trainer(LineRecipe(), _config(tmp_path))
    _run(tmp_path)
    assert waiting.run()["steps_done"] == 12 and waiting.recipe.starts == []
    with other("folder", (tmp_path,)), pytest.raises(FastgenError, match="in use by another run"):
        _run(tmp_path)


@settings(max_examples=200, deadline=None)
@given(steps=st.integers(1, 1000), warmup=st.integers(0, 50), decay=st.floats(0, 1), step=st.integers(0, 999))
def test_learning_rate_stays_in_range_and_ends_low(steps: int, warmup: int, decay: float, step: int) -> None:
    config = TrainConfig(output_dir=Path("x"), steps=steps, batch_size=1, lr=0.5, warmup=warmup, decay=decay)
    rate = learning_rate(config, min(step, steps - 1))
    assert 0 < rate <= 0.5
    if decay * steps >= 1:
        assert learning_rate(config, steps - 1) <= 0.5 / (decay * steps) + 1e-12
    plateau = warmup
    if plateau < steps - decay * steps:
        assert math.isclose(learning_rate(config, plateau), 0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"decay": 1.5},
        {"ema_decay": 1.0},
        {"warmup": -1},
        {"grad_clip": 0.0},
        {"max_seconds": -1.0},
        {"accumulate": 0},
        {"accumulate": 3},
        {"precision": "fp8"},
        {"workers": -1},
        {"workers": 1, "accumulate": 2},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        _config(Path("x"), **bad)


def test_optimizers_split_the_parameters_once() -> None:
    """Matrices go to Muon; embeddings, named heads, convolutions, vectors to AdamW; frozen ones nowhere."""

    class Net(torch.nn.Module):
        adamw_names = ("head",)

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.hidden = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 2)
            self.conv = torch.nn.Conv2d(1, 1, 3)
            self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    net = Net()
    muon, adamw = build_optimizers(net, 1e-3)
    hidden = [id(p) for group in muon.param_groups for p in group["params"]]
    other = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert hidden == [id(net.hidden.weight)]
    assert other == {id(p) for p in net.parameters() if p.requires_grad} - set(hidden)
