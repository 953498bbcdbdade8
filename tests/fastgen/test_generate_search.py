"""`fastgen generate --method search`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate_command import call
from PIL import Image

import fastgen.pipelines.loading as loading
from fastgen.data.captions import vocabulary
from fastgen.evaluation.verifiers.names import load_verifier
from fastgen.evaluation.verifiers.shapes_verifier import ShapesVerifier
from fastgen.models.shapes_verifier import ShapesVerifier as Network

COMMAND = [sys.executable, "-m", "fastgen.cli.main", "generate"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def sidecar(picture: Path) -> dict[str, Any]:
    return dict(json.loads(picture.with_suffix(".json").read_text()))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight verifier whose scores differ from picture to picture."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("verifier")
    network = Network(vocabulary(), width=32, channels=16, depth=1, fusion_layers=2)
    with torch.no_grad():
        network.head.weight.mul_(40)
        network.head.bias.sub_(network(torch.zeros(1, 3, 64, 64), network.tokens(["a ring"])[None])[0])
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo blue squares\na green star\n", encoding="utf-8")
    return path


@pytest.fixture
def search(micro_z: Path, verifier: Path) -> list[object]:
    """Options of a small search."""
    return ["--method", "search", "--model", micro_z, "--verifier", verifier, "--steps", 4]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the verifier do something after `calls` calls; returns how many pictures each call had."""

    def after(calls: int, act: Any = None) -> list[int]:
        score, made = ShapesVerifier._score_batch, list[int]()

        def scored(self: ShapesVerifier, images: torch.Tensor, sides: list[Any]) -> torch.Tensor:
            made.append(len(images))
            if act is not None and len(made) > calls:
                act()
            return score(self, images, sides)

        monkeypatch.setattr(ShapesVerifier, "_score_batch", scored)
        return made

    return after


# ---- what a search writes and says ----


def test_the_sidecar_has_the_search_and_one_line_reports_it(
    search: list[object], verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    options = ["--max-nfe", 40, "--tau", 1, "--starts", 2, "--seed", 3, "--json"]
    code, stdout, stderr = call(capsys, "a red circle", *search, *options, "-o", out)
    assert code == 0, stderr
    result, record = json.loads(stdout), sidecar(out)
    found = record["search"]
    assert found["policy"] == "threshold, tau fixed(1)" and found["taus"] == [1.0] * 4
    assert found["verifier"] == "shapes-verifier" and found["sampler"] == "ancestral"
    # Guidance takes two forward passes: 20 evaluations, of which 2 are starts and 1 finishes each later transition.
    assert found["nfe"] == 40 and found["tries"] == [[16, 1, 1]] and found["forced"] == 3
    assert found["accepted"] == [[False] * 3] and found["starts"] == 2 and len(found["trees"][0]) == 20
    assert not record["interrupted"] and not record["preview"] and record["loss"] == "lossy"
    assert {"denoise", "decode", "verifier"} <= set(record["stats"]["seconds"]) and record["stats"]["flops"] > 0
    asked = {"method": "search", "policy": "threshold", "verifier": str(verifier), "max_nfe": 40, "tau": 1.0}
    assert asked.items() <= record["settings"].items() and record["settings"]["starts"] == 2
    assert record["settings"] == {"prompt": "a red circle", "seed": 3, **result["settings"]}
    # The score is that of the picture on the disk.
    image = torch.from_numpy(pixels(out).astype(np.uint8)).permute(2, 0, 1)[None]
    score = float(load_verifier(verifier).score(image, ["a red circle"]))
    assert found["score"] == pytest.approx(score, abs=1e-5) and result["scores"] == [found["score"]]
    (line,) = stderr.splitlines()
    assert line.startswith(
        f"{out}: score {found['score']:.4g}, 2 starts, tries 16 1x2, 3 forced, 20 evaluations, 40 NFE, "
    )
    assert "denoise" in line and "verifier" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_a_search_with_one_candidate_draws_the_base_picture(
    search: list[object], micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", micro_z, "--steps", 4, "--seed", 5]
    call(capsys, "a ring", *base, "-o", tmp_path / "base.png")
    few = ["--policy", "best-of-n", "--max-nfe", 8, "--seed", 5]
    code, _, stderr = call(capsys, "a ring", *search, *few, "-o", tmp_path / "one.png")
    assert code == 0, stderr
    assert np.abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "base.png")).max() <= 1
    assert ", tries" not in stderr and ", 4 evaluations, 8 NFE, " in stderr
    assert sidecar(tmp_path / "one.png")["settings"]["sampler"] is None
    more = ["--policy", "best-of-n", "--max-nfe", 64, "--seed", 5]
    call(capsys, "a ring", *search, *more, "-o", tmp_path / "more.png")
    found = sidecar(tmp_path / "more.png")["search"]
    ends = [score for _, _, _, score in found["trees"][0] if score is not None]
    assert len(ends) == 8 and found["score"] == max(ends) > min(ends)
    assert sidecar(tmp_path / "one.png")["search"]["score"] == pytest.approx(ends[0], abs=1e-6)


def test_other_pictures_and_the_batch_size_change_no_file(
    search: list[object], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    batches = failing(0)
    # Eight pictures for each prompt, four of which are drawn side by side where the batch may.
    options = [*search, "--prompts-file", prompts_file, "--policy", "best-of-n", "--steps", 2, "--max-nfe", 32]
    one_by_one = "--batch-invariant"
    seen = []
    for size in (1, 8):
        code, _, stderr = call(capsys, *options, "-o", tmp_path / str(size), one_by_one, "--batch-size", size)
        assert code == 0, stderr
        seen.append({path.name: path.read_bytes() for path in sorted((tmp_path / str(size)).glob("*.png"))})
    assert seen[0] == seen[1] and len(seen[0]) == 3
    assert batches == [1] * 48  # at this size rounding might hide it
    code, _, stderr = call(capsys, *options, "-o", tmp_path / "fast", "--fast-batches", "--batch-size", 8)
    assert code == 0, stderr
    assert stderr.count(" for 3 pictures") == 3 and sum(batches[48:]) == 24 and max(batches[48:]) == 8
    for name in seen[0]:
        record = sidecar(tmp_path / "fast" / name)
        assert record["stats"]["images"] == 3 and record["search"]["nfe"] == 32 and record["stats"]["nfe"] == 96
        assert record["search"]["path"] == sidecar(tmp_path / "1" / name)["search"]["path"]


def test_seconds_and_a_good_score_end_a_search(
    search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, stderr = call(capsys, "a ring", *search, "--tau", 1, "--max-seconds", 0.2, "-o", tmp_path / "a.png")
    assert code == 0, stderr
    found = sidecar(tmp_path / "a.png")["search"]
    assert found["stopped"] == "time" and found["finished"]
    enough = ["--policy", "best-of-n", "--max-nfe", 64, "--target-score", 0]
    code, _, stderr = call(capsys, "a ring", *search, *enough, "-o", tmp_path / "b.png")
    assert code == 0, stderr
    found = sidecar(tmp_path / "b.png")["search"]
    assert found["stopped"] != "time" and found["nfe"] == 32  # the first four trajectories, which run together


def test_dynamic_chunking_keeps_its_knobs_in_a_search(
    micro_dc: Path, verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "search", "--model", micro_dc, "--verifier", verifier, "--policy", "best-of-n"]
    code, stdout, stderr = call(
        capsys, "a ring", *options, "--max-nfe", 4, "--token-budget", 3, "--json", "-o", tmp_path / "a.png"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["stats"]["kept_tokens"] == [6, 6]


# ---- interruptions ----


@pytest.mark.slow
@posix
def test_ctrl_c_keeps_the_best_until_then_and_a_rerun_searches_again(
    search: list[object], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real SIGINT in the middle of the second search of a real process."""
    options = [
        *map(str, search),
        "--prompts-file",
        str(prompts_file),
        "--max-nfe",
        "150",
        "--tau",
        "1",
        "--json",
        "--batch-invariant",
    ]
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*COMMAND, *options, "-o", str(broken)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # For the very pixels of this process.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"},
        # Where the tests run in the background of a script the signal is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 500
    first, second = broken / "00000-0.png", broken / "00001-0.png"
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3 * sidecar(first)["stats"]["wall_seconds"])
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    # Without torchvision a library says so, in a line of its own.
    lines = [line for line in stderr.strip().splitlines() if not line.startswith("[transformers]")]
    assert stdout == "" and lines[-1] == "error: interrupted" and len(lines) == 3, stderr
    assert lines[1].startswith(f"{second}: interrupted, a rerun searches again, score ")
    assert "of a preview at time 1 of" in lines[1]
    assert sorted(path.name for path in broken.glob("*.png")) == [first.name, second.name]
    record = sidecar(second)
    assert record["interrupted"] and record["preview"] and record["search"]["stopped"] == "interrupted"
    assert 2 <= record["search"]["nfe"] < 150 and not sidecar(first)["interrupted"]
    with Image.open(second) as image:
        image.load()

    kept = first.stat().st_mtime_ns
    code, stdout, stderr = call(capsys, *options, "-o", broken)
    assert code == 0, stderr
    assert json.loads(stdout)["kept"] == 1 and first.stat().st_mtime_ns == kept
    assert not sidecar(second)["interrupted"] and sidecar(second)["search"]["nfe"] == 150
    code, stdout, _ = call(capsys, *options, "-o", broken)
    assert json.loads(stdout)["kept"] == 3


@posix
def test_a_termination_ends_a_search_as_ctrl_c_does(
    search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    failing(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    out = tmp_path / "out.png"
    options = [*search, "--tau", 0, "--chains", 2, "--max-nfe", 40, "--batch-invariant"]
    code, stdout, stderr = call(capsys, "a ring", *options, "-o", out)
    assert code == 130 and stdout == "" and stderr.endswith("error: interrupted\n")
    assert sidecar(out)["interrupted"] and signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_picture_of_other_settings_is_in_the_way(
    search: list[object], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    options = [*search, "--prompts-file", prompts_file, "-o", tmp_path / "o", "--tau", 1]

    def interrupt() -> None:
        raise KeyboardInterrupt

    failing(5, interrupt)
    assert call(capsys, *options, "--max-nfe", 40)[0] == 130
    code, _, stderr = call(capsys, *options, "--max-nfe", 60)
    assert code == 2 and "made with max_nfe 40, this run has 60" in stderr and stderr.count("\n") == 1


def test_a_verifier_that_crashes_leaves_the_best_until_then(
    search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    def crash() -> None:
        raise RuntimeError("the verifier fell over")

    failing(9, crash)
    options = ["a ring", *search, "--num-images", 2, "--policy", "best-of-n", "--max-nfe", 48, "--batch-invariant"]
    drawn = importlib.util.find_spec("matplotlib") is not None
    code, stdout, stderr = call(capsys, *options, "-o", tmp_path / "o.png", *["--save-tree"] * drawn)
    assert code == 2 and stdout == "" and "Traceback" not in stderr
    lines = stderr.splitlines()
    # 48 passes are 6 trajectories of which each end is scored: the fourth of the second picture is not.
    assert lines[-1] == "error: search: RuntimeError: the verifier fell over" and len(lines) == 3
    assert "interrupted" not in lines[0] and "interrupted, a rerun searches again, score" in lines[1]
    assert not sidecar(tmp_path / "o-0.png")["interrupted"] and sidecar(tmp_path / "o-1.png")["interrupted"]
    assert (tmp_path / "o-1.tree.png").is_file() == drawn


def test_a_verifier_that_crashes_first_leaves_nothing(
    search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    def crash() -> None:
        raise RuntimeError("it never\nworked")

    failing(0, crash)
    code, stdout, stderr = call(capsys, "a ring", *search, "--max-nfe", 40, "-o", tmp_path / "o.png")
    assert code == 2 and stdout == "" and stderr == "error: search: RuntimeError: it never worked\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_cheap_previews(micro_dc: Path, verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["a ring", "--method", "search", "--model", micro_dc, "--verifier", verifier, "--steps", 4]
    common += ["--policy", "svdd", "--max-nfe", 500, "--preview", "pooled"]
    code, _, stderr = call(capsys, *common, "-o", tmp_path / "a.png")
    assert code == 0, stderr
    made = sidecar(tmp_path / "a.png")
    assert made["stats"]["seconds"]["preview"] > 0 and made["settings"]["preview"] == "pooled"


# ---- mistakes ----

NO_LOAD: list[tuple[list[object], str]] = [
    (["--max-nfe", 7], "max_nfe: 7 is not allowed, policy threshold needs at least 8 here"),
    (["--max-nfe", 3, "--guidance-scale", 0], "needs at least 4 here"),
    (["--max-nfe", 9, "--starts", 2], "needs at least 10 here"),
    (["--max-nfe", 15, "--chains", 2], "needs at least 16 here"),
    (["--max-nfe", 0], "--max-nfe: 0 is not allowed"),
    (["--max-nfe", 40, "--policy", "svdd"], "policy svdd needs at least 400 here"),
    ([], "policy threshold needs one of them, or it would not end"),
    (["--target-score", 0.5], "it would not end"),
    (["--policy", "rbf", "--max-seconds", 5], "max_nfe: policy rbf needs it"),
    (["--max-seconds", 0], "--max-seconds: 0.0 is not allowed"),
    (["--max-seconds", "inf"], "--max-seconds: inf is not allowed"),
    (["--max-nfe", 40, "--target-score", "nan"], "--target-score: nan"),
    (["--max-nfe", 40, "--target-score", 1.5], "--target-score: 1.5 is outside the scores of shapes-verifier"),
    (["--max-nfe", 40, "--tau", -1], "--tau: -1 is outside the scores"),
    (["--max-nfe", 40, "--tau", "nan"], "--tau: nan"),
    (["--max-nfe", 40, "--starts", 0], "--starts: 0"),
    (["--max-nfe", 40, "--chains", -2], "--chains: -2"),
    (["--max-nfe", 40, "--policy", "magic"], "policy: 'magic' is unknown, there are threshold, rbf"),
    (["--max-nfe", 40, "--preview", "tiny"], "--preview: 'tiny' is not allowed"),
    (["--max-nfe", 40, "--policy", "rbf", "--tau", 0.5], "--tau: policy rbf has none, but threshold"),
    (["--max-nfe", 40, "--policy", "best-of-n", "--starts", 2], "--starts: policy best-of-n has none"),
    (["--max-nfe", 40, "--sampler", "euler"], "--sampler: 'euler' is not allowed, needs one of ancestral"),
    (["--max-nfe", 40, "--policy", "best-of-n", "--sampler", "rollover"], "--sampler: policy best-of-n adds no noise"),
    (["--max-nfe", 40, "--verifier", "shape"], "verifier: 'shape' is unknown"),
    (["--max-nfe", 40, "--verifier", "shapes-verifier:"], "names no weights"),
    (["--max-nfe", 40, "--save-map"], "--save-map: not with --method search"),
    (["--max-nfe", 40, "--drafter", "none"], "--drafter: needs --method speculative"),
    (["--max-nfe", 40, "--top-k", 4], "top_k: ZImagePipeline does not take it"),
    (["--max-nfe", 40, "--tail-drop", 0.3], "tail_drop: ZImagePipeline does not take it"),
]


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_checkpoint", refuse)
    monkeypatch.setattr(ShapesVerifier, "load", refuse)


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize(("options", "message"), NO_LOAD, ids=lambda value: str(value)[:60])
def test_mistakes_end_in_one_line_before_weights_load(
    options: list[object], message: str, search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stdout, stderr = call(capsys, "a ring", *search, *options, "-o", tmp_path / "o.png")
    assert code == 2 and stdout == "" and not list(tmp_path.iterdir())
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr, stderr


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize("option", ["--policy=rbf", "--verifier=x", "--max-nfe=9", "--tau=0.5", "--save-tree"])
def test_options_of_a_search_need_the_method(
    option: str, micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stdout, stderr = call(capsys, "a ring", "--model", micro_z, option, "-o", tmp_path / "o.png")
    assert code == 2 and stdout == "" and stderr == f"error: {option.split('=')[0]}: needs --method search\n"


@pytest.mark.usefixtures("no_load")
def test_models_that_cannot_be_searched(
    micro_janus: Path, micro_z: Path, verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "search", "--max-nfe", 40, "-o", tmp_path / "o.png"]
    code, _, stderr = call(capsys, "a", *options, "--verifier", verifier, "--model", micro_janus)
    assert code == 2 and "draws tokens, there is no noise to search" in stderr and stderr.count("\n") == 1
    other = Path(shutil.copytree(micro_z, tmp_path / "other"))
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "IFPipeline"}))
    code, _, stderr = call(capsys, "a", *options, "--verifier", verifier, "--model", other)
    assert (
        code == 2
        and "IFPipeline cannot be searched: its start noise was not found" in stderr
        and stderr.count("\n") == 1
    )
    code, _, stderr = call(capsys, "a", *options, "--model", micro_z)
    assert code == 2 and stderr.startswith("error: --verifier: needs one for model ") and stderr.count("\n") == 1
    assert not (tmp_path / "o.png").exists()


def test_other_weights_of_the_verifier_or_thresholds_are_noticed(
    search: list[object], verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    own = Path(shutil.copytree(verifier, tmp_path / "verifier"))
    options = ["a ring", *search, "--verifier", own, "--max-nfe", 8, "--tau", 0, "--json", "-o", tmp_path / "o.png"]
    assert json.loads(call(capsys, *options)[1])["kept"] == 0
    assert json.loads(call(capsys, *options)[1])["kept"] == 1
    weights = next(own.glob("*.safetensors"))
    save_file({name: t * 1.01 for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert json.loads(call(capsys, *options)[1])["kept"] == 0


# ---- trees ----


def test_trees_are_written_next_to_the_pictures_and_later_from_their_sidecars(
    search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ["a ring", *search, "--max-nfe", 20, "--tau", 0.5, "-o", tmp_path / "o.png", "--save-tree"]
    code, _, stderr = call(capsys, *options)
    assert code == 0, stderr
    tree = tmp_path / "o.tree.png"
    first = tree.read_bytes()
    tree.unlink()
    code, _, stderr = call(capsys, *options)
    assert code == 0 and "kept 1 finished" in stderr and tree.read_bytes() == first


@pytest.mark.usefixtures("no_load")
def test_trees_need_matplotlib(
    search: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, stderr = call(capsys, "a ring", *search, "--max-nfe", 20, "--save-tree", "-o", tmp_path / "o.png")
    assert code == 2 and stderr == "error: --save-tree: needs matplotlib (python -m pip install matplotlib)\n"
