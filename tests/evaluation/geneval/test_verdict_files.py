"""Result files: ours for the official summary, and the official scorer's for ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from geneval_oracle import official_summary

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.prompts import official_prompts
from fastgen.evaluation.geneval.rules import ImageResult
from fastgen.evaluation.geneval.verdict_files import read_results, summarize_file
from fastgen.evaluation.samples import Sample, results_jsonl


def verdicts(images: int = 4, seed: int = 0) -> tuple[list[Sample], list[ImageResult]]:
    """Random verdicts on the official prompts, harder tasks failing more often."""
    rng = np.random.default_rng(seed)
    samples, results = [], []
    for number, prompt in enumerate(official_prompts()):
        chance = rng.beta(2, 1 + len(prompt.include))
        for image in range(images):
            samples.append(Sample(Path(f"run/{number:05d}/samples/{image:04d}.png"), number, prompt))
            correct = bool(rng.random() < chance)
            reasons = () if correct else ("expected cat>=1, found 0", "expected dog<2, found 3")
            results.append(ImageResult(prompt.tag, number, correct, reasons, {"cat": [[1.0, 2, 3, 4, 0.5]]}))
    return samples, results


def official_record(sample: Sample, result: ImageResult) -> dict:
    """A line of the official scorer: slashes escaped as pandas does, no detector."""
    return {
        "filename": str(sample.path),
        "tag": result.tag,
        "prompt": sample.metadata.prompt,
        "correct": result.correct,
        "reason": result.reason,
        "metadata": json.dumps(sample.metadata.as_dict()),
        "details": json.dumps({"cat": [[1.0, 2, 3, 4, 0.5]]}),
    }


def test_our_file_in_the_official_summary(tmp_path: Path) -> None:
    samples, results = verdicts()
    (tmp_path / "results.jsonl").write_bytes(results_jsonl("run", samples, results, "hf"))
    wanted = official_summary(tmp_path / "results.jsonl")
    found = summarize_file(tmp_path / "results.jsonl")
    assert (found["benchmark"], found["detector_name"]) == ("GenEval (HF-M2F)", "hf")
    assert (found["n_images"], found["n_prompts"]) == (2212, 553)
    for tag, task in found["tasks"].items():
        assert task["score"] == pytest.approx(wanted[tag], abs=1e-12)
    for name in ("overall", "correct_images", "correct_prompts"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-12)
    assert found["overall"] != pytest.approx(found["correct_images"], abs=1e-3)  # weighted otherwise
    assert list(found["tasks"]) == list(wanted)[:6]
    assert sum(row["correct"] for row in found["prompts"]) == sum(result.correct for result in results)
    assert {row["images"] for row in found["prompts"]} == {4} and len(found["prompts"]) == 553
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert line["filename"] == "00000/samples/0000.png" and line["detector"] == "hf"
    assert json.loads(line["metadata"]) == samples[0].metadata.as_dict()
    assert json.loads(line["details"]) == {"cat": [[1.0, 2, 3, 4, 0.5]]}


def test_an_official_file_in_ours(tmp_path: Path) -> None:
    samples, results = verdicts(seed=1)
    lines = [json.dumps(official_record(s, r)).replace("/", r"\/") for s, r in zip(samples, results, strict=True)]
    (tmp_path / "official.jsonl").write_text("\n".join(lines) + "\n")
    found = summarize_file(tmp_path / "official.jsonl")
    wanted = official_summary(tmp_path / "official.jsonl")
    assert found["overall"] == pytest.approx(wanted["overall"], abs=1e-12)
    assert found["correct_prompts"] == pytest.approx(wanted["correct_prompts"], abs=1e-12)
    assert (found["benchmark"], found["detector_name"]) == ("GenEval (detector unknown)", "unknown")
    read = read_results(tmp_path / "official.jsonl")
    assert read.names[5] == str(samples[5].path)
    assert [r.correct for r in read.results] == [r.correct for r in results]
    assert [r.reasons for r in read.results] == [r.reasons for r in results]
    assert 0.002 < found["overall_stderr"] < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 1}, ":2: correct: needs true or false"),
        ({"tag": "counting"}, ":2: tag 'counting' is another"),
        ({"metadata": "{}"}, ":2: .*missing tag"),
        ({"metadata": "nonsense"}, ":2: "),
        ({"detector": "shapes"}, "mixes verdicts of the detectors shapes, unknown"),
        (None, ":2: needs a JSON object"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, change: dict | None, message: str) -> None:
    samples, results = verdicts(1)
    records = [official_record(s, r) for s, r in zip(samples[:3], results, strict=False)]
    lines = [json.dumps(record) for record in records]
    lines[1] = json.dumps([1]) if change is None else json.dumps(records[1] | change)
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(FastgenError, match=message) as error:
        summarize_file(tmp_path / "r.jsonl")
    assert str(error.value).startswith(str(tmp_path / "r.jsonl"))


@pytest.mark.parametrize("again", ["{}", "./{}", "x/../{}"])
def test_an_image_is_judged_once(tmp_path: Path, again: str) -> None:
    samples, results = verdicts(1)
    records = [official_record(s, r) for s, r in zip(samples[:3], results, strict=False)]
    for number, record in enumerate(records):
        record["filename"] = f"00000/samples/{number:04d}.png"
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert summarize_file(tmp_path / "r.jsonl")["n_images"] == 3
    records[2]["filename"] = again.format(records[0]["filename"])
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(FastgenError, match=r"r.jsonl:3: filename: .* was judged in line 1 already"):
        summarize_file(tmp_path / "r.jsonl")


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match="no such file"):
        summarize_file(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(FastgenError, match="has no verdicts"):
        summarize_file(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl").write_text(json.dumps(official_record(*[part[0] for part in verdicts(1)]))[:-9])
    with pytest.raises(FastgenError, match="cut.jsonl:1: "):
        summarize_file(tmp_path / "cut.jsonl")
