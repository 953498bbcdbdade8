"""Recording windows, and heads that learn from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from micro_models import PROMPTS

from fastgen.cli.main import run
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import load_drafter
from fastgen.drafters.sources import JacobiSource
from fastgen.drafters.targets import Target
from fastgen.errors import FastgenError
from fastgen.training.engine import Trainer
from fastgen.training.heads import HeadsRecipe, initial_heads, load_target
from fastgen.training.train_config import TrainConfig
from fastgen.training.windows import WindowRecorder, Windows, record_windows

WINDOW = 4


@pytest.fixture(scope="module")
def target(micro_janus: Path) -> Target:
    """Random weights, but what is said next depends on the token before."""
    made = load_target(micro_janus)
    with torch.no_grad():
        made.model.model.generation_embeddings.weight.mul_(20)
    return made


@pytest.fixture(scope="module")
def windows(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    folder = tmp_path_factory.mktemp("windows")
    return record_windows(target, JacobiSource(WINDOW), TokenLaw(3.0), folder, PROMPTS, 320, taps=(1,))


def test_rounds_are_those_of_the_pictures(target: Target, windows: Windows) -> None:
    """Tokens at a round's root and its accepted places are the picture's; the states say the next round's laws."""
    for number in range(3):
        rounds = windows.picture(number)
        going = rounds.length[0] >= 0
        at, index = rounds.length[0][going], rounds.index[0][going]
        assert int(index[0]) == 0 and torch.equal(index[1:], index[:-1] + at[:-1] + 1)
        assert rounds.hidden.shape[2:] == (2, WINDOW + 1, 2 * target.hidden_size)
        for tokens, root, accepted in zip(rounds.tokens[0][going], index.tolist(), at.tolist(), strict=True):
            end = min(root + accepted + 1, target.num_tokens)
            assert torch.equal(tokens[: end - root], rounds.picture[0, root:end])


def test_a_stopped_recording_continues_and_refuses_other_settings(target: Target, tmp_path: Path) -> None:
    law = TokenLaw(3.0)
    record_windows(target, JacobiSource(WINDOW), law, tmp_path, PROMPTS, 18)
    first, second = (tmp_path / f"0000{shard}.safetensors" for shard in range(2))
    kept, lost = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    with pytest.raises(FastgenError, match="1 shards are missing"):
        Windows(tmp_path)
    record_windows(target, JacobiSource(WINDOW), law, tmp_path, PROMPTS, 18)
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == lost
    with pytest.raises(FastgenError, match="other prompts or settings"):
        record_windows(target, JacobiSource(WINDOW), law, tmp_path, PROMPTS[:2], 18)
    with pytest.raises(FastgenError, match="has no windows"):
        Windows(tmp_path / "other")
    with pytest.raises(ValueError, match="count"):
        record_windows(target, JacobiSource(WINDOW), law, tmp_path, PROMPTS, 0)
    with pytest.raises(ValueError, match="2 candidates"):
        WindowRecorder(JacobiSource(WINDOW, 2))


@pytest.mark.slow
def test_trained_heads_agree_with_the_next_round_more_than_the_window(
    target: Target, windows: Windows, tmp_path: Path
) -> None:
    """On pictures that they have not seen."""
    recipe = HeadsRecipe(0, target, windows, width=32, heads=2)
    config = TrainConfig(tmp_path / "run", 200, 8, 5e-3, warmup=5, ema_decay=0.9, log_every=200)
    Trainer(recipe, config).run()
    heads = load_drafter(tmp_path / "run" / "model", torch.float32)
    assert isinstance(heads, WindowHeads) and tuple(heads.config.taps) == (1,)
    others = record_windows(
        target, JacobiSource(WINDOW), recipe.law, tmp_path / "others", PROMPTS, 160, taps=(1,), seed=9000
    )
    later, generator = HeadsRecipe(0, target, others, heads), torch.Generator().manual_seed(0)
    with torch.no_grad():
        _, numbers = later.loss(later.build().eval(), later.batch(0, 160, generator), generator)
    assert all(numbers[f"overlap_{place}"] > numbers[f"window_{place}"] + 0.005 for place in (1, 2, 4)), numbers


def test_the_command_line_records_trains_and_records_with_heads(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, more = tmp_path / "windows", tmp_path / "more"
    command = [
        "train",
        "heads",
        "-o",
        str(tmp_path / "run"),
        "--part",
        str(micro_janus),
        "--data",
        str(data),
        "--json",
    ]
    command += ["--batch-size", "2"]
    assert (
        run([*command, "--steps", "2", "--samples", "2", "--set", "width=16", "--set", "heads=2", "--set", "window=6"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["steps_done"] == 2
    again = [str(more) if word == str(data) else word for word in command]
    again[3:4] = [str(tmp_path / "second"), "--init", str(tmp_path / "run" / "model")]
    assert run([*again, "--steps", "1", "--samples", "2", "--set", "window=9"]) == 0
    assert Windows(more).asked["source"] != "" == Windows(data).asked["source"]
    assert [Windows(folder).window for folder in (data, more)] == [6, 9]
    assert initial_heads(tmp_path / "second" / "model").config.window == 9


def test_bad_requests_are_one_line(
    micro_janus: Path, windows: Windows, target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, heads = ["train", "heads", "-o", str(tmp_path), "--part", str(micro_janus)], tmp_path / "heads"
    WindowHeads.for_target(target, window=5, width=16).save_pretrained(heads)
    for options, word in (
        ([], "needs --data"),
        (["--data", str(tmp_path / "none")], "has no windows"),
        (["--data", str(windows.folder), "--set", "breadth=3"], "breadth"),
        (["--data", str(windows.folder), "--set", "window=2"], "the heads correct up to 2"),
        (["--data", str(windows.folder), "--set", "taps=[0]"], "taps"),
        (["--samples", "4"], "needs --data"),
        (["--data", str(tmp_path / "new"), "--samples", "2", "--set", "window=0"], "window: 0 is not allowed"),
        (["--data", str(tmp_path / "new"), "--samples", "2", "--set", "window=null"], "window"),
        (["--data", str(windows.folder), "--init", str(heads), "--set", "window=3"], "window"),
        (["--data", str(windows.folder), "--init", str(heads), "--set", "width=32"], "belong to new heads"),
    ):
        assert run([*part, *options]) == 2
        said = capsys.readouterr().err
        assert word in said and "Traceback" not in said
    assert not (tmp_path / "new").exists()  # nothing was recorded first
    other = WindowHeads.for_target(target, width=16)
    other.register_to_config(vocab_size=7)
    with pytest.raises(ValueError, match="vocab_size 7"):
        HeadsRecipe(0, target, windows, other)
