"""`fastgen serve` under load: what shared batches gain, and whether it stays right and small for a long time."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
from PIL import Image
from scipy.stats import bootstrap

from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of
from fastgen.evaluation.report import markdown_table, provenance
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.io import parse_json
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading import load_pipeline

__all__ = ["benchmark_serve", "serve_markdown", "served"]

CLIENTS = 8
_EXPECTED = 24  # different pictures of a long run


def benchmark_serve(
    model: str = "tiny",
    *,
    rounds: int = 5,
    pictures: int = 24,
    minutes: float = 0,
    variant: str | None = None,
    replicas: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark against a server process on this machine.

    Args:
        model: that is served.
        rounds: each draws the pictures by one client after the other, and by eight at once.
        pictures: of a round, each way.
        minutes: of load by eight clients afterwards, every picture compared with that of its seed; 0: none.
        variant: of the weight files, as in diffusers.
        replicas: of Ray Serve, of which one is killed every minute of the load once all are ready; 0 draws in the
            server's process.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "rows" with clients, seconds (of a round; percentiles) and pictures_per_minute; "ratio"
        (throughput of eight clients over one; median and 95 % of it); "load" with answers by status, wrong pictures,
        kills, and resident megabytes of all processes of the server by time.

    Raises:
        FastgenError: a value out of range, or a server that does not start.
    """
    check_integer("rounds", rounds, 2)
    check_integer("pictures", pictures, CLIENTS)
    check_number("minutes", minutes, 0)
    check_integer("replicas", replicas, 0)
    prompts = [item.prompt for item in shapes_prompts()]
    options = ["--model", model, "--device", "cpu", *([] if variant is None else ["--variant", variant])]
    if replicas:
        options += ["--engine", "ray", "--replicas", str(replicas), "--replica-cpus", "0.5"]
    with served(*options, RAY_AUTH_MODE="disabled") as (server, url):
        process = psutil.Process(server.pid)
        taken: dict[int, list[float]] = {1: [], CLIENTS: []}
        _draw_all(url, model, prompts, pictures, CLIENTS)  # warm-up
        for number in range(rounds):
            for clients in (1, CLIENTS) if number % 2 else (CLIENTS, 1):
                started = time.perf_counter()
                _draw_all(url, model, prompts, pictures, clients)
                taken[clients].append(time.perf_counter() - started)
            report(f"round {number + 1} of {rounds}: {taken[1][-1] / taken[CLIENTS][-1]:.2f}x")
        ratios = np.array(taken[1]) / np.array(taken[CLIENTS])
        ends = bootstrap((ratios,), np.median, method="percentile", random_state=np.random.default_rng(0))
        low, high = ends.confidence_interval
        load = _load(process, url, model, variant, prompts, minutes, replicas, report) if minutes else None
    rows = [
        {
            "clients": clients,
            "n": rounds,
            "seconds": percentiles(seconds),
            "pictures_per_minute": 60 * pictures / float(np.median(seconds)),
        }
        for clients, seconds in taken.items()
    ]
    settings = {"model": model, "rounds": rounds, "pictures": pictures, "minutes": minutes, "replicas": replicas}
    ratio = {"p50": float(np.median(ratios)), "ci": [float(low), float(high)]}
    return result_of("serve", settings, rows=rows, ratio=ratio, load=load)


def serve_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench serve`."""
    header = ["clients at once", "rounds", "s a round, p50", "pictures a minute"]
    table = [
        [str(row["clients"]), str(row["n"]), f"{row['seconds']['p50']:.2f}", f"{row['pictures_per_minute']:.0f}"]
        for row in data["rows"]
    ]
    asked, (low, high) = data["settings"], data["ratio"]["ci"]
    drawn = f", drawn by {asked['replicas']} replicas of Ray Serve" if asked["replicas"] else ""
    text = (
        f"{asked['pictures']} pictures of `{asked['model']}` a round, over HTTP on this machine{drawn}. Throughput of "
        f"{CLIENTS} clients over one: **{data['ratio']['p50']:.2f}x** (95 % {low:.2f} to {high:.2f}).\n\n"
    )
    text += markdown_table(header, table)
    if (load := data.get("load")) is not None:
        memory, answers = load["megabytes"], load["answers"]
        others = ", ".join(f"{count} of status {status}" for status, count in answers.items() if status != "200")
        text += (
            f"\n{asked['minutes']:g} minutes of load by {CLIENTS} clients: {answers.get('200', 0)} pictures, "
            f"{load['wrong']} of them wrong; other answers: {others or 'none'}; {load['kills']} replicas killed. "
            f"Memory of the server after a tenth of the time: {memory[len(memory) // 10]:.0f} MB, at the end: "
            f"{memory[-1]:.0f} MB.\n"
        )
    return text + "\n" + provenance(data) + "\n"


@contextlib.contextmanager
def served(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fastgen serve` with `options` as a process on a free port, and its URL; Ctrl-C ends it.

    Raises:
        FastgenError: it ended before it listened; the message has its last line.
    """
    command = [sys.executable, "-m", "fastgen", "serve", "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            matches = (re.search(r" at (http://\S+)$", line) for line in process.stdout or ())
            url = next((match[1] for match in matches if match), "")
            if not url:
                code = process.wait()
                errors.seek(0)
                raise FastgenError(f"fastgen serve ended with {code}: {errors.read().strip().splitlines()[-1:]}")
            yield process, url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _ask(url: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """One request for pictures: status and answer."""
    asked = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=600) as answer:
            return answer.status, parse_json(answer.read(), "answer")
    except urllib.error.HTTPError as error:
        return error.code, parse_json(error.read(), "answer")


def _draw_all(url: str, model: str, prompts: Sequence[str], count: int, clients: int) -> None:
    def one(number: int) -> None:
        status, answer = _ask(url, model=model, prompt=prompts[number % len(prompts)], seed=number)
        if status != 200:
            raise FastgenError(f"the server answered {status}: {answer['error']['message']}")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(count)))


def _load(
    process: psutil.Process,
    url: str,
    model: str,
    variant: str | None,
    prompts: Sequence[str],
    minutes: float,
    replicas: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Clients that ask again and again, while memory is read and replicas are killed."""
    orders = [(prompts[number * 7 % len(prompts)], number, 4 + number % 5) for number in range(_EXPECTED)]
    pipe, expected = load_pipeline(model, variant=variant), []
    for prompt, seed, steps in orders:
        picture = next(generate_images(pipe, [prompt], [seed], steps=steps, batch_invariant=True))
        expected.append(np.asarray(picture.image))
    ends, answers, wrong, killed = time.monotonic() + 60 * minutes, Counter[str](), 0, 0
    lock, memory = threading.Lock(), list[float]()

    def client(number: int) -> None:
        nonlocal wrong
        chosen = random.Random(number)
        while time.monotonic() < ends:
            which = chosen.randrange(_EXPECTED)
            prompt, seed, steps = orders[which]
            try:
                status, answer = _ask(url, model=model, prompt=prompt, seed=seed, steps=steps, batch_invariant=True)
            except (OSError, ValueError) as error:
                status, answer = 0, {"error": str(error)}
            with lock:
                answers[str(status)] += 1
                if status == 200:
                    data = base64.b64decode(answer["data"][0]["b64_json"])
                    wrong += not np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected[which])

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, number) for number in range(CLIENTS)]
        next_kill = time.monotonic() + 60
        while time.monotonic() < ends:
            time.sleep(min(10.0, max(0.0, ends - time.monotonic())))
            memory.append(_megabytes(process))
            report(f"{sum(answers.values())} answers, {wrong} wrong, {memory[-1]:.0f} MB")
            if replicas and time.monotonic() > next_kill and len(ready := _replicas(process)) >= replicas:
                next_kill = time.monotonic() + 60
                killed += 1
                ready[0].kill()
        for each in running:
            each.result()
    return {"answers": dict(answers), "wrong": wrong, "kills": killed, "megabytes": memory}


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _megabytes(process: psutil.Process) -> float:
    """Resident memory of a process and its children; what they share counts once for each."""
    total = 0
    for each in _family(process):
        with contextlib.suppress(psutil.Error):
            total += each.memory_info().rss
    return total / 2**20


def _replicas(process: psutil.Process) -> list[psutil.Process]:
    """Replicas of the server that are ready: Ray names a process by what it runs."""
    found = []
    for each in _family(process):
        with contextlib.suppress(psutil.Error):
            name = " ".join(each.cmdline())
            found += [each] if "ServeReplica:fastgen" in name and "init" not in name else []
    return found
