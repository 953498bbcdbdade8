"""`fastgen.accounting`: what is reported to whom, times, memory, and errors. FLOPs are in test_flops.py."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen import accounting
from fastgen.accounting import (
    Stats,
    account,
    add_accepted,
    add_nfe,
    add_passes,
    add_tokens,
    add_verifier_calls,
    count_flops,
    current,
    note_path,
    phase,
)


class Clock:
    """Stands in for `time`: seconds pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accounting, "time", clock)
    return clock


def report_everything() -> None:
    with phase("denoise"):
        add_passes("target")
    add_passes("target", 2)
    add_passes("drafter", 0)
    add_nfe(8)
    add_tokens(kept=3, total=4)
    add_tokens(kept=4, total=4)
    add_accepted(2)
    add_accepted([0, 5])
    add_verifier_calls(4)
    with count_flops():
        accounting._report_flops("attention", 100)
        accounting._report_flops("other", 11)
    note_path("attention", "sdpa")


def test_everything_reported_is_in_the_account() -> None:
    with account() as stats:
        report_everything()
    found = stats.as_dict()
    assert found["seconds"].keys() == {"denoise"}
    assert found["passes"] == {"target": 3, "drafter": 0}
    assert found["nfe"] == 8
    assert found["kept_tokens"] == [3, 4]
    assert found["total_tokens"] == [4, 4]
    assert found["accepted_lengths"] == [2, 0, 5]
    assert found["verifier_calls"] == 4
    assert found["flops"] == 111
    assert found["flops_by_kind"] == {"attention": 100, "other": 11}
    assert found["paths"] == {"attention": {"sdpa": None}}
    assert json.loads(json.dumps(found)) == found


def test_nothing_happens_without_an_account() -> None:
    assert current() is None
    report_everything()
    with count_flops():
        pass
    with account() as stats:
        pass
    assert stats.as_dict() | {"wall_seconds": 0, "peak_memory": {}, "peak_memory_bytes": 0} == Stats().as_dict() | {
        "wall_seconds": 0,
        "peak_memory": {},
        "peak_memory_bytes": 0,
    }


def test_flops_are_unknown_unless_something_counted_them() -> None:
    with account() as uncounted:
        add_nfe(1)
    with account() as counted, count_flops():
        add_nfe(1)
    assert uncounted.as_dict()["flops"] is None
    assert counted.as_dict()["flops"] == 0


def test_inner_accounts_feed_the_outer_ones_and_not_the_other_way() -> None:
    with account() as outer:
        add_nfe(1)
        with account() as first:
            add_nfe(10)
            assert current() is first
        with account() as second:
            add_nfe(100)
        add_nfe(1000)
        assert current() is outer
    add_nfe(10000)
    assert (outer.nfe, first.nfe, second.nfe) == (1111, 10, 100)


def test_one_account_object_may_be_entered_again() -> None:
    again = account()
    with again as first:
        add_nfe(1)
        with again as second:
            add_nfe(2)
    assert (first.nfe, second.nfe) == (3, 2)
    assert current() is None


def test_phase_seconds_are_exclusive(clock: Clock) -> None:
    with account() as stats:
        with phase("generate"):
            clock.sleep(1)
            with phase("denoise"):
                clock.sleep(2)
                with phase("attention"):
                    clock.sleep(4)
            with phase("decode"):
                clock.sleep(8)
            clock.sleep(16)
        clock.sleep(32)
    assert stats.seconds == {"generate": 17, "denoise": 2, "attention": 4, "decode": 8}
    assert stats.wall_seconds == 63


def test_a_phase_inside_the_same_phase_counts_once(clock: Clock) -> None:
    with account() as stats, phase("load"):
        clock.sleep(1)
        with phase("load"):
            clock.sleep(2)
    assert stats.seconds == {"load": 3}


def test_an_inner_account_sees_its_phases_and_the_outer_account_all_of_them(clock: Clock) -> None:
    with account() as outer, phase("evaluate"):
        clock.sleep(1)
        with account() as inner, phase("generate"):
            clock.sleep(2)
        clock.sleep(4)
    assert outer.seconds == {"evaluate": 5, "generate": 2}
    assert inner.seconds == {"generate": 2}
    assert inner.wall_seconds == 2


phase_trees = st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@given(phase_trees)
def test_phases_add_up_to_the_wall_time(tree: list[Any]) -> None:
    """Every node of the tree is a phase that takes one second of its own."""
    clock, original = Clock(), accounting.time
    accounting.time = clock  # type: ignore[assignment]
    names = iter(range(10_000))

    def run(node: list[Any]) -> int:
        with phase(str(next(names) % 3)):
            clock.sleep(1)
            return 1 + sum(run(child) for child in node)

    try:
        with account() as stats:
            nodes = run(tree)
        assert stats.wall_seconds == nodes
        assert sum(stats.seconds.values()) == nodes
    finally:
        accounting.time = original


def test_exceptions_pass_through_and_leave_nothing_open(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="out of paper"), account() as stats, phase("print"), count_flops():
        clock.sleep(3)
        with phase("fetch"):
            clock.sleep(4)
            raise RuntimeError("out of paper")
    assert stats.seconds == {"print": 3, "fetch": 4}
    assert stats.wall_seconds == 7
    assert current() is None
    with account() as later, phase("print"):
        clock.sleep(1)
    assert later.seconds == {"print": 1}
    assert stats.seconds == {"print": 3, "fetch": 4}


def test_generators_that_interleave_do_not_bring_back_closed_accounts() -> None:
    def work() -> Iterator[Stats]:
        with account() as stats, phase("work"):
            yield stats
            yield stats

    first, second = work(), work()
    next(first)
    stats = next(second)
    first.close()
    add_nfe(1)
    second.close()
    assert current() is None
    assert stats.nfe == 1
    assert accounting._phases.get() == ()
    assert accounting._open == []


def test_threads_keep_their_accounts_apart() -> None:
    barrier = threading.Barrier(4)
    found: dict[int, int] = {}

    def work(number: int) -> None:
        assert current() is None  # a thread starts without the account of the one that started it
        with account() as stats:
            barrier.wait(timeout=30)
            for _ in range(number):
                add_nfe(1)
            barrier.wait(timeout=30)
        found[number] = stats.nfe

    with account() as outer:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {1: 1, 2: 2, 3: 3, 4: 4}
    assert outer.nfe == 0


def test_threads_with_a_copied_context_feed_the_same_account() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with account() as stats, phase("outer"):

            def work() -> None:
                with phase("work"):
                    for _ in range(2000):
                        add_nfe(1)
                        add_passes("target")

            threads = [threading.Thread(target=copy_context().run, args=(work,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert stats.nfe == 8000
    assert stats.passes == {"target": 8000}
    # The phase of the starting thread went on meanwhile, so it keeps its time.
    assert stats.seconds["outer"] > 0.9 * stats.wall_seconds - stats.seconds["work"] * 1e-3


@pytest.mark.parametrize(
    ("report", "error", "message"),
    [
        (lambda: add_nfe(-1), ValueError, "n: -1 is not allowed; needs >= 0"),
        (lambda: add_nfe(1.5), TypeError, "n: 1.5 is not a whole number"),
        (lambda: add_passes("target", "3"), TypeError, "n: '3' is not a whole number"),
        (lambda: add_tokens(kept=5, total=4), ValueError, "kept: 5 tokens of 4"),
        (lambda: add_accepted([1, None]), TypeError, "n: None is not a whole number"),
        (lambda: add_nfe(SimpleNamespace(is_cuda=True)), TypeError, "n: got a CUDA tensor"),
    ],
)
def test_wrong_reports_are_refused_with_and_without_an_account(
    report: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        report()
    with account() as stats, pytest.raises(error, match=message):
        report()
    assert stats.nfe == 0
    assert stats.accepted_lengths == []


def test_a_path_keeps_every_implementation_that_ran_and_logs_its_reason_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastgen.accounting"), account() as stats:
        for _ in range(3):
            note_path("test op", "reference", "there is no GPU here")
        note_path("test op", "triton")
    assert stats.paths == {"test op": {"reference": "there is no GPU here", "triton": None}}
    assert [record.message for record in caplog.records] == ["test op: reference runs, because there is no GPU here"]


def test_stats_can_be_copied_and_pickled() -> None:
    with account() as stats:
        report_everything()
    for twin in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert twin.as_dict() == stats.as_dict()
        twin.passes["target"] = 0
        assert stats.passes["target"] == 3


def test_as_dict_is_a_copy() -> None:
    with account() as stats:
        report_everything()
        found = stats.as_dict()
        found["passes"].clear()
        found["kept_tokens"].clear()
        found["paths"]["attention"].clear()
        report_everything()
    assert stats.passes["target"] == 6
    assert stats.kept_tokens == [3, 4, 3, 4]
    assert stats.paths == {"attention": {"sdpa": None}}


@pytest.mark.skipif(sys.platform == "win32", reason="the system tells no peak")
def test_process_peak_is_in_bytes_and_grows_with_use() -> None:
    code = (
        "from fastgen.accounting import account\n"
        "with account() as small: pass\n"
        "with account() as outer:\n"
        "    with account() as large: block = bytearray(b'x' * 200_000_000)\n"
        "print(small.peak_memory_bytes, large.peak_memory_bytes, outer.peak_memory_bytes)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    small, large, outer = map(int, output.split())
    assert 4e6 < small < 150e6
    assert 180e6 < large - small < 450e6
    assert outer >= large


class FakeCuda:
    """The memory counters of torch.cuda, for one device."""

    def __init__(self) -> None:
        self.peak = self.allocated = 0
        self.waits = 0
        self.capturing = False

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def synchronize(self) -> None:
        assert not self.capturing
        self.waits += 1

    def max_memory_allocated(self, index: int) -> int:
        return self.peak

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak = self.allocated

    def use(self, size: int) -> None:
        """Allocate `size` bytes for a moment."""
        self.peak = max(self.peak, self.allocated + size)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    return cuda


def test_device_peaks_belong_to_the_account_in_which_they_happened(cuda: FakeCuda) -> None:
    cuda.use(900)  # before: not ours
    with account() as outer:
        cuda.use(50)
        with account() as first:
            cuda.use(20)
        with account() as second:
            cuda.use(30)
        cuda.use(10)
    assert first.peak_memory["cuda:0"] == 20
    assert second.peak_memory["cuda:0"] == 30
    assert outer.peak_memory["cuda:0"] == 50  # kept although the inner accounts reset the counter
    assert outer.peak_memory_bytes == 50
    assert "process" in outer.peak_memory or sys.platform == "win32"


def test_phases_wait_for_the_device(cuda: FakeCuda) -> None:
    with phase("no account: no wait"):
        pass
    with account():
        with phase("denoise"):
            assert cuda.waits == 1
        assert cuda.waits == 2
        cuda.capturing = True
        with phase("captured"):
            pass
        cuda.capturing = False
        with pytest.raises(RuntimeError, match="illegal access"), phase("fails"):
            raise RuntimeError("illegal access")
    assert cuda.waits == 3


def test_accounting_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from fastgen.accounting import account, add_nfe, count_flops, phase\n"
        "with count_flops(): pass\n"
        "with account() as stats, phase('load'): add_nfe(1)\n"
        "stats.as_dict()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_time_is_measured_in_seconds() -> None:
    with account() as stats, phase("sleep"):
        time.sleep(0.02)
    assert 0.02 <= stats.seconds["sleep"] <= stats.wall_seconds
