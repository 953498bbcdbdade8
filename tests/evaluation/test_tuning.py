"""Choosing parts by measuring: the statistics, the search, its log, and the command."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import ZImagePipeline
from generate_command import call as generate
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation import tuning
from fastgen.evaluation.shapesworld import render_prompts, shapes_prompts
from fastgen.evaluation.tune_metrics import load_metric, ssim
from fastgen.evaluation.tuning import Trial, Tuner, beats_fewer_steps, candidates, front
from fastgen.pipelines.accelerate import Plan
from fastgen.pipelines.accelerate.parts import BFloat16, ChannelsLast, FewerSteps, Guidance, Part, Solver
from fastgen.pipelines.loading import load_pipeline

PROMPTS = ["a red circle", "a blue square", "two green stars"]


def trial(ratio: float, score: float, *parts: Part, n: int = 8) -> Trial:
    return Trial(parts, (ratio,) * n, (1.0,) * n, (score,) * n, (1.0,) * n, 0, ratio)


def test_the_interval_of_a_ratio_has_its_nominal_coverage() -> None:
    """2,000 measurements of noise of 20 %; of a share of .95 the standard error is .005."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        seconds = 0.5 * np.exp(0.2 * random.standard_normal(6))
        low, high = Trial((FewerSteps(),), tuple(seconds), (1.0,) * 6, (1.0,) * 6, (1.0,) * 6, 0, 1.0).ratio[1:]
        inside += low <= 0.5 <= high
    assert abs(inside / 2000 - 0.95) < 4 * 0.005


def test_one_picture_has_no_interval() -> None:
    assert trial(0.5, 1.0, FewerSteps(), n=1).ratio[1:] == (0.0, math.inf)


@given(st.lists(st.tuples(st.floats(0.1, 2), st.floats(0, 1)), min_size=1, max_size=12))
def test_nothing_beats_the_front_in_both(points: list[tuple[float, float]]) -> None:
    trials = [trial(ratio, score) for ratio, score in points]
    best = front(trials)
    for each in trials:
        above = [other for other in best if other.ratio[0] <= each.ratio[0] and other.score >= each.score]
        assert above or each in best
    assert [t.score for t in best] == sorted({t.score for t in best})


def test_a_plan_must_be_above_the_line_of_fewer_steps() -> None:
    rivals = [trial(1.0, 1.0), trial(0.5, 0.8, FewerSteps(0.5)), trial(0.3, 0.2, FewerSteps(0.3))]
    good, bad, fast = trial(0.75, 0.95, Guidance()), trial(0.75, 0.85, Guidance()), trial(0.1, 0.1, Guidance())
    verdicts = [beats_fewer_steps(each, [*rivals, good, bad, fast]) for each in (good, bad, fast, *rivals)]
    assert verdicts == [True, False, None, None, None, None]
    assert beats_fewer_steps(trial(1.0, 1.0, ChannelsLast()), rivals) is None


def test_equal_pictures_are_as_similar_as_can_be() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    one, other = (Image.fromarray(each) for each in noise)
    same, different = ssim([one, one], ["", ""], [one, other])
    assert same == pytest.approx(1.0) and different < 0.3


def test_the_stock_pipeline_takes_its_own_time_exactly() -> None:
    noisy = Trial((), (1.0, 3.0, 2.0), (2.0, 1.0, 3.0), (1.0,) * 3, (1.0,) * 3, 0, 1.0)
    assert noisy.ratio == (1.0, 1.0, 1.0) and noisy.drop == (0.0, 0.0)


def test_shapes_verdicts_are_those_of_the_checker() -> None:
    prompts = [item.prompt for item in shapes_prompts(1)][:2]
    drawn = list(render_prompts(prompts, [0, 0]))
    metric = load_metric("shapes", prompts)
    assert metric(drawn, prompts, drawn) == [1.0, 1.0]
    assert metric(drawn[::-1], prompts, drawn) == [0.0, 0.0]
    with pytest.raises(FastgenError, match="'a green dog' is not one"):
        load_metric("shapes", [*prompts, "a green dog"])


@pytest.fixture(scope="module")
def pipe(micro_z: Path) -> Any:
    return load_pipeline(str(micro_z))


def tuner(pipe: Any, folder: Path, **given: Any) -> Tuner:
    settings: dict[str, Any] = {
        "pipe": pipe,
        "prompts": PROMPTS[:2],
        "metric": ssim,
        "call": {"steps": 8, "batch_size": 1},
        "log": folder / "log.jsonl",
        "header": {"model": "micro"},
    }
    return Tuner(**{**settings, **given})


def test_candidates_are_those_that_can_be_used_and_are_allowed(pipe: Any) -> None:
    exact, lossy = candidates(pipe, "exact"), candidates(pipe, "lossy")
    assert {part.name for part in exact} == {"channels_last", "prompt_padding"}
    assert {part.name for part in lossy} == {
        "channels_last",
        "prompt_padding",
        "fewer_steps",
        "guidance",
        "solver",
    } | (
        # Where torchao and cache-dit are installed, and on processors with bfloat16.
        {"quantize", "dbcache", "bfloat16"} & {part.name for part in lossy}
    )


def test_a_solver_is_tried_together_with_fewer_steps(pipe: Any, tmp_path: Path) -> None:
    tried = tuner(pipe, tmp_path)
    solvers = [part for part in candidates(pipe, "lossy") if isinstance(part, Solver)]
    tried.tune([FewerSteps(0.5), *solvers], max_drop=10.0)
    plans = [set(trial.parts) for trial in tried.trials]
    assert len(solvers) > 1 and all({solver, FewerSteps(0.5)} in plans for solver in solvers)


def test_parts_are_measured_in_the_order_in_which_they_can_be_turned_on(pipe: Any, tmp_path: Path) -> None:
    measured = tuner(pipe, tmp_path).measure((FewerSteps(0.5), Solver(), ChannelsLast()))
    assert [part.name for part in measured.parts] == ["channels_last", "solver", "fewer_steps"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of the denoiser instead of seconds, so that the load of the machine has no effect."""
    stock = tuning.timed_picture

    def timed(pipe: Any, *given: Any) -> tuple[Image.Image, float]:
        rows: list[int] = []
        with pipe.transformer.register_forward_hook(lambda model, args, output: rows.append(len(args[0]))):
            return stock(pipe, *given)[0], float(sum(rows))

    monkeypatch.setattr(tuning, "timed_picture", timed)


@pytest.mark.usefixtures("counted")
def test_a_solver_with_guidance_on_few_steps_is_found(pipe: Any, tmp_path: Path) -> None:
    parts = [FewerSteps(0.5), BFloat16(), Solver(), Guidance(0.5)]
    chosen = tuner(pipe, tmp_path).tune([part for part in parts if part.why_not(pipe) is None], max_drop=10.0)
    assert {FewerSteps(0.5), Guidance(0.5)} <= set(chosen.parts) and chosen.ratio[0] == pytest.approx(6 / 16)


@pytest.mark.usefixtures("counted")
def test_the_fastest_plan_that_loses_little_is_chosen(pipe: Any, tmp_path: Path) -> None:
    parts = [FewerSteps(0.9), FewerSteps(0.25), Guidance(0.5)]
    everything = tuner(pipe, tmp_path).tune(parts, max_drop=10.0)
    assert FewerSteps(0.25) in everything.parts and everything.ratio[0] < 0.8
    strict = tuner(pipe, tmp_path).tune(parts, max_drop=0.0)
    assert all(lost.drop[0] <= 0 for lost in [strict])
    assert type(pipe) is ZImagePipeline


@given(losses=st.lists(st.integers(-20, 20), min_size=2, max_size=40), bound=st.floats(0, 0.5))
def test_a_plan_whose_loss_is_not_known_well_enough_is_not_chosen(losses: list[int], bound: float) -> None:
    """The bound is on the upper end of the interval of scipy's paired t-test, not on the mean."""
    n = len(losses)
    stock, tried = (1.0,) * n, tuple(1 - loss / 20 for loss in losses)
    plan = Trial((FewerSteps(0.5),), (0.5,) * n, (1.0,) * n, tried, stock, 9, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        measured = tuner(None, Path(folder))
    measured.trials = [plan]
    lost = np.subtract(stock, tried)
    high = stats.ttest_1samp(lost, 0.0).confidence_interval().high if np.ptp(losses) else lost[0]
    assume(abs(high - bound) > 1e-6)
    default = Trial((), (1.0,) * n, (1.0,) * n, stock, stock, 0, 1.0)
    assert measured._best(bound, default) is (plan if high <= bound else default)


def test_a_run_continues_from_its_log(pipe: Any, tmp_path: Path) -> None:
    first = tuner(pipe, tmp_path)
    first.measure(())
    first.measure((FewerSteps(0.5),))
    trials: list[Trial] = []
    again = tuner(pipe, tmp_path, report=trials.append)
    assert again.trials == first.trials
    again.measure((FewerSteps(0.5),))
    assert trials == []
    again.measure((FewerSteps(0.25),))
    assert len(trials) == 1 and len(tuner(pipe, tmp_path).trials) == 3
    other = tuner(pipe, tmp_path, header={"model": "another"})
    assert other.trials == []


def test_a_line_that_a_kill_cut_short_costs_one_run_only(pipe: Any, tmp_path: Path) -> None:
    first = tuner(pipe, tmp_path)
    first.measure(())
    with first.log.open("a") as file:
        file.write('{"parts": [["fewer')
    assert tuner(pipe, tmp_path).trials == first.trials


def test_no_new_measurement_starts_when_time_is_up(pipe: Any, tmp_path: Path) -> None:
    chosen = tuner(pipe, tmp_path, deadline=time.monotonic() - 1).tune([FewerSteps(0.5)], 1.0)
    assert chosen.parts == ()


@pytest.fixture
def command(micro_z: Path, tmp_path: Path) -> list[str]:
    prompts, plan = tmp_path / "p.txt", tmp_path / "plan.json"
    prompts.write_text("\n".join(PROMPTS))
    return [*map(str, ("tune", "--model", micro_z, "--prompts-file", prompts, "-o", plan, "--prompts", 3))]


@pytest.mark.usefixtures("counted")
def test_the_command_writes_a_plan_that_generate_follows(
    command: list[str],
    micro_z: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    tried = [FewerSteps(0.5), FewerSteps(0.25), Guidance(0.5)]
    monkeypatch.setattr(tuning, "candidates", lambda pipe, loss, compile: tried)
    plan, command = tmp_path / "plan.json", [*command, "--steps", "4"]
    assert run([*command, "--max-drop", "10", "--minutes", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ZImagePipeline, loss contract lossy") and "fewer_steps" in out
    made = Plan.load(plan)
    assert made.loss == "lossy" and made.measured["ratio"][0] < 1
    assert any(row["beats_fewer_steps"] is None for row in made.measured["trials"])
    for file in (plan.with_suffix(".png"), plan.with_suffix(".sheet.png")):
        Image.open(file).load()
    assert run([*command, "--max-drop", "10", "--minutes", "0.001", "--json"]) == 0  # known from the log
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("files")["plan"] == str(plan) and printed == Plan.load(plan).as_dict()
    here = ["x", "--model", micro_z, "--steps", 8, "-o", tmp_path / "a.png"]
    other = json.loads(plan.read_text())
    other["measured"]["weights"] = "0" * 16  # another model of the same class and configuration
    (tmp_path / "other.json").write_text(json.dumps(other))
    code, _, err = generate(capsys, *here, "--plan", tmp_path / "other.json")
    assert code == 2 and "was measured with another ZImagePipeline" in err and not (tmp_path / "a.png").exists()
    code, _, err = generate(capsys, *here, "--plan", plan)
    assert code == 0, err
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["loss"] == "lossy"
    assert sidecar["settings"]["plan"] == [[part.name, part.settings] for part in made.parts]
    assert sidecar["stats"]["nfe"] < 16


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_there_is_a_plan_and_no_plot(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    assert run([*command, "--steps", "2", "--minutes", "0.001"]) == 0
    assert "there will be no plot, it needs matplotlib" in capsys.readouterr().err
    assert Plan.load(plan).pipeline == "ZImagePipeline"
    assert plan.with_suffix(".sheet.png").is_file() and not plan.with_suffix(".png").exists()


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("name", ["dc", "speculative", "search"])
def test_a_plot_that_cannot_be_drawn_is_an_error_before_anything_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", name, "--plot", str(tmp_path / "plot.png"), "--folder", str(tmp_path / "run")]) == 2
    assert "error: --plot: needs matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "small"], "--loss: 'small' is not allowed"),
        (["--minutes", "0"], "--minutes: 0.0 is not allowed"),
        (["--prompts", "1"], "--prompts: 1 is not allowed"),
        (["--max-drop", "nan"], "--max-drop"),
        (["-o", "plan.txt"], "plans are written as .json"),
        (["--metric", "beauty"], "or one of ssim, lpips, shapes"),
        (["--metric", "shapes"], "'a red circle' is not one"),
        (["--model", "tiny-janus"], "draws tokens"),
        (["--model", "nothing"], "model 'nothing' is unknown"),
        (["--prompts-file", "nothing.txt"], "prompts file nothing.txt"),
        (["--steps", "0"], "--steps: 0"),
    ],
)
def test_wrong_options_of_tune_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle")
    given = {"--prompts-file": str(prompts), "-o": str(tmp_path / "plan.json")} | dict([options])
    assert run(["tune", *(text for pair in given.items() for text in pair)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "nothing.json"], "there is no file 'nothing.json'"),
        (["--accelerate", "fast"], "--accelerate: 'fast' is not allowed"),
        (["--plan", "nothing.json", "--accelerate", "off"], "--plan: not with --accelerate off"),
        (["--plan", "nothing.json", "--method", "search"], "--plan: not with --method search"),
    ],
)
def test_wrong_plans_are_one_line(
    options: list[str], message: str, micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = generate(capsys, "x", "--model", micro_z, "-o", tmp_path / "a.png", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_plan_of_another_pipeline_is_refused_before_weights_load(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Plan("FluxPipeline", ()).save(tmp_path / "plan.json")
    command = ["x", "--model", micro_z, "-o", tmp_path / "a.png", "--plan", tmp_path / "plan.json"]
    code, _, err = generate(capsys, *command)
    assert code == 2 and "is of a FluxPipeline, and the model is a ZImagePipeline" in err


def test_exact_parts_are_recorded(micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["x", "--model", micro_z, "--steps", 2, "-o", tmp_path / "a.png"]
    assert generate(capsys, *command, "--accelerate", "exact")[0] == 0
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["settings"]["accelerate"] == "exact" and sidecar["loss"] == "exact"
    parts = sidecar["stats"]["accelerate"]
    assert parts["channels_last"] == "on" and parts["kernels"] == "Triton kernels need a GPU"
