"""Argument checks: what is allowed comes back, everything else is one error that names argument, value and range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgen.checks import (
    check_bool,
    check_callable,
    check_choice,
    check_finite,
    check_generator,
    check_integer,
    check_number,
)
from fastgen.errors import FastgenError, NotFiniteError


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


NO_INTEGERS = [True, 1.0, 1.5, "1", None, math.nan, [1], Unprintable(), 1j]
NO_NUMBERS = [True, "1", None, math.nan, math.inf, -math.inf, [1.0], Unprintable(), 1j, 10**400]


@given(st.integers())
def test_integers_inside_the_range_come_back(value: int) -> None:
    if 1 <= value <= 9:
        assert check_integer("steps", value, 1, 9) == value
    else:
        with pytest.raises(FastgenError, match="^steps: .* needs an integer from 1 to 9$"):
            check_integer("steps", value, 1, 9)


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3)])
def test_integers_of_numpy_count(value: object) -> None:
    assert type(check_integer("steps", value, 1)) is int


@pytest.mark.parametrize("value", NO_INTEGERS, ids=lambda value: type(value).__name__)
def test_what_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(FastgenError, match="^steps: .* needs an integer >= 1$"):
        check_integer("steps", value, 1)


@given(st.floats())
def test_bounds_of_numbers(value: float) -> None:
    if 0 < value <= 1:
        assert check_number("top_p", value, maximum=1, above=0) == value
    else:
        with pytest.raises(FastgenError, match="^top_p: .* needs a number > 0 and <= 1$"):
            check_number("top_p", value, maximum=1, above=0)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(FastgenError, match="^tau: .* needs a finite number$"):
        check_number("tau", value)


@pytest.mark.parametrize("value", ["other", 1, None, ["exact"]])
def test_choices(value: object) -> None:
    assert check_choice("loss", "exact", ("exact", "lossy")) == "exact"
    with pytest.raises(FastgenError, match="^loss: .* needs one of exact, lossy$"):
        check_choice("loss", value, ("exact", "lossy"))


@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_only_booleans_are_booleans(value: object) -> None:
    assert check_bool("flag", False) is False
    with pytest.raises(FastgenError, match="^flag: "):
        check_bool("flag", value)


@pytest.mark.parametrize("value", [5, "print", [print]])
def test_what_cannot_be_called_is_refused(value: object) -> None:
    assert check_callable("callback", None) is None
    assert check_callable("callback", print) is print
    with pytest.raises(FastgenError, match="^callback: .* needs a function$"):
        check_callable("callback", value)


@pytest.mark.parametrize("value", [5, "cpu", [5], [torch.Generator(), None], torch.Generator])
def test_what_is_no_generator_is_refused(value: object) -> None:
    with pytest.raises(FastgenError, match="^generator: .* needs a torch.Generator or a list of them$"):
        check_generator(value)


def test_one_generator_per_image() -> None:
    check_generator(None, 2)
    check_generator(torch.Generator(), 2)
    check_generator([torch.Generator()] * 2, 2)
    with pytest.raises(FastgenError, match="^generator: 3 generators for 2 images"):
        check_generator([torch.Generator()] * 3, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_that_are_not_numbers_are_refused(bad: float, kind: torch.dtype) -> None:
    values = torch.zeros(3, 4, dtype=kind)
    check_finite(values, "latents")
    values[1, 2] = bad
    with pytest.raises(NotFiniteError, match="^latents are not numbers"):
        check_finite(values, "latents")


def test_finite_takes_arrays_lists_and_integers() -> None:
    check_finite(np.zeros((2, 3)), "pixels")
    check_finite([0.0, 1.0], "scores")
    check_finite(torch.zeros(2, dtype=torch.int64), "tokens")
    with pytest.raises(NotFiniteError):
        check_finite([0.0, math.nan], "scores")
    with pytest.raises(NotFiniteError):
        check_finite(np.array([math.inf]), "pixels")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(FastgenError) as error:
        check_integer("steps", "x" * 10_000, 1)
    assert len(str(error.value)) < 200
