"""The part that all verifiers share: checks, batches, remembered prompts, thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.evaluation.verifiers.base import ModelVerifier
from fastgen.pipelines.search.thresholds import check_in_range


class Brightness(ModelVerifier):
    """Mean of the picture plus the length of the prompt; notes what it was asked."""

    name = "brightness"
    range = (0.0, 300.0)

    def __init__(self, **kwargs: int) -> None:
        super().__init__(torch.nn.Linear(1, 1), **kwargs)
        self.encoded: list[list[str]] = []
        self.batches: list[int] = []

    def _encode(self, prompts: list[str]) -> Sequence[Any]:
        self.encoded.append(prompts)
        return [len(prompt) for prompt in prompts]

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        self.batches.append(len(images))
        return images.double().mean((1, 2, 3)) + torch.tensor(sides)


PICTURES = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 4).contiguous()


def test_every_picture_is_scored_for_its_own_prompt_in_batches() -> None:
    verifier = Brightness(batch_size=2)
    found = verifier.score(PICTURES, ["", "aaa", "a", "", "aa"])
    assert found.dtype == torch.float32
    assert found.tolist() == [0, 4, 3, 3, 6]
    assert verifier.batches == [2, 2, 1]


def test_no_pictures_give_no_scores() -> None:
    found = Brightness().score(PICTURES[:0], [])
    assert found.shape == (0,) and found.dtype == torch.float32


def test_the_prompt_side_is_made_once() -> None:
    verifier = Brightness(batch_size=2)
    for _ in range(3):
        verifier.score(PICTURES, ["x", "x", "y", "x", "y"])
    assert verifier.encoded == [["x"], ["y"]]


def test_the_prompts_used_last_are_remembered() -> None:
    verifier = Brightness(cache_size=2)
    for prompt in ["a", "b", "a", "c", "a", "b"]:
        verifier.score(PICTURES[:1], [prompt])
    assert verifier.encoded == [["a"], ["b"], ["c"], ["b"]]


def test_more_prompts_in_a_batch_than_are_cached() -> None:
    verifier = Brightness(cache_size=1)
    assert verifier.score(PICTURES, ["", "a", "aa", "aaa", ""]).tolist() == [0, 2, 4, 6, 4]
    verifier = Brightness(cache_size=0)
    verifier.score(PICTURES[:1], ["a"])
    verifier.score(PICTURES[:1], ["a"])
    assert verifier.encoded == [["a"], ["a"]]


def test_moving_forgets_the_prompts() -> None:
    verifier = Brightness()
    verifier.score(PICTURES[:1], ["a"])
    assert verifier.to("cpu") is verifier
    verifier.score(PICTURES[:1], ["a"])
    assert verifier.encoded == [["a"], ["a"]]


def test_the_network_is_frozen_and_in_evaluation_mode() -> None:
    model = Brightness().model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (PICTURES.float(), [""] * 5, "images: needs dtype uint8 .* got torch.float32"),
        (PICTURES[0], [""] * 3, r"images: needs shape \[k, 3, H, W\], got \[3, 2, 4\]"),
        (PICTURES.permute(0, 2, 3, 1), [""] * 5, r"images: needs shape .* got \[5, 2, 4, 3\]"),
        (PICTURES.numpy(), [""] * 5, "images: needs a tensor, got ndarray"),
        (PICTURES, [""] * 4, "prompts: needs 5, one for each picture, got 4"),
        (PICTURES, "a text", "prompts: needs a list of texts, got str"),
        (PICTURES, ["", "", None, "", ""], "prompts: needs texts, got NoneType"),
    ],
)
def test_bad_input_is_refused(images: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Brightness().score(images, prompts)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"cache_size": -1}])
def test_bad_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}: needs an integer"):
        Brightness(**sizes)


def test_thresholds_outside_the_range_are_refused() -> None:
    verifier = Brightness()
    assert check_in_range("threshold", 0, verifier) == 0.0 and check_in_range("threshold", 300.0, verifier) == 300.0
    for value in (-0.1, 301, float("inf")):
        with pytest.raises(ValueError, match="outside the scores of brightness, which are 0 to 300"):
            check_in_range("threshold", value, verifier)
    verifier.range = None
    assert check_in_range("threshold", -1e9, verifier) == -1e9
    with pytest.raises(ValueError, match="nan is no number"):
        check_in_range("threshold", float("nan"), verifier)
