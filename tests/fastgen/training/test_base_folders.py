"""Recipes read pipelines whose folder takes components from a base, and write whole ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from short_recipes import build_recipe, train_config

from fastgen.cli.main import run
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.training.engine import Trainer

#: Recipe -> the setting that takes a Z-Image pipeline, as a user may write it.
_TAKES = {"dc-patch": "part", "small": "part", "z-image": "init"}


@pytest.fixture(autouse=True)
def _few_held_out() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("patch_chunking", "small_z_image"):
            patch.setattr(f"fastgen.training.{module}.HELD_OUT", 2)
        yield


def _given(name: str, model: str) -> dict[str, Any]:
    """The recipe's setting; `init` takes folders alone."""
    setting = _TAKES[name]
    return {setting: embedded_folder(model) if setting == "init" else Path(model)}


@pytest.mark.parametrize("name", _TAKES)
def test_a_pipeline_with_a_base_is_read_whole(name: str) -> None:
    recipe: Any = build_recipe(name, 0, **_given(name, "small"))
    assert recipe.pipe.tokenizer is not None and recipe.pipe.scheduler.config.shift == 4.0


@pytest.mark.parametrize("name", _TAKES)
def test_a_chunked_pipeline_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ((setting, value),) = _given(name, "small-dc").items()
    assert run(["train", name, f"--{setting}", str(value), "-o", "nowhere"]) == 2
    assert "has a DCZImagePipeline; needs a ZImagePipeline" in capsys.readouterr().err


def test_what_it_becomes_is_a_whole_pipeline(tmp_path: Path) -> None:
    config = train_config("dc-patch", tmp_path, steps=1, batch_size=2, accumulate=1)
    Trainer(build_recipe("dc-patch", 0, Path("small")), config).run()
    defaults = json.loads((tmp_path / "model/fastgen.json").read_text())
    assert defaults["height"] == 128 and "base" not in defaults
    assert {"tokenizer", "text_encoder", "vae"} <= {path.name for path in (tmp_path / "model").iterdir()}
    pipe: Any = load_pipeline(str(tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "DCZImagePipeline" and pipe.scheduler.config.shift == 4.0
    assert (
        pipe("a red circle", num_inference_steps=1, height=128, width=128, output_type="np").images[0].shape[0] == 128
    )
