"""Which implementation runs, what is logged, and the errors of wrong settings."""

from __future__ import annotations

import contextvars
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastgen.accounting import account
from fastgen.kernels.dispatch import (
    Bounded,
    Checked,
    _decide,
    choose,
    direct,
    kernels_mode,
    ran,
    reset_ran,
    triton_runs,
    use_kernels,
)

ON_GPU = DEVICE.type == "cuda"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGEN_KERNELS", raising=False)
    reset_ran()


def test_modes_nest_and_the_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_mode() == "auto"
    monkeypatch.setenv("FASTGEN_KERNELS", "triton")
    assert kernels_mode() == "triton"
    with use_kernels("reference"):
        with use_kernels("auto"):
            assert kernels_mode() == "auto"
        assert kernels_mode() == "reference"
    assert kernels_mode() == "triton"
    monkeypatch.setenv("FASTGEN_KERNELS", "")
    assert kernels_mode() == "auto"


def test_a_wrong_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "mode: 'fast' is unknown; choose one of auto, triton, reference"
    with pytest.raises(ValueError, match=message), use_kernels("fast"):
        pass
    monkeypatch.setenv("FASTGEN_KERNELS", "on")
    with pytest.raises(ValueError, match="FASTGEN_KERNELS: 'on' is unknown"):
        choose("op", None, True, torch.ones(1))


def test_threads_have_their_own_mode() -> None:
    seen = []
    with use_kernels("reference"):
        plain = threading.Thread(target=lambda: seen.append(kernels_mode()))
        copied = threading.Thread(target=contextvars.copy_context().run, args=(lambda: seen.append(kernels_mode()),))
        for thread in (plain, copied):
            thread.start()
            thread.join()
    assert seen == ["auto", "reference"]


def test_auto_takes_the_kernel_on_a_gpu_only(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(2, device=DEVICE)
    with account() as stats, caplog.at_level(logging.INFO, logger="fastgen"):
        for _ in range(3):
            assert choose("op", None, True, x) is ON_GPU
    assert triton_runs(x)
    assert ran() == {"op": "triton" if ON_GPU else "reference"}
    assert stats.paths == {"op": {"triton": None} if ON_GPU else {"reference": "Triton needs a GPU"}}
    assert len([record for record in caplog.records if "op" in record.getMessage()]) == 1


@pytest.mark.parametrize("default", [True, False])
def test_what_the_kernel_cannot_do_runs_by_the_reference_or_is_an_error(default: bool) -> None:
    x = torch.ones(2, device=DEVICE)
    with account() as stats:
        assert not choose("op", "x: 7 channels", default, x)
    assert stats.paths == {"op": {"reference": "x: 7 channels"}}
    with use_kernels("triton"), pytest.raises(ValueError, match="op: the Triton kernel cannot run: x: 7 channels"):
        choose("op", "x: 7 channels", default, x)
    with use_kernels("reference"):
        assert not choose("op", None, default, x)


def test_a_slow_kernel_runs_only_on_request() -> None:
    x = torch.ones(2, device=DEVICE)
    assert not choose("op", None, False, x)
    with use_kernels("triton"):
        assert choose("op", None, False, x)
    assert ran() == {"op": "triton"}


def test_without_interpreter_and_gpu_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(2)
    assert not triton_runs(x)
    message = "op: the Triton kernel cannot run: Triton needs a GPU"
    with use_kernels("triton"), pytest.raises(ValueError, match=message):
        choose("op", None, True, x)


def test_without_triton_references_run(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch\n"
        "from fastgen.kernels.dispatch import choose, use_kernels, triton_runs\n"
        "x = torch.ones(1)\n"
        "print(choose('op', None, True, x), triton_runs(x))\n"
        "with use_kernels('triton'):\n"
        "    try: choose('op', None, True, x)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "op: the Triton kernel cannot run: Triton is not installed"]


def test_a_kernel_that_was_never_timed_runs_only_on_request() -> None:
    """On a GPU, which the last argument stands for: the reference runs automatically, and the reason is logged."""
    with account() as stats, use_kernels("auto"):
        assert not _decide("op", None, "slow", True) and _decide("other", None, True, True)
    assert stats.paths["op"] == {"reference": "slow"} and stats.paths["other"] == {"triton": None}
    with use_kernels("triton"):
        assert _decide("op", None, "slow", True)


def test_a_compiled_graph_keeps_the_choice_it_was_traced_with() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if choose("op", None, True, x) else x * 2

    compiled = torch.compile(work, fullgraph=True, backend="eager")
    x = torch.full((2,), 3.0, device=DEVICE)
    with use_kernels("triton"):
        assert compiled(x).tolist() == [4, 4]
    assert ran() == {"op": "triton"}
    torch._dynamo.reset()
    with use_kernels("reference"):
        assert compiled(x).tolist() == [6, 6]


def test_equal_arguments_are_checked_once_and_others_again() -> None:
    seen = []

    def check(x: torch.Tensor, y: torch.Tensor | None = None, option: object = None) -> str:
        def found() -> str:
            seen.append(1)
            if x.shape[0] == 3:
                raise ValueError("three")
            return f"{tuple(x.stride())} {x.dtype} {option}"

        return checked(found, (x, y), option)

    checked = Checked()
    x = torch.ones(2, 4, device=DEVICE)
    assert check(x) == check(torch.zeros_like(x)) == "(4, 1) torch.float32 None" and len(seen) == 1
    others = [x.t().contiguous().t(), x.double(), x[:, :3], x.clone().requires_grad_(), torch.nn.Parameter(x)]
    assert len({*map(check, others), check(x, x), check(x, option=2)}) > 2 and len(seen) == 8
    with torch.no_grad():
        check(x)
    assert len(seen) == 9
    for _ in range(2):
        with pytest.raises(ValueError, match="three"):
            check(torch.ones(3, device=DEVICE))
    assert len(seen) == 11
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        symbols = mode.from_tensor(x, static_shapes=False)
        assert check(symbols).startswith("(") and check(symbols).startswith("(") and len(seen) == 13  # have no hash


def test_what_was_checked_is_forgotten_when_it_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bounded, "MOST", 3)
    checked, seen = Checked(), []
    for size in (1, 2, 3, 4, 1):
        checked(lambda size=size: seen.append(size), (torch.ones(size),))
    assert seen == [1, 2, 3, 4, 1]


def test_direct_launch_is_for_plain_tensors_without_gradients() -> None:
    x = torch.ones(2)
    weight = torch.nn.Parameter(x)
    assert direct(x, None)
    assert not direct(x, weight)
    with torch.no_grad():
        assert direct(x, weight)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not direct(mode.from_tensor(x))
