"""Quality against cost of dynamic chunking, and the peers it is compared with."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, ZImagePipeline
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import loaded

from fastgen.accounting import account
from fastgen.cli.main import run
from fastgen.evaluation.benchmarks.dc_quality import _pictures
from fastgen.evaluation.benchmarks.dc_variants import Choice, Variant, variants_of
from fastgen.evaluation.benchmarks.peers import mag_ratios, step_cache, taylor_seer
from fastgen.evaluation.benchmarks.quality import paired_difference
from fastgen.evaluation.benchmarks.router_statistics import SIGMAS
from fastgen.evaluation.dc_results import pareto_front
from fastgen.pipelines.flow_solver import unipc_of_flow
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.loading.checkpoint import find_checkpoint


@pytest.fixture
def z(micro_z: Path) -> ZImagePipeline:
    return loaded(ZImagePipeline, micro_z)


def draw(pipe: Any, steps: int = 3) -> np.ndarray:
    images: np.ndarray = pipe(
        ["a red circle", "two blue squares"],
        height=32,
        width=16,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return images


CACHES: dict[str, tuple[Any, Any, int]] = {
    # One that skips, one that skips nothing, and how often the last block runs in 8 steps of the former.
    "first-block": (FirstBlockCacheConfig(threshold=1e9), FirstBlockCacheConfig(threshold=-1.0), 1),
    "mag": (
        MagCacheConfig(threshold=1e9, mag_ratios=[1.0] * 8, num_inference_steps=8),
        MagCacheConfig(threshold=-1.0, mag_ratios=[1.0] * 8, num_inference_steps=8),
        3,  # the first two always, then one of four
    ),
    "taylorseer": (taylor_seer(3), taylor_seer(1), 5),  # the first three, and one of three
}


@pytest.mark.parametrize("name", CACHES)
def test_step_caches_skip_steps_and_leave_no_trace(name: str, z: ZImagePipeline) -> None:
    skips, nothing, runs = CACHES[name]
    plain, calls = draw(z, 8), []
    hook = z.transformer.layers[-1].feed_forward.w1.register_forward_hook(lambda *a: calls.append(1))
    with step_cache(z, skips) as pipe:
        cached = draw(pipe, 8)
        assert len(calls) == runs
        # The second picture begins as the first did.
        assert np.array_equal(draw(pipe, 8), cached)
    assert np.isfinite(cached).all()
    with step_cache(z, nothing) as pipe:
        assert np.array_equal(draw(pipe, 8), plain)
    hook.remove()
    assert np.array_equal(draw(z, 8), plain)


def test_mag_ratios_are_how_much_the_blocks_update_grows(z: ZImagePipeline) -> None:
    ratios = mag_ratios(z, ["a red circle"], 4, height=32, width=16)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    hooks = [
        z.transformer.layers[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0])),
        z.transformer.layers[-1].register_forward_hook(lambda module, given, output: outputs.append(output)),
    ]
    z(["a red circle"], height=32, width=16, num_inference_steps=4, output_type="latent",
      generator=[torch.Generator().manual_seed(0)])  # fmt: skip
    for hook in hooks:
        hook.remove()
    norms = [(after - before).norm(dim=-1) for before, after in zip(inputs, outputs, strict=True)]
    expected = [1.0] + [float((b / a).mean()) for a, b in itertools.pairwise(norms)]
    assert ratios == pytest.approx(expected, rel=1e-4) and len(set(ratios)) == 4


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_pareto_optimal(points: list[tuple[int, int]]) -> None:
    rows = [{"seconds": {"p50": float(second)}, "score": score / 6} for second, score in points]
    front = {(row["seconds"]["p50"], row["score"]) for row in pareto_front(rows)}
    places = {(row["seconds"]["p50"], row["score"]) for row in rows}
    unbeaten = {a for a in places if not any(b != a and b[0] <= a[0] and b[1] >= a[1] for b in places)}
    assert front == unbeaten


def test_scores_are_compared_by_prompts_as_pairs() -> None:
    """Two tasks, by hand: prompts that both models draw alike add nothing to the interval."""

    def result(hits: dict[str, list[int]]) -> dict[str, Any]:
        prompts = [
            {"tag": tag, "prompt": f"{tag} {i}", "images": 2, "correct": correct}
            for tag, of in hits.items()
            for i, correct in enumerate(of)
        ]
        scores = [sum(of) / (2 * len(of)) for of in hits.values()]
        return {"score": sum(scores) / 2, "tasks": dict(zip(hits, scores, strict=True)), "prompts": prompts}

    base = result({"counting": [0, 1, 2, 2], "colors": [2, 2, 1]})
    row = result({"counting": [0, 1, 2, 0], "colors": [2, 2, 1]})
    found = paired_difference(base, row)
    assert found is not None and found["difference"] == pytest.approx(-0.125)
    # One of four prompts loses both pictures: moves -3/16, 1/16, 1/16, 1/16; half of it is the mean of the two tasks'.
    error = (4 / 3 * (9 + 3) / 256) ** 0.5 / 2
    assert found["ci"] == pytest.approx([-0.125 - 1.96 * error, -0.125 + 1.96 * error])
    assert paired_difference(base, base) == {"difference": 0.0, "ci": [0.0, 0.0]}
    assert paired_difference(result({"a": [1], "b": [2]}), result({"a": [1], "b": [2]})) is None


def test_a_chunked_model_with_a_solver_of_its_own_lends_it_to_the_dense_one(
    micro_z: Path, micro_dc: Path, tmp_path: Path
) -> None:
    chunked = Path(shutil.copytree(micro_dc, tmp_path / "dc"))
    unipc_of_flow(load_pipeline(str(micro_dc)).scheduler, 2.0).save_pretrained(chunked / "scheduler")  # type: ignore[attr-defined]
    index = json.loads((chunked / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (chunked / "model_index.json").write_text(json.dumps(index))
    choice = Choice((0.0,), (1, 3), (), (), (), ())
    rows = {
        row.name: row
        for row in variants_of([find_checkpoint(chunked), find_checkpoint(micro_z)], choice, False, "cpu")
    }
    assert [name for name in rows if "UniPC" in name] == ["dense UniPC 1 steps", "dense UniPC 2 steps"]
    dense, lent = rows["dense"].pipe, rows["dense UniPC 2 steps"]
    own = draw(dense)
    with lent.adapt(lent.pipe) as pipe:
        assert not np.array_equal(draw(pipe), own)
    assert np.array_equal(draw(dense), own)
    same = variants_of([find_checkpoint(micro_dc), find_checkpoint(micro_z)], choice, False, "cpu")
    assert not any("UniPC" in row.name for row in same)


def test_a_schedule_that_a_model_brings_is_a_row_of_its_own(micro_z: Path, micro_dc: Path, tmp_path: Path) -> None:
    chunked = Path(shutil.copytree(micro_dc, tmp_path / "dc"))
    choice = Choice((0.0,), (3,), (), (), (), ())

    def rows_with(settings: dict[str, Any]) -> dict[str, Variant]:
        (chunked / "fastgen.json").write_text(json.dumps({**defaults, **settings}))
        found = [find_checkpoint(chunked), find_checkpoint(micro_z)]
        return {row.name: row for row in variants_of(found, choice, False, "cpu")}

    defaults = json.loads((chunked / "fastgen.json").read_text())
    rows = rows_with({"uncond_tail_drop": [0.9, 0.0]})
    kept = []
    for name in ("dc 0 2 steps", "dc own schedule 2 steps"):
        with account() as stats:
            list(_pictures(rows[name], 1, ["a red circle"], [0]))
        kept.append(stats.kept_tokens)
    assert len(kept[0]) == len(kept[1]) == 2 and kept[1][0] < kept[0][0]
    assert not any("own schedule" in name for name in rows_with({"tail_drop": 0.0, "uncond_tail_drop": 0.0}))
    assert not any("own schedule" in name for name in rows_with({}))
    late = rows_with({"steps": 5})["dc late lite-cfg 0.98 5 steps"]
    assert late.settings["tail_drop"] == [0.0, 0.0, 0.7, 0.95, 0.99] and late.settings["uncond_tail_drop"] == 0.98


def test_the_chunked_model_takes_a_step_cache_for_its_row_only(micro_z: Path, micro_dc: Path) -> None:
    choice = Choice((0.0,), (3,), (), (1e9,), (), ())
    found = [find_checkpoint(micro_dc), find_checkpoint(micro_z)]
    rows = {row.name: row for row in variants_of(found, choice, True, "cpu")}
    cached, pipe = rows["dc 0 2 steps first-block-cache 1e+09"], rows["dc 0 3 steps"].pipe
    calls: list[int] = []
    pipe.transformer.layers[-1].feed_forward.register_forward_hook(lambda *a: calls.append(1))
    counts = []
    for row in (replace(rows["dc 0 2 steps"], settings=cached.settings), cached, rows["dc 0 2 steps"]):
        calls.clear()
        list(_pictures(row, 1, ["a red circle"], [0]))
        counts.append(len(calls))
    assert cached.settings["steps"] == 2 and counts[0] == counts[2] == 2 * counts[1]


@pytest.mark.slow
def test_rows_of_every_variant(micro_z: Path, micro_dc: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["bench", "dc", "--model", str(micro_dc), "--dense", str(micro_z), "--folder", str(tmp_path / "f")]
    arguments += ["--tail-drop", "0.5", "--limit", "1", "--images-per-prompt", "1", "--runs", "1"]
    arguments += ["--guidance-scale", "3", "--steps", "3", "--quick"]
    assert run([*arguments, "--json", "--out", str(tmp_path / "dc.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "dc.json").read_text())
    rows = {row["variant"]: row for row in printed["rows"]}
    assert list(rows) == [
        "dense", "dense 3 steps", "dense magcache 0.06",
        "dc 0 2 steps", "dc 0 lite-cfg 0.9 2 steps", "dc 0.5 2 steps",
        "dc 0 3 steps", "dc 0 lite-cfg 0.9 3 steps", "dc 0.5 3 steps", "dc late lite-cfg 0.98 2 steps",
        "dense guidance 3", "dc 0 2 steps guidance 3", "dc late lite-cfg 0.98 2 steps guidance 3",
    ]  # fmt: skip
    assert rows["dc late lite-cfg 0.98 2 steps"]["tail_drop"] == [0.95, 0.99]
    assert rows["dense 3 steps"]["steps"] == 3 and rows["dense 3 steps"]["flops"] > rows["dense"]["flops"]
    full, lite = rows["dc 0 2 steps"], rows["dc 0 lite-cfg 0.9 2 steps"]
    half = rows["dc 0.5 2 steps"]
    assert rows["dc 0 2 steps guidance 3"]["guidance_scale"] == 3 and full["guidance_scale"] is None
    for row in rows.values():
        assert 0 <= row["score"] <= 1 and row["flops"] > 0 and 0 < row["seconds"]["p20"] <= row["seconds"]["p80"]
    assert rows["dense"]["kept"] is None and full["kept"] > half["kept"] > 0
    assert full["flops"] > lite["flops"] > half["flops"]
    assert rows["dense"]["kept_by_step"] is None and len(full["kept_by_step"]) == 2
    assert [row["sigma"] for row in printed["router"]["rows"]] == sorted(SIGMAS, reverse=True)
    assert all(0 < row["boundary"] < 1 for row in printed["router"]["rows"])
    assert printed["router"]["compression"] == 4 and all(row["paired"] is None for row in rows.values())
    assert 0 < printed["flops_beside"] < min(row["flops"] for row in rows.values())
    # The pictures are there: a second run draws none, and its table and plot can be made.
    pytest.importorskip("matplotlib")
    assert run([*arguments, "--plot", str(tmp_path / "dc.png")]) == 0
    assert "dc 0 lite-cfg 0.9" in capsys.readouterr().out
    assert (tmp_path / "dc.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tail-drop", "1"], "tail_drops"),
        (["--steps", "0"], "steps: 0 is not allowed"),
        (["--runs", "0"], "runs"),
        (["--guidance-scale", "-1"], "guidance_scales"),
        (["--images-per-prompt", "0"], "images_per_prompt"),
        (["--model", "DENSE"], "no dynamic chunking"),
        (["--dense", "DC"], "no stock Z-Image"),
        (["--dense", "absent"], "absent"),
    ],
)
def test_bad_arguments(
    change: list[str], message: str, micro_z: Path, micro_dc: Path, tmp_path: Path, capsys: Any
) -> None:
    names = {"DENSE": str(micro_z), "DC": str(micro_dc)}
    values = {"--model": str(micro_dc), "--dense": str(micro_z), "--folder": str(tmp_path / "f")}
    values |= {change[0]: names.get(change[1], change[1])}
    assert run(["bench", "dc", *(word for pair in values.items() for word in pair)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_budget_is_part_of_an_evaluation_run(micro_dc: Path, tmp_path: Path, capsys: Any) -> None:
    """`fastgen eval shapes --token-budget`: the pictures change, and another budget needs another folder."""
    arguments = ["eval", "shapes", "--model", str(micro_dc), "--limit", "1", "--images-per-prompt", "1", "--json"]
    pictures = []
    for budget in ("1", "16"):
        out = tmp_path / budget
        assert run([*arguments, "--out", str(out), "--token-budget", budget]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["token_budget"] == int(budget)
        pictures.append((out / "00000" / "samples" / "0000.png").read_bytes())
    assert pictures[0] != pictures[1]
    assert run([*arguments, "--out", str(tmp_path / "1"), "--token-budget", "2"]) == 2
    assert "token_budget is 1 there and 2 now" in capsys.readouterr().err
    assert run([*arguments, "--tail-drop", "1.5"]) == 2
    assert "--tail-drop" in capsys.readouterr().err
