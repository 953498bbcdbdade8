"""Shared by all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Workers of pytest-xdist share the cores, and processes that tests start must round as their parents do. Torch reads
# this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fastgen._compat import repair_torchvision

# No test may reach the network: a forgotten download must fail at once, not hang or pass by luck.
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU, tests run Triton kernels in its interpreter. Triton reads this when it is imported, by whomever.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Tests that import diffusers or transformers themselves need what the packages of fastgen do for their own imports.
repair_torchvision()
# Until all tests are collected: imports make a million objects that stay, which the collector would walk each time.
gc.disable()


# Not this folder itself: it has a folder of the name of our package.
sys.path.insert(0, str(Path(__file__).parent / "helpers"))


@pytest.fixture(scope="session")
def micro_z(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random-weight ZImagePipeline that takes milliseconds a picture."""
    from micro_models import save_micro_z_image

    return save_micro_z_image(tmp_path_factory.mktemp("micro") / "z")


@pytest.fixture(scope="session")
def micro_dc(micro_z: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random-weight Z-Image pipeline with dynamic chunking."""
    from micro_models import save_micro_dc

    return save_micro_dc(tmp_path_factory.mktemp("micro") / "dc", micro_z)


@pytest.fixture(scope="session")
def micro_janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random-weight Janus that takes milliseconds a picture."""
    from micro_models import save_micro_janus

    return save_micro_janus(tmp_path_factory.mktemp("micro") / "janus")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the files of most tests, which are not those that take longest.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # These first: of two workers, none is left alone with one of them at the end.
    longest = ("test_docs.py", "test_recipes.py", "test_packaging.py", "test_hostile_shells.py")
    items.sort(key=lambda item: item.path.name not in longest)
    if moving := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"names of tests hold addresses, workers of pytest-xdist would disagree: {moving[0]}")
    gpu_folder = Path(__file__).parent / "gpu"
    gpu_items = [item for item in items if gpu_folder in item.path.parents]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries count at the end what nobody freed


SLOW = pytest.StashKey[Counter[str]]()  # by folder, the tests with the marker that were collected and not chosen


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if slow := [item for item in items if item.get_closest_marker("slow")]:
        counts = slow[0].config.stash.setdefault(SLOW, Counter())
        counts.update("/".join(item.nodeid.split("::")[0].split("/")[:2]) for item in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Workers of pytest-xdist collect, their controller reports; all collect the same."""
    node.config.stash[SLOW] = Counter(getattr(node, "workeroutput", {}).get("slow", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = dict(session.config.stash.get(SLOW, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if counts := config.stash.get(SLOW, None):
        terminalreporter.section("slow tests that were not run")
        terminalreporter.line(", ".join(f"{folder}: {count}" for folder, count in sorted(counts.items())))
        terminalreporter.line(f"{sum(counts.values())} in all; -m slow runs them, --collect-only -m slow names them")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout; a test of the installed package alone is skipped."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or importlib.util.find_spec("fastgen") is None:
        pytest.skip("needs a checkout with fastgen installed")
    return root
