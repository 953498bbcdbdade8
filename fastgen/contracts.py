"""The loss contract that every accelerated path declares. A leaf: imports only the standard library.

`"exact"`         equal to the baseline, bit for bit or up to floating-point rounding
`"distribution"`  another sample than the baseline's, drawn from the same distribution
`"lossy"`         trades quality for speed; the measured cost stands next to the claim

Turning a knob off gives back `"exact"`.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

Loss = Literal["exact", "distribution", "lossy"]

#: Every loss contract, from the strongest promise to the weakest.
LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)


def check_loss(value: object) -> Loss:
    """Return `value` as a loss contract.

    Raises:
        ValueError: `value` is not one of `LOSSES`.
    """
    for loss in LOSSES:
        if value == loss:
            return loss
    raise ValueError(f"loss contract {value!r} is unknown; allowed: {', '.join(LOSSES)}")
