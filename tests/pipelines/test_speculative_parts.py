"""A pipeline draws with the parts that it has now: replaced, moved, changed in place, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from micro_models import JANUS_CODES, JANUS_TOKENS, PROMPTS, save_micro_janus
from transformers import AutoTokenizer, JanusForConditionalGeneration

from fastgen.drafters.acceptance import GSD, Lantern, Neighbours
from fastgen.drafters.calibration import Calibration, Level
from fastgen.drafters.cascade import Cascade, CascadeConfig
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.loading import build_rule
from fastgen.drafters.targets import target_of
from fastgen.drafters.tree import named_tree
from fastgen.pipelines import speculative
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.speculative import SpeculativeImagePipeline

CALIBRATION = Calibration((Level(0.5, 0.1, -1.0, 2.0, 0.3, (9, 0, 9)),), {"model": "micro"})


def load(folder: Path) -> tuple[Any, Any]:
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def parts(micro_janus: Path) -> tuple[Any, Any]:
    return load(micro_janus)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load(save_micro_janus(tmp_path_factory.mktemp("other"), seed=7))


def eagle(parts: tuple[Any, Any], seed: int = 0, **config: Any) -> EagleDrafter:
    torch.manual_seed(seed)
    return EagleDrafter.for_target(target_of(*parts), heads=2, **config)


def draw(pipe: Any, prompt: str = "a red circle", **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(pipe, SpeculativeImagePipeline):  # without a tree nothing would be drafted
        arguments = {"tree": "jacobi-4", **arguments}
    tokens: torch.Tensor = pipe(prompt, generator=generator, output_type="tokens", **arguments).tokens
    return tokens


def louder(weight: torch.Tensor) -> None:
    weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)


@pytest.mark.parametrize("kind", [SpeculativeImagePipeline, JanusImagePipeline])
@pytest.mark.parametrize("way", ["attribute", "register_modules"])
def test_another_model_draws(parts: Any, others: Any, kind: Any, way: str) -> None:
    pipe = kind(*parts)
    before = draw(pipe)
    if way == "attribute":
        pipe.model = others[0]
    else:
        pipe.register_modules(model=others[0])
    assert torch.equal(draw(pipe), draw(kind(*others))) and not torch.equal(draw(pipe), before)
    if kind is SpeculativeImagePipeline:
        assert pipe.target.model is others[0]


def test_layers_put_into_the_model_are_used(parts: Any) -> None:
    """As LoRA and quantisation do: a linear map is replaced by another module."""
    pipe = SpeculativeImagePipeline(*parts)
    before = draw(pipe)
    attention = parts[0].model.language_model.layers[1].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Linear(32, 32))
    attention.q_proj.in_features = 32
    after = draw(pipe, temperature=0.0)
    assert torch.equal(after, draw(JanusImagePipeline(*parts), temperature=0.0))
    assert not torch.equal(draw(pipe), before)


def test_another_tokenizer_and_its_processor_are_used(parts: Any) -> None:
    class Processor:
        tokenizer = copy.deepcopy(parts[1])

    Processor.tokenizer.chat_template = "{% for m in messages %}two blue {{ m['content'] }}{% endfor %}"
    for kind in (SpeculativeImagePipeline, JanusImagePipeline):
        pipe = kind(*parts)
        before = draw(pipe)
        pipe.tokenizer = Processor.tokenizer
        assert not torch.equal(draw(pipe), before)
        assert torch.equal(draw(pipe), draw(kind(parts[0], Processor())))


def test_another_drafter_and_calibration_are_used(parts: Any) -> None:
    pipe = SpeculativeImagePipeline(*parts, eagle(parts))
    first = draw(pipe, tree="3-2")
    pipe.drafter = eagle(parts, seed=5)
    assert torch.equal(draw(pipe, tree="3-2"), draw(SpeculativeImagePipeline(*parts, pipe.drafter), tree="3-2"))
    assert not torch.equal(draw(pipe, tree="3-2"), first)
    pipe.calibration = CALIBRATION
    relaxed = pipe("a ring", acceptance="cascade", quality=0.5, tree="4-4", generator=torch.Generator().manual_seed(0))
    assert relaxed.stats.acceptance.counts["stolen"] > 0
    pipe.drafter = EagleDrafter(32, JANUS_CODES + 1, 2, heads=2)
    with pytest.raises(ValueError, match="drafter: made for a model of vocab_size"):
        pipe("a ring")
    pipe.drafter, pipe.calibration = None, {"levels": []}
    with pytest.raises(ValueError, match="calibration"):
        pipe("a ring")


def test_the_fastest_tree_is_measured_for_the_present_drafter(
    parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    measured: list[Any] = []

    def choose(target: Any, drafter: Any, rule: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(drafter)
        return speculative.TreeSource(drafter, named_tree("2-1"), sampled=True), "auto 2-1"

    monkeypatch.setattr(speculative, "choose_source", choose)
    pipe = SpeculativeImagePipeline(*parts, eagle(parts))
    for drafter in (pipe.drafter, pipe.drafter, other := eagle(parts, seed=9)):
        pipe.drafter = drafter
        fixed = SpeculativeImagePipeline(*parts, drafter)
        assert torch.equal(draw(pipe, tree="auto"), draw(fixed, tree="2-1"))
    assert measured == [measured[0], other]


def test_another_dtype_is_used(parts: Any, micro_janus: Path) -> None:
    pipe = SpeculativeImagePipeline(*parts, eagle(parts))
    for acceptance in ("lantern", "gsd"):
        draw(pipe, acceptance=acceptance)
    pipe.to(torch.bfloat16)
    fresh = SpeculativeImagePipeline(
        load(micro_janus)[0].to(torch.bfloat16), parts[1], eagle(parts).to(torch.bfloat16)
    )
    for acceptance in ("exact", "lantern", "gsd"):
        assert torch.equal(draw(pipe, acceptance=acceptance), draw(fresh, acceptance=acceptance))
    pipe.drafter.to(torch.float32)
    with pytest.raises(ValueError, match=r"drafter: has torch.float32, the model torch.bfloat16"):
        pipe("a ring")


def test_tables_move_with_the_model(parts: Any) -> None:
    """The meta device in place of a GPU."""
    pipe = SpeculativeImagePipeline(*parts)
    built: list[Any] = [
        build_rule("lantern", pipe.target),
        build_rule("gsd", pipe.target),
        build_rule("cascade", pipe.target, radius=0.5),
    ]
    pipe.to("meta")
    meta = torch.device("meta")
    assert pipe.target.codebook.device == meta
    again = [build_rule(rule.name, pipe.target, **({"radius": 0.5} if i == 2 else {})) for i, rule in enumerate(built)]
    for lantern, gsd, cascade in (again, [rule.to(meta) for rule in built]):
        assert lantern.codes.device == gsd.codebook.device == meta
        assert {t.device for t in vars(cascade.neighbours).values()} == {meta}
    assert built[0].codes.device.type == "cpu" and built[1].to(torch.device("cpu")) is built[1]


def test_tables_are_built_once_and_again_for_other_codes(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    real = Neighbours.of.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, codebook: torch.Tensor, k: int) -> Neighbours:
        built.append(k)
        found: Neighbours = real(cls, codebook, k)
        return found

    monkeypatch.setattr(Neighbours, "of", classmethod(counted))
    pipes = [SpeculativeImagePipeline(*parts) for _ in range(2)]
    for pipe in pipes * 2:
        draw(pipe, acceptance="lantern")
    assert built == [JANUS_CODES - 1]
    draw(pipes[0], acceptance="lantern++")
    assert built == [JANUS_CODES - 1, 10]
    codes = parts[0].model.vqmodel.quantize.embedding.weight
    changes = (louder, lambda weight: weight.data.neg_(), lambda weight: torch.nn.init.normal_(weight))
    for number, change in enumerate(changes, start=3):
        change(codes)
        rule = build_rule("lantern", pipes[0].target)
        assert len(built) == number and isinstance(rule, Lantern)
        assert torch.equal(rule.codes, real(Neighbours, pipes[0].target.codebook, JANUS_CODES - 1).codes)


@pytest.mark.parametrize("dim", [3, 64])
def test_neighbours_are_the_nearest(dim: int) -> None:
    """Against all distances at once; close codes, equal codes, and rows that are no codes."""
    generator = torch.Generator().manual_seed(dim)
    book = torch.randn(200, dim, generator=generator)
    book[1], book[2], book[199] = book[0], book[0] + 1e-4, torch.nan
    found = Neighbours.of(book, 150)
    apart = torch.cdist(book.double(), book.double(), compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart.fill_diagonal_(torch.inf).nan_to_num(nan=torch.inf)
    assert torch.allclose(found.distances[:199].double(), apart.sort(dim=1).values[:199, :150], rtol=1e-4, atol=1e-6)
    assert torch.allclose(apart.gather(1, found.codes)[:199], found.distances[:199].double(), rtol=1e-4, atol=1e-6)
    assert not (found.codes == torch.arange(200)[:, None])[:199].any() and not (found.codes[:199] == 199).any()
    assert found.distances[199].isinf().all()


def test_a_rule_of_another_codebook_is_refused(parts: Any) -> None:
    pipe, book = SpeculativeImagePipeline(*parts), torch.randn(JANUS_CODES + 2, 4)
    near = Neighbours.of(book, 5)
    for rule in (Lantern(near), GSD(book), Cascade(CascadeConfig(radius=0.5), near)):
        with pytest.raises(ValueError, match="acceptance: .* was made for 50 tokens, the model has 48"):
            pipe("a ring", acceptance=rule)


@pytest.mark.parametrize("kind", [SpeculativeImagePipeline, DiffusionPipeline])
@pytest.mark.parametrize("drafted", [True, False])
def test_a_saved_pipeline_draws_the_same(parts: Any, tmp_path: Path, kind: Any, drafted: bool) -> None:
    pipe = SpeculativeImagePipeline(*parts, *((eagle(parts), CALIBRATION) if drafted else ()))
    pipe.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert isinstance(again, SpeculativeImagePipeline) and again.calibration == pipe.calibration
    assert not again.model.training and (again.drafter is None) is not drafted
    arguments = {"tree": "3-2", "acceptance": "cascade", "quality": 0.5} if drafted else {}
    assert torch.equal(draw(again, **arguments), draw(pipe, **arguments))
    again.calibration = None
    again.save_pretrained(tmp_path / "second")
    assert SpeculativeImagePipeline.from_pretrained(tmp_path / "second").calibration is None


def test_a_model_alone_says_how_to_load_it(micro_janus: Path) -> None:
    with pytest.raises(ValueError, match=r"load_pipeline\(.*method=\"speculative\"\)"):
        SpeculativeImagePipeline.from_pretrained(micro_janus)


@pytest.mark.parametrize("kind", [SpeculativeImagePipeline, JanusImagePipeline])
def test_prompts_without_room_for_the_picture_are_refused(parts: Any, kind: Any) -> None:
    pipe = kind(*parts)
    room = parts[0].config.text_config.max_position_embeddings - JANUS_TOKENS
    frame = target_of(*parts).lengths(["red"])[0] - 1
    longest = " ".join(["red"] * (room - frame))
    assert draw(pipe, longest).shape == (1, JANUS_TOKENS)
    message = f"prompt: '.*…' has {room + 1} tokens with its frame, the model takes at most {room}"
    with pytest.raises(ValueError, match=message):
        pipe([PROMPTS[0], longest + " red"])
    with pytest.raises(ValueError, match=message):
        check_prompt_lengths(pipe, [PROMPTS[0], longest + " red"])
