"""Evaluation runs: resuming, guarding and scoring a folder in GenEval's layout."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_fakes import PixelModel
from PIL import Image

from fastgen.errors import FastgenError
from fastgen.evaluation.distributed import Group
from fastgen.evaluation.fid.fd_shapes import FDShapes
from fastgen.evaluation.geneval.metadata import Metadata, format_metadata
from fastgen.evaluation.geneval.rules import ImageResult
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker
from fastgen.evaluation.report import contact_sheet, scores_markdown
from fastgen.evaluation.runner import (
    EvaluationRun,
    RunSettings,
    image_seed,
    judge_samples,
    model_fingerprint,
    read_samples,
    results_jsonl,
    spread,
)
from fastgen.evaluation.shapesworld import render_prompts, score_folder, shapes_prompts

PROMPTS = shapes_prompts(limit=2)  # 12 prompts
SETTINGS = RunSettings(model="fake", model_fingerprint="0", images_per_prompt=3, seed=7)


def picture(prompt: str, seed: int) -> Image.Image:
    """Noise that depends on prompt and seed alone."""
    digest = hashlib.sha256(f"{prompt} {seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


class Painter:
    """A generator that counts its images and may be interrupted after some of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.made, self.stop_after = 0, stop_after

    def __call__(self, prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.made == self.stop_after:
                raise KeyboardInterrupt
            self.made += 1
            yield picture(prompt, seed)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the timing, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "timing.json"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    EvaluationRun(folder, PROMPTS, SETTINGS).generate(Painter())
    return folder


# --- generating --------------------------------------------------------------------------------------------------


def test_layout(finished: Path) -> None:
    files = content(finished)
    assert len(files) == 1 + 12 * (1 + 3)
    assert json.loads(files["00004/metadata.jsonl"]) == PROMPTS[4].as_dict()
    made = np.asarray(Image.open(finished / "00004/samples/0002.png"))
    np.testing.assert_array_equal(made, np.asarray(picture(PROMPTS[4].prompt, image_seed(7, PROMPTS[4].prompt, 2))))


def test_every_image_has_a_seed_of_its_own() -> None:
    """No two prompts share noise, no two runs do, and a seed depends on nothing but run, prompt and number."""
    prompts = [prompt.prompt for prompt in shapes_prompts()]
    seeds = [image_seed(run, prompt, image) for run in (0, 1) for prompt in prompts for image in range(4)]
    assert len(set(seeds)) == len(seeds) == 2 * 360 * 4
    assert all(0 <= seed < 2**32 for seed in seeds)
    # Equal on every machine and in every version: sha256 of "0/1/a red circle" begins so.
    assert image_seed(0, "a red circle", 1) == int(hashlib.sha256(b"0/1/a red circle").hexdigest()[:8], 16)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 17, 35])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, finished: Path, stop_after: int) -> None:
    folder, first, second = tmp_path / "run", Painter(stop_after), Painter()
    with pytest.raises(KeyboardInterrupt):
        EvaluationRun(folder, PROMPTS, SETTINGS).generate(first)
    assert EvaluationRun(folder, PROMPTS, SETTINGS).generate(second) == 36 - stop_after
    assert first.made + second.made == 36  # nothing lost, nothing made twice
    assert content(folder) == content(finished)
    assert EvaluationRun(folder, PROMPTS, SETTINGS).timing()[0] == 36


class Second(Group):
    """The second of two processes, alone: the first one reported that everything is missing, and has begun since."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2

    def main_first(self, work):
        return work()

    def share(self, value=None):
        return [(p, i) for p in range(len(PROMPTS)) for i in range(SETTINGS.images_per_prompt)]

    def count(self, name, done):
        return done

    def check(self) -> None:
        pass

    def meet(self, on_wait=None) -> None:
        pass


def test_a_process_that_comes_late_draws_its_share_of_the_common_list(tmp_path: Path, finished: Path) -> None:
    """What the first one has drawn meanwhile must not shift the places of the second."""
    run = EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run.generate(Painter(3))
    run.group = Second()
    assert run.generate(Painter()) == 36
    made = {pair for pair in run.group.share() if run.sample(*pair).is_file()}
    assert made == {(0, 0), (0, 1), (0, 2)} | set(run.group.share()[1::2])


def test_leftovers_of_a_killed_write_are_removed_when_the_run_continues(tmp_path: Path) -> None:
    run = EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS)
    left = run.folder / "00000" / "samples" / ".0000.png.0123456789ab.tmp"
    own = run.folder / ".notes.tmp"
    left.parent.mkdir(parents=True)
    for path in (left, own):
        path.write_bytes(b"part")
    EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS)
    assert not left.exists() and own.exists()


def test_finished_run_makes_nothing_and_loads_nothing(finished: Path) -> None:
    run = EvaluationRun(finished, PROMPTS, SETTINGS)
    timing = run.timing()
    assert run.generate(lambda prompts, seeds: pytest.fail("a model was asked")) == 0
    assert run.timing() == timing


def test_damaged_and_deleted_images_are_made_again(tmp_path, finished: Path) -> None:
    folder = tmp_path / "run"
    run = EvaluationRun(folder, PROMPTS, SETTINGS)
    run.generate(Painter())
    half = run.sample(3, 1)
    half.write_bytes(half.read_bytes()[:3000])
    run.sample(5, 0).unlink()
    run.sample(6, 0).write_bytes(b"")
    assert run.missing() == [(3, 1), (5, 0), (6, 0)]
    assert EvaluationRun(folder, PROMPTS, SETTINGS).generate(Painter()) == 3
    assert content(folder) == content(finished)


def _zeroed(data: bytes, other: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(50) + data[middle + 50 :]


def _resaved(data: bytes, other: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        _zeroed,
        _resaved,
        lambda data, other: other,  # a whole picture, of another prompt
        lambda data, other: data[:-1],
        lambda data, other: data + b"\0",
        lambda data, other: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    ],
    ids=["zeroed", "resaved", "exchanged", "cut", "longer", "one bit"],
)
def test_a_picture_counts_only_when_it_is_the_one_that_was_drawn(tmp_path, finished: Path, damage) -> None:
    run = EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS)
    run.generate(Painter())
    hurt = run.sample(3, 1)
    hurt.write_bytes(damage(hurt.read_bytes(), run.sample(4, 1).read_bytes()))
    assert run.missing() == [(3, 1)]
    assert EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS).generate(Painter()) == 1
    assert content(tmp_path / "run") == content(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed is 7 there and 8 now"),
        ({"steps": 4}, "steps is None there and 4 now"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"model_fingerprint": "1"}, "model_fingerprint"),
        ({"images_per_prompt": 4}, "images_per_prompt"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_settings_are_refused(finished: Path, change: dict, message: str) -> None:
    before = content(finished)
    settings = RunSettings(**{**{f: getattr(SETTINGS, f) for f in SETTINGS.__dataclass_fields__}, **change})
    with pytest.raises(FastgenError, match=message):
        EvaluationRun(finished, PROMPTS, settings)
    assert content(finished) == before


def test_other_prompts_are_refused(finished: Path) -> None:
    with pytest.raises(FastgenError, match="prompts are others"):
        EvaluationRun(finished, PROMPTS[:-1], SETTINGS)


def test_foreign_folder_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.docx").write_text("")
    with pytest.raises(FastgenError, match="has no evaluation run"):
        EvaluationRun(tmp_path, PROMPTS, SETTINGS)


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"format": 0}'])
def test_damaged_run_record_is_refused(tmp_path, record: str) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(FastgenError, match="run"):
        EvaluationRun(tmp_path, PROMPTS, SETTINGS)


def test_output_that_is_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FastgenError, match="is a file"):
        EvaluationRun(tmp_path / "file", PROMPTS, SETTINGS)


def test_damaged_timing_is_named(tmp_path, finished: Path) -> None:
    run = EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS)
    (tmp_path / "run" / "timing.json").write_text("[]")
    with pytest.raises(FastgenError, match="timing.json"):
        run.generate(Painter())


def test_failed_write_keeps_what_is_there(tmp_path, monkeypatch, finished: Path) -> None:
    import fastgen.evaluation.runner as runner

    real, calls = runner.atomic_write_bytes, []

    def full_disk(path: Path, data: bytes) -> None:
        if path.suffix == ".png":
            if len(calls) == 5:
                raise FastgenError(f"{path}: disk full")
            calls.append(path)
        real(path, data)

    monkeypatch.setattr(runner, "atomic_write_bytes", full_disk)
    folder = tmp_path / "run"
    with pytest.raises(FastgenError, match="disk full"):
        EvaluationRun(folder, PROMPTS, SETTINGS).generate(Painter())
    monkeypatch.undo()
    assert EvaluationRun(folder, PROMPTS, SETTINGS).generate(Painter()) == 31
    assert content(folder) == content(finished)


def test_generator_that_ends_early_is_an_error(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="too few"):
        EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS).generate(lambda p, s: iter([picture("x", 0)]))


@pytest.mark.parametrize(
    "bad",
    [
        {"images_per_prompt": 0},
        {"steps": 0},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"seed": -1},
        {"tail_drop": 1.0},
        {"uncond_tail_drop": -0.1},
        {"token_budget": 0},
        {"tree": "nonsense"},
        {"acceptance": "nonsense"},
        {"quality": 2.0},
    ],
)
def test_settings_are_checked(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RunSettings(model="m", model_fingerprint="0", **bad)


def test_progress_is_reported(tmp_path) -> None:
    calls: list[tuple] = []
    EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS).generate(Painter(), lambda *item: calls.append(item))
    assert calls[0] == ("generate", 0, 36) and calls[-1] == ("generate", 36, 36) and len(calls) == 37


def test_model_fingerprint_sees_content_not_cards(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "training.json").write_text("{}")
    assert model_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert model_fingerprint(tmp_path) != first


def test_model_fingerprint_of_a_large_file_reads_its_ends(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(70 << 20)  # sparse
    first = model_fingerprint(tmp_path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert model_fingerprint(tmp_path) != first


KILLED = """
import sys, time
from fastgen.evaluation.runner import EvaluationRun, RunSettings
from fastgen.evaluation.shapesworld import render_prompts, shapes_prompts
def slow(prompts, seeds):
    for image in render_prompts(prompts, seeds):
        time.sleep(0.02)
        yield image
settings = RunSettings(model="renders", model_fingerprint="renders", images_per_prompt=2)
print("ready", flush=True)
EvaluationRun(sys.argv[1], shapes_prompts(2), settings).generate(slow)
"""


@pytest.mark.slow
def test_killed_runs_end_like_an_uninterrupted_one(tmp_path) -> None:
    """SIGKILL after random delays until the run is done; every start continues the last."""
    settings = RunSettings(model="renders", model_fingerprint="renders", images_per_prompt=2)
    EvaluationRun(tmp_path / "whole", shapes_prompts(2), settings).generate(render_prompts)
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        kills += code != 0
        if code == 0:
            break
    EvaluationRun(tmp_path / "killed", shapes_prompts(2), settings).generate(render_prompts)
    assert kills >= 2
    visible = {name: data for name, data in content(tmp_path / "killed").items() if "/." not in f"/{name}"}
    assert visible == content(tmp_path / "whole")


# --- scoring -----------------------------------------------------------------------------------------------------


def test_samples_are_read_in_order(finished: Path) -> None:
    samples = read_samples(finished)
    assert [(s.prompt_id, s.path.name) for s in samples[:4]] == [
        (0, "0000.png"), (0, "0001.png"), (0, "0002.png"), (1, "0000.png")
    ]  # fmt: skip
    assert [s.metadata for s in samples[::3]] == PROMPTS


def test_reads_the_official_layout_too(tmp_path) -> None:
    """Four or five digits, a grid next to the samples, and files that fastgen did not write."""
    for name, item in zip(("00000", "00001", "00010"), PROMPTS, strict=False):
        samples = tmp_path / name / "samples"
        samples.mkdir(parents=True)
        (tmp_path / name / "metadata.jsonl").write_text(item.to_json())
        for image in ("00000.png", "00001.png", "00010.png"):
            picture("x", 0).save(samples / image)
        (samples / "0000.json").write_text("{}")
        picture("x", 0).save(tmp_path / name / "grid.png")
    (tmp_path / "notes").mkdir()
    samples = read_samples(tmp_path)
    assert [s.path.name for s in samples] == ["00000.png", "00001.png", "00010.png"] * 3
    assert sorted({s.prompt_id for s in samples}) == [0, 1, 10]


def folder_with(tmp_path: Path, metadata: str | None, image: bytes | None) -> Path:
    home = tmp_path / "00000"
    (home / "samples").mkdir(parents=True)
    if metadata is not None:
        (home / "metadata.jsonl").write_text(metadata)
    if image is not None:
        (home / "samples" / "0000.png").write_bytes(image)
    return tmp_path


GOOD = PROMPTS[0].to_json()
ALIEN = Metadata.from_dict({"tag": "x", "include": [{"class": "zebra", "count": 1}], "prompt": "p"}).to_json()


@pytest.mark.parametrize(
    ("metadata", "image", "message"),
    [
        (None, b"", "cannot read the metadata"),
        (GOOD + "\n" + PROMPTS[1].to_json(), b"", "exactly one line"),
        (GOOD + "\n" + GOOD, b"", "is already in .*metadata.jsonl:1"),
        ("{", b"", "not valid JSON"),
        (GOOD, None, "no image"),
        (ALIEN, b"", "unknown class 'zebra'"),
    ],
)
def test_broken_folders_are_named(tmp_path, metadata, image, message: str) -> None:
    folder = folder_with(tmp_path, metadata, image)
    with pytest.raises(FastgenError, match=message) as error:
        read_samples(folder, ShapesChecker(PixelModel()))
    assert "00000" in str(error.value)


def test_images_are_judged_as_their_orientation_shows_them(tmp_path, caplog) -> None:
    home = tmp_path / "00000"
    (home / "samples").mkdir(parents=True)
    (home / "metadata.jsonl").write_bytes(format_metadata(PROMPTS[:1]))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = picture("x", 1).resize((64, 32))
    image.save(home / "samples/0000.png", exif=exif.tobytes())
    (home / "samples/0001.gif").write_bytes(b"")
    (sample,) = read_samples(tmp_path)
    assert sample.size() == (32, 64)
    np.testing.assert_array_equal(sample.load(), np.rot90(np.asarray(image), -1))
    assert "1 images of other formats are skipped: 0001.gif" in caplog.text


def test_missing_and_empty_folders(tmp_path) -> None:
    with pytest.raises(FastgenError, match="no such folder"):
        read_samples(tmp_path / "none")
    with pytest.raises(FastgenError, match="no prompt folders"):
        read_samples(tmp_path)


@pytest.mark.parametrize("image", [b"", b"not a png", None])
def test_unreadable_image_is_named(tmp_path, finished: Path, image: bytes | None) -> None:
    whole = (finished / "00000/samples/0000.png").read_bytes()
    folder = folder_with(tmp_path, GOOD, whole[:5000] if image is None else image)
    with pytest.raises(FastgenError, match="0000.png: not a readable image"):
        judge_samples(read_samples(folder), ShapesChecker(PixelModel()))


def test_results_are_in_the_fields_of_the_official_scorer(finished: Path) -> None:
    samples = read_samples(finished)
    results = judge_samples(samples, ShapesChecker(PixelModel()))
    lines = [json.loads(line) for line in results_jsonl(finished, samples, results, "shapes").splitlines()]
    assert len(lines) == 36
    assert list(lines[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details", "detector"]
    assert lines[4]["filename"] == "00001/samples/0001.png"
    assert json.loads(lines[4]["metadata"]) == PROMPTS[1].as_dict()
    assert all(line["correct"] == (line["reason"] == "") for line in lines)
    for line in lines:
        for boxes in json.loads(line["details"]).values():
            assert all(len(box) == 5 for box in boxes)


def test_a_colour_classifier_can_be_given(tmp_path) -> None:
    """On renders of the prompts the detector's colours are right, and a wrong colour classifier is used as given."""
    shown = []

    class Grey:
        def classify(self, image, detections, class_name, indices) -> list[str]:
            shown.append(image.shape)
            return ["grey"] * len(indices)

    EvaluationRun(tmp_path / "run", PROMPTS, SETTINGS).generate(render_prompts)
    samples = read_samples(tmp_path / "run")
    own = judge_samples(samples, ShapesChecker())
    grey = judge_samples(samples, ShapesChecker(), Grey())
    colored = [i for i, result in enumerate(own) if result.tag in ("colors", "color_attr")]
    assert all(own[i].correct for i in colored) and len(colored) == 12
    assert shown and not any(grey[i].correct for i in colored)


def test_score_of_a_folder(finished: Path, tmp_path) -> None:
    model = PixelModel()
    fd = FDShapes(model, n_reference=64, seed=9, cache_dir=tmp_path)
    score = score_folder(finished, model, fd=fd)
    data = json.loads(json.dumps(score.data))
    assert data["benchmark"] == "ShapesWorld-GenEval"
    assert list(data["tasks"]) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert data["overall"] == pytest.approx(np.mean([task["score"] for task in data["tasks"].values()]))
    assert (data["n_images"], data["n_prompts"]) == (36, 12)
    assert data["fd_shapes"]["value"] > 0 and data["fd_shapes"]["n_images"] == 36
    assert "FD-shapes[64" in data["fd_shapes"]["protocol"]
    assert "ShapesWorld-GenEval" in scores_markdown(data)
    # Too few images: scores all the same, and a reason instead of a number.
    fd.extractor.taps = {"pool": 100}
    small = score_folder(finished, model, fd=fd).data
    assert small["overall"] == data["overall"]
    assert small["fd_shapes"]["value"] is None and "too few" in small["fd_shapes"]["reason"]


def test_renders_are_seeded_and_show_the_prompt() -> None:
    prompts = [p.prompt for p in PROMPTS]
    a, b = ([np.asarray(i) for i in render_prompts(prompts, [s] * 12)] for s in (0, 1))
    again = [np.asarray(i) for i in render_prompts(prompts[::-1], [0] * 12)][::-1]
    for x, y, z in zip(a, b, again, strict=True):
        np.testing.assert_array_equal(x, z)
        assert (x != y).any()
    with pytest.raises(FastgenError, match="no ShapesWorld evaluation prompt"):
        next(render_prompts(["a zebra"], [0]))


# --- prompts and sheets ------------------------------------------------------------------------------------------


def test_prompts_are_limited_per_task() -> None:
    assert len(shapes_prompts()) == 360 and len({p.prompt for p in shapes_prompts()}) == 360
    assert [p.tag for p in PROMPTS] == [tag for tag in dict.fromkeys(p.tag for p in PROMPTS) for _ in range(2)]
    with pytest.raises(ValueError, match="limit"):
        shapes_prompts(0)


def test_spread_covers_the_tasks() -> None:
    chosen = spread(360, 64)
    assert len(set(chosen)) == 64 and chosen[0] == 0 and chosen[-1] >= 354
    assert np.bincount(np.array(chosen) // 60).tolist() in ([11, 11, 10, 11, 11, 10], [11, 10, 11, 11, 10, 11])
    assert spread(5, 64) == [0, 1, 2, 3, 4]


def test_contact_sheet() -> None:
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "black")]
    sheet = contact_sheet(images, columns=2, tile=32)
    assert sheet.size == (2 * 38 + 6, 2 * 38 + 6)
    assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.getpixel((50, 10)) == (0, 0, 255)
    assert sheet.getpixel((50, 50)) == (255, 255, 255)
    marked = contact_sheet(images, ["a b", "long " * 30, ""], correct=[True, False, True], tile=64)
    assert marked.getpixel((8, 6 + 64 + 2)) == (0x1A, 0x98, 0x50)
    assert marked.getpixel((8 + 70, 6 + 64 + 2)) == (0xD7, 0x30, 0x27)
    with pytest.raises(ValueError, match="captions"):
        contact_sheet(images, ["a"])
    with pytest.raises(ValueError, match="images"):
        contact_sheet([])


def test_sheet_of_a_score_takes_first_images(finished: Path) -> None:
    from fastgen.evaluation.shapesworld import FolderScore

    samples = read_samples(finished)
    results = [ImageResult("t", s.prompt_id, s.path.name == "0000.png") for s in samples]
    sheet = FolderScore({}, samples, results).sheet(captions=True, count=4)
    assert sheet.width == 4 * 134 + 6
    assert sheet.getpixel((8, 6 + 128 + 2)) == (0x1A, 0x98, 0x50)  # green: the first image of a prompt
