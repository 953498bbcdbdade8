"""Packing: against loops over samples; kernels and references give the same numbers to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, lay_out, layouts
from torch import Tensor

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.pack import Packing, pack, pack_mask, pack_top, scatter

MODES = ["triton", "reference"]
FIELDS = ("mask", "positions", "cu_seqlens", "sequence_ids", "rows")


def oracle(mask: Tensor, capacity: int) -> dict[str, Tensor]:
    """Token by token; what is beyond the capacity is left out."""
    samples, length = mask.shape
    positions, ids, rows, starts = list[int](), list[int](), list[int](), [0]
    kept = torch.zeros_like(mask)
    for sample in range(samples):
        for index in range(length):
            if mask[sample, index] and len(positions) < capacity:
                kept[sample, index] = True
                positions.append(sample * length + index)
                ids.append(sample)
            rows.append(len(positions) - 1)
        starts.append(len(positions))
    tail = capacity - len(positions)
    return {
        "mask": kept,
        "positions": torch.tensor(positions + [-1] * tail, dtype=torch.int64),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
        "sequence_ids": torch.tensor(ids + [samples - 1] * tail, dtype=torch.int64),
        "rows": torch.tensor(rows, dtype=torch.int64).view(samples, length),
    }


def assert_equal(packing: Packing, wanted: dict[str, Tensor]) -> None:
    for name in FIELDS:
        value = getattr(packing, name).cpu()
        assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), (name, value, wanted[name])


def top(scores: Tensor, keep: list[int]) -> Tensor:
    """Mask of the `keep` largest of each row; NaN above all, of equal ones the first."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, count in enumerate(keep):
        keys = [(-math.inf if math.isnan(x) else -x, i) for i, x in enumerate(scores[row].tolist())]
        for _, index in sorted(keys)[: max(0, count)]:
            mask[row, index] = True
    return mask


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=6, deadline=None)
@given(
    samples=st.integers(1, 4),
    length=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    spare=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_a_mask_is_packed(mode: str, samples: int, length: int, share: float, spare: int, seed: int) -> None:
    mask = torch.rand(samples, length, generator=torch.Generator().manual_seed(seed)) < share
    kept = int(mask.sum())
    capacity = min(kept + spare, mask.numel())
    with use_kernels(mode):
        assert_equal(pack_mask(mask.to(DEVICE), capacity, full=capacity == kept), oracle(mask, capacity))
        assert_equal(pack_mask(mask.to(DEVICE)), oracle(mask, mask.numel()))
    assert ran()["pack_mask"] == mode


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=6, deadline=None)
@given(data=st.data(), samples=st.integers(1, 3), length=st.integers(1, 40), seed=st.integers(0, 999))
def test_the_top_of_scores_is_kept(mode: str, data: st.DataObject, samples: int, length: int, seed: int) -> None:
    scores = torch.randn(samples, length, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # ties
    odd = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf, -0.0, 1e-42]))
    if odd is not None:
        scores[:, :: max(1, length // 3)] = odd
    keep = data.draw(st.lists(st.integers(-1, length), min_size=samples, max_size=samples))
    layout = data.draw(layouts("contiguous", "row_stride", "inner_stride"))
    with use_kernels(mode):
        got = pack_top(lay_out(scores.to(DEVICE), layout), torch.tensor(keep, device=DEVICE))
        assert_equal(got, oracle(top(scores, keep), samples * length))
        budget = data.draw(st.integers(1, length))
        got = pack_top(scores.to(DEVICE), budget)
        assert_equal(got, oracle(top(scores, [budget] * samples), samples * budget))
        assert got.full


def test_a_sample_does_not_depend_on_the_batch(triton_kernels: None) -> None:
    scores = torch.rand(3, 50).to(DEVICE)
    alone, together = pack_top(scores[1:2], 20), pack_top(scores, 20)
    assert torch.equal(alone.mask[0], together.mask[1])


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10, deadline=None)
@given(
    samples=st.integers(1, 3),
    length=st.integers(1, 20),
    width=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    spare=st.integers(0, 5),
    layout=layouts("contiguous", "row_stride", "misaligned", "slice", "inner_stride"),
    dtype=st.sampled_from(DTYPES),
)
def test_there_and_back(
    mode: str, samples: int, length: int, width: int, share: float, spare: int, layout: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(samples, length, generator=generator) < share
    tokens = torch.randn(samples, length, width, generator=generator).to(dtype)
    kept = int(mask.sum())
    capacity = min(kept + spare, mask.numel())
    with use_kernels(mode):
        packing = pack_mask(mask.to(DEVICE), capacity, full=capacity == kept)
        packed = pack(lay_out(tokens.to(DEVICE), layout), packing)
        back = scatter(lay_out(packed, layout), packing)
    wanted = torch.cat([tokens[mask], torch.zeros(capacity - kept, width, dtype=dtype)])
    assert torch.equal(packed.cpu(), wanted)
    assert torch.equal(back.cpu(), tokens * mask[..., None])


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spare", [0, 4])
def test_gradients(mode: str, spare: int) -> None:
    """Both are linear, so finite differences are exact up to rounding."""
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = int(mask.sum())
    with use_kernels(mode):
        packing = pack_mask(mask.to(DEVICE), kept + spare, full=not spare)
        tokens = torch.randn(2, 6, 3).to(DEVICE).requires_grad_()
        check = {"eps": 1.0, "atol": 1e-5, "rtol": 1e-5}
        assert torch.autograd.gradcheck(lambda x: pack(x, packing), (tokens,), **check)
        packed = torch.randn(kept + spare, 3).to(DEVICE).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: scatter(x, packing), (packed,), **check)


def test_the_operator_passes_opcheck(triton_kernels: None) -> None:
    mask = (torch.rand(2, 9) < 0.5).to(DEVICE)
    packing = pack_mask(mask)
    ops = torch.ops.fastgen
    torch.library.opcheck(ops.pack_mask.default, (mask, 18))
    torch.library.opcheck(ops.pack_top.default, (torch.rand(2, 9, device=DEVICE), torch.tensor([3, 4]).to(DEVICE), 18))
    packed = torch.randn(18, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ops.scatter.default, (packed, mask, packing.positions, packing.rows))


@pytest.mark.parametrize("mode", MODES)
def test_one_graph(mode: str) -> None:
    def there_and_back(tokens: Tensor, scores: Tensor) -> Tensor:
        packing = pack_top(scores, 5)
        return scatter(2 * pack(tokens, packing), packing)

    tokens, scores = torch.randn(2, 9, 4).to(DEVICE).requires_grad_(), torch.rand(2, 9).to(DEVICE)
    torch._dynamo.reset()  # a graph keeps its choice
    with use_kernels(mode):
        wanted = there_and_back(tokens, scores)
        got = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(tokens, scores)
    assert torch.equal(got, wanted)
    assert torch.equal(*(torch.autograd.grad(x.sum(), tokens)[0] for x in (got, wanted)))


def test_bad_input() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    packing = pack_mask(mask)
    for message, call in {
        "mask: needs bool": lambda: pack_mask(torch.ones(2, 5)),
        "capacity: 11 is not allowed, needs an integer from 0 to 10": lambda: pack_mask(mask, 11),
        "capacity: 4 is not allowed, 10 positions": lambda: pack_mask(mask, 4),
        "scores: need float32": lambda: pack_top(mask, 3),
        "keep: 6 is not allowed, needs an integer from 1 to 5": lambda: pack_top(torch.rand(2, 5), 6),
        "keep: needs a number or int64": lambda: pack_top(torch.rand(2, 5), torch.ones(3, dtype=torch.int64)),
        "tokens: need floating point": lambda: pack(torch.rand(2, 4, 3), packing),
        "packed: needs floating point": lambda: scatter(torch.rand(9, 3), packing),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]


def test_nothing_to_pack(triton_kernels: None) -> None:
    packing = pack_mask(torch.zeros(2, 5, dtype=torch.bool, device=DEVICE), 0, full=True)
    assert packing.cu_seqlens.tolist() == [0, 0, 0]
    assert pack(torch.randn(2, 5, 3, device=DEVICE), packing).shape == (0, 3)
    assert torch.equal(scatter(torch.randn(0, 3, device=DEVICE), packing).cpu(), torch.zeros(2, 5, 3))
