"""Drawing tokens: the kernel against its reference and a float64 oracle of the distribution, including ties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, lay_out, layouts
from torch import Tensor

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.sample import (
    restrict_logits,
    sample,
    sample_reference,
    token_probabilities,
    token_probabilities_reference,
)


def noise(rows: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.log(-torch.log(torch.rand(rows, vocabulary, generator=generator).clamp(1e-6, 1 - 1e-6)))


def law(logits: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    """One row, token by token, in Python's floats."""
    kept = range(len(logits))
    if top_k is not None:
        least = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = [i for i in kept if logits[i] >= least]
    mass = {i: math.exp(logits[i] - max(logits)) for i in kept}
    total = sum(mass.values())
    if top_p is not None and top_p < 1:
        before, stays = 0.0, []
        for i in sorted(mass, key=lambda i: (-logits[i], i)):
            if before / total < top_p and logits[i] > -math.inf:
                stays.append(i)
            before += mass[i]
        mass = {i: mass[i] for i in stays}
        total = sum(mass.values())
    return [mass.get(i, 0.0) / total for i in range(len(logits))]


settings_of_the_law = st.fixed_dictionaries(
    {
        "guidance_scale": st.sampled_from([1.0, 3.5]),
        "temperature": st.sampled_from([0.5, 1.0, 1.7]),
        "top_k": st.sampled_from([None, 1, 3, 1000]),
        "top_p": st.sampled_from([None, 0.05, 0.6, 0.95, 1.0]),
    }
)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 3),
    vocabulary=st.integers(1, 70),
    options=settings_of_the_law,
    guided=st.booleans(),
    ties=st.booleans(),
    hole=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=layouts("contiguous", "row_stride", "misaligned", "inner_stride"),
    seed=st.integers(0, 999),
)
def test_the_kernel_equals_the_reference(
    rows: int,
    vocabulary: int,
    options: dict[str, Any],
    guided: bool,
    ties: bool,
    hole: bool,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = (2 * torch.randn(2, rows, vocabulary, generator=generator)).to(dtype)
    if ties:
        cond, uncond = cond.round(), uncond.round()
    if hole:
        cond[:, 1::3] = -math.inf
    second = uncond if guided else None
    gumbel = noise(rows, vocabulary, seed)
    given = [x if x is None else lay_out(x.to(DEVICE), layout) for x in (cond, second, gumbel)]
    with use_kernels("triton"):
        tokens = sample(*given, **options)
        probabilities = token_probabilities(*given[:2], **options)
    assert ran()["sample"] == ran()["token_probabilities"] == "triton"
    assert torch.equal(tokens.cpu(), sample_reference(cond, second, gumbel, **options))
    wanted = token_probabilities_reference(cond, second, **options)
    assert torch.allclose(probabilities.cpu(), wanted, atol=2e-6)
    assert torch.equal(probabilities.cpu() > 0, wanted > 0)
    # An excluded token is never drawn.
    assert bool((wanted.gather(1, tokens.cpu()[:, None]) > 0).all())


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, -math.inf]), min_size=1, max_size=12),
    top_k=st.sampled_from([None, 1, 2, 5]),
    top_p=st.sampled_from([None, 0.1, 0.33, 0.7, 0.99]),
)
def test_the_reference_equals_an_oracle(logits: list[float], top_k: int | None, top_p: float | None) -> None:
    logits = [1.0, *logits]
    got = token_probabilities_reference(torch.tensor([logits]), None, top_k=top_k, top_p=top_p)
    assert torch.allclose(got[0].double(), torch.tensor(law(logits, top_k, top_p), dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(2, None), (1, None), (4, None), (None, 0.5), (None, 0.75), (3, 0.8)])
def test_ties_at_the_cut(triton_kernels: None, top_k: int | None, top_p: float | None) -> None:
    """What ties with the k-th stays; of equal tokens at the edge of the mass those of lower index do."""
    logits = [1.0, 2.0, 1.0, -0.0, 1.0, 0.0, -3.0]
    got = token_probabilities(torch.tensor([logits], device=DEVICE), None, top_k=top_k, top_p=top_p).cpu()
    assert torch.allclose(got[0].double(), torch.tensor(law(logits, top_k, top_p), dtype=torch.float64), atol=1e-6)


def test_temperature_zero_and_no_noise_take_the_most_likely(triton_kernels: None) -> None:
    cond = torch.randn(2, 9).to(DEVICE)
    assert torch.equal(sample(cond, None, noise(2, 9, 0).to(DEVICE), temperature=0.0), cond.argmax(-1))
    assert torch.equal(sample(cond, None, None, top_k=3), cond.argmax(-1))
    hot = token_probabilities(cond, None, temperature=0.0)
    assert torch.equal(hot.argmax(-1), cond.argmax(-1)) and torch.equal(hot.sum(-1).cpu(), torch.ones(2))


@pytest.mark.parametrize("mode", ["triton", "reference"] if DEVICE.type == "cuda" else ["reference"])
def test_samples_have_the_distribution(mode: str) -> None:
    """Frequencies of 40,000 draws; a chi-square of 4 degrees of freedom is above 33 once in a million."""
    count = 40_000
    cond = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    with use_kernels(mode):
        tokens = sample(cond.expand(count, -1).to(DEVICE), None, noise(count, 8, 1).to(DEVICE), top_k=5)
    wanted = torch.tensor(law(cond[0].tolist(), 5, None)) * count
    seen = tokens.cpu().bincount(minlength=8).float()
    kept = wanted > 0
    assert not seen[~kept].any()
    assert float(((seen - wanted)[kept].square() / wanted[kept]).sum()) < 33


def test_the_operator_passes_opcheck(triton_kernels: None) -> None:
    cond, gumbel = torch.randn(2, 9).to(DEVICE), noise(2, 9, 0).to(DEVICE)
    checks = ("test_schema", "test_faketensor")
    arguments = (cond, cond, gumbel, 2.0, 0.7, 4, 0.9)
    torch.library.opcheck(torch.ops.fastgen.sample.default, arguments, test_utils=checks)
    arguments = (cond, None, 2.0, 0.7, 4, 0.9)
    torch.library.opcheck(torch.ops.fastgen.token_probabilities.default, arguments, test_utils=checks)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_one_graph(mode: str) -> None:
    cond, uncond, gumbel = torch.randn(2, 9).to(DEVICE), torch.randn(2, 9).to(DEVICE), noise(2, 9, 0).to(DEVICE)

    def both(cond: Tensor, uncond: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor]:
        return sample(cond, uncond, gumbel, 3.0, 0.8, 5), token_probabilities(cond, uncond, 3.0, 0.8, None, 0.7)

    torch._dynamo.reset()  # a graph keeps its choice
    with use_kernels(mode):
        wanted = both(cond, uncond, gumbel)
        got = torch.compile(both, fullgraph=True, backend="aot_eager")(cond, uncond, gumbel)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_gradients_stay_with_the_reference() -> None:
    cond = torch.randn(2, 9).to(DEVICE).requires_grad_()
    token_probabilities(cond, None, temperature=0.5)[:, 0].sum().backward()
    assert cond.grad is not None and bool(cond.grad.any())
    with use_kernels("triton"), pytest.raises(ValueError, match="gradients"):
        token_probabilities(cond, None)


def test_restriction_reports_the_kept_tokens() -> None:
    logits, keep, before = restrict_logits(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), 3, 0.8)
    assert keep is not None and before is not None
    assert keep.tolist() == [[False, True, True, False]] and logits[0, 0] == -math.inf
    assert torch.allclose(before[0, 1:3], torch.tensor([0.0, 0.6652]), atol=1e-4)


def test_bad_input() -> None:
    cond = torch.randn(2, 9)
    for message, arguments, options in [
        ("cond: needs \\[B, V\\]", (cond[0], None, None), {}),
        ("cond: needs floating point", (cond.long(), None, None), {}),
        ("uncond: needs torch.float32", (cond, cond[:1], None), {}),
        ("gumbel: needs float32", (cond, cond, cond.half()), {}),
        ("temperature: -1", (cond, None, None), {"temperature": -1.0}),
        ("top_k: 0", (cond, None, None), {"top_k": 0}),
        ("top_p: 1.5", (cond, None, None), {"top_p": 1.5}),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(*arguments, **options)  # type: ignore[arg-type]
