"""The pipeline of speculative decoding with heads that correct its windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen.cli.main import run
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.targets import target_of
from fastgen.errors import FastgenError
from fastgen.pipelines.janus import JanusImagePipeline


@pytest.fixture(scope="module")
def parts(micro_janus: Path) -> tuple[Any, Any, WindowHeads]:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    torch.manual_seed(0)
    heads = WindowHeads.for_target(target_of(pipe.model, pipe.tokenizer), window=6, width=16, heads=2)
    torch.nn.init.normal_(heads.speak.weight)
    return pipe.model, pipe.tokenizer, heads.eval()


def draw(pipe: Any, tree: str) -> Any:
    return pipe("a red circle", tree=tree, output_type="tokens", generator=torch.Generator().manual_seed(0))


def test_windows_are_corrected_and_counted(parts: tuple[Any, Any, WindowHeads]) -> None:
    model, tokenizer, heads = parts
    output = draw(fastgen.SpeculativeImagePipeline(model, tokenizer, heads=heads), "heads-6")
    assert output.stats.paths["draft"] == {"HeadsSource": None}
    assert output.stats.passes["drafter"] == output.stats.passes["target"] - 1


def test_a_saved_pipeline_keeps_its_heads(parts: tuple[Any, Any, WindowHeads], tmp_path: Path) -> None:
    model, tokenizer, heads = parts
    pipe = fastgen.SpeculativeImagePipeline(model, tokenizer, heads=heads)
    pipe.save_pretrained(tmp_path)
    loaded = fastgen.SpeculativeImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded, "heads-4").tokens, draw(pipe, "heads-4").tokens)


def test_a_saved_pipeline_loads_by_its_folder_with_every_part(
    parts: tuple[Any, Any, WindowHeads], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`load_pipeline` and the command line draw what the pipeline drew: heads alone, and with a drafter and its
    calibration, with its heads in the same folder. The model alone loads for the plain method."""
    model, tokenizer, heads = parts
    alone, whole = tmp_path / "alone", tmp_path / "whole"
    fastgen.SpeculativeImagePipeline(model, tokenizer, heads=heads).save_pretrained(alone)
    embedded: Any = fastgen.load_pipeline("tiny-janus", method="speculative")
    embedded.save_pretrained(whole)
    for folder, pipe, tree in ((alone, None, "heads-4"), (whole, embedded, "heads-4"), (whole, embedded, "2-1")):
        loaded: Any = fastgen.load_pipeline(str(folder), method="speculative")
        pipe = pipe or fastgen.SpeculativeImagePipeline(model, tokenizer, heads=heads)
        assert torch.equal(draw(loaded, tree).tokens, draw(pipe, tree).tokens)
        assert loaded.calibration == pipe.calibration
    assert loaded.drafter is not None and loaded.heads is not None and loaded.calibration is not None
    base = ["generate", "a red circle", "--model", str(whole), "--device", "cpu"]
    given = ["--method", "speculative", "--tree", "heads-4", "--acceptance", "cascade", "--quality", "0.5"]
    assert run([*base, *given, "-o", str(tmp_path / "drafted.png")]) == 0
    assert run([*base, "-o", str(tmp_path / "plain.png")]) == 0
    without = fastgen.load_pipeline(str(whole), method="speculative", drafter="none")
    assert without.drafter is None and without.heads is None
    capsys.readouterr()
    (whole / "tokenizer").rename(tmp_path / "elsewhere")
    assert run([*base, "-o", str(tmp_path / "none.png")]) == 2
    assert "the component 'tokenizer' of model_index.json is missing" in capsys.readouterr().err


def test_heads_that_do_not_fit_are_refused(parts: tuple[Any, Any, WindowHeads]) -> None:
    model, tokenizer, heads = parts
    pipe = fastgen.SpeculativeImagePipeline(model, tokenizer, heads=heads)
    with pytest.raises(FastgenError, match="heads correct up to 6"):
        draw(pipe, "heads-7")
    with pytest.raises(FastgenError, match="needs heads"):
        draw(fastgen.SpeculativeImagePipeline(model, tokenizer), "heads-4")
    with pytest.raises(FastgenError, match="no heads of a window"):
        fastgen.SpeculativeImagePipeline(model, tokenizer, heads=torch.nn.Linear(1, 1))
    with pytest.raises(FastgenError, match="heads: has torch.bfloat16, the model torch.float32"):
        fastgen.SpeculativeImagePipeline(model, tokenizer, heads=WindowHeads(**heads.config).bfloat16())
    pipe.heads = WindowHeads(**{**heads.config, "vocab_size": 7})
    with pytest.raises(FastgenError, match="vocab_size 7"):
        draw(pipe, "heads-4")


def test_the_command_line_finds_heads(
    parts: tuple[Any, Any, WindowHeads], micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone in a folder, or in that of a drafter; where there are none the command says so."""
    heads, folder = parts[2], tmp_path / "heads"
    heads.save_pretrained(folder)
    base = ["generate", "a red circle", "--method", "speculative"]
    own = ["--output", str(tmp_path / "own.png"), "--model", str(micro_janus), "--drafter", str(folder)]
    assert run([*base, *own, "--tree", "heads-4"]) == 0
    embedded = ["--output", str(tmp_path / "embedded.png"), "--model", "tiny-janus"]
    assert run([*base, *embedded, "--tree", "heads-16"]) == 0
    for name in ("own", "embedded"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["stats"]["paths"]["draft"] == {"HeadsSource": None}
    capsys.readouterr()
    assert run([*base, "--output", str(tmp_path / "none.png"), "--model", str(micro_janus), "--tree", "heads-4"]) == 2
    assert "needs heads of this model" in capsys.readouterr().err
