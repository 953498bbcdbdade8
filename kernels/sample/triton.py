"""Triton kernel of `fastgen.kernels.sample`: one row of logits per program, all of it in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import power_of_two, run_kernel


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    cond, uncond, gumbel, out, vocabulary, cond_stride, uncond_stride, gumbel_stride,
    scale, inverse_temperature, top_k, top_p,
    GUIDED: tl.constexpr, NOISY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < vocabulary
    logits = tl.load(cond + row * cond_stride + token, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        base = tl.load(uncond + row * uncond_stride + token, mask=inside, other=0.0).to(tl.float32)
        logits = base + scale * tl.where(logits == base, 0.0, logits - base)
    logits = tl.where(inside, logits * inverse_temperature, float("-inf"))
    if TOP_K or TOP_P:
        # An integer with the order of the floats (-0 is 0); padding beyond the vocabulary is smallest.
        bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
        order = tl.where(inside, order, -0x80000000)
    if TOP_K:
        # Bisect for the largest threshold with k logits at or above it; stop at exactly k.
        low = tl.full([], -0x80000001, tl.int64)
        high = tl.full([], 0x80000000, tl.int64)
        while high - low > 1:
            middle = (low + high) >> 1
            reached = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), axis=0)
            low = tl.where(reached >= top_k, middle, low)
            high = tl.where(reached == top_k, low + 1, tl.where(reached > top_k, high, middle))
        logits = tl.where(order >= tl.maximum(low, -0x80000000).to(tl.int32), logits, float("-inf"))
    if TOP_P:
        largest = tl.max(logits, axis=0)
        mass = tl.exp(logits - largest)
        wanted = top_p * tl.sum(mass, axis=0)
        # The tokens before a kept one have less than the wanted mass: the lowest kept value is above `low`, and not
        # above `high`.
        low = tl.full([], -0x80000001, tl.int64)
        high = tl.full([], 0x7FFFFFFF, tl.int64)
        between = tl.full([], 2, tl.int32)
        while (high - low > 1) & (between > 1):
            middle = (low + high) >> 1
            fits = tl.sum(tl.where(order > middle.to(tl.int32), mass, 0.0), axis=0) < wanted
            high = tl.where(fits, middle, high)
            low = tl.where(fits, low, middle)
            over = order > tl.maximum(low, -0x80000000).to(tl.int32)
            between = tl.sum((over & (order <= high.to(tl.int32))).to(tl.int32), axis=0)
        above = order > high.to(tl.int32)
        last = (order > tl.maximum(low, -0x80000000).to(tl.int32)) & (order <= high.to(tl.int32))
        before = tl.sum(tl.where(above, mass, 0.0), axis=0)
        # Equal logits come in index order.
        share = tl.where(last, mass, 0.0)
        kept = above | (last & (before + tl.cumsum(share, axis=0) - share < wanted))
        logits = tl.where(kept, logits, float("-inf"))
    if LAW:
        weight = tl.exp(logits - tl.max(logits, axis=0))
        tl.store(out + row * vocabulary + token, weight / tl.sum(weight, axis=0), mask=inside)
    else:
        if NOISY:
            logits += tl.load(gumbel + row * gumbel_stride + token, mask=inside, other=0.0)
        # If all are -inf, the first token: never one outside the vocabulary.
        tl.store(out + row, tl.minimum(tl.argmax(logits, axis=0), vocabulary - 1).to(tl.int64))


def _warps(block: int) -> int:
    return min(32, max(4, block // 1024))


def launch_sample(
    cond: Tensor, uncond: Tensor | None, gumbel: Tensor | None,
    guidance_scale: float, temperature: float, top_k: int | None, top_p: float | None,
) -> Tensor:  # fmt: skip
    """See `fastgen.kernels.sample.sample`."""
    out = torch.empty(len(cond), dtype=torch.int64, device=cond.device)
    _launch(cond, uncond, gumbel, out, guidance_scale, temperature, top_k, top_p, law=False)
    return out


def launch_law(
    cond: Tensor, uncond: Tensor | None,
    guidance_scale: float, temperature: float, top_k: int | None, top_p: float | None,
) -> Tensor:  # fmt: skip
    """See `fastgen.kernels.sample.token_probabilities`."""
    out = torch.empty(cond.shape, dtype=torch.float32, device=cond.device)
    flat = None if uncond is None else uncond.reshape(-1, cond.shape[-1])
    cond = cond.reshape(-1, cond.shape[-1])
    _launch(cond, flat, None, out, guidance_scale, temperature, top_k, top_p, law=True)
    return out


def _launch(
    cond: Tensor, uncond: Tensor | None, gumbel: Tensor | None, out: Tensor,
    guidance_scale: float, temperature: float, top_k: int | None, top_p: float | None, law: bool,
) -> None:  # fmt: skip
    if not cond.numel():
        return
    cond = cond if cond.stride(-1) == 1 else cond.contiguous()
    uncond, gumbel = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (uncond, gumbel))
    vocabulary = cond.shape[1]
    block = power_of_two(vocabulary)
    run_kernel(
        _row,
        (len(cond),),
        cond, cond if uncond is None else uncond, cond if gumbel is None else gumbel, out, vocabulary,
        cond.stride(0), 0 if uncond is None else uncond.stride(0), 0 if gumbel is None else gumbel.stride(0),
        float(guidance_scale), 1.0 if temperature in (0, 1) else 1.0 / temperature, top_k or 0, float(top_p or 1.0),
        GUIDED=uncond is not None, NOISY=gumbel is not None, TOP_K=top_k is not None and top_k < vocabulary,
        TOP_P=top_p is not None and top_p < 1, LAW=law, BLOCK=block,
        num_warps=_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
