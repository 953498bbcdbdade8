"""Packed attention of different lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.accounting import account, count_flops
from fastgen.kernels.varlen import varlen_attention, varlen_attention_reference


def packed(lengths: list[int], heads: int = 2, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), heads, width, generator=generator) for _ in range(3))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, bounds


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 1000))
def test_equals_one_sequence_at_a_time(lengths: list[int], seed: int) -> None:
    q, k, v, bounds = packed(lengths, seed=seed)
    result = varlen_attention(q, k, v, bounds, max(lengths))
    torch.testing.assert_close(result, varlen_attention_reference(q, k, v, bounds), rtol=1e-4, atol=1e-5)


def test_strided_input() -> None:
    """Views of one projection, as a fused q-k-v layer gives them."""
    qkv = torch.randn(11, 3, 2, 8)
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    q, k, v = qkv.unbind(1)
    expected = varlen_attention_reference(q, k, v, bounds)
    torch.testing.assert_close(varlen_attention(q, k, v, bounds, 7), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 2]])
def test_gradients(lengths: list[int]) -> None:
    q, k, v, bounds = packed(lengths)
    results = []
    for attend in (
        lambda *x: varlen_attention(*x, bounds, max(lengths)),
        lambda *x: varlen_attention_reference(*x, bounds),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*inputs).square().sum().backward()
        results.append([x.grad for x in inputs])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 2]])
def test_autocast_takes_mixed_types_and_gives_each_its_gradient(lengths: list[int]) -> None:
    """Queries and keys in float32 from their norms, values in bfloat16 from their projection."""
    q, k, v, bounds = packed(lengths)
    inputs = [q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = varlen_attention(*inputs, bounds, max(lengths))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    exact = [x.detach().float().requires_grad_() for x in inputs]
    varlen_attention_reference(*exact, bounds).square().sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == mine.dtype
        assert float((mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.05


def test_flops_are_those_of_the_sequences_not_of_padding() -> None:
    q, k, v, bounds = packed([2, 7])
    with account() as stats, count_flops():
        varlen_attention(q, k, v, bounds, 7)
    assert stats.flops == 4 * 2 * 8 * (2 * 2 + 7 * 7)


def test_operator_is_well_behaved() -> None:
    q, k, v, bounds = packed([1, 4])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.fastgen.varlen_attention, (*inputs, bounds))


def test_compiles_without_a_break_for_changing_lengths() -> None:
    compiled = torch.compile(
        lambda q, k, v, b, m: varlen_attention(q, k, v, b, m) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for lengths in ([3, 5], [8, 1], [2, 2, 9]):
        q, k, v, bounds = packed(lengths)
        expected = 2 * varlen_attention_reference(q, k, v, bounds)
        torch.testing.assert_close(compiled(q, k, v, bounds, max(lengths)), expected, rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    q, k, v, bounds = packed([2, 3])
    with pytest.raises(ValueError, match="need equal"):
        varlen_attention(q, k[:-1], v, bounds, 3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        varlen_attention(q, k, v, bounds.long(), 3)
    with pytest.raises(ValueError, match="one dtype"):
        varlen_attention(q, k, v.double(), bounds, 5)
