"""`fastgen generate` as a user meets it."""

from __future__ import annotations

import errno
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
from generate_command import call
from long_tail import long_tail
from PIL import Image

import fastgen.io

COMMAND = [sys.executable, "-m", "fastgen.cli.main", "generate"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")


def environment() -> dict[str, str]:
    """For subprocesses that must give the very pixels of this process."""
    import torch

    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo blue squares\na ring above a heart\na green star\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "method"), [("z", "base"), ("janus", "speculative"), ("janus", "base")])
def test_json_is_one_object_and_the_sidecar_is_complete(
    kind: str, method: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(f"micro_{kind}")
    out = tmp_path / "new" / "out.png"
    asked = ("a red circle", "-o", out, "--model", model, "--method", method, "--seed", 5, "--json")
    code, stdout, stderr = call(capsys, *asked)
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["files"] == [str(out)] and result["seed"] == 5 and result["seeds"] == [5] and result["kept"] == 0
    assert result["stats"]["images"] == 1 and result["stats"]["flops"] > 0
    stage = "denoise" if kind == "z" else "tokens"
    assert {"load", stage, "decode", "save"} <= set(result["stats"]["seconds"])
    sidecar = json.loads(out.with_suffix(".json").read_text())
    assert sidecar["settings"] == {"prompt": "a red circle", "seed": 5, **result["settings"]}
    assert sidecar["loss"] == ("exact" if kind == "z" else "distribution") and sidecar["file"] == "out.png"
    parts = sidecar["stats"].get("accelerate", {})  # models that draw tokens have no denoiser to make faster
    assert (parts.get("prompt_padding") == "on") is (kind == "z") is (sidecar["settings"].get("accelerate") == "exact")
    assert {"fastgen", "torch", "diffusers", "transformers", "python"} <= set(sidecar["versions"])
    assert sidecar["stats"]["seconds"][stage] > 0
    with Image.open(out) as image:
        assert image.size == (16, 16) and image.mode == "RGB"
        assert json.loads(image.text["Comment"])["seed"] == 5
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.json", "out.png"]


def test_paths_are_printed_and_several_pictures_are_numbered(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    code, stdout, _ = call(
        capsys, "a ring", "-o", out, "--model", micro_z, "--num-images", 3, "--seed", 4, "--batch-invariant"
    )
    names = [tmp_path / f"out-{i}.png" for i in range(3)]
    assert code == 0 and stdout.split() == [str(name) for name in names]
    call(capsys, "a ring", "-o", tmp_path / "one.png", "--model", micro_z, "--seed", 5)
    assert np.array_equal(np.asarray(Image.open(names[1])), np.asarray(Image.open(tmp_path / "one.png")))


@pytest.mark.parametrize("kind", ["z", "janus"])
def test_batch_size_changes_no_batch_invariant_file(
    kind: str,
    request: pytest.FixtureRequest,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = request.getfixturevalue(f"micro_{kind}")
    seen = []
    for size in (1, 3, 8):
        folder = tmp_path / str(size)
        code, _, stderr = call(
            capsys,
            "--prompts-file",
            prompts_file,
            "-o",
            folder,
            "--model",
            model,
            "--batch-size",
            size,
            "--num-images",
            2,
            "--batch-invariant",
        )
        assert code == 0, stderr
        seen.append(pictures(folder))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 8 and len(set(seen[0].values())) == 8


@pytest.mark.parametrize(
    ("kind", "lost"),
    long_tail(
        [(kind, lost) for kind in ("z", "janus") for lost in ([0], [4], [1, 7], [2, 3, 4])],
        fast=[("z", [0]), ("z", [2, 3, 4]), ("janus", [1, 7])],
        unpack=True,
    ),
)
def test_a_rerun_draws_the_batches_of_an_uninterrupted_run(
    kind: str,
    lost: list[int],
    request: pytest.FixtureRequest,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--prompts-file", prompts_file, "--model", request.getfixturevalue(f"micro_{kind}"), "-o", tmp_path]
    options += ["--num-images", 2, "--batch-size", 3]
    assert call(capsys, *options)[0] == 0
    whole = pictures(tmp_path)
    for number in lost:
        (tmp_path / sorted(whole)[number]).unlink()
    code, _, stderr = call(capsys, *options)
    assert code == 0 and f"kept {8 - len(lost)} " in stderr and "other batches" not in stderr
    assert pictures(tmp_path) == whole


def test_pictures_kept_from_other_batches_are_named(
    micro_z: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts-file", prompts_file, "--model", micro_z, "-o", tmp_path, "--num-images", 2]
    assert call(capsys, *options, "--batch-size", 4)[0] == 0
    assert "note: 8 of them were drawn in other batches" in call(capsys, *options, "--batch-size", 6)[2]


def test_a_rerun_makes_only_what_is_missing(
    micro_z: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = ["--prompts-file", prompts_file, "-o", folder, "--model", micro_z, "--json"]
    assert call(capsys, *arguments)[0] == 0
    first, times = pictures(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder / "00001-0.png").unlink()
    (folder / "00002-0.json").write_text("{")  # then the picture cannot be trusted
    code, stdout, stderr = call(capsys, *arguments)
    assert code == 2 and "00002-0.png is in the way" in stderr and stdout == ""
    (folder / "00002-0.png").unlink()
    code, stdout, stderr = call(capsys, *arguments)
    result = json.loads(stdout)
    assert code == 0 and result["kept"] == 2 and result["stats"]["images"] == 2 and "kept 2" in stderr
    assert pictures(folder) == first
    assert (folder / "00000-0.png").stat().st_mtime_ns == times["00000-0.png"]
    prompts_file.write_text(prompts_file.read_text() + "a white cross\n")  # a longer file extends the run
    assert json.loads(call(capsys, *arguments)[1])["kept"] == 4
    code, _, stderr = call(capsys, *arguments, "--steps", 3)
    assert code == 2 and "made with steps 2, this run has 3; use --overwrite" in stderr and stderr.count("\n") == 1
    code, stdout, _ = call(capsys, *arguments, "--steps", 3, "--overwrite")
    assert code == 0 and json.loads(stdout)["kept"] == 0
    assert pictures(folder)["00000-0.png"] != first["00000-0.png"]


def test_a_named_picture_is_replaced(micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    arguments = ["a ring", "-o", out, "--model", micro_z, "--json"]
    call(capsys, *arguments)
    first = out.read_bytes()
    assert json.loads(call(capsys, *arguments)[1])["kept"] == 1
    assert json.loads(call(capsys, *arguments, "--seed", 1)[1])["kept"] == 0
    assert out.read_bytes() != first


def test_other_weights_in_the_same_folder_are_noticed(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(micro_z, tmp_path / "model")
    arguments = ["a ring", "-o", tmp_path / "out.png", "--model", model, "--json"]
    call(capsys, *arguments)
    weights = next((model / "transformer").glob("*.safetensors"))
    save_file({name: t * 1.01 for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert json.loads(call(capsys, *arguments)[1])["kept"] == 0


@pytest.mark.slow
@posix
def test_ctrl_c_leaves_whole_files_and_a_restart_continues(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real SIGINT in the middle of a real process; the finished folder equals that of a run left alone."""
    prompts = tmp_path / "prompts.txt"
    colours = ("red", "green", "blue", "white", "black")
    prompts.write_text("".join(f"a {c} {s}\n" for c in colours for s in ("ring", "star", "cross", "heart")))
    options = ["--prompts-file", str(prompts), "--model", str(micro_z), "--steps", "12", "--json"]
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*COMMAND, *options, "-o", str(broken)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Where the tests run in the background of a script the signal is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 500
    while len(list(broken.glob("*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert stdout == "" and stderr.strip().splitlines()[-1] == "error: interrupted" and "Traceback" not in stderr
    part = pictures(broken)
    assert 3 <= len(part) < 20
    assert {p.suffix for p in broken.iterdir()} == {".png", ".json"}
    assert {p.stem for p in broken.glob("*.png")} == {p.stem for p in broken.glob("*.json")}
    for path in broken.glob("*.png"):
        with Image.open(path) as image:
            image.load()
        json.loads(path.with_suffix(".json").read_text())

    code, stdout, stderr = call(capsys, *options, "-o", broken)
    assert code == 0, stderr
    assert json.loads(stdout)["kept"] == len(part)
    code, stdout, _ = call(capsys, *options, "-o", tmp_path / "whole")
    assert code == 0 and json.loads(stdout)["kept"] == 0
    assert pictures(broken) == pictures(tmp_path / "whole") and len(pictures(broken)) == 20


def test_a_full_disk_spares_finished_pictures(
    micro_z: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulated: the disk is full from the second file of the third picture on."""
    folder, real, calls = tmp_path / "out", os.fsync, []

    def fsync(descriptor: int) -> None:
        import stat

        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            calls.append(descriptor)
            if len(calls) >= 6:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    arguments = ["--prompts-file", prompts_file, "-o", folder, "--model", micro_z]
    with monkeypatch.context() as patch:
        patch.setattr(fastgen.io.os, "fsync", fsync)
        code, stdout, stderr = call(capsys, *arguments)
    assert code == 2 and stdout == "" and stderr.count("\n") == 1 and "no space left" in stderr
    assert sorted(p.name for p in folder.iterdir()) == ["00000-0.json", "00000-0.png", "00001-0.json", "00001-0.png"]
    kept = pictures(folder)
    assert call(capsys, *arguments)[0] == 0
    assert len(pictures(folder)) == 4 and kept.items() <= pictures(folder).items()


@pytest.mark.slow
@posix
def test_a_real_limit_on_file_sizes(micro_z: Path, tmp_path: Path) -> None:
    """A write that really fails, in a process of its own: 128x128 pixels of noise do not fit into 6 kB."""
    code = (
        "import resource, sys\nfrom fastgen.cli.main import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6144, 6144))\nsys.exit(run(sys.argv[1:]))"
    )
    options = ["-o", str(tmp_path / "o" / "out.png"), "--model", str(micro_z), "--height", "128", "--width", "128"]
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "a ring", *options, "--json"],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment(),
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stdout == "" and "size limit" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    )
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.slow  # docs/ and the README run the command in processes of their own
def test_stdout_is_only_the_json_in_a_real_process(micro_janus: Path, tmp_path: Path) -> None:
    options = ["--model", str(micro_janus), "-o", str(tmp_path / "out"), "--num-images", "2", "--json"]
    done = subprocess.run(
        [*COMMAND, "a photorealistic ring", *options], capture_output=True, text=True, timeout=500, env=environment()
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [Path(name).name for name in result["files"]] == ["00000-0.png", "00000-1.png"]
    assert "no token for: photorealistic" in done.stderr
    assert "torchvision" not in done.stderr, "a note that transformers makes while it is imported"


NO_LOAD: list[tuple[list[Any], str]] = [
    ([], "needs a prompt or --prompts-file"),
    ([""], "prompt: an empty text"),
    (["  \t"], "prompt: an empty text"),
    (["a\x00b"], "is not text"),
    (["\udcff"], "is not text"),
    (["a", "--steps", "0"], "--steps: 0"),
    (["a", "--steps", "-3"], "--steps: -3"),
    (["a", "--steps", "x"], "steps"),
    (["a", "--guidance-scale", "nan"], "--guidance-scale: nan"),
    (["a", "--guidance-scale", "inf"], "--guidance-scale: inf"),
    (["a", "--num-images", "0"], "--num-images: 0"),
    (["a", "--seed", "-1"], "--seed: -1"),
    (["a", "--seed", str(2**63)], "--seed"),
    (["a", "--batch-size", "0"], "--batch-size: 0"),
    (["a", "--height", "20"], "height: 20 is not allowed"),
    (["a", "--width", "0"], "--width: 0"),
    (["a", "--height", "4096"], "height: 4096"),
    (["a", "--negative-prompt", ""], "--negative-prompt: an empty"),
    (["a", "--negative-prompt", "b", "--guidance-scale", "0"], "negative_prompt: has no effect"),
    (["a", "--top-k", "4"], "top_k: ZImagePipeline does not take it"),
    (["a", "--dtype", "int8"], "dtype: 'int8'"),
    (["a", "--device", "abacus!"], "device: 'abacus!'"),
    (["a", "--device", "nosuch"], "device: 'nosuch'"),
    (["a", "-o", "out.jpg"], "written as .png"),
    (["a", "-o", "/dev/null/x/out.png"], "folder"),
    (["a", "--prompts-file", "p.txt"], "not both"),
    (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
    (["a", "--model", "tinny"], "unknown"),
    (["a", "--model", "./nowhere"], "no such folder"),
    (["a", "--model", "owner/name"], "hf download owner/name"),
]


@pytest.mark.parametrize(("arguments", "message"), NO_LOAD, ids=lambda value: ascii(value)[:40])
def test_bad_input_is_one_line_before_weights_load(
    arguments: list[str],
    message: str,
    micro_z: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    import fastgen.pipelines.loading as loading

    def no_load(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_checkpoint", no_load)
    monkeypatch.chdir(tmp_path)
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(micro_z)]
    code, stdout, stderr = call(capsys, *arguments, "--json")
    assert code == 2 and stdout == ""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and re.search(message, stderr), stderr
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "4"], "steps: JanusImagePipeline does not take it"),
        (["--negative-prompt", "b"], "does not take it; its row without a prompt"),
        (["--height", "32"], "height: 32"),
    ],
)
def test_bad_input_for_an_autoregressive_model(
    arguments: list[str], message: str, micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stdout, stderr = call(capsys, "a", "-o", tmp_path / "o.png", "--model", micro_janus, *arguments)
    assert code == 2 and stdout == "" and message in stderr and stderr.count("\n") == 1


def test_output_that_cannot_be(micro_z: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, stderr = call(capsys, "--prompts-file", prompts_file, "-o", prompts_file, "--model", micro_z)
    assert code == 2 and "need a folder" in stderr
    code, _, stderr = call(capsys, "--prompts-file", prompts_file, "-o", "out.png", "--model", micro_z)
    assert code == 2 and "need a folder" in stderr
    code, _, stderr = call(capsys, "a", "-o", prompts_file / "out.png", "--model", micro_z)
    assert code == 2 and "folder" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("damage", ["truncated", "json", "missing"])
def test_broken_checkpoints(damage: str, micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(micro_z, tmp_path / "model"))
    weights = next((model / "vae").glob("*.safetensors"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "missing":
        weights.unlink()
    else:
        (model / "vae" / "config.json").write_text("{")
    code, stdout, stderr = call(capsys, "a", "-o", tmp_path / "o.png", "--model", model)
    assert code == 2 and stdout == "" and stderr.count("\n") == 1 and str(model / "vae") in stderr
