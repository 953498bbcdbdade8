"""Training of drafters: the unrolled pass is the one that decoding makes, and the terms are what they say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_models import JANUS_TOKENS, PROMPTS, save_micro_janus
from short_recipes import build_recipe

from fastgen.cli.main import run
from fastgen.data.shapes import ShapesWorld
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.draft import StaticPlan
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import load_drafter
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import chain
from fastgen.errors import FastgenError
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.speculative import SpeculativeImagePipeline
from fastgen.training.cascade_calibration import calibrate_cascade
from fastgen.training.drafter import DrafterModule
from fastgen.training.eagle_unroll import unroll
from fastgen.training.redundancy_terms import (
    Siblings,
    class_cross_entropy,
    convergence_along,
    probe_siblings,
    soft_targets,
)
from fastgen.training.samples import Samples


@pytest.fixture(scope="module")
def target(micro_janus: Path) -> Target:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    return target_of(pipe.model.requires_grad_(False), pipe.tokenizer)


@pytest.mark.parametrize("variant", [1, 3])
@torch.no_grad()
def test_the_unrolled_pass_is_what_decoding_does(target: Target, variant: Any) -> None:
    """States of a chain of four nodes after each of several roots, in a padded batch."""
    torch.manual_seed(0)
    drafter = EagleDrafter.for_target(target, variant=variant, heads=2)
    prefix = target.prefix(PROMPTS[:3], True)
    tokens = torch.randint(target.vocab_size, (3, target.num_tokens))
    output, embeds = target.read(prefix, tokens, target.new_cache(prefix, 1), drafter.taps)
    features, length = drafter.features(output), prefix.mask.shape[1]
    mask = torch.nn.functional.pad(prefix.mask, (0, target.num_tokens - 1), value=True)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    states = unroll(drafter, features[:, :-1], embeds[:, 1:], positions, mask, 5)

    plan = StaticPlan.of(chain(5))
    state = drafter.start(target, prefix, features[:, :length], tokens[:, 0], 8)
    for root in range(0, 6, 2):
        if root:
            both = slice(length + root - 2, length + root)
            drafter.absorb(state, tokens[:, root - 1 : root + 1], features[:, both], torch.full((3,), 2))
        hidden = state.root
        assert torch.allclose(hidden[:, 0], states[0][:, length - 1 + root], atol=1e-5)
        for depth, level in enumerate(plan.levels[1:], start=1):
            places = torch.full((1, 1), depth)
            drawn = tokens[:, root + depth][:, None]
            hidden = drafter.grow(state, drawn, hidden, places, level.mask, level.first)
            assert torch.allclose(hidden[:, 0], states[depth][:, length - 1 + root + depth], atol=1e-5), (root, depth)


@torch.no_grad()
def test_a_medusa_step_is_what_decoding_does(target: Target) -> None:
    torch.manual_seed(0)
    drafter = MedusaDrafter.for_target(target, depth=3)
    for layer in drafter.up:
        torch.nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    prefix = target.prefix(PROMPTS[:3], True)
    tokens = torch.randint(target.vocab_size, (3, target.num_tokens))
    output, embeds = target.read(prefix, tokens, target.new_cache(prefix, 1))
    length = prefix.mask.shape[1]
    states = DrafterModule(drafter, 3)(output.hidden[:, :-1], embeds[:, 1:], torch.empty(0), torch.empty(0))
    state = drafter.start(target, prefix, output.hidden[:, :length], tokens[:, 0], 8)
    for root in (0, 2):
        if root:
            both = slice(length + root - 2, length + root)
            drafter.absorb(state, tokens[:, root - 1 : root + 1], output.hidden[:, both], torch.full((3,), 2))
        for depth in range(3):
            ours = drafter.logits(state, state.root, depth)[:, 0]
            assert torch.allclose(ours, target.head(states[depth][:, length - 1 + root + depth]), atol=1e-4)


@torch.no_grad()
def test_probed_siblings_are_what_the_target_says_after_them(target: Target) -> None:
    law = TokenLaw(3.0)
    prefix = target.prefix(PROMPTS[:2], True)
    tokens = torch.randint(target.vocab_size, (2, target.num_tokens), generator=torch.Generator().manual_seed(1))
    cache = target.new_cache(prefix, 8)
    output, _ = target.read(prefix, tokens, cache)
    index = torch.arange(target.num_tokens).expand(2, -1)
    hidden = output.hidden[:, prefix.mask.shape[1] - 1 : -1]
    laws = target.token_law(target.head(hidden), prefix, law, index)
    places = torch.tensor([[3, 9], [0, 15]])
    siblings = probe_siblings(target, prefix, law, laws, cache, places, count=4)
    assert torch.equal(siblings.tokens, laws[torch.arange(2)[:, None], places].topk(4).indices)
    for row in range(2):
        for probe in range(2):
            place = int(places[row, probe])
            states = []
            for token in siblings.tokens[row, probe]:
                line = torch.cat([tokens[:, :place], token.expand(2, 1)], dim=1)
                read, _ = target.read(prefix, line, target.new_cache(prefix, 1))
                states.append(target.guided(target.redundancy(read.hidden[:, -1:]), prefix, law)[row, 0])
            whole = torch.stack(states)
            centred = torch.nn.functional.normalize(whole - whole.mean(dim=0), dim=-1)
            assert torch.allclose(siblings.alike[row, probe], centred @ centred.mT, atol=2e-3)


def siblings_of(alike: torch.Tensor, tokens: list[int], redundancy: float = 1.0) -> Siblings:
    return Siblings(
        torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[tokens]]), alike[None, None], torch.tensor([[redundancy]])
    )


def test_class_cross_entropy_does_not_ask_which_member() -> None:
    """Tokens 1 and 2 are one class, 4 stands alone."""
    alike = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])
    siblings = siblings_of(alike, [1, 2, 4])
    p = torch.tensor([[[0.1, 0.3, 0.2, 0.1, 0.3]]])
    one = torch.tensor([[[0.1, 0.4, 0.1, 0.1, 0.3]]])
    other = torch.tensor([[[0.1, 0.1, 0.4, 0.1, 0.3]]])
    values = [float(class_cross_entropy(siblings, p, q.log())) for q in (one, other)]
    assert values[0] == pytest.approx(values[1]) == pytest.approx(-0.5 * float(torch.tensor(0.5).log()))
    assert float(class_cross_entropy(siblings_of(torch.eye(3), [1, 2, 4]), p, one.log())) == 0


@given(seed=st.integers(0, 10_000), strength=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_soft_targets_move_mass_among_siblings_only(seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(1, 1, 9, generator=generator).softmax(-1)
    states = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator), dim=-1)
    siblings = siblings_of(states @ states.mT, [1, 3, 4, 8], 0.7)
    soft = soft_targets(siblings, p, strength)
    assert float(soft.sum()) == pytest.approx(1.0, abs=1e-5) and (soft >= 0).all()
    others = [0, 2, 5, 6, 7]
    assert torch.equal(soft[..., others], p[..., others])
    if strength == 0:
        assert torch.allclose(soft, p)


def test_convergence_is_high_in_flat_regions() -> None:
    flat = torch.tensor([1.0, 0.0, 0.0]).expand(5, 3)
    busy = torch.eye(3)[[0, 1, 2, 0, 1]] * 3
    along = convergence_along(torch.cat([flat, busy])[None])[0]
    assert float(along[0]) == 0 and float(along[1:5].min()) > 0.99 and float(along[6:].max()) < 0.7


def test_a_calibration_knows_the_weights_that_it_was_made_for(micro_janus: Path, tmp_path: Path) -> None:
    """In every dtype; a model or drafter of the same sizes is refused in one line, but not weights on no device."""
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    first, second = (EagleDrafter.for_target(target_of(pipe.model, pipe.tokenizer), heads=2) for _ in range(2))
    first.save_pretrained(tmp_path / "drafter")
    calibrate_cascade(str(micro_janus), tmp_path / "drafter", tmp_path / "out", pictures=2)
    made = Calibration.load(tmp_path / "out")
    assert all(len(made.about["weights"][part]) >= 4 for part in ("model", "drafter"))

    def draws_with(model: Any, drafter: Any) -> Any:
        return SpeculativeImagePipeline(model, pipe.tokenizer, drafter, made)

    other = JanusImagePipeline.from_pretrained(save_micro_janus(tmp_path / "other", seed=1), torch_dtype=torch.float32)
    for model, drafter, part in ((other.model, first, "model"), (pipe.model, second, "drafter")):
        with pytest.raises(FastgenError, match=f"calibration: made for a {part} of other weights") as caught:
            draws_with(model, drafter)
        assert "\n" not in str(caught.value)
    draws_with(pipe.model, None)
    # Weights that change later, as fused LoRA weights do: only what takes thresholds of the calibration is refused.
    changed = SpeculativeImagePipeline(copy.deepcopy(pipe.model), pipe.tokenizer, first, made)
    with torch.no_grad():
        for weight in changed.model.parameters():
            weight.mul_(1.05)
    changed("a red circle", tree="jacobi-2")
    with pytest.raises(FastgenError, match="made for a model of other weights"):
        changed("a red circle", acceptance="cascade", tree="jacobi-2x2")
    draws_with(other.model.to("meta"), second.to("meta"))
    for dtype in (torch.float16, torch.bfloat16):
        draws_with(pipe.model.to(dtype), first.to(dtype))


def test_calibration_by_command(micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real rounds of a micro model with an untrained drafter; thresholds that keep their limits, and what is wrong."""
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    torch.manual_seed(0)
    EagleDrafter.for_target(target_of(pipe.model, pipe.tokenizer), heads=2).save_pretrained(tmp_path / "drafter")
    command = ["train", "cascade-calibrate", "-o", str(tmp_path / "out"), "--part", str(micro_janus)]
    assert run([*command, "--init", str(tmp_path / "drafter"), "--samples", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["levels"]
    levels = Calibration.load(tmp_path / "out").levels
    assert [level.quality for level in levels] == [row["quality"] for row in printed] == [0.25, 0.5, 0.75, 1.0]
    about = json.loads((tmp_path / "out" / "calibration.json").read_text())["about"]
    assert about["pictures"] == 3 and about["pairs"] > 50
    numbers = {"score": 0.5, "stderr": 0.1, "target_pass_ratio": 0.5, "seconds": {"p50": 1.0}}
    names = ("plain loop, float32", "exact 2-1", "cascade 2-1 quality=1")
    rows = [{"variant": name, "rule": None if "," in name else name.split()[0], **numbers} for name in names]
    scores = {"rows": rows, "settings": {"device": "cpu", "compile": False}}
    (tmp_path / "bench.json").write_text(json.dumps(scores))
    measured = ["--init", str(tmp_path / "out"), "--data", str(tmp_path / "bench.json")]
    assert run([*command, *measured, "--json"]) == 0
    capsys.readouterr()
    after = Calibration.load(tmp_path / "out")
    assert [level.drops.get("2-1", (None,))[0] for level in after.levels] == [None, None, None, 0.0]
    assert (
        after.about == about
        and after.pace is not None
        and after.pace.times == {"cpu eager": {"1": {"exact": {"2-1": 1.0}}}}
    )
    for wrong in (
        command,
        [*command, "--init", str(tmp_path / "out"), "--data", str(tmp_path / "drafter" / "config.json")],
        [*command, "--init", str(tmp_path)],
        [*command, "--init", str(tmp_path), "--samples", "-1"],
    ):
        assert run(wrong) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_drafter_learns_from_what_its_target_draws(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    command = ["train", "drafter", "--part", str(micro_janus), "--data", str(data)]
    command += ["--steps", "2", "--precision", "fp32"]
    command += ["--batch-size", "2", "--accumulate", "1", "-o", str(tmp_path / "run"), "--json"]
    assert run([*command, "--samples", "5", "--prompts-file", "shapesworld"]) == 0, capsys.readouterr().err
    samples = Samples(data, 0)
    tokens, prompts = samples.batch(0, 5)
    assert tokens.dtype == torch.int64 and tokens.shape == (5, JANUS_TOKENS) and len(set(prompts)) > 1
    # Sample 3 is what the model draws for its prompt with seed 3.
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    third = list(ShapesWorld(707).batch(5).texts)[3]
    scale = json.loads((micro_janus / "fastgen.json").read_text())["guidance_scale"]
    again = pipe(third, generator=torch.Generator().manual_seed(3), guidance_scale=scale, output_type="tokens").tokens
    assert any(prompt == third and torch.equal(row, again[0]) for prompt, row in zip(prompts, tokens, strict=True))
    assert run(command) == 0  # they are there: nothing is drawn, and the run is over
    assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) > 0  # training flushes such numbers to 0; no longer
    recipe = build_recipe("drafter", 0, micro_janus, data=data)
    assert set(recipe.batch(0, 2, torch.Generator())) == {"tokens", "prompts"}
    for model, word in (("tiny", "not a Janus model"), (str(micro_janus), "renders of ShapesWorld have 64")):
        assert run(["train", "drafter", "--part", model, "-o", str(tmp_path / "x")]) == 2
        assert word in capsys.readouterr().err


def test_the_terms_and_the_drafter_are_chosen_on_the_command_line(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "drafter", "--part", str(micro_janus), "--data", str(tmp_path / "data"), "--steps", "1"]
    command += ["--batch-size", "2", "--accumulate", "1", "--precision", "fp32", "-o", str(tmp_path / "run")]
    draw = ["--samples", "2", "--prompts-file", "shapesworld"]
    chosen = ["--set", "redundancy=class", "--set", "probes=3", "--set", "width=16", "--set", "variant=3"]
    assert run([*command, *draw, *chosen, "--set", "heads=2"]) == 0, capsys.readouterr().err
    made = load_drafter(tmp_path / "run" / "model", torch.float32)
    assert made.config.variant == 3 and made.config.width == 16 and made.config.heads == 2
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())["drafter"]
    assert record["choices"] == {"redundancy": "class", "probes": 3, "width": 16, "variant": 3, "heads": 2}
    for wrong, word in (
        (["--set", "width"], "KEY=VALUE"),
        (["--set", "probes=0"], "probes"),
        (["--set", "redundancy=both"], "redundancy"),
        (["--set", "depth=3"], "depth"),
        (["--set", "width=16", "--set", "width=32"], "once"),
        (["--set", "width=16", "--init", str(tmp_path / "run" / "model")], "width"),
    ):
        assert run([*command[:-1], str(tmp_path / "other"), *wrong]) == 2
        assert word in capsys.readouterr().err
    assert run(["train", "vq", "--set", "width=16", "-o", str(tmp_path / "vq")]) == 2
    assert capsys.readouterr().err.startswith("error: No such option: --set ")
    assert not (tmp_path / "other").exists()
