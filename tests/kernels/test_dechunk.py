"""De-chunking against a brute-force float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, assert_matches, lay_out, layouts
from torch import Tensor

from fastgen.kernels.dechunk import dechunk, nearest_kept, smooth_kept, smooth_kept_reference
from fastgen.kernels.dispatch import ran, use_kernels


def brute_force(
    h: np.ndarray, p: np.ndarray, mask: np.ndarray, grid: tuple[int, int], sigma: float | None
) -> np.ndarray:
    """One sample, float64, straight from the formulas: h [M, D], p and mask [L]."""
    where = np.flatnonzero(mask)
    u = np.stack([where // grid[1], where % grid[1]], axis=1).astype(np.float64)
    out = np.empty_like(h, dtype=np.float64)
    for i in range(len(where)):
        if sigma is None:
            out[i] = h[i]
            continue
        weights = np.exp(-((u[i] - u) ** 2).sum(axis=1) / (2 * sigma**2)) * np.maximum(p[where], 1e-12)
        out[i] = p[where[i]] * h[i] + (1 - p[where[i]]) * (weights[:, None] * h).sum(axis=0) / weights.sum()
    result = np.empty((len(mask), h.shape[1]))
    for index in range(len(mask)):
        row, column = divmod(index, grid[1])
        distance = (u[:, 0] - row) ** 2 + (u[:, 1] - column) ** 2
        result[index] = out[int(np.argmin(distance))]  # argmin takes the first of equals: the lowest index
    return result


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    samples=st.integers(1, 3),
    share=st.floats(0.01, 1.0),
    sigma=st.sampled_from([None, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_brute_force(
    height: int, width: int, samples: int, share: float, sigma: float | None, seed: int
) -> None:
    _check(height, width, samples, share, sigma, seed)


@pytest.mark.parametrize(("height", "width", "share"), [(64, 64, 0.25), (64, 64, 0.002), (1, 64, 0.1), (64, 1, 0.1)])
def test_equals_brute_force_on_large_grids(height: int, width: int, share: float) -> None:
    _check(height, width, 1, share, 1.0, 0)


def _check(height: int, width: int, samples: int, share: float, sigma: float | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = height * width
    mask = rng.random((samples, length)) < share
    mask[np.arange(samples), rng.integers(length, size=samples)] = True
    p = rng.random((samples, length)).astype(np.float32)
    tokens = rng.standard_normal((int(mask.sum()), 5)).astype(np.float32)
    result = dechunk(
        torch.from_numpy(tokens),
        torch.from_numpy(np.flatnonzero(mask)),
        torch.from_numpy(p),
        torch.from_numpy(mask),
        (height, width),
        sigma,
    )
    start = 0
    for i in range(samples):
        stop = start + int(mask[i].sum())
        expected = brute_force(
            tokens[start:stop].astype(np.float64), p[i].astype(np.float64), mask[i], (height, width), sigma
        )
        np.testing.assert_allclose(result[i].numpy(), expected, rtol=0, atol=2e-5)
        start = stop


def test_ties_go_to_the_lowest_index() -> None:
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 0, 2] = mask[0, 2, 0] = mask[0, 2, 2] = True
    assert nearest_kept(mask)[0].tolist() == [[0, 0, 2], [0, 0, 2], [6, 6, 8]]


def test_all_kept_and_sure_is_the_identity() -> None:
    tokens = torch.randn(2 * 15, 4)
    mask = torch.ones(2, 15, dtype=torch.bool)
    result = dechunk(tokens, torch.arange(30), torch.ones(2, 15), mask, (3, 5))
    assert torch.equal(result, tokens.view(2, 15, 4))


def test_probabilities_of_zero_stay_finite() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    result = dechunk(torch.ones(1, 2), torch.tensor([5]), torch.zeros(1, 16), mask, (4, 4))
    assert torch.equal(result, torch.ones(1, 16, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_keeps_its_type(dtype: torch.dtype) -> None:
    tokens = (1000 * torch.randn(64, 3)).to(dtype)
    result = dechunk(tokens, torch.arange(64), torch.rand(1, 64), torch.ones(1, 64, dtype=torch.bool), (8, 8))
    assert result.dtype == dtype and bool(torch.isfinite(result).all())


def test_gradients_reach_tokens_and_probabilities() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 12) < 0.5
    mask[:, 3] = True
    positions = mask.flatten().nonzero().squeeze(1)
    tokens = torch.randn(len(positions), 3, dtype=torch.float32, requires_grad=True)
    p = torch.rand(2, 12, requires_grad=True)
    result = dechunk(tokens, positions, p, mask, (3, 4))
    result.square().sum().backward()
    assert tokens.grad is not None and p.grad is not None
    kept = p.grad[mask]
    assert bool((kept != 0).all()) and bool((p.grad[~mask] == 0).all())
    # Against finite differences along one direction.
    direction = torch.randn_like(p) * mask
    step = 1e-3

    def value(q: torch.Tensor) -> float:
        return float(dechunk(tokens.detach(), positions, q, mask, (3, 4)).double().square().sum())

    slope = (value(p.detach() + step * direction) - value(p.detach() - step * direction)) / (2 * step)
    assert math.isclose(slope, float((p.grad * direction).sum()), rel_tol=2e-2, abs_tol=1e-2)


@pytest.mark.parametrize(
    ("grid", "sigma", "message"), [((3, 4), 1.0, "do not fit"), ((2, 5), 0.0, "sigma"), ((2, 5), -1.0, "sigma")]
)
def test_bad_input(grid: tuple[int, int], sigma: float, message: str) -> None:
    mask = torch.ones(1, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        dechunk(torch.ones(10, 2), torch.arange(10), torch.ones(1, 10), mask, grid, sigma)


# ---- the kernels ----


def drawn(
    height: int, width: int, samples: int, channels: int, share: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, probabilities and mask, with at least one kept position in every sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(samples, height * width, generator=generator) < share
    mask[torch.arange(samples), torch.randint(height * width, (samples,), generator=generator)] = True
    p = torch.rand(samples, height * width, generator=generator) ** 8  # some very small
    positions = mask.flatten().nonzero().squeeze(1)
    return torch.randn(len(positions), channels, generator=generator), positions, p, mask


@settings(max_examples=10, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    samples=st.integers(1, 2),
    channels=st.sampled_from([1, 5, 16, 130]),
    share=st.floats(0.01, 1.0),
    sigma=st.sampled_from([None, 0.5, 1.0, 2.0]),
    dtype=st.sampled_from(DTYPES),
    layout=layouts("contiguous", "row_stride", "misaligned", "inner_stride"),
    seed=st.integers(0, 10**6),
)
def test_kernels_equal_the_float64_reference(
    height: int,
    width: int,
    samples: int,
    channels: int,
    share: float,
    sigma: float | None,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    tokens, positions, p, mask = drawn(height, width, samples, channels, share, seed)
    tokens = tokens.to(dtype)
    with use_kernels("triton"):
        arguments = (x.to(DEVICE) for x in (positions, p, mask))
        result = dechunk(lay_out(tokens.to(DEVICE), layout), *arguments, (height, width), sigma)
    assert ran()["nearest_kept"] == "triton"
    with use_kernels("reference"):
        oracle = dechunk(tokens.double(), positions, p.double(), mask, (height, width), sigma)
    if sigma is None:
        assert torch.equal(result.cpu().double(), oracle)
    else:
        # Sums of weights down to 1e-12, whose order differs: a few units more than one rounding.
        assert_matches(
            result, oracle, rms=4e-6 if dtype == torch.float32 else None, ulp=128.0 if dtype == torch.float32 else 2.0
        )


@pytest.mark.parametrize(("height", "width", "share"), [(6, 64, 0.02), (1, 200, 0.1), (33, 3, 0.2), (2, 256, 0.001)])
def test_nearest_on_large_grids(triton_kernels: None, height: int, width: int, share: float) -> None:
    mask = drawn(height, width, 1, 1, share, 0)[3].view(1, height, width)
    with use_kernels("reference"):
        wanted = nearest_kept(mask)
    assert torch.equal(nearest_kept(mask.to(DEVICE)).cpu(), wanted)


def test_nearest_ties_and_wide_keys(triton_kernels: None) -> None:
    """Far apart in a long column: the squared distances times the size pass 2^31."""
    mask = torch.zeros(1, 3, 256, dtype=torch.bool, device=DEVICE)
    mask[0, 0, 0] = mask[0, 0, 2] = mask[0, 2, 0] = mask[0, 2, 2] = True
    assert nearest_kept(mask)[0, :, :3].tolist() == [[0, 0, 2], [0, 0, 2], [512, 512, 514]]
    rows = torch.arange(768, device=DEVICE) + 7
    assert nearest_kept(mask, rows)[0, 2, :3].tolist() == [519, 519, 521]
    empty = torch.zeros(1, 2, 3, dtype=torch.bool, device=DEVICE)
    assert nearest_kept(empty).tolist() == [[[0] * 3] * 2]


@settings(max_examples=6, deadline=None)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    samples=st.integers(1, 2),
    channels=st.sampled_from([1, 20]),
    share=st.floats(0.05, 1.0),
    sigma=st.sampled_from([None, 0.7, 1.5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
@example(height=1, width=1, samples=1, channels=1, share=1.0, sigma=0.7, dtype=torch.float32, seed=2)
@example(height=1, width=3, samples=2, channels=1, share=0.0625, sigma=0.7, dtype=torch.float32, seed=0)
def test_gradients_equal_those_of_the_float64_reference(
    height: int,
    width: int,
    samples: int,
    channels: int,
    share: float,
    sigma: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    tokens, positions, p, mask = drawn(height, width, samples, channels, share, seed)
    p = p.clamp_min(1e-3)  # the slope in p is as steep as 1 / p
    tokens = tokens.to(dtype)
    weights = torch.randn(samples, height * width, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
    inputs = (tokens.clone().to(DEVICE).requires_grad_(), p.clone().to(DEVICE).requires_grad_())
    exact = (tokens.double().requires_grad_(), p.double().requires_grad_())
    with use_kernels("triton"):
        result = dechunk(inputs[0], positions.to(DEVICE), inputs[1], mask.to(DEVICE), (height, width), sigma)
        result.backward(weights.to(DEVICE))
    with use_kernels("reference"):
        dechunk(exact[0], positions, exact[1], mask, (height, width), sigma).backward(weights.double())
    assert inputs[0].grad is not None and exact[0].grad is not None
    # Rounded twice, behind plug-back and at the end, and what cancels in between is less exact than its size.
    rms = {torch.float32: 4e-6, torch.float16: 1.2e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert_matches(inputs[0].grad, exact[0].grad, "tokens", rms=rms, ulp=math.inf)
    if sigma is not None:
        assert inputs[1].grad is not None and exact[1].grad is not None
        rms = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
        # Where one token is kept, h and its rounded mean cancel, and h / p and p h / p² in float32: rounding is left.
        one = torch.finfo(torch.float32).eps
        rounding = max(torch.finfo(dtype).eps, one / float(p[mask].min()))
        terms = float(tokens.abs().max() * weights.abs().max()) * rounding / one
        assert_matches(inputs[1].grad, exact[1].grad, "probabilities", rms=rms, ulp=math.inf, terms=terms)


def test_gradcheck() -> None:
    tokens, positions, p, mask = drawn(3, 4, 2, 2, 0.5, 0)
    inputs = (tokens.double().requires_grad_(), (0.2 + 0.6 * p).double().requires_grad_())
    with use_kernels("reference"):
        assert torch.autograd.gradcheck(lambda h, q: dechunk(h, positions, q, mask, (3, 4), 1.0), inputs)


def test_the_gradient_is_the_same_every_time(triton_kernels: None) -> None:
    tokens, positions, p, mask = (x.to(DEVICE) for x in drawn(8, 8, 2, 20, 0.1, 0))
    grads = []
    for _ in range(3):
        inputs = tokens.clone().requires_grad_()
        dechunk(inputs, positions, p, mask, (8, 8)).cos().sum().backward()
        grads.append(inputs.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_rows_behind_the_last_token_are_no_tokens(mode: str) -> None:
    """With a capacity above the number of kept tokens; what lies there may be anything, also for the gradients."""
    tokens, positions, p, mask = (x.to(DEVICE) for x in drawn(5, 6, 2, 3, 0.4, 2))
    garbage = torch.full((40, 3), 1e4 if mode == "reference" else math.nan, device=DEVICE)
    longer = torch.cat([positions, positions.new_full((40,), -1)])
    results = []
    for some, where in ((tokens, positions), (torch.cat([tokens, garbage]), longer)):
        packed, q = some.clone().requires_grad_(), p.clone().requires_grad_()
        with use_kernels(mode):
            result = dechunk(packed, where, q, mask, (5, 6), full=len(packed) == len(positions))
            result.cos().sum().backward()
        assert packed.grad is not None and q.grad is not None
        assert not packed.grad[len(positions) :].any()
        results.append((result, packed.grad[: len(positions)], q.grad))
    for short, long in zip(*results, strict=True):
        assert torch.allclose(short, long, atol=1e-6, rtol=1e-5)


def test_the_operator_passes_opcheck(triton_kernels: None) -> None:
    tokens, positions, p, mask = (x.to(DEVICE) for x in drawn(4, 5, 2, 3, 0.5, 1))
    rows = mask.flatten().cumsum(0) - 1
    tokens.requires_grad_()
    ops, kept = torch.ops.fastgen, p.flatten()[positions].requires_grad_()
    torch.library.opcheck(ops.nearest_kept.default, (mask.view(2, 4, 5), rows))
    torch.library.opcheck(ops.smooth_kept.default, (tokens, positions, kept, rows, 4, 5, 1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_one_graph(mode: str) -> None:
    tokens, positions, p, mask = (x.to(DEVICE) for x in drawn(4, 5, 2, 3, 0.5, 1))
    torch._dynamo.reset()  # a graph keeps its choice
    with use_kernels(mode):
        wanted = dechunk(tokens, positions, p, mask, (4, 5))
        got = torch.compile(dechunk, fullgraph=True, backend="aot_eager")(tokens, positions, p, mask, (4, 5))
    assert torch.equal(got, wanted)


def test_memory_at_64_by_64() -> None:
    """Beside its input and output, de-chunking 4 samples of 64 x 64 at the width of DC-DiT-XL needs < 64 MiB."""
    tokens, positions, p, mask = drawn(64, 64, 4, 1152, 0.25, 0)

    def work() -> Tensor:
        return dechunk(tokens, positions, p, mask, (64, 64))

    with torch.profiler.profile(profile_memory=True) as profile, use_kernels("reference"):
        result = work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    extra = peak - result.numel() * result.element_size()
    assert 0 < extra < 64 * 2**20, extra / 2**20


def test_bad_input_of_the_parts() -> None:
    tokens, positions, p, mask = drawn(2, 5, 1, 3, 0.5, 0)
    with pytest.raises(ValueError, match="mask: needs bool"):
        nearest_kept(mask)
    with pytest.raises(ValueError, match="do not fit"):
        smooth_kept(tokens, positions[1:], p.flatten()[positions], (2, 5), 1, 1.0)
    for wrong in (positions + 10, positions - 10):
        with pytest.raises(ValueError, match="positions: needs numbers in 0 … 9"):
            dechunk(tokens, wrong, p, mask, (2, 5))
    for rows in (torch.full((1, 10), len(tokens)), torch.full((1, 10), -1)):
        with pytest.raises(ValueError, match="mask, rows: every position needs a token"):
            dechunk(tokens, positions, p, mask, (2, 5), rows=rows)
    with pytest.raises(ValueError, match="mask, rows: every position needs a token"):
        dechunk(tokens[:1], positions[:1], torch.rand(2, 10), torch.arange(20).view(2, 10) == positions[0], (2, 5))
    with use_kernels("triton"), pytest.raises(ValueError, match="float64"):
        smooth_kept(tokens.double(), positions, p.flatten()[positions].double(), (2, 5), 1, 1.0)
    kept = p.flatten()[positions]
    assert smooth_kept_reference(tokens.double(), positions, kept.double(), (2, 5), 1, 1.0).dtype == torch.float64


def test_float64_tokens_are_smoothed_in_float64() -> None:
    """Also with the float32 probabilities of a router."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    p = torch.rand(5, generator=generator)
    where = torch.tensor([0, 2, 5, 6, 11])
    found, exact = (smooth_kept_reference(tokens, where, each, (2, 3), 2, 1.0) for each in (p, p.double()))
    assert found.dtype == torch.float64 and torch.equal(found, exact)
