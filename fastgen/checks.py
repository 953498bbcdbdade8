"""Checks of arguments and of results that every method shares. A leaf: imports torch only where a tensor is checked.

Each check returns the value it was given, or raises an error that names the argument, the value and what is allowed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError, NotFiniteError

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "TAIL_DROP",
    "check_bool",
    "check_callable",
    "check_choice",
    "check_finite",
    "check_generator",
    "check_integer",
    "check_number",
    "check_one_budget",
    "check_tail_drop",
]


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """An integer (NumPy's too, no bool) from `minimum` to `maximum`.

    Raises:
        FastgenError: it has another type, or is outside the range.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]
        allowed = f"an integer >= {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs {allowed}")
    return int(value)  # type: ignore[call-overload]


def check_number(
    name: str,
    value: object,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """A finite number (NumPy's too, no bool) with ``minimum <= value <= maximum`` and ``above < value < below``.

    Raises:
        FastgenError: it has another type, or is outside the range.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and minimum <= number <= maximum and above < number < below):
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", minimum), (">", above), ("<=", maximum), ("<", below))
            if math.isfinite(bound)
        ]
        allowed = f"a number {' and '.join(bounds)}" if bounds else "a finite number"
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs {allowed}")
    return number


#: What a share of tokens to drop may be.
TAIL_DROP: dict[str, float] = {"minimum": 0.0, "below": 1.0}


def check_tail_drop(name: str, value: object) -> float:
    """A share of a model's tokens to drop.

    Raises:
        FastgenError: it is no number in [0, 1).
    """
    return check_number(name, value, **TAIL_DROP)


def check_one_budget(token_budget: object, tail_drop: object, uncond_tail_drop: object = None) -> None:
    """Tokens are counted, or a share of them is dropped.

    Raises:
        FastgenError: both are given.
    """
    none = tail_drop is None or (isinstance(tail_drop, int | float) and tail_drop == 0)  # it may be a list
    if token_budget is not None and not (none and uncond_tail_drop is None):
        raise FastgenError("token_budget: cannot be used together with tail_drop or uncond_tail_drop")


def check_choice(name: str, value: object, allowed: Collection[str]) -> str:
    """One of the names in `allowed`.

    Raises:
        FastgenError: it is not one of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs one of {', '.join(allowed)}")
    return value


def check_bool(name: str, value: object) -> bool:
    """True or False.

    Raises:
        FastgenError: it is not one.
    """
    if not isinstance(value, bool):
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs True or False")
    return value


def check_callable(name: str, value: Any) -> Callable[..., Any] | None:
    """A function, or None.

    Raises:
        FastgenError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs a function")
    return value


def check_generator(value: object, count: int | None = None) -> None:
    """A `torch.Generator`, a list of `count` of them, or None.

    Raises:
        FastgenError: it is something else, or a list of another length.
    """
    import torch

    several = isinstance(value, Sequence) and not isinstance(value, str)
    members: Sequence[object] = value if several else [value]  # type: ignore[assignment]
    if value is not None and not all(isinstance(member, torch.Generator) for member in members):
        raise FastgenError(f"generator: {_shown(value)} is not allowed, needs a torch.Generator or a list of them")
    if several and count is not None and len(members) != count:
        raise FastgenError(f"generator: {len(members)} generators for {count} images; needs one per image")


def check_finite(values: torch.Tensor | np.ndarray | Sequence[float] | float, what: str) -> None:
    """Refuse NaN and infinity in a result: the one place that every method calls before it returns pictures.

    Args:
        values: latents, logits, pixels or scores, of any shape. Waits for the device.
        what: what they are, in the plural, for the message: "latents", "the verifier's scores" …

    Raises:
        NotFiniteError: some are NaN or infinite.
    """
    import torch

    tensor = torch.as_tensor(values)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
        raise NotFiniteError(f"{what} are not numbers ({kind}) in parts; another dtype (float32, bfloat16) may help")


def _shown(value: object, limit: int = 80) -> str:
    """A value as Python writes it, cut where it is long; what cannot be written shows its type."""
    try:
        text = repr(value)
    except Exception:  # a __repr__ of the user's, or an integer with more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}…"
