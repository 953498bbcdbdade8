"""Model cards say what the records say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastgen import _assets
from fastgen.environment import commit, cpu_name, versions
from fastgen.training.cards import card, inherit_records, write_cards, write_defaults, write_record

_RECORD = {
    "recipe": "vae",
    "config": {"steps": 7, "batch_size": 4, "accumulate": 1, "lr": 0.001, "seed": 3},
    "steps_done": 7,
    "items_seen": 28,
    "seconds": 600.0,
    "device": "cpu",
    "cpu": "Some Processor",
    "threads": 1,
    "torch": "2.0",
    "commit": "abc",
    "held_out_psnr": 31.5,
    "last": {"loss": 0.1},
}
_SCORES = {
    "benchmark": "ShapesWorld-GenEval",
    "tasks": {"counting": {"score": 0.25}},
    "overall": 0.5,
    "overall_stderr": 0.0125,
    "n_images": 8,
    "n_prompts": 2,
    "fd_shapes": {"protocol": "FD-shapes[10k]", "value": 1.5},
}


def test_card_tells_command_hardware_and_scores() -> None:
    text = card("tiny", {"vae": _RECORD}, _SCORES)
    command = "fastgen train vae -o RUNS/vae --steps 7 --batch-size 4 --accumulate 1 --lr 0.001 --seed 3"
    for part in (command, "Some Processor", "10 minutes", "commit abc", "31.5", "**0.500** ± 0.013", "FD-shapes[10k]"):
        assert part in text
    assert "Scores" not in card("tiny", {"vae": _RECORD})


_CALIBRATION = {
    "model": "tiny",
    "times": [1.0, 0.25],
    "fixed": 0.625,
    "about": {"level": 0.9, "commit": "abc", "settings": {"sampler": "ancestral"}},
    "report": {
        "agreement": [
            {"n": 800, "correct": 0.8, "auroc": 0.5125, "tasks": {}},
            {
                "n": 800,
                "correct": 0.8,
                "auroc": 0.9375,
                "accuracy": 0.875,
                "brier": 0.11,
                "calibration_error": 0.05,
                "tasks": {"colors": {"auroc": None}, "counting": {"auroc": 0.75}},
            },
        ]
    },
}


def test_the_card_of_a_verifier_tells_how_far_it_agrees_with_the_checker() -> None:
    text = card("shapes-verifier", {"verifier": _RECORD}, None, [_CALIBRATION], "Size: 5 parameters.")
    for part in (
        "On 800 pictures of `tiny`",
        "80.0 % correct: AUROC **0.938** (colors -, counting 0.750)",
        "right on 87.5 %",
        "1.00: 0.512, 0.25: 0.938",
        "above the threshold 0.625 at least 90 % are correct (commit abc)",
        "Size: 5 parameters.",
    ):
        assert part in text, part
    nothing = card("shapes-verifier", {"verifier": _RECORD}, None, [{**_CALIBRATION, "fixed": None}])
    assert "There is no threshold above which 90 %" in nothing and "Size" not in nothing


def test_records_add_up(tmp_path: Path) -> None:
    write_record(tmp_path / "run" / "model", "vae", _RECORD)
    write_record(tmp_path / "next", "z-image", {**_RECORD, "recipe": "z-image"})
    inherit_records(tmp_path / "next", tmp_path / "run" / "model" / "vae")
    inherit_records(tmp_path / "next", tmp_path / "nowhere" / "vae")
    assert set(json.loads((tmp_path / "next" / "training.json").read_text())) == {"vae", "z-image"}
    write_defaults(tmp_path / "next", steps=3, guidance_scale=1.5)
    assert json.loads((tmp_path / "next" / "fastgen.json").read_text()) == {"steps": 3, "guidance_scale": 1.5}


@pytest.mark.parametrize("name", _assets.names())
def test_committed_cards_are_those_of_the_committed_records(name: str, tmp_path: Path) -> None:
    """Regenerating the cards changes nothing: no number in them was typed by hand."""
    shutil.copytree(_assets.ROOT, tmp_path / "assets")
    (tmp_path / "assets" / name / "README.md").unlink()
    results = Path(__file__).resolve().parents[3] / "docs" / "results"
    write_cards(tmp_path / "assets", results)
    for part in (f"{name}/README.md", _assets.CHECKSUMS):
        assert (tmp_path / "assets" / part).read_bytes() == (_assets.ROOT / part).read_bytes(), part


def test_embedded_checkpoints_are_whole_and_small() -> None:
    sizes = {name: _assets.size(_assets.ROOT / name) for name in _assets.names()}
    assert list(sizes) == ["shapes-detector", "shapes-verifier", "small", "small-dc", "tiny", "tiny-janus"]
    assert [_assets.problem(name) for name in sizes] == [None] * len(sizes)
    assert sizes.pop("shapes-verifier") <= 4_000_000
    assert sizes.pop("small") + sizes.pop("small-dc") <= 26_000_000 and sum(sizes.values()) <= 24_000_000


def test_environment_is_recorded() -> None:
    assert cpu_name()
    assert {"python", "torch"} <= set(versions()) and "nothing-of-this-name" not in versions(["nothing-of-this-name"])
    found = commit()
    assert found is None or len(found.rstrip("+")) == 12
