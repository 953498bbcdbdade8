"""`fastgen serve` under load: what shared batches gain."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of
from fastgen.evaluation.report import markdown_table, provenance
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.io import parse_json

__all__ = ["benchmark_serve", "serve_markdown", "served"]

CLIENTS = 8


def benchmark_serve(
    model: str = "tiny",
    *,
    rounds: int = 5,
    pictures: int = 24,
    variant: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark against a server process on this machine.

    Args:
        model: that is served.
        rounds: each draws the pictures by one client after the other, and by eight at once.
        pictures: of a round, each way.
        variant: of the weight files, as in diffusers.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "rows" with clients, seconds (of a round; percentiles) and pictures_per_minute; "ratio"
        (throughput of eight clients over one; median and 95 % of it).

    Raises:
        FastgenError: a value out of range, or a server that does not start.
    """
    check_integer("rounds", rounds, 2)
    check_integer("pictures", pictures, CLIENTS)
    prompts = [item.prompt for item in shapes_prompts()]
    options = ["--model", model, "--device", "cpu", *([] if variant is None else ["--variant", variant])]
    with served(*options) as (_, url):
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
    rows = [
        {
            "clients": clients,
            "n": rounds,
            "seconds": percentiles(seconds),
            "pictures_per_minute": 60 * pictures / float(np.median(seconds)),
        }
        for clients, seconds in taken.items()
    ]
    settings = {"model": model, "rounds": rounds, "pictures": pictures}
    ratio = {"p50": float(np.median(ratios)), "ci": [float(low), float(high)]}
    return result_of("serve", settings, rows=rows, ratio=ratio)


def serve_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench serve`."""
    header = ["clients at once", "rounds", "s a round, p50", "pictures a minute"]
    table = [
        [str(row["clients"]), str(row["n"]), f"{row['seconds']['p50']:.2f}", f"{row['pictures_per_minute']:.0f}"]
        for row in data["rows"]
    ]
    asked, (low, high) = data["settings"], data["ratio"]["ci"]
    text = (
        f"{asked['pictures']} pictures of `{asked['model']}` a round, over HTTP on this machine. Throughput of "
        f"{CLIENTS} clients over one: **{data['ratio']['p50']:.2f}x** (95 % {low:.2f} to {high:.2f}).\n\n"
    )
    text += markdown_table(header, table)
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
