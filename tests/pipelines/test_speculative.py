"""SpeculativeImagePipeline: a loaded Janus, a drafter, and a diffusers-like call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_models import JANUS_TOKENS, PROMPTS, with_eagle

from fastgen.drafters.calibration import Calibration, Level
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.loading import build_rule, load_drafter
from fastgen.drafters.names import RULES
from fastgen.drafters.pace import Pace
from fastgen.drafters.sources import JacobiSource
from fastgen.drafters.targets import target_of
from fastgen.drafters.tree import DynamicShape, named_tree
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.speculative import SpeculativeImagePipeline


@pytest.fixture(scope="module")
def plain(micro_janus: Path) -> JanusImagePipeline:
    return JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(plain: JanusImagePipeline) -> SpeculativeImagePipeline:
    return with_eagle(plain)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_greedy_pictures_equal_the_plain_pipelines(plain: JanusImagePipeline, pipe: SpeculativeImagePipeline) -> None:
    ours = pipe(PROMPTS[:3], guidance_scale=3.0, temperature=0.0, output_type="np")
    stock = plain(PROMPTS[:3], guidance_scale=3.0, temperature=0.0, output_type="np")
    assert torch.equal(ours.tokens, stock.tokens)
    assert np.array_equal(ours.images, stock.images)


@pytest.mark.parametrize("acceptance", RULES)
def test_every_rule_draws(pipe: SpeculativeImagePipeline, acceptance: str) -> None:
    seen: list[int] = []
    output = pipe(
        PROMPTS[:2],
        num_images_per_prompt=2,
        guidance_scale=3.0,
        acceptance=acceptance,
        tree="chain-3" if acceptance == "block" else "3-2",
        generator=seeded(0, 1, 2, 3),
        callback_on_step_end=lambda _, index, step, tensors: seen.append(index),
    )
    assert len(output.images) == 4 and output.tokens.shape == (4, JANUS_TOKENS)
    assert output.stats.acceptance.rule == acceptance
    assert output.stats.passes["target"] <= 4 * JANUS_TOKENS
    assert seen == sorted(seen) and seen[-1] == JANUS_TOKENS - 1
    assert set(output.stats.seconds) == {"text", "tokens", "decode"}


@pytest.mark.parametrize(
    "tree", ["chain-3", named_tree("2-2"), DynamicShape(6, 2, 3)], ids=["name", "tree", "dynamic"]
)
def test_a_picture_does_not_depend_on_the_batch(pipe: SpeculativeImagePipeline, tree: Any) -> None:
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "tree": tree, "output_type": "tokens"}
    together = pipe(PROMPTS[:3], generator=seeded(3, 4, 5), **arguments).tokens
    alone = pipe(PROMPTS[1], generator=seeded(4), **arguments).tokens
    batched = pipe(PROMPTS[:3], generator=seeded(3, 4, 5), batch_invariant=False, **arguments).tokens
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together, batched)  # this micro model leaves no close decision


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a ring<begin_of_image>"}, "special token"),
        ({"tree": "tall"}, "tree"),
        (
            {"tree": f"jacobi-{JANUS_TOKENS + 1}"},
            f"a window of {JANUS_TOKENS + 1} places, a picture has {JANUS_TOKENS}",
        ),
        ({"tree": "chain-3", "temperature": 0.0, "sampled": True}, "temperature 0"),
        ({"tree": DynamicShape(2, 2, 2), "sampled": True}, "dynamic"),
        ({"acceptance": "loose"}, "acceptance"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"negative_prompt": "x"}, "negative_prompt"),
        ({"output_type": "jpg"}, "output_type"),
        ({"generator": seeded(1, 2)}, "generator"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    ],
)
def test_bad_arguments(pipe: SpeculativeImagePipeline, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        pipe(**{"prompt": "a ring", **arguments})


def test_without_a_drafter_it_drafts_from_its_own_predictions(plain: JanusImagePipeline) -> None:
    pipe = SpeculativeImagePipeline(plain.model, plain.tokenizer)
    ours = pipe(PROMPTS[:2], guidance_scale=3.0, temperature=0.0, output_type="tokens")
    assert torch.equal(ours.tokens, plain(PROMPTS[:2], guidance_scale=3.0, temperature=0.0).tokens)
    assert ours.stats.passes["target"] < 2 * JANUS_TOKENS and "drafter" not in ours.stats.passes
    for tree in ("chain-3", DynamicShape(2, 2, 2), named_tree("2")):
        with pytest.raises(ValueError, match="needs a drafter"):
            pipe("a ring", tree=tree)
    for tree in ("jacobi-0", "jacobi-x"):
        with pytest.raises(ValueError, match="jacobi-12"):
            pipe("a ring", tree=tree)
    for acceptance in RULES:
        assert pipe("a ring", acceptance=acceptance, tree="jacobi-4", output_type="tokens").tokens.shape[1] == 16


def drafted(output: Any) -> str:
    """The source that the statistics name."""
    (name,) = output.stats.paths["tree"]
    return str(name)


def test_without_a_tree_the_fastest_by_the_calibration_draws(pipe: SpeculativeImagePipeline) -> None:
    """Also the plain loop; what was not measured, or whose parts are missing, is not taken. For every rule, and by
    the pictures that are drawn at once."""
    times = {"jacobi-4": 0.7, "jacobi-6": 0.9, "3-2": 0.8, "heads-4": 0.1}
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "output_type": "tokens"}
    for change, wanted in (
        ({}, "jacobi-4"),
        ({"jacobi-4": 1.4}, "3-2"),
        ({"jacobi-4": 1.4, "3-2": 1.5}, "jacobi-6"),
        ({"jacobi-4": 1.4, "3-2": 1.1, "jacobi-6": 1.2}, "plain"),
    ):
        for rule in ("exact", "gsd", "cascade"):
            made = {"1": {rule: {**times, **change}}, "3": {rule: {**times, "jacobi-6": 0.2}}}
            pace = Pace({}, {"cpu eager": made})
            made_of = Calibration((Level(0.5, 0.1, 0.9, 2.0, 0.0, (9, 0, 0)),), pace=pace)
            tuned = SpeculativeImagePipeline(pipe.model, pipe.tokenizer, pipe.drafter, made_of)
            output = tuned("a ring", generator=seeded(1), acceptance=rule, **arguments)
            reason = output.stats.paths["tree"][wanted]
            assert drafted(output) == wanted and "measured on cpu eager in batches of 1" in reason
    assert drafted(tuned(PROMPTS[:2], acceptance="cascade", **arguments)) == "jacobi-6"
    assert drafted(tuned(PROMPTS[:2], acceptance="cascade", batch_invariant=True, **arguments)) == "plain"
    assert drafted(tuned(PROMPTS[:4], acceptance="cascade", **arguments)) == "plain", "this batch was not measured"


@pytest.mark.parametrize("acceptance", RULES)
def test_nothing_is_drafted_where_no_speed_was_measured(
    plain: JanusImagePipeline, pipe: SpeculativeImagePipeline, acceptance: str
) -> None:
    """Whatever the rule, without a calibration or with one that says nothing of the rule."""
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "output_type": "tokens"}
    other = Pace({"exact": {"jacobi-4": 9.0}} if acceptance != "exact" else {}, {})
    for calibration in (None, Calibration(()), Calibration((Level(0.5, 0.1, 0.9, 2.0, 0.0, (9, 0, 0)),), pace=other)):
        made = SpeculativeImagePipeline(pipe.model, pipe.tokenizer, pipe.drafter, calibration)
        output = made("a ring", acceptance=acceptance, generator=seeded(1), **arguments)
        assert 'tree="auto" measures it' in output.stats.paths["tree"]["plain"]
        assert torch.equal(output.tokens, plain("a ring", generator=seeded(1), **arguments).tokens)
    assert drafted(pipe("a ring", sampled=False, **arguments)) == "4-4-2-2-1-1"


def test_the_plain_loop_is_a_choice(plain: JanusImagePipeline, pipe: SpeculativeImagePipeline) -> None:
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "batch_invariant": True, "output_type": "tokens"}
    ours = pipe(PROMPTS[:2], tree="plain", generator=seeded(1, 2), **arguments)
    assert torch.equal(ours.tokens, plain(PROMPTS[:2], generator=seeded(1, 2), **arguments).tokens)
    assert ours.stats.passes == {"target": 2 * JANUS_TOKENS} and drafted(ours) == "plain"
    with pytest.raises(ValueError, match="'plain' drafts nothing"):
        pipe("a ring", tree="plain", acceptance="gsd")


def test_auto_is_measured_once(
    plain: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """By a pipeline, and by all later ones of the same parts and versions."""
    from fastgen.drafters import choices
    from fastgen.pipelines import speculative

    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))

    calls: list[str] = []
    real = speculative.choose_source

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments[2].name)
        return real(*arguments, repeats=1, **settings)

    monkeypatch.setattr(speculative, "choose_source", counted)
    pipe = SpeculativeImagePipeline(plain.model, plain.tokenizer)
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "tree": "auto", "output_type": "tokens"}
    first = pipe("a ring", generator=seeded(1), **arguments)
    window = next(iter(first.stats.paths["tree"]))
    assert first.stats.seconds["auto"] > 0
    again = pipe(["a ring", "red"], generator=seeded(1, 2), batch_invariant=True, **arguments)
    assert calls == ["exact"] and torch.equal(again.tokens[:1], first.tokens)
    fixed = pipe("a ring", generator=seeded(1), **{**arguments, "tree": window})
    assert torch.equal(fixed.tokens, first.tokens)
    pipe("a ring", acceptance="gsd", **arguments)
    assert calls == ["exact", "gsd"]
    later = SpeculativeImagePipeline(plain.model, plain.tokenizer)
    assert drafted(later("a ring", generator=seeded(1), **arguments)) == window and calls == ["exact", "gsd"]
    monkeypatch.setattr(choices, "versions", lambda: {"torch": "another"})
    SpeculativeImagePipeline(plain.model, plain.tokenizer)("a ring", **arguments)
    assert calls == ["exact", "gsd", "exact"] and not recwarn.list


def test_auto_measures_each_size_of_a_batch(
    plain: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch is measured as it is drawn, and keeps a source of its own, in the pipeline and in the cache."""
    from fastgen.pipelines import speculative

    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    sizes: list[int] = []

    def by_size(*arguments: Any, **settings: Any) -> Any:
        sizes.append(arguments[3].images)
        name = f"jacobi-{2 + arguments[3].images}"
        return JacobiSource.of_name(name, arguments[2]), name

    monkeypatch.setattr(speculative, "choose_source", by_size)
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "tree": "auto", "output_type": "tokens"}
    for _ in range(2):
        pipe = SpeculativeImagePipeline(plain.model, plain.tokenizer)
        for _ in range(2):
            assert drafted(pipe("a ring", **arguments)) == "jacobi-3"
            assert drafted(pipe(PROMPTS[:3], **arguments)) == "jacobi-5"
    assert sizes == [1, 3]


def test_quality_is_a_knob_of_cascade(pipe: SpeculativeImagePipeline) -> None:
    """Quality 0 draws what the exact rule draws; 1 takes the loosest level."""
    levels = (Level(0.5, 0.1, 0.9, 0.9, 0.0, (9, 9, 9)), Level(1.0, 0.3, -1.0, -1.0, 0.0, (9, 9, 9)))
    tuned = SpeculativeImagePipeline(pipe.model, pipe.tokenizer, pipe.drafter, calibration=Calibration(levels))
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "tree": "4-4", "output_type": "tokens"}
    off = tuned("a ring", acceptance="cascade", quality=0.0, generator=seeded(1), **arguments)
    assert off.stats.acceptance.counts["stolen"] == 0
    loose = tuned("a ring", acceptance="cascade", quality=1.0, generator=seeded(1), **arguments)
    assert loose.stats.acceptance.counts.keys() == {"stolen"} and loose.stats.acceptance.counts["stolen"] > 0
    for arguments_, word in (
        ({"acceptance": "exact", "quality": 0.5}, "knob"),
        ({"acceptance": "cascade", "quality": 2.0}, "quality"),
    ):
        with pytest.raises(ValueError, match=word):
            tuned("a ring", **arguments_)
    with pytest.raises(ValueError, match="cascade-calibrate"):
        pipe("a ring", acceptance="cascade", quality=0.5)


def test_bad_parts(plain: JanusImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no drafter"):
        SpeculativeImagePipeline(plain.model, plain.tokenizer, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="vocab_size"):
        SpeculativeImagePipeline(plain.model, plain.tokenizer, EagleDrafter(32, 47, 2, heads=2))
    other = Calibration((), {"target": {"vocab_size": 7}})
    with pytest.raises(ValueError, match="calibration: made for a model of vocab_size 7"):
        SpeculativeImagePipeline(plain.model, plain.tokenizer, calibration=other)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no known drafter"):
        load_drafter(tmp_path)
    target = target_of(plain.model, plain.tokenizer)
    for rule in RULES:
        with pytest.raises(ValueError, match="has no setting sharpness"):
            build_rule(rule, target, sharpness=1)


def test_a_loaded_drafter_draws_the_same(pipe: SpeculativeImagePipeline, tmp_path: Path) -> None:
    pipe.drafter.save_pretrained(tmp_path)
    again = SpeculativeImagePipeline(pipe.model, pipe.tokenizer, load_drafter(tmp_path))
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "tree": "3-2", "output_type": "tokens"}
    first, second = (p("a ring", generator=seeded(2), **arguments).tokens for p in (pipe, again))
    assert torch.equal(first, second)


def test_compile_is_a_switch(plain: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.drafters import decode

    steps: list[str] = []

    def capture(step: Any) -> Any:
        steps.append(step.__qualname__)
        return torch.compile(step, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(decode, "compiled", capture)
    pipe = SpeculativeImagePipeline(plain.model, plain.tokenizer)
    results = []
    for enabled in (False, True, False):
        pipe.compile(enabled)
        results.append(pipe("a ring", tree="jacobi-3", generator=seeded(4), output_type="tokens").tokens)
        assert len(steps) == (0, 1, 1)[len(results) - 1]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
