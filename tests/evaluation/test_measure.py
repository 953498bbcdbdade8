"""What all benchmarks measure with: turns, waiting for the device, percentiles."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastgen.evaluation.benchmarks import measure


def test_calls_take_turns_and_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = iter(range(100)), list[str]()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    seconds = measure.take_turns({name: partial(ran.append, name) for name in "ab"}, 3, warm_up=2)
    assert ran == list("ab") * 5
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1]}


def test_a_call_lasts_from_an_idle_device_to_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(measure, "wait_for", lambda device: order.append(str(device)))
    measure.seconds_of(partial(order.append, "work"), torch.device("cuda"))
    assert order == ["cuda", "work", "cuda"]
    measure.seconds_of(partial(order.append, "work"))
    assert order[3:] == ["work"]


def test_percentiles_interpolate() -> None:
    assert measure.percentiles([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})
    assert measure.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}
