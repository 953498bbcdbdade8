"""Kernels started with little work on the host: always the version that fits the arguments, always on their device."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl

from fastgen.kernels.triton_tools import run_kernel


@triton.jit
def _affine(x, y, out, count, step, factor, SIGN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index.to(tl.int64) * step, mask=index < count, other=0.0) * factor
    if y is not None:
        value += SIGN * tl.load(y + index, mask=index < count, other=0.0)
    tl.store(out + index, value, mask=index < count)


def test_every_kind_of_argument_has_its_own_version() -> None:
    """In any order: sizes that are 1, multiples of 16 or neither, unaligned memory, other dtypes, None, constants."""
    draw = random.Random(0)
    source = torch.randn(4096, device="cuda")
    for _ in range(300):
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float64])
        count, step, offset = draw.choice([1, 16, 17, 64]), draw.choice([1, 3, 16]), draw.choice([0, 1, 4])
        factor, sign = draw.choice([1.0, 0.5, 2]), draw.choice([-1, 1])
        x, y = source.to(dtype)[offset:], draw.choice([None, source.to(dtype)[offset + 7 :]])
        out = torch.full((64,), float("nan"), dtype=dtype, device="cuda")
        run_kernel(_affine, (triton.cdiv(count, 32),), x, y, out, count, step, float(factor), SIGN=sign, BLOCK=32)
        wanted = x[: count * step : step] * factor
        if y is not None:
            wanted = wanted + sign * y[:count]
        torch.testing.assert_close(out[:count], wanted)
        assert out[count:].isnan().all()


def test_addresses_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    x = torch.zeros(2**31 + 32, dtype=torch.bfloat16, device="cuda")
    x[2**31] = 3
    out = torch.zeros(16, dtype=torch.bfloat16, device="cuda")
    for step in (2**31, 16, 2**31):  # a number of 64 bits, then one of 32, then the first again
        run_kernel(_affine, (1,), x, None, out, 2, step, 1.0, SIGN=1, BLOCK=32)
        assert out[1].item() == (3 if step == 2**31 else 0)


def test_it_runs_on_the_current_stream() -> None:
    x, out = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    run_kernel(_affine, (2,), x, None, out, 64, 1, 2.0, SIGN=1, BLOCK=32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(5)
        run_kernel(_affine, (2,), x, None, out, 64, 1, 2.0, SIGN=1, BLOCK=32)
    side.synchronize()
    assert out.tolist() == [10.0] * 64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    x = torch.ones(64, device="cuda:1")
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(device):
            out = torch.zeros_like(x)
            run_kernel(_affine, (2,), x, None, out, 64, 1, 2.0, SIGN=1, BLOCK=32)
            assert out.tolist() == [2.0] * 64
