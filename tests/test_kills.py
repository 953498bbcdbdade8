"""SIGKILL at random moments: running the same command again gives the files of an uninterrupted run."""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
import torch

from fastgen.io import file_sha256

pytestmark = pytest.mark.slow
Outcome = Callable[[Path], dict[str, Any]]


def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(folder: Path, arguments: list[str] | None, size: int) -> list[Any]:
    """The processes of a command (None: of the training) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if arguments is None:
        return [killed.start(killed.train, folder)]
    where = port() if size > 1 else 0
    return [killed.start(killed.command, folder, arguments, rank, size, where) for rank in range(size)]


def wait(processes: list[Any], seconds: float = 90) -> list[int | None]:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]


def whole_run(folder: Path, arguments: list[str] | None, outcome: Outcome) -> tuple[dict[str, Any], float]:
    """The files of an uninterrupted run, and how long a warm one takes."""
    for attempt in ("first", "second"):
        begin = time.monotonic()
        assert wait(launch(folder / attempt, arguments, 1)) == [0], said(folder / attempt)
    return outcome(folder / "second"), time.monotonic() - begin


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.parent.glob(f"{folder.name}-said-*.txt"))


def kill_and_resume(
    tmp_path: Path, arguments: list[str] | None, outcome: Outcome, kills: int, sizes: tuple[int, ...] = (1,)
) -> None:
    """Each attempt is killed up to three times before it may end."""
    expected, seconds = whole_run(tmp_path / "whole", arguments, outcome)
    assert expected
    rng, hits, attempt = random.Random(kills), 0, 0
    while hits < kills:
        attempt += 1
        assert attempt < 4 * kills, "hardly a kill falls into a run"
        folder = tmp_path / str(attempt)
        for _ in range(rng.choice((1, 2, 3))):
            for left in folder.parent.glob(f"{folder.name}-met-*"):
                left.unlink()
            processes = launch(folder, arguments, rng.choice(sizes))
            time.sleep(rng.uniform(0.05, 1.0) * seconds)
            # Before they have met, only a launcher can know that one is dead.
            met = len([*folder.parent.glob(f"{folder.name}-met-*")]) == len(processes)
            victims = [rng.choice(processes)] if met and rng.random() < 0.3 else processes
            hits += any(process.is_alive() for process in victims)
            for process in victims:
                process.kill()
            wait(processes)  # the remaining process notices
        size = rng.choice(sizes)
        assert wait(launch(folder, arguments, size)) == [0] * size, said(folder)
        assert "Traceback" not in said(folder)
        assert outcome(folder) == expected
        assert not [path.name for path in folder.rglob(".*") if path.suffix in (".tmp", ".lock")]
        shutil.rmtree(folder)


def pictures(folder: Path) -> dict[str, Any]:
    """Of `fastgen generate`: bytes of the pictures, and of each sidecar what does not depend on the run."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "out").iterdir()):
        if path.suffix == ".png":
            sidecar = json.loads(path.with_suffix(".json").read_text())
            assert sidecar["sha256"] == file_sha256(path)
            found[path.name] = (path.read_bytes(), sidecar["settings"], sidecar["sha256"])
        else:
            assert path.with_suffix(".png").exists(), path
    return found


def test_generate(tmp_path: Path, micro_z: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\ntwo green stars\n")
    options = ["--model", str(micro_z), "--steps", "3", "--num-images", "2", "--batch-size", "2", "--device", "cpu"]
    kill_and_resume(tmp_path, ["generate", "--prompts-file", str(prompts), "-o", "out", *options], pictures, 10)


def verdicts(folder: Path) -> dict[str, Any]:
    """Of `fastgen eval geneval`: everything but the time."""
    files = {path.relative_to(folder).as_posix(): path for path in (folder / "run").rglob("*") if path.is_file()}
    scores = json.loads(files.pop("run/scores.json").read_text())
    kept = {name: path.read_bytes() for name, path in files.items() if "timing" not in name and "scores" not in name}
    return kept | {key: scores[key] for key in ("tasks", "overall", "overall_stderr", "prompts", "n_images")}


GENEVAL = ["eval", "geneval", "--detector", "shapes", "--model", "renders", "--limit", "2", "--images-per-prompt", "4"]


def test_eval_geneval(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, [*GENEVAL, "--out", "run"], verdicts, 8)


def test_eval_geneval_by_one_or_two_processes(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, [*GENEVAL, "--out", "run"], verdicts, 6, sizes=(1, 2))


def distances(folder: Path) -> dict[str, Any]:
    """Of `fastgen eval fid`: the pictures, and the numbers."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "run").rglob("*.png")}
    data = json.loads((folder / "result.json").read_text())
    return found | {name: metric["value"] for name, metric in data["metrics"].items()} | {"n": data["n_images"]}


def test_eval_fid(tmp_path: Path) -> None:
    from PIL import Image

    from fastgen.data.shapes import ShapesWorld

    reference = tmp_path / "reference"
    reference.mkdir()
    for number, image in enumerate(ShapesWorld(3).batch(40).images):
        Image.fromarray(image).save(reference / f"{number:03d}.png")
    options = ["--model", "renders", "--limit", "2", "--images-per-prompt", "4", "--run", "run", "--allow-small"]
    options += ["--reference", str(reference), "--metrics", "fd-shapes,precision-shapes", "--bootstrap", "5"]
    kill_and_resume(tmp_path, ["eval", "fid", *options, "--cache", "cache", "--out", "result.json"], distances, 8)


def weights(folder: Path) -> dict[str, Any]:
    """Of a training: weights, and a log of every step, once."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    exported = torch.load(folder / "model" / "weights.pt", weights_only=True)
    record = json.loads((folder / "model" / "record.json").read_text())
    tensors = {name: value.tolist() for name, value in exported.items()}
    return tensors | {
        "losses": [line["loss"] for line in lines],
        "last": record["last"],
        "steps": record["steps_done"],
    }


def test_train(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, None, weights, 10)
