"""The loss contract that every accelerated path declares. A leaf.

`"exact"`         equal to the baseline, bit for bit or up to floating-point rounding
`"distribution"`  another sample than the baseline's, drawn from the same distribution
`"lossy"`         trades quality for speed; the measured cost stands next to the claim

Turning a knob off gives back `"exact"`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, get_args

from fastgen.errors import FastgenError

Loss = Literal["exact", "distribution", "lossy"]

#: Every loss contract, from the strongest promise to the weakest.
LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)


def check_loss(value: object) -> Loss:
    """Return `value` as a loss contract.

    Raises:
        FastgenError: `value` is not one of `LOSSES`.
    """
    for loss in LOSSES:
        if value == loss:
            return loss
    raise FastgenError(f"loss: {value!r} is unknown; allowed: {', '.join(LOSSES)}")


def weakest(losses: Iterable[Loss]) -> Loss:
    """Contract of several paths used together; of none it is `"exact"`: nothing was changed."""
    return max(losses, key=LOSSES.index, default="exact")
