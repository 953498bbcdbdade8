"""Wrong calls of the pipelines that draw tokens: an error that names the argument, before any forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_models import JANUS_CODES, with_eagle

from fastgen.checks import check_number
from fastgen.drafters.acceptance import Exact
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.names import MOST_NODES, is_tree_name
from fastgen.drafters.targets import target_of
from fastgen.drafters.tree import DynamicShape, named_tree
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.schema import SCHEMA
from fastgen.pipelines.speculative import SpeculativeImagePipeline


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError


ODD: list[Any] = [float("nan"), float("inf"), "1", [1.0], {}, True, Unshowable(), 10**400, torch.ones(2), np.ones(2)]
BOTH: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (*ODD, -1.0, None, 1e-40, 1e-320, 1e-7)),
    *(("guidance_scale", value) for value in (*ODD, "5", 1j)),
    *(("top_k", value) for value in (0, -1, 1.5, "5", True, [5], float("nan"), np.float32(2.5))),
    *(("top_p", value) for value in (*ODD[:7], 0, 0.0, -0.1, 1.01, [0.5])),
    *(("num_images_per_prompt", value) for value in (0, -1, 1.0, "2", True, None, [1], 10**12)),
    *(("generator", value) for value in (5, "0", [], [5], [torch.Generator()] * 2, {"seed": 1}, torch.manual_seed)),
    *(("output_type", value) for value in ("jpg", "latent", None, 5, ["pil"], "PIL")),
    *(("prompt", value) for value in ("", " ", [], [""], ["a", None], 5, None, {"a"}, b"a ring", "a\ud800", "a\x00")),
    *(("negative_prompt", value) for value in ("x", "", ["x"], 5)),
    *(("callback_on_step_end", value) for value in (5, "print", [print])),
    *((name, value) for name in ("batch_invariant", "return_dict") for value in (None, "no", 2, [True])),
]
SPECULATIVE: list[tuple[str, Any]] = [
    *(("tree", value) for value in (5, "x", "", ["4-2"], (4, 2), True, Exact(), "0", "chain-0", "4--2", "jacobi-0")),
    *(("tree", value) for value in ("chain-1025", "jacobi-1025", "jacobi-600x2", "9999999", "600-600")),
    ("tree", "jacobi-" + "9" * 5000),
    *(("tree", value) for value in (f"{JANUS_CODES + 1}", f"jacobi-2x{JANUS_CODES + 1}", DynamicShape(60, 1, 60))),
    *(("sampled", value) for value in ("yes", 1, [True])),
    *(("acceptance", value) for value in (5, "x", "", ["exact"], Exact, True, "Exact")),
    *(("quality", value) for value in ("1", float("nan"), 2, -0.1, True, [0.5])),
]


@pytest.fixture(scope="module")
def plain(micro_janus: Path) -> JanusImagePipeline:
    return JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(plain: JanusImagePipeline) -> SpeculativeImagePipeline:
    return with_eagle(plain)


@pytest.fixture
def no_pass(plain: JanusImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("the model was run")

    inner = plain.model.model
    monkeypatch.setattr(inner.language_model.layers[0].self_attn.q_proj, "forward", forward)
    monkeypatch.setattr(inner.language_model, "forward", forward)


def named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Unshowable) or len(repr(value)) > 30 else ascii(value)


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize(("name", "value"), BOTH + SPECULATIVE, ids=named)
def test_wrong_arguments_are_named(
    plain: JanusImagePipeline, pipe: SpeculativeImagePipeline, name: str, value: Any
) -> None:
    call = {"prompt": "a ring", **({"acceptance": "cascade"} if name == "quality" else {}), name: value}
    for drawing in (pipe,) if name in dict(SPECULATIVE) else (plain, pipe):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            drawing(**call)


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize("name", ["height", "width", "num_inference_steps", "seed"])
def test_arguments_that_there_are_not_are_named(
    plain: JanusImagePipeline, pipe: SpeculativeImagePipeline, name: str
) -> None:
    for drawing in (plain, pipe):
        with pytest.raises(TypeError, match=name):
            drawing("a ring", **{name: 64})


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"tree": "chain-3", "temperature": 0.0, "sampled": True}, "tree: temperature 0"),
        ({"tree": DynamicShape(2, 2, 2), "sampled": True}, "tree: a dynamic tree"),
        ({"tree": "jacobi-4", "sampled": True}, "sampled: "),
        ({"tree": "auto", "sampled": False}, "sampled: "),
        ({"tree": "jacobi-3x2", "acceptance": "block"}, "acceptance: "),
        ({"tree": "chain-3", "sampled": False, "acceptance": "block"}, "acceptance: "),
        ({"tree": DynamicShape(2, 2, 2), "acceptance": "block"}, "acceptance: "),
        ({"quality": 0.5}, "quality: "),
        ({"quality": 0.5, "acceptance": "cascade"}, "quality: needs a calibration"),
        ({"prompt": ["a", "b"], "generator": [torch.Generator()]}, "generator: 1 generators for 2"),
        ({"num_images_per_prompt": 3, "generator": [torch.Generator()] * 2}, "generator: 2 generators for 3"),
    ],
)
def test_arguments_that_do_not_go_together(pipe: SpeculativeImagePipeline, arguments: Any, word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word}"):
        pipe(**{"prompt": "a ring", **arguments})


def test_wrong_parts_are_named(plain: JanusImagePipeline, pipe: SpeculativeImagePipeline) -> None:
    model, tokenizer = plain.model, plain.tokenizer
    target = target_of(model, tokenizer)
    wrong: list[tuple[str, dict[str, Any]]] = [
        *(("model", {"model": value}) for value in (5, None, "x", torch.nn.Linear(1, 1), JanusImagePipeline)),
        *(("tokenizer", {"tokenizer": value}) for value in (5, None, "x", torch.nn.Linear(1, 1))),
        *(("drafter", {"drafter": value}) for value in (5, "x", torch.nn.Linear(1, 1), EagleDrafter)),
        ("drafter", {"drafter": EagleDrafter(32, JANUS_CODES + 1, 2, heads=2)}),
        ("drafter", {"drafter": EagleDrafter(64, JANUS_CODES, 2, heads=2)}),
        ("drafter", {"drafter": MedusaDrafter(32, JANUS_CODES, 3)}),
        ("drafter", {"drafter": EagleDrafter.for_target(target, heads=2).to(torch.bfloat16)}),
        *(("calibration", {"calibration": value}) for value in (5, "x", Calibration, [1])),
        *(("quality", {"calibration": value}) for value in ({}, {"levels": [{}]}, {"levels": 5})),
    ]
    for name, parts in wrong:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            SpeculativeImagePipeline(**{"model": model, "tokenizer": tokenizer, **parts})
        if name in ("model", "tokenizer"):
            with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
                JanusImagePipeline(**{"model": model, "tokenizer": tokenizer, **parts})
    for value in ("yes", 1, None):
        with pytest.raises(ValueError, match="^enabled: "):
            pipe.compile(value)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_pythons() -> None:
    law = TokenLaw(np.float32(3), np.float64(0.5), np.int64(7), np.float32(0.5))  # type: ignore[arg-type]
    assert law == TokenLaw(3.0, 0.5, 7, 0.5) and [type(x) for x in law.numbers] == [float, float, int, float]


def test_sizes_of_trees_are_bounded_before_one_is_built() -> None:
    SCHEMA["tree"].check("--tree", f"jacobi-{MOST_NODES}")
    assert named_tree("lantern-57").n == 58 and is_tree_name("auto") and not is_tree_name("chain-9999999")
    for name in (f"jacobi-{MOST_NODES + 1}", f"chain-{MOST_NODES + 1}", f"{MOST_NODES}-1", "x"):
        with pytest.raises(ValueError, match="^--tree: "):
            SCHEMA["tree"].check("--tree", name)
    for shape in ((0, 1, 1), (1, 1.5, 1), (1, 1, "2"), (True, 1, 1), (3, 1, 2), (1, 9, 40)):
        with pytest.raises(ValueError, match="^tree"):
            DynamicShape(*shape)  # type: ignore[arg-type]
    for value in (1e-40, -1, "1"):
        with pytest.raises(ValueError, match="^--temperature: "):
            SCHEMA["temperature"].check("--temperature", value)
    assert check_number("x", 1e-6) == TokenLaw(temperature=1e-6).temperature
