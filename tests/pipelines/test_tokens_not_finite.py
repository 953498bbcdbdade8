"""Logits and pixels that are not numbers: one error, whatever draws; tokens that are masked out are fine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_command import call
from micro_models import JANUS_TOKENS, PROMPTS, with_eagle

from fastgen.drafters import decode
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.names import RULES
from fastgen.drafters.targets import target_of
from fastgen.drafters.targets.janus import JanusTarget
from fastgen.drafters.tree import DynamicShape
from fastgen.errors import NotFiniteError
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.speculative import SpeculativeImagePipeline

Spoil = Callable[[torch.Tensor], torch.Tensor]
DRAFTS: dict[str, dict[str, Any]] = {
    "jacobi": {"tree": "jacobi-4"},
    "wide jacobi": {"tree": "jacobi-3x2"},
    "sampled tree": {"tree": "3-2"},
    "likely tree": {"tree": "3-2", "sampled": False},
    "dynamic tree": {"tree": DynamicShape(6, 2, 3)},
}


@pytest.fixture(scope="module")
def plain(micro_janus: Path) -> JanusImagePipeline:
    return JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(plain: JanusImagePipeline) -> SpeculativeImagePipeline:
    return with_eagle(plain)


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def at(value: float, *where: Any) -> Spoil:
    """Writes a value into logits."""

    def spoil(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[where] = value
        return logits

    return spoil


SPOILS: dict[str, Spoil] = {
    "all NaN": at(torch.nan, ...),
    "one NaN token": at(torch.nan, ..., 5),
    "one infinite token": at(torch.inf, ..., 5),
    "nothing left": at(-torch.inf, ...),
    "the last row": at(torch.nan, -1),
}


def spoil_head(patch: pytest.MonkeyPatch, model: Any, spoil: Spoil, since: int = 0, calls_spoiled: int = 999) -> None:
    """Some of the head's answers, from call `since` on."""
    head, calls = model.model.generation_head, [0]
    real = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return spoil(real(hidden)) if since < calls[0] <= since + calls_spoiled else real(hidden)

    patch.setattr(head, "forward", forward)


@pytest.mark.parametrize(
    "law", [{}, {"temperature": 0.0}, {"guidance_scale": 1.0}, {"top_k": 3, "top_p": 0.9}], ids=str
)
@pytest.mark.parametrize("spoil", SPOILS)
def test_broken_logits_are_an_error(
    plain: JanusImagePipeline, pipe: SpeculativeImagePipeline, spoil: str, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_head(monkeypatch, plain.model, SPOILS[spoil])
    with pytest.raises(NotFiniteError, match="model's logits"):
        plain(PROMPTS[:2], **law, generator=seeded(2), batch_invariant=False)
    for draft in DRAFTS.values():
        if law.get("temperature") != 0:
            with pytest.raises(NotFiniteError, match="model's logits"):
                pipe(PROMPTS[:2], **law, **draft, generator=seeded(2), batch_invariant=False)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("tree", ["jacobi-4", "2-2", DynamicShape(6, 2, 3)], ids=str)
def test_broken_logits_at_temperature_0(
    pipe: SpeculativeImagePipeline, tree: Any, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_head(monkeypatch, pipe.model, SPOILS["one infinite token"])
    with pytest.raises(NotFiniteError, match="model's logits"):
        pipe("a ring", temperature=0.0, guidance_scale=guidance, tree=tree)


@pytest.mark.parametrize("rule", RULES)
def test_late_ones_are_an_error_under_every_rule(
    pipe: SpeculativeImagePipeline, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fifth pass on, in the second of two images."""
    spoil_head(monkeypatch, pipe.model, SPOILS["the last row"], since=4)
    with pytest.raises(NotFiniteError, match="model's logits"):
        pipe(
            PROMPTS[:2],
            guidance_scale=1.0,
            acceptance=rule,
            tree="jacobi-2",
            generator=seeded(2),
            batch_invariant=False,
        )


@pytest.mark.parametrize("step", [0, 7, JANUS_TOKENS - 1])
def test_one_step_alone(plain: JanusImagePipeline, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_head(monkeypatch, plain.model, SPOILS["one NaN token"], since=step, calls_spoiled=1)
    with pytest.raises(NotFiniteError, match="model's logits"):
        plain("a ring", top_k=2, generator=seeded(1))


def test_compiled_rounds_keep_the_flag(pipe: SpeculativeImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(step: Any) -> Any:
        return torch.compile(step, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(decode, "compiled", capture)
    monkeypatch.setattr(
        JanusTarget, "head", lambda self, hidden: self.inner.generation_head(hidden) * self.inner.spoil
    )
    pipe.model.model.spoil = torch.tensor(torch.nan)
    pipe.compile(True)
    try:
        with pytest.raises(NotFiniteError, match="model's logits"):
            pipe("a ring", tree="2-1", generator=seeded(1))
    finally:
        pipe.compile(False)
        torch._dynamo.reset()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["sampled tree", "likely tree", "dynamic tree"])
@pytest.mark.parametrize("kind", ["eagle-1", "eagle-3", "medusa"])
def test_a_broken_drafter_is_an_error(plain: JanusImagePipeline, kind: str, draft: str, temperature: float) -> None:
    target = target_of(plain.model, plain.tokenizer)
    if kind == "medusa":
        drafter: Any = MedusaDrafter.for_target(target, depth=2)
    else:
        drafter = EagleDrafter.for_target(target, heads=2, variant=int(kind[-1]))
    with torch.no_grad():
        next(iter(drafter.parameters())).fill_(torch.nan)
    arguments = {**DRAFTS[draft], **({"sampled": None} if temperature == 0 else {})}
    with pytest.raises(NotFiniteError, match="drafter's logits"):
        SpeculativeImagePipeline(plain.model, plain.tokenizer, drafter)("a ring", temperature=temperature, **arguments)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_masked_tokens_are_fine_and_not_drawn(
    plain: JanusImagePipeline, pipe: SpeculativeImagePipeline, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_head(monkeypatch, plain.model, at(-torch.inf, ..., slice(0, 40)))
    law: dict[str, Any] = {"guidance_scale": guidance, "output_type": "tokens", "generator": seeded(2)}
    assert (plain(PROMPTS[:2], **law).tokens >= 40).all()
    for draft in DRAFTS.values():
        assert (pipe(PROMPTS[:2], **draft, **law).tokens >= 40).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_broken_pixels_are_an_error(
    plain: JanusImagePipeline,
    pipe: SpeculativeImagePipeline,
    value: float,
    output_type: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = plain.model.decode_image_tokens
    monkeypatch.setattr(plain.model, "decode_image_tokens", lambda tokens: at(value, -1, 3, 4)(real(tokens)))
    for drawing in (plain, pipe):
        with pytest.raises(NotFiniteError, match="decoded pixels"):
            drawing("a ring", output_type=output_type)


@pytest.mark.parametrize("method", [[], ["--method", "speculative"]], ids=["base", "speculative"])
def test_the_command_line_keeps_earlier_pictures_and_writes_no_broken_one(
    micro_janus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: list[str],
) -> None:
    pipeline = SpeculativeImagePipeline if method else JanusImagePipeline
    real, calls = pipeline.__call__, [0]

    def second_is_broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        with pytest.MonkeyPatch.context() as patch:
            if calls[0] == 2:
                spoil_head(patch, self.model, SPOILS["one NaN token"], since=3)
            return real(self, *args, **kwargs)

    second_is_broken.__signature__ = __import__("inspect").signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(pipeline, "__call__", second_is_broken)
    (tmp_path / "prompts.txt").write_text("a red circle\na ring\n")
    options = ["--prompts-file", tmp_path / "prompts.txt", "--model", micro_janus, "--batch-size", 1, *method]
    code, _, err = call(capsys, *options, "-o", tmp_path / "out")
    assert code == 2 and "not numbers" in err and "Traceback" not in err
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
