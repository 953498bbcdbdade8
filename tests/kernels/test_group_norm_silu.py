"""Group norm and SiLU over channels_last images: the kernel against a float64 oracle."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_checks import DEVICE, DTYPES, assert_matches, random
from long_tail import long_tail
from torch import Tensor, nn

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.group_norm_silu import can_use_triton, group_norm_silu, group_norm_silu_reference

pytestmark = pytest.mark.usefixtures("triton_kernels")


def image(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, layout: str = "dense") -> Tensor:
    """[n, C, ...] with channels inside; "padded": pixels further apart than C, "part": a part of a larger batch."""
    n, channels, *space = shape
    x = (random(n, *space, channels) + mean).to(dtype)
    if layout == "padded":
        wider = torch.full((n, *space, channels + 3), float("nan"), dtype=dtype, device=DEVICE)
        wider[..., :channels] = x
        x = wider[..., :channels]
    elif layout == "part":
        x = torch.cat([torch.full_like(x, float("nan")), x])[n:]
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def check(x: Tensor, groups: int, affine: bool = True, silu: bool = True, eps: float = 1e-6) -> None:
    weight, bias = (random(x.shape[1], seed=1 + i, dtype=x.dtype) if affine else None for i in range(2))
    actual = group_norm_silu(x, groups, weight, bias, eps, silu)
    assert ran() == {"group_norm_silu": "triton"}
    wide = [None if vector is None else vector.double() for vector in (weight, bias)]
    assert actual.dtype == x.dtype
    assert_matches(actual, group_norm_silu_reference(x.double(), groups, *wide, eps, silu))
    if x.numel() and x.shape[1] > 1:
        assert actual.stride(1) == 1


@pytest.mark.parametrize("dtype", long_tail(DTYPES, fast=(torch.float32,)), ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_shapes(affine: bool, silu: bool, dtype: torch.dtype) -> None:
    for shape, groups in (
        ((2, 24, 5, 7), 4),
        ((1, 128, 9, 9), 32),
        ((1, 640, 3, 3), 32),
        ((2, 12, 9), 3),
        ((1, 8, 2, 3, 4), 2),
        ((2, 16, 1, 1), 2),
        ((1, 6, 1, 5), 6),
        ((0, 8, 4, 4), 2),
    ):
        check(image(*shape, dtype=dtype), groups, affine, silu)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 7),
    space=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["dense", "padded", "part"]),
)
def test_any_shape_and_layout(
    samples: int, groups: int, width: int, space: list[int], dtype: torch.dtype, layout: str
) -> None:
    if groups * width == 1:
        width = 2
    x = image(samples, groups * width, *space, dtype=dtype, layout=layout)
    if width * x[0, 0].numel() == 1:
        return  # a norm of one number: 0 / sqrt(0 + eps), rounding divided by almost nothing
    check(x, groups, eps=1e-2)


def test_large_groups_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images take one launch; here large ones, and small ones sent the same way."""
    for dtype in DTYPES:
        check(image(1, 2, 129, 257, dtype=dtype), 2)
    from fastgen.kernels.group_norm_silu import triton as group_norm_silu_triton

    monkeypatch.setattr(group_norm_silu_triton, "_SMALL", 0)
    for layout in ("dense", "padded", "part"):
        check(image(2, 36, 5, 11, layout=layout), 4)
    check(image(1, 512, 24, 8), 32, affine=False, silu=False)
    check(image(1, 1200, 3, 3), 4)
    check(image(3, 6, 1, 1), 2, eps=1e-2)


def test_large_means_do_not_cancel() -> None:
    x = image(1, 16, 16, 16, mean=4096.0)
    actual = group_norm_silu(x, 4, silu=False)
    expected = group_norm_silu_reference(x.double(), 4, silu=False)
    # The fold -mean / deviation costs what the input's own rounding does.
    assert_matches(actual, expected, rms=5e-4, ulp=16384)


def test_constant_images() -> None:
    x = torch.full((1, 8, 4, 4), 3.0, device=DEVICE).to(memory_format=torch.channels_last)
    weight, bias = random(8), random(8, seed=1)
    actual = group_norm_silu(x, 2, weight, bias, silu=False)
    assert_matches(actual, bias.double()[:, None, None].expand(1, 8, 4, 4), rms=1e-3, ulp=1e5)


def test_samples_are_independent_of_their_batch() -> None:
    x = image(3, 24, 12, 12)
    together = group_norm_silu(x, 4)
    alone = torch.cat([group_norm_silu(part.contiguous(memory_format=torch.channels_last), 4) for part in x.split(1)])
    assert_matches(together, alone.double())


def test_what_runs_by_the_reference() -> None:
    weight = nn.Parameter(torch.ones(8, device=DEVICE))
    for x, reason in ((random(2, 8, 3, 3), "channels_last"), (image(2, 8, 3, 3).double(), "not torch.float64")):
        assert not can_use_triton(x, 2)
        with pytest.raises(ValueError, match=reason):
            group_norm_silu(x, 2)
        with use_kernels("auto"):
            assert torch.equal(group_norm_silu(x, 2), group_norm_silu_reference(x, 2))
    with pytest.raises(ValueError, match="gradients are needed"):
        group_norm_silu(image(2, 8, 3, 3), 2, weight)
    # torch 2.13 crashes in group_norm's own backward on a CPU where channels are last and the input needs no gradient.
    with use_kernels("auto"):
        group_norm_silu(image(2, 8, 3, 3).requires_grad_(), 2, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        group_norm_silu(image(2, 8, 3, 3), 2, weight)
    assert ran() == {"group_norm_silu": "triton"}


def test_operator_and_graph() -> None:
    x, weight = image(2, 8, 3, 5), random(8)
    torch.library.opcheck(torch.ops.fastgen.group_norm_silu.default, (x, 2, weight, None, 1e-6, True))
    compiled = torch.compile(
        group_norm_silu, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager"
    )
    actual = compiled(x, 2, weight)
    assert torch.equal(actual, group_norm_silu(x, 2, weight))
    assert actual.stride() == group_norm_silu(x, 2, weight).stride()


@pytest.mark.parametrize(
    ("shape", "groups", "vector", "message"),
    [
        ((2, 8), 2, 8, "x: needs floats"),
        ((2, 8, 3, 3), 3, 8, "groups: needs a divisor of 8 channels, got 3"),
        ((2, 8, 3, 3), 0, 8, "groups: 0 is not allowed, needs an integer >= 1"),
        ((2, 8, 3, 3), 2, 4, r"weight: needs floats \[8\], got torch.float32 \(4,\)"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_what_does_not_fit(shape: tuple[int, ...], groups: int, vector: int, message: str, mode: str) -> None:
    with use_kernels(mode), pytest.raises(ValueError, match=message):
        group_norm_silu(random(*shape), groups, random(vector))


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 5), (1, 1, 1, 1), (2, 1, 7), (1, 4, 1, 1), (1, 4, 1, 5), (1, 4, 5, 1)], ids=str
)
def test_layouts_that_combine_several(triton_kernels: None, shape: tuple[int, ...]) -> None:
    """One channel, or one pixel, in the order of PyTorch's default."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = group_norm_silu_reference(x.double(), 1)
    assert_matches(group_norm_silu(x, 1), wanted, rms=1e-5, ulp=512)
    if shape[1] == 1:
        assert_matches(group_norm_silu(x.contiguous(), 1), wanted, rms=1e-5, ulp=512)
