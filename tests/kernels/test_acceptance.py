"""A kernel takes what its reference takes, except for what it says it does not: dtypes, sizes and layouts."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_calls import GOOD
from kernel_checks import DEVICE, lay_out, layouts
from torch import Tensor

from fastgen.kernels.dispatch import reset_ran, use_kernels

# Tensors that an operation needs no more than these of: the others may be left out.
OPTIONAL = {
    "adaln": ("update_weight", "weight", "scale", "shift", "cu_seqlens"),
    "adaln padded": ("gate", "scale"),
    "qk_norm_rope": ("query_weight", "key_weight", "positions"),
    "group_norm_silu": ("weight", "bias"),
    "pack_mask": ("capacity",),
    "pack_top": ("capacity",),
    "nearest_kept": ("rows",),
    "tree_verify": ("draft",),
    "sample": ("uncond", "gumbel", "top_k", "top_p"),
    "token_probabilities": ("uncond",),
}
NO_KERNEL = {"cached_attention", "varlen_attention"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def outcome(operation: Any, arguments: dict[str, Any], mode: str) -> tuple[str, str]:
    """What a call comes to, and its message."""
    copied = {name: lay_out_again(value) for name, value in arguments.items()}
    reset_ran()
    try:
        with use_kernels(mode), torch.no_grad():
            operation(**copied)
    except (ValueError, TypeError) as error:
        declined = "the Triton kernel cannot run" in str(error)
        return ("declined" if declined else "refused"), str(error)
    return "taken", ""


def lay_out_again(value: Any) -> Any:
    """A copy with the same strides."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


@pytest.mark.parametrize("name", [name for name in GOOD if name not in NO_KERNEL])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kernel_and_reference_take_and_refuse_the_same(name: str, data: st.DataObject) -> None:
    """Right calls with other dtypes, layouts, batches of none, and arguments left out."""
    operation, arguments = GOOD[name]
    arguments = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    for key in OPTIONAL.get(name, ()):
        if data.draw(st.booleans(), label=f"without {key}"):
            arguments.pop(key, None)
    for key, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and data.draw(st.integers(0, 3)) == 0:
            value = arguments[key] = value.to(data.draw(st.sampled_from([*DTYPES, torch.float64])))
        if isinstance(value, Tensor) and data.draw(st.integers(0, 3)) == 0:
            arguments[key] = lay_out(value, data.draw(layouts("row_stride", "inner_stride", "transposed", "slice")))
        if isinstance(value, Tensor) and data.draw(st.integers(0, 15)) == 0:
            arguments[key] = value[:0]
    plain, why = outcome(operation, arguments, "reference")
    fused, message = outcome(operation, arguments, "triton")
    if fused == "declined":
        assert plain == "taken", (why, message)
        assert any(word in message for word in ("float", "axis", "channels_last", "contiguous", "strided")), message
    else:
        assert (fused, message) == (plain, why)
