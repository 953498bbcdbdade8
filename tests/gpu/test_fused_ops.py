"""Norms, rotation and group norm on a GPU: graphs, compilers, no waiting, determinism, memory, very large tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_checks import assert_matches
from torch import Tensor

from fastgen.kernels.adaln import adaln, adaln_reference
from fastgen.kernels.dispatch import ran, reset_ran, use_kernels
from fastgen.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from fastgen.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def adaln_case(
    n: int = 4, length: int = 333, width: int = 1152
) -> tuple[Callable[..., Any], Callable[..., Any], dict]:
    chunks = noise(n, 6 * width, seed=2).chunk(6, dim=1)
    inputs = {"hidden": noise(n, length, width), "update": noise(n, length, width, seed=1)}
    return adaln, adaln_reference, {**inputs, "gate": chunks[2], "scale": chunks[0], "shift": chunks[4]}


def qk_case(n: int = 2, length: int = 777, heads: int = 24, width: int = 128) -> tuple[Any, Any, dict]:
    qkv = noise(n, length, 3, heads, width)
    angle = noise(length, width // 2, seed=1, dtype=torch.float32)
    weights = {"query_weight": noise(width, seed=2), "key_weight": noise(width, seed=3)}
    inputs = {"query": qkv[:, :, 0], "key": qkv[:, :, 1], "cos": angle.cos(), "sin": angle.sin()}
    return qk_norm_rope, qk_norm_rope_reference, {**inputs, **weights}


def group_case(n: int = 2, channels: int = 256, side: int = 123) -> tuple[Any, Any, dict]:
    x = noise(n, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = noise(channels, seed=1), noise(channels, seed=2)
    return group_norm_silu, group_norm_silu_reference, {"x": x, "groups": 32, "weight": weight, "bias": bias}


CASES = {"adaln": adaln_case, "qk_norm_rope": qk_case, "group_norm_silu": group_case}


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, dict]]:
    reset_ran()
    with torch.no_grad():
        yield CASES[request.param]()
    assert set(ran().values()) == {"triton"}  # by default, at these sizes


def test_real_sizes_match_the_oracle(case: Any) -> None:
    op, reference, inputs = case
    results, expected = tensors(op(**inputs)), tensors(reference(**widened(inputs)))
    if op is adaln:  # its second result is the norm of the sum, which was rounded
        given = {**inputs, "hidden": results[0], "update": None, "gate": None}
        expected[1] = reference(**widened(given))[1]
    for actual, wanted in zip(results, expected, strict=True):
        assert_matches(actual, wanted)


def test_captured_in_a_cuda_graph(case: Any) -> None:
    op, _, inputs = case
    tensor = next(iter(inputs.values()))
    for _ in range(3):
        op(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(op(**inputs))
    tensor.copy_(tensor * 0.5 + 1)
    graph.replay()
    for actual, expected in zip(captured, tensors(op(**inputs)), strict=True):
        assert torch.equal(actual, expected)


def test_nothing_waits_for_the_gpu(case: Any) -> None:
    op, _, inputs = case
    op(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_result_every_time(case: Any) -> None:
    """Races would show as differences between runs."""
    op, _, inputs = case
    first = [x.clone() for x in tensors(op(**inputs))]
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(tensors(op(**inputs)), first, strict=True))


def test_compiled_in_one_graph_without_a_new_one_for_other_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(adaln, fullgraph=True, dynamic=True)
    reset_ran()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (333, 777, 64, 4096):
            _, _, inputs = adaln_case(length=length)
            # The compiler starts the same kernel, with settings of its own.
            for actual, expected in zip(compiled(**inputs), adaln(**inputs), strict=True):
                assert_matches(actual, expected.double())
    assert ran() == {"adaln": "triton"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), use_kernels("triton"):
        op, _, inputs = CASES[name]()
        compiled = torch.compile(op, fullgraph=True)
        for actual, expected in zip(tensors(compiled(**inputs)), tensors(op(**inputs)), strict=True):
            assert_matches(actual, expected.double())


def test_small_images_are_left_to_the_compiler() -> None:
    """Its fusion was the faster one; large ones, and all in eager mode, take the kernel."""
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(group_norm_silu, fullgraph=True, dynamic=False)
        for side, used in ((32, "reference"), (256, "triton")):
            _, _, inputs = group_case(side=side)
            reset_ran()
            compiled(**inputs)
            assert ran() == {"group_norm_silu": used}
            group_norm_silu(**inputs)
            assert ran() == {"group_norm_silu": "triton"}


@pytest.mark.parametrize("name", ["adaln", "qk_norm_rope"])
def test_gradients_at_real_sizes_are_right_and_repeatable(name: str) -> None:
    op, reference, inputs = CASES[name]()
    constant = {"cos", "sin"}

    def gradients(function: Any, given: dict[str, Any]) -> dict[str, Tensor]:
        leaves = {
            n: v.detach().clone().requires_grad_()
            for n, v in given.items()
            if torch.is_tensor(v) and n not in constant
        }
        results = tensors(function(**{**given, **leaves}))
        torch.autograd.backward(results, [noise(*x.shape, seed=9).to(x.dtype) for x in results])
        return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}

    first, second = gradients(op, inputs), gradients(op, inputs)
    expected = gradients(reference, widened(inputs))
    for n in expected:
        assert torch.equal(first[n], second[n]), n
        assert_matches(first[n], expected[n], n, rms=8e-3, ulp=float("inf"))


def test_rounding_is_to_nearest() -> None:
    """The half-precision kernel gives the float32 kernel's result, rounded as PyTorch rounds."""
    with torch.no_grad():
        _, _, inputs = qk_case()
        wide = {n: v.float() if torch.is_tensor(v) else v for n, v in inputs.items()}
        for actual, expected in zip(qk_norm_rope(**inputs), qk_norm_rope(**wide), strict=True):
            # Sums may be ordered differently where layouts differ: one unit, seldom.
            differs = actual != expected.bfloat16()
            assert float(differs.float().mean()) < 1e-3


def test_extra_memory_is_small(case: Any) -> None:
    op, _, inputs = case
    results = tensors(op(**inputs))
    own = sum(x.numel() * x.element_size() for x in results if x is not inputs.get("hidden"))
    del results
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    op(**inputs)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < own + 16 * 2**20


@pytest.mark.parametrize("name", sorted(CASES))
def test_more_than_two_to_the_31_elements(name: str) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    with torch.no_grad():
        if name == "adaln":
            x = torch.zeros(1, 2**31 // 4096 + 5, 4096, dtype=torch.bfloat16, device="cuda")
            x[:, -2:] = noise(1, 2, 4096)
            _, z = adaln(x)
            assert_matches(z[:, -2:], adaln_reference(x[:, -2:].double())[1])
        elif name == "qk_norm_rope":
            x = torch.zeros(2**31 // 4096 + 5, 32, 128, dtype=torch.bfloat16, device="cuda")
            x[-2:] = noise(2, 32, 128)
            query, _ = qk_norm_rope(x, x[:, :1])
            assert_matches(query[-2:], qk_norm_rope_reference(x[-2:].double(), x[-2:, :1].double())[0])
        else:
            side = 4104
            x = torch.zeros(1, 128, side, side, dtype=torch.bfloat16, device="cuda")
            x = x.contiguous(memory_format=torch.channels_last)
            x[..., -2:, :] = noise(1, 128, 2, side)
            y = group_norm_silu(x, 32, silu=False)
            part = x[..., -2:, :].double().unflatten(1, (32, 4))
            count = 4 * side * side
            mean = part.sum((2, 3, 4), keepdim=True) / count
            variance = part.square().sum((2, 3, 4), keepdim=True) / count - mean.square()
            expected = ((part - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
            assert_matches(y[..., -2:, :], expected, rms=1e-2, ulp=4)
