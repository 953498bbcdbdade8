"""Several processes on one evaluation: the same result as one, with any of them killed, and none waits forever."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import runner_worker
import torch
from long_tail import long_tail
from PIL import Image

from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ChunkStore, ranges, run_chunks
from fastgen.evaluation.distributed import Group

# A server that has imported everything forks the processes, which then start in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "fastgen.evaluation.shapesworld",
        "torch.distributed",
        "fastgen.cli.main",
        "fastgen.evaluation.geneval.named_judges",
    ]
    + ["transformers.utils.logging", "fastgen.cli.eval_geneval"]
)

Worker = Callable[..., None]
Own = dict[int, dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    folder: Path,
    size: int,
    seconds: float = 0.0,
    target: Worker = runner_worker.work,
    own: Own | None = None,
    **kwargs,
) -> list[BaseProcess]:
    """Processes that share a run; `own` has further arguments of single ones."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    started = [
        PROCESSES.Process(
            target=target,
            args=(str(folder), rank, size, port, seconds),
            kwargs={**kwargs, **(own or {}).get(rank, {})},
        )
        for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def finish(processes: list[BaseProcess], within: float = 60.0) -> list[int | None]:
    """Exit codes; a process that hangs is killed and fails the test."""
    deadline = time.monotonic() + within
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, "a process hangs"
    return [process.exitcode for process in processes]


def visible(folder: Path) -> list[Path]:
    """Every file but seconds; of those that a kill may leave, none is visible."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "timing"))]


def outcome(folder: Path) -> dict[str, object]:
    """Every image and record and the scores."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in visible(folder / "run")}
    scores = json.loads((folder / "scores.json").read_text())
    return {**files, "scores": scores}


def same(found: dict[str, object], whole: dict[str, object]) -> None:
    """Equal to the byte, except for the distance: another number of processes adds its sums in another order."""
    ours, theirs = dict(found.pop("scores")), dict(whole["scores"])  # type: ignore[call-overload]
    fd, other = ours.pop("fd_shapes"), theirs.pop("fd_shapes")
    assert fd.pop("value") == pytest.approx(other["value"], rel=1e-9)
    assert fd == {key: value for key, value in other.items() if key != "value"} and ours == theirs
    assert found == {name: data for name, data in whole.items() if name != "scores"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The outcome of one process without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder, 1)) == [0]
    return outcome(folder)


# --- the same result ---------------------------------------------------------------------------------------------


def test_two_processes_equal_one(tmp_path: Path, whole: dict[str, object]) -> None:
    assert finish(start(tmp_path, 2)) == [0, 0]
    assert len(list((tmp_path / "run").glob("timing*.json"))) == 2
    made = [json.loads(path.read_text())["images"] for path in (tmp_path / "run").glob("timing*.json")]
    assert made == [24, 24]  # nothing twice
    assert not (tmp_path / "run" / ".work").exists()
    same(outcome(tmp_path), whole)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Sums that are added up, and features that are brought together: KID, precision, bootstrap."""
    found = []
    for size in (1, 2, 3):
        port = free_port()
        started = [
            PROCESSES.Process(target=runner_worker.measure, args=(str(tmp_path), rank, size, port))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        assert finish(started) == [0] * size
        found.append(json.loads((tmp_path / "measured.json").read_text()))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, metric in found[0].items():
            assert other[name]["value"] == pytest.approx(metric["value"], rel=1e-9)
        assert other["fd-shapes"]["stderr"] == pytest.approx(found[0]["fd-shapes"]["stderr"], rel=1e-6)
    assert found[0]["fd-shapes"]["value"] > 0.1 and found[0]["kd-shapes"]["value"] > 1e-3


def test_batches_are_cut_in_the_same_places(tmp_path: Path) -> None:
    """Where pixels depend on the batch, a process asks for whole batches of the run and keeps what was missing."""
    from fastgen.evaluation.runner import EvaluationRun, RunSettings

    settings = RunSettings(model="m", model_fingerprint="0", images_per_prompt=3, batch_size=5)
    run = EvaluationRun(tmp_path / "run", runner_worker.PROMPTS, settings)
    missing = [(0, 1), (2, 1), (11, 2)]  # images 1, 7 and 35 of 36
    asked = run._own(missing)
    assert [p * 3 + i for p, i in asked] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 35]
    run.group.size, run.group.rank = 2, 1
    assert [p * 3 + i for p, i in run._own(missing)] == [5, 6, 7, 8, 9]


def test_fast_batches_resume_bit_for_bit(tmp_path: Path, micro_z: Path) -> None:
    """A real pipeline whose pixels depend on the batch: interrupted, resumed and shared runs make the same files."""
    from fastgen.evaluation.runner import EvaluationRun, RunSettings
    from fastgen.pipelines.generation import generate_images
    from fastgen.pipelines.loading import load_pipeline

    pipe = load_pipeline(str(micro_z))
    settings = RunSettings(model="micro", model_fingerprint="0", images_per_prompt=2, batch_size=5)

    def draw(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        pictures = generate_images(
            pipe, prompts, seeds, batch_size=5, batch_invariant=False, steps=2, height=32, width=32
        )
        return (picture.image for picture in pictures)

    def interrupted(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        yield from itertools.islice(draw(prompts, seeds), 8)
        raise KeyboardInterrupt

    prompts = runner_worker.PROMPTS[:6]
    EvaluationRun(tmp_path / "whole", prompts, settings).generate(draw)
    with pytest.raises(KeyboardInterrupt):
        EvaluationRun(tmp_path / "parts", prompts, settings).generate(interrupted)
    assert EvaluationRun(tmp_path / "parts", prompts, settings).generate(draw) == 4
    for path in (tmp_path / "whole").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes()


# --- kills -------------------------------------------------------------------------------------------------------


def kill_and_resume(
    folder: Path,
    rng: random.Random,
    sizes: tuple[int, int],
    alone: bool,
    moment: float,
    target: Worker = runner_worker.work,
) -> bool:
    """Kill one process or all at a moment (share of the run), start again with another number; whether it hit."""
    started = start(folder, sizes[0], seconds=0.01, target=target)
    # Before they have met, only a launcher can know that one is dead.
    deadline = time.monotonic() + 60
    while not (folder / "run" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    # 48 images drawn, judged and measured by all processes together, at 10 ms each and stage.
    time.sleep(moment * 3 * 48 * 0.01 / sizes[0])
    victims = [rng.choice(started)] if alone else started
    hit = any(process.is_alive() for process in victims)
    for process in victims:
        if process.pid is not None and process.is_alive():
            process.kill()
    finish(started, within=40)  # the remaining process must notice
    codes = finish(start(folder, sizes[1], target=target))
    assert not list((folder / "run").rglob(".*.tmp"))
    assert codes == [0] * sizes[1], [path.read_text() for path in folder.glob("error-*")]
    return hit


@pytest.mark.parametrize(
    ("sizes", "alone", "moment"), [pytest.param((1, 1), False, 0.5, marks=pytest.mark.slow), ((2, 1), True, 0.4)]
)
def test_killed_and_restarted(tmp_path: Path, whole: dict[str, object], sizes, alone, moment) -> None:
    assert kill_and_resume(tmp_path, random.Random(0), sizes, alone, moment)
    same(outcome(tmp_path), whole)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_ten_random_moments(tmp_path: Path, whole: dict[str, object], size: int) -> None:
    rng, hits = random.Random(size), 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        after = rng.choice([1, 2, 3])
        hits += kill_and_resume(folder, rng, (size, after), rng.random() < 0.5, rng.uniform(0, 1.1))
        same(outcome(folder), whole)
        shutil.rmtree(folder)
    assert hits >= 5


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_command_killed_at_random_moments(tmp_path: Path, size: int) -> None:
    """`fastgen eval geneval`: the files of an uninterrupted run, and the scores."""

    def outcome_of(folder: Path) -> dict[str, object]:
        files = {path.relative_to(folder).as_posix(): path for path in visible(folder)}
        apart = ("scores.json", "scores.md")  # they hold the time
        scores = json.loads(files["scores.json"].read_text())
        kept = {key: scores[key] for key in ("tasks", "overall", "overall_stderr", "correct_images", "n_images")}
        return {**{name: path.read_bytes() for name, path in files.items() if name not in apart}, "scores": kept}

    assert finish(start(tmp_path / "whole", 1, target=runner_worker.command)) == [0]
    expected = outcome_of(tmp_path / "whole" / "run")
    assert len(expected) > 48 and "results.jsonl" in expected
    rng, hits = random.Random(size), 0
    for attempt in range(3):
        folder, after = tmp_path / str(attempt), rng.choice([1, 2])
        alone, moment = rng.random() < 0.5, rng.uniform(0, 0.8)
        hits += kill_and_resume(folder, rng, (size, after), alone, moment, runner_worker.command)
        assert outcome_of(folder / "run") == expected
        shutil.rmtree(folder)
    assert hits >= 2


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", long_tail([0, 1], fast=(1,)))
def test_a_failure_is_reported_and_stops_the_others(tmp_path: Path, broken: int) -> None:
    began = time.monotonic()
    codes = finish(start(tmp_path, 2, seconds=0.2, own={broken: {"fail_at": 2}}), within=30)
    assert codes == [3, 3] and time.monotonic() - began < 25
    kind, reason = json.loads((tmp_path / f"error-{broken}.json").read_text())
    assert kind == "OSError" and "on fire" in reason
    kind, reason = json.loads((tmp_path / f"error-{1 - broken}.json").read_text())
    assert kind == "PeerFailed"
    assert f"process {broken} of 2 failed: the disk of process {broken} is on fire" in reason
    there = list((tmp_path / "run").glob("*/samples/*.png"))
    assert len(there) >= 3  # what was made stays


def test_settings_that_differ_are_an_error_on_all_processes(tmp_path: Path) -> None:
    assert finish(start(tmp_path, 1)) == [0]
    other = replace(runner_worker.SETTINGS, seed=5)
    assert finish(start(tmp_path, 2, settings=other)) == [3, 3]
    for rank in (0, 1):
        assert "seed is 0 there and 5 now" in (tmp_path / f"error-{rank}.json").read_text()


def test_an_incomplete_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Group.from_environment().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FastgenError, match="RANK is not set"):
        Group.from_environment()


def test_one_process_needs_no_distribution() -> None:
    group = Group()
    assert group.is_main and group.owns(7) and group.share(3) == 3 and group.gather("x") == ["x"]
    assert group.device("cuda") == "cuda" and group.main_first(lambda: 5) == 5
    total = torch.ones(2)
    group.sum_(total)
    group.meet()
    assert total.tolist() == [1, 1]
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Group(2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_the_command_under_its_launchers(tmp_path: Path, launcher: str) -> None:
    """`torchrun` and `accelerate launch` of the whole command, against one process.

    With one thread a process, as `torchrun` sets it: the number of threads changes float32 sums of a network.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--model", "renders", "--limit", "1", "--images-per-prompt", "2", "--json", "--allow-small"]
    options += ["--batch-size", "4"]
    command = ["-m", "fastgen", "eval", "shapes", *options, "--out"]
    plain = subprocess.run(
        [sys.executable, *command, str(tmp_path / "one")], capture_output=True, text=True, check=True, env=environment
    )
    two = (
        ["--nproc-per-node", "2", "--standalone"] if "torch." in launcher else ["--multi_gpu", "--num_processes", "2"]
    )
    shared = subprocess.run(
        [sys.executable, "-m", launcher, *two, *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert shared.returncode == 0, shared.stderr
    first, second = json.loads(plain.stdout), json.loads(shared.stdout)
    assert (tmp_path / "two" / "timing-1.json").is_file()  # of a second process
    assert first["tasks"] == second["tasks"]
    assert second["fd_shapes"]["value"] == pytest.approx(first["fd_shapes"]["value"], rel=1e-9)


# --- chunks ------------------------------------------------------------------------------------------------------


def squares(store: ChunkStore, total: int = 10, calls: list | None = None) -> dict[int, list[int]]:
    def compute(items: range) -> list[int]:
        if calls is not None:
            calls.append(items)
        return [i * i for i in items]

    def decode(data: bytes, items: range) -> list[int]:
        found = json.loads(data)
        if len(found) != len(items):
            raise ValueError("another length")
        return list(found)

    return dict(
        run_chunks(
            total,
            4,
            group=Group(),
            store=store,
            compute=compute,
            encode=lambda x: json.dumps(x).encode(),
            decode=decode,
        )
    )


def test_chunks_are_computed_once_and_damage_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first: list = []
    expected = {0: [0, 1, 4, 9], 1: [16, 25, 36, 49], 2: [64, 81]}
    assert squares(ChunkStore(tmp_path, "squares", [1]), calls=first) == expected and len(first) == 3
    (folder,) = tmp_path.iterdir()
    broken = folder / "000001.chunk"
    raw = broken.read_bytes()
    for damage in (raw[:-1], b"", raw[:40] + b"7" + raw[41:]):
        broken.write_bytes(damage)
        again: list = []
        assert squares(ChunkStore(tmp_path, "squares", [1]), calls=again) == expected
        assert again == [range(4, 8)] and broken.read_bytes() == raw
    ChunkStore(tmp_path, "squares", [1]).save(2, b"[64]")  # whole, but of another total
    assert squares(ChunkStore(tmp_path, "squares", [1])) == expected
    other: list = []
    squares(ChunkStore(tmp_path, "squares", [2]), calls=other)
    assert len(other) == 3
    ChunkStore(tmp_path, "squares", [1]).discard()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_only_resuming(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(squares(ChunkStore(tmp_path / "file" / "x", "squares", [1]))) == 3
    assert ChunkStore(None, "squares", [1]).load(0) is None


def test_ranges_cover_everything_once() -> None:
    for total in range(12):
        assert [i for part in ranges(total, 5) for i in part] == list(range(total))
