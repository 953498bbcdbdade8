"""`fastgen generate` in several processes: they share the pictures, which are those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from killed import command, start
from torch.distributed import HashStore

from fastgen.cli.generate import _own
from fastgen.cli.plan import plan_jobs
from fastgen.evaluation.distributed import Group


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def _words(model: Path, tmp_path: Path, out: str) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ring\na star\ntwo stars\n")
    options = ["--steps", "2", "--num-images", "3", "--batch-size", "2", "--device", "cpu"]
    return ["generate", "--model", str(model), "--prompts-file", str(prompts), *options, "-o", str(tmp_path / out)]


def _together(folder: Path, words: list[str], size: int) -> list[int | None]:
    folder.mkdir(exist_ok=True)
    port = _free_port()
    processes = [start(command, folder, words, rank, size, port) for rank in range(size)]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_batch_is_drawn_whole_by_one_process(size: int, batch_size: int) -> None:
    prompts = ["a", "b", "c"]
    paths = [[Path(f"{prompt}-{number}.png") for number in range(3)] for prompt in prompts]
    jobs = plan_jobs(prompts, 0, {}, paths, batch_size)
    parts = [_own(jobs, Group(rank, size, HashStore() if size > 1 else None)) for rank in range(size)]
    assert sorted(job.image for part in parts for job in part) == sorted(job.image for job in jobs)
    for first in range(0, len(jobs), batch_size):
        batch = set(map(str, (job.image for job in jobs[first : first + batch_size])))
        assert sum(bool(batch & {str(job.image) for job in part}) for part in parts) == 1
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * batch_size


def test_two_processes_share_the_pictures_of_one(micro_z: Path, tmp_path: Path) -> None:
    assert _together(tmp_path / "a", _words(micro_z, tmp_path, "one"), 1) == [0]
    assert _together(tmp_path / "b", _words(micro_z, tmp_path, "two"), 2) == [0, 0]
    whole = _pictures(tmp_path / "one")
    assert len(whole) == 9 and _pictures(tmp_path / "two") == whole
    said = [(tmp_path / f"b-said-{rank}.txt").read_text() for rank in range(2)]
    assert said[0].count(".png") == 9 and ".png" not in said[1]
    # Existing pictures are made by no process, missing ones by one.
    lost = sorted((tmp_path / "two").glob("*.png"))[4]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.png") if path != lost}
    lost.unlink()
    assert _together(tmp_path / "b", _words(micro_z, tmp_path, "two"), 2) == [0, 0]
    assert _pictures(tmp_path / "two") == whole
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_an_error_of_one_process_ends_both(micro_z: Path, tmp_path: Path) -> None:
    words = _words(micro_z, tmp_path, "two")
    assert _together(tmp_path / "a", [*words, "--height", "33"], 2) == [2, 2]
    assert not _pictures(tmp_path / "two")


@pytest.mark.slow
def test_accelerate_launch_shares_them(micro_z: Path, tmp_path: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]  # without a GPU: on the CPU
    shared = subprocess.run(
        [*launcher, "-m", "fastgen", *_words(micro_z, tmp_path, "two")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert shared.returncode == 0, shared.stderr
    assert len(_pictures(tmp_path / "two")) == 9 and shared.stdout.count(".png") == 9
