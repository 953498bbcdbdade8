"""Attention in plain matrix products equals the fused kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.models.layers import attend, fused_backward_is_slow


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    keys=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_both_ways_equal_a_float64_oracle(batch: int, heads: int, tokens: int, keys: int, seed: int) -> None:
    """Strided queries as a transposed projection gives them; values and gradients, to the precision of each way."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, length, heads, 8, generator=generator).transpose(1, 2) for length in (tokens, keys, keys)
    )
    weights = (query.double() @ key.double().mT * 8**-0.5).softmax(dim=-1)
    oracle = weights @ value.double()
    torch.testing.assert_close(attend(query, key, value).double(), oracle, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = attend(query, key, value)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.double(), oracle, rtol=0.05, atol=0.05)


def test_the_slow_case_is_autocast_on_a_cpu() -> None:
    assert not fused_backward_is_slow(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_backward_is_slow(torch.device("cpu"))
        assert not fused_backward_is_slow(torch.device("cuda"))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_gradients_of_the_plain_way_equal_the_fused(name: str) -> None:
    torch.manual_seed(0)
    tensors = {key: torch.randn(2, 3, 17, 8, requires_grad=True) for key in ("query", "key", "value")}
    (fused,) = torch.autograd.grad(attend(**tensors).square().sum(), tensors[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend(**tensors)
    (plain,) = torch.autograd.grad(output.float().square().sum(), tensors[name])
    assert float((plain - fused).norm() / fused.norm()) < 0.03
