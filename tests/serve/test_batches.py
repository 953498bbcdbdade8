"""Requests share batches; each keeps its picture, and none harms another."""

from __future__ import annotations

import serve_libraries  # noqa: F401  # isort: skip

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running_server import Running, alone, ask, pixels, running

from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.serve import served
from fastgen.serve.errors import ApiError
from fastgen.serve.metrics import Metrics
from fastgen.serve.orders import Drawn, Event, Order
from fastgen.serve.settings import ServeSettings
from fastgen.serve.worker import Stopped, Ticket, Worker


def test_eight_clients_share_batches_and_each_has_the_picture_of_its_seed(server: Running) -> None:
    model = next(iter(server.catalogue.models))
    batches, pictures = server.count("fastgen_batch_size_count"), server.count("fastgen_batch_size_sum")

    def one(seed: int) -> Any:
        return ask(server.url, prompt=f"{seed} stars", seed=seed, steps=3)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    assert server.count("fastgen_batch_size_sum") - pictures == 8
    assert server.count("fastgen_batch_size_count") - batches <= 4
    for seed, answer in enumerate(answers):
        found = pixels(answer.json()["data"][0]["b64_json"]).astype(int)
        # Rounding depends on the shape of the batch.
        assert np.abs(found - alone(model, f"{seed} stars", seed, steps=3)).max() <= 2


def test_other_settings_do_not_share_a_batch(server: Running) -> None:
    batches = server.count("fastgen_batch_size_count")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda steps: ask(server.url, prompt="a star", seed=0, steps=steps), (1, 2, 3)))
    assert server.count("fastgen_batch_size_count") - batches == 3


def test_a_full_queue_answers_429_and_when_to_come_again(micro_z: Path) -> None:
    with running(ServeSettings(models=(str(micro_z),), max_queue=2, max_wait_ms=500, device="cpu")) as found:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda seed: ask(found.url, prompt="a star", seed=seed, steps=2), range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200 and codes[-1] == 429
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
        assert found.count("fastgen_failures_total", code="queue_full") == codes.count(429)


def test_a_request_above_its_time_is_answered_and_its_work_ends(micro_z: Path) -> None:
    with running(ServeSettings(models=(str(micro_z),), timeout=0.3, device="cpu")) as found:
        answer = ask(found.url, prompt="a star", steps=200, n=8)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        _idle(found)
        assert found.count("fastgen_pictures_total", model=str(micro_z), method="base") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_goes_ends(micro_z: Path, stream: bool) -> None:
    with running(ServeSettings(models=(str(micro_z),), device="cpu")) as found:
        body = {"prompt": "a star", "steps": 200, "n": 8, "stream": stream, "progress": True}
        with pytest.raises((httpx.ReadTimeout, TimeoutError)):
            _drop(f"{found.url}/v1/images/generations", body, stream)
        _idle(found)
        assert found.count("fastgen_pictures_total", model=str(micro_z), method="base") == 0
        assert ask(found.url, prompt="a star", steps=1).status_code == 200


def _drop(url: str, body: dict[str, Any], stream: bool) -> None:
    if not stream:
        httpx.post(url, json=body, timeout=0.3)
    with httpx.stream("POST", url, json=body, timeout=30) as answer:
        next(answer.iter_lines())
    raise TimeoutError


def _idle(found: Running, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while found.backend.worker.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not found.backend.worker.busy, "the work went on"


# ---- the worker alone, with something that draws on command ----


class Sketcher:
    """Draws nothing of use, in `steps` steps; refuses seeds that it was given as bad."""

    def __init__(self, bad: Sequence[int] = (), error: type[Exception] = RuntimeError) -> None:
        self.bad, self.error = set(bad), error
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def draw(self, orders: Sequence[Order], report: Callable[[Event, int | None], None]) -> Iterator[Drawn]:
        seeds = [order.seed for order in orders]
        self.batches.append(seeds)
        self.go.wait(60)
        for step in range(3):
            report(Event(step=step + 1, steps=3), None)
        for seed in seeds:
            if seed in self.bad:
                raise self.error(f"steps: {seed} is bad")
            yield Drawn(str(seed).encode(), {"stats": {"images": len(orders)}})


def order(seed: int, steps: int = 3) -> Order:
    return Order(model="m", method="base", prompt="x", seed=seed, settings={"steps": steps})


def drawn_by(worker: Worker, orders: Sequence[Order]) -> list[Event]:
    """The last event of each order."""
    last: dict[int, list[Event]] = {place: [] for place in range(len(orders))}
    tickets = [
        Ticket(one, lambda event, place=place: last[place].append(event) if event.last else None)
        for place, one in enumerate(orders)
    ]
    worker.submit(tickets)
    deadline = time.monotonic() + 60
    while not all(last.values()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert all(len(events) == 1 for events in last.values())
    return [events[0] for events in last.values()]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, 500), (FastgenError, 400), (ValueError, 500)])
@pytest.mark.parametrize("bad", [[0], [3], [1, 4]])
def test_one_bad_order_never_harms_its_batch(bad: list[int], error: type[Exception], status: int) -> None:
    sketcher = Sketcher(bad, error)
    worker = Worker(sketcher, 5, 0.2, 10, Metrics())
    worker.start()
    events = drawn_by(worker, [order(seed) for seed in range(5)])
    for seed, event in enumerate(events):
        if seed in bad:
            assert isinstance(event.error, ApiError) and event.error.status == status
            assert ("bad" in event.error.message) == (status == 400), "an unknown error tells clients nothing"
        else:
            assert event.drawn is not None and event.drawn.png == str(seed).encode()
    assert sketcher.batches[0] == [0, 1, 2, 3, 4]
    worker.close()
    assert worker.join(60)


def test_closing_finishes_what_runs_and_refuses_the_rest() -> None:
    sketcher = Sketcher()
    sketcher.go.clear()
    worker = Worker(sketcher, 1, 0, 10, Metrics())
    worker.start()
    last: list[Event] = []
    tickets = [Ticket(order(seed), lambda event: last.append(event) if event.last else None) for seed in range(3)]
    worker.submit(tickets)
    while not sketcher.batches:
        time.sleep(0.005)
    worker.close()
    with pytest.raises(ApiError, match="shutting down"):
        worker.submit([Ticket(order(9), last.append)])
    sketcher.go.set()
    assert worker.join(60)
    assert sorted(event.error.status if isinstance(event.error, ApiError) else 200 for event in last) == [
        200,
        503,
        503,
    ]


def test_an_abandoned_order_is_not_started_and_a_batch_of_them_stops() -> None:
    sketcher = Sketcher()
    sketcher.go.clear()
    worker = Worker(sketcher, 2, 0, 10, Metrics())
    worker.start()
    tickets = [Ticket(order(seed), lambda event: None) for seed in range(4)]
    worker.submit(tickets)
    while not sketcher.batches:
        time.sleep(0.005)
    for ticket in tickets:
        ticket.cancel()
    sketcher.go.set()
    worker.close()
    assert worker.join(60) and sketcher.batches == [[0, 1]]
    assert all(ticket.finished for ticket in tickets[:2])


def test_stopping_reaches_the_one_that_draws() -> None:
    ended = []

    class Watch(Sketcher):
        def draw(self, orders: Sequence[Order], report: Callable[[Event, int | None], None]) -> Iterator[Drawn]:
            try:
                yield from super().draw(orders, report)
            except Stopped:
                ended.append(True)
                raise

    sketcher = Watch()
    sketcher.go.clear()
    worker = Worker(sketcher, 2, 0, 10, Metrics())
    worker.start()
    worker.submit([Ticket(order(0), lambda event: None)])
    while not sketcher.batches:
        time.sleep(0.005)
    worker.close(now=True)
    sketcher.go.set()
    assert worker.join(60) and ended == [True]


# ---- the command ----


def test_ctrl_c_finishes_what_runs_and_ends_with_0(micro_z: Path) -> None:
    import signal

    with served("--model", str(micro_z), "--device", "cpu", "--limit-steps", "4000") as (server, url):
        body = {"prompt": "a star", "steps": 400, "seed": 0, "stream": True, "progress": True}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert kinds[-1] == "image_generation.completed"
        assert server.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nothing-there"], "nothing-there"),
        (["--port", "70000"], "--port"),
        (["--variant", "fp 16"], "variant"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "no.such.host.invalid", "--insecure"], "cannot listen"),
        (["--limit-steps", "0"], "--limit-steps"),
        (["--max-wait-ms", "-1"], "--max-wait-ms"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(
    options: list[str], message: str, micro_z: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastgen.cli.main import run

    model = [] if "--model" in options else ["--model", str(micro_z)]
    assert run(["serve", *model, *options]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_metrics_are_those_of_prometheus_and_count(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    model = next(iter(server.catalogue.models))
    before = server.count("fastgen_nfe_total", model=model)
    assert ask(server.url, prompt="a star", seed=0, steps=3, guidance_scale=0.0).status_code == 200
    assert server.count("fastgen_nfe_total", model=model) - before == 3
    names = {family.name for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)}
    assert {"fastgen_queue_length", "fastgen_batch_size", "fastgen_phase_seconds", "fastgen_nfe"} <= names
    assert json.loads(httpx.get(f"{server.url}/readyz").text) == {"status": "ready"}
