"""A model folder with anything broken in it: a picture, or one line and exit status 2, in bounded time."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from broken_folders import copies, generate
from killed import start

pytestmark = pytest.mark.slow

SECONDS = 120.0  # of waiting; its processor time is limited as well
ARGUMENTS = {
    "tiny": ["--steps", "1"],
    "small-dc": ["--steps", "1"],
    "tiny-janus": ["--method", "speculative", "--acceptance", "cascade", "--quality", "0.5", "--tree", "chain-4"],
    "micro-dc": ["--steps", "1"],
    "micro-janus": [],
    "stable-diffusion": ["--steps", "1"],
    "sdxl": ["--steps", "1"],
    "flux": ["--steps", "1", "--height", "32", "--width", "32"],
    "sd3": ["--steps", "1", "--height", "32", "--width", "32"],
    "dit": ["--steps", "1"],
}
PROMPTS = {"dit": "7"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    micro: Any = importlib.import_module("micro_models")
    unets: Any = importlib.import_module("tiny_unets")
    flows: Any = importlib.import_module("tiny_flows")
    from fastgen.pipelines.loading.checkpoint import embedded_folder

    root = tmp_path_factory.mktemp("folders")
    for name in ("tiny", "small-dc", "tiny-janus"):
        shutil.copytree(embedded_folder(name), root / name)
    micro.save_micro_dc(root / "micro-dc", micro.save_micro_z_image(root / "micro-z"))
    micro.save_micro_janus(root / "micro-janus")
    unets.tiny_sd(unets.ddim()).save_pretrained(root / "stable-diffusion")
    unets.tiny_sdxl(unets.euler()).save_pretrained(root / "sdxl")
    unets.tiny_dit(unets.ddim()).save_pretrained(root / "dit")
    flows.tiny_flux(True).save_pretrained(root / "flux")
    flows.tiny_sd3(True).save_pretrained(root / "sd3")
    return {name: root / name for name in ARGUMENTS}


def fault(name: str, model: Path, place: Path) -> str | None:
    """What is wrong with how the command ends; None if nothing."""
    place.mkdir()
    words = ["generate", PROMPTS.get(name, "a red circle"), "--model", str(model), "-o", "out.png", "--device", "cpu"]
    process = start(generate, str(place), [*words, *ARGUMENTS[name]])
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return f"runs for more than {SECONDS:g} s"
    said = place.with_name(f"{place.name}-said-0.txt").read_text(encoding="utf-8", errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if process.exitcode == 0 and not errors and (place / "out.png").is_file():
        return None
    if process.exitcode == 2 and len(errors) == 1 and "Traceback" not in said and not (place / "out.png").exists():
        return None
    return f"exit status {process.exitcode}: {said[-600:]}"


def cases() -> list[tuple[str, int]]:
    return [(name, seed) for name in ARGUMENTS for seed in range(4)]


@pytest.mark.parametrize(("name", "seed"), cases())
def test_a_broken_folder_ends_in_one_line(folders: dict[str, Path], tmp_path: Path, name: str, seed: int) -> None:
    faults = []
    for number, (done, folder) in enumerate(copies(folders[name], tmp_path, 10, seed)):
        if (found := fault(name, folder, tmp_path / f"run-{number}")) is not None:
            faults.append(f"{done}: {found}")
        shutil.rmtree(folder)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_whole_folder_draws(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert fault(name, folders[name], tmp_path / "run") is None
    assert (tmp_path / "run" / "out.png").is_file()
