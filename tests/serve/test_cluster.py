"""Two replicas on this machine: the pictures are those of their seeds, also where a replica is killed under load."""

from __future__ import annotations

import serve_libraries  # noqa: F401  # isort: skip

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from running_server import alone, ask, pixels

from fastgen.evaluation.benchmarks.serve import served

pytest.importorskip("ray", reason="Ray is not installed")


def _replicas(parent: int) -> list[int]:
    """Processes of the replicas that a server started."""
    found = psutil.Process(parent).children(recursive=True)
    return [each.pid for each in found if any("ServeReplica:fastgen" in part for part in each.cmdline())]


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_no_picture(micro_z: Path) -> None:
    options = (
        "--engine",
        "ray",
        "--replicas",
        "2",
        "--replica-cpus",
        "0.5",
        "--device",
        "cpu",
        "--model",
        str(micro_z),
    )
    with served(*options, RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1") as (server, url):
        wanted = {seed: alone(str(micro_z), f"{seed % 5} stars", seed, steps=6) for seed in range(40)}

        def one(seed: int) -> httpx.Response:
            return ask(url, prompt=f"{seed % 5} stars", seed=seed, steps=6, batch_invariant=True)

        killed = []
        with ThreadPoolExecutor(6) as pool:
            futures: list[Future[httpx.Response]] = []
            for seed in wanted:
                futures.append(pool.submit(one, seed))
                if seed == 15:
                    assert len(found := _replicas(server.pid)) == 2
                    killed = found[:1]
                    os.kill(killed[0], signal.SIGKILL)
                time.sleep(0.05)
            answers = [future.result() for future in futures]
        for seed, answer in enumerate(answers):
            assert answer.status_code == 200, answer.text
            np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), wanted[seed])
        deadline = time.monotonic() + 120
        while len(_replicas(server.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        now = _replicas(server.pid)
        assert len(now) == 2 and killed[0] not in now, "the lost replica was not replaced"
        server.send_signal(signal.SIGINT)
        assert server.wait(120) == 0


@pytest.mark.slow
def test_an_evaluation_on_a_cluster_has_the_images_of_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.cli.main import run

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    torch.set_num_threads(1)  # as workers have; another number rounds differently
    asked = ["eval", "shapes", "--model", "tiny", "--limit", "1", "--images-per-prompt", "2", "--steps", "2"]
    found = []
    for engine in ("local", "ray"):
        folder = tmp_path / engine
        options = ["--engine", engine, "--ray-workers", "2", "--batch-size", "3", "--out", str(folder)]
        assert run([*asked, *options]) == 0
        found.append({path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))})
    assert len(found[0]) == 12 and found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "farm"], "--engine"),
        (["--engine", "ray", "--replicas", "0"], "--replicas"),
        (["--engine", "ray", "--replicas", "3", "--max-replicas", "2"], "--max-replicas"),
        (["--engine", "ray", "--replica-gpus", "-1"], "--replica-gpus"),
    ],
)
def test_a_wrong_option_of_the_cluster_is_one_line(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastgen.cli.main import run

    assert run(["serve", *options]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
