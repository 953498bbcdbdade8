"""Names of pictures, prompts files, and what counts as finished."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgen.cli.plan import Job, image_paths, is_finished, plan_jobs, read_prompts_file, unfinished_jobs
from fastgen.errors import FastgenError
from fastgen.io import file_sha256, save_png

SETTINGS = {"model": "m", "steps": 4}

lines = st.lists(
    st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip), min_size=1
)


@settings(deadline=None, max_examples=50)
@given(lines, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_prompts_file_round_trip(prompts: list[str], newline: str, final: bool, mark: bool) -> None:
    if mark or not prompts[0].startswith("\ufeff"):  # a leading mark is one of the encoding
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "prompts.txt")
            text = ("\ufeff" if mark else "") + newline.join(prompts) + (newline if final else "")
            path.write_bytes(text.encode())
            assert read_prompts_file(path) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n", "line 1 is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\n   \n", "line 2 is empty"),
        (b"a\nb\xff\n", "line 2 is not UTF-8"),
        ("a\nb".encode("utf-16"), "line 1 is not UTF-8"),
        (b"a\nb\x00c\n", "line 2 contains control characters"),
    ],
)
def test_bad_prompts_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(FastgenError, match=message) as caught:
        read_prompts_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FastgenError, match="none.txt"):
        read_prompts_file(tmp_path / "none.txt")
    with pytest.raises(FastgenError, match="directory"):
        read_prompts_file(tmp_path)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 150), st.integers(1, 12), st.booleans(), st.integers(0, 2**40))
def test_names_and_seeds(prompts: int, images: int, folder: bool, seed: int) -> None:
    prompts = prompts if folder else 1
    output = Path("x/out" if folder else "x/out.png")
    paths = image_paths(output, prompts, images, folder=folder)
    jobs = plan_jobs([f"p{i}" for i in range(prompts)], seed, SETTINGS, paths)
    names = [job.image for job in jobs] + [job.sidecar for job in jobs]
    assert len(set(names)) == len(names) == 2 * prompts * images
    assert all(job.image.suffix == ".png" and job.sidecar.suffix == ".json" for job in jobs)
    assert [job.seed - seed for job in jobs] == list(range(images)) * prompts
    assert [job.prompt for job in jobs] == [f"p{i}" for i in range(prompts) for _ in range(images)]
    if folder:
        assert sorted(names[: prompts * images]) == names[: prompts * images] or images > 10
        # More pictures per prompt, or more prompts at the end, keep the names of those that are there.
        more = image_paths(output, prompts + 1, images + 1, folder=True)
        assert all(path in more[p] for p, row in enumerate(paths) for path in row)


def test_single_names() -> None:
    assert image_paths(Path("a/out.png"), 1, 1, folder=False) == [[Path("a/out.png")]]
    assert image_paths(Path("a/out.png"), 1, 2, folder=False) == [[Path("a/out-0.png"), Path("a/out-1.png")]]
    assert image_paths(Path("a"), 1, 1, folder=True) == [[Path("a/00000-0.png")]]
    assert image_paths(Path("a"), 100_001, 1, folder=True)[0] == [Path("a/000000-0.png")]


def finished_job(folder: Path, name: str = "00000-0.png", color: str = "red") -> Job:
    job = Job("p", 3, folder / name, {"prompt": "p", "seed": 3, **SETTINGS})
    save_png(job.image, Image.new("RGB", (64, 64), color))
    job.sidecar.write_text(json.dumps({"settings": job.settings, "sha256": file_sha256(job.image)}))
    return job


def test_what_counts_as_finished(tmp_path: Path) -> None:
    job = finished_job(tmp_path)
    assert is_finished(job)
    assert unfinished_jobs([job], overwrite=False, strict=True) == []
    assert unfinished_jobs([job], overwrite=True, strict=True) == [job]
    data = job.image.read_bytes()
    for broken in (data[:-1], data[10:], b""):  # a picture that some other program cut is made again
        job.image.write_bytes(broken)
        assert unfinished_jobs([job], overwrite=False, strict=True) == [job]
    job.image.unlink()
    assert unfinished_jobs([job], overwrite=False, strict=True) == [job]


@pytest.mark.parametrize("sidecar", [None, "{", "[]", "{}", '{"settings": 3}'])
def test_a_foreign_picture_is_in_the_way(tmp_path: Path, sidecar: str | None) -> None:
    job = finished_job(tmp_path)
    job.sidecar.unlink()
    if sidecar is not None:
        job.sidecar.write_text(sidecar)
    with pytest.raises(FastgenError, match="no sidecar with its settings; use --overwrite"):
        unfinished_jobs([job], overwrite=False, strict=True)
    assert unfinished_jobs([job], overwrite=False, strict=False) == [job]


def test_other_settings_are_named(tmp_path: Path) -> None:
    job = finished_job(tmp_path)
    for name, value in (("steps", 5), ("prompt", "q"), ("seed", 4)):
        other = Job(job.prompt, job.seed, job.image, {**job.settings, name: value})
        assert not is_finished(other)
        with pytest.raises(FastgenError, match=f"it was made with {name} "):
            unfinished_jobs([other], overwrite=False, strict=True)
        assert unfinished_jobs([other], overwrite=True, strict=True) == [other]
    fewer = Job(job.prompt, job.seed, job.image, {k: v for k, v in job.settings.items() if k != "steps"})
    with pytest.raises(FastgenError, match="made with steps 4, this run has None"):
        unfinished_jobs([fewer], overwrite=False, strict=True)


@pytest.mark.parametrize("damage", ["zeroed", "cut", "longer", "exchanged", "resaved", "gone", "folder"])
def test_a_picture_is_finished_only_if_it_is_the_one_of_its_sidecar(tmp_path: Path, damage: str) -> None:
    job, other = finished_job(tmp_path, "a.png"), finished_job(tmp_path, "b.png", "blue")
    assert is_finished(job) and is_finished(other)
    data = job.image.read_bytes()
    job.image.unlink()
    if damage == "folder":
        job.image.mkdir()
    elif damage == "resaved":
        save_png(job.image, Image.new("RGB", (64, 64), "red"), {"by": "another program"})
    elif damage != "gone":
        middle = len(data) // 2
        zeroed = data[:middle] + bytes(20) + data[middle + 20 :]
        hurt = {"zeroed": zeroed, "cut": data[:-1], "longer": data + b"\0", "exchanged": other.image.read_bytes()}
        job.image.write_bytes(hurt[damage])
    assert not is_finished(job) and is_finished(other)
    assert unfinished_jobs([job, other], overwrite=False, strict=True) == [job]
