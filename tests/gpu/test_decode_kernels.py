"""What only a GPU can show of the kernels of packing, de-chunking and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.evaluation.benchmarks import kernel_cases_decode, kernel_cases_routing
from fastgen.evaluation.benchmarks.kernel_case import Case
from fastgen.kernels.dechunk import dechunk
from fastgen.kernels.dispatch import use_kernels
from fastgen.kernels.kv_compact import kv_compact
from fastgen.kernels.pack import Packing, pack, pack_top, scatter

CASES = [*kernel_cases_routing.cases(), *kernel_cases_decode.cases()]
SMALL = {case.op: case for case in reversed(CASES) if not case.large}
OPS = sorted(SMALL)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_kernels("triton"):
        yield


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else [getattr(result, name) for name in result.__dataclass_fields__]
    return [part for part in parts if isinstance(part, Tensor)]


def build(case: Case) -> Callable[[], list[Tensor]]:
    inputs = case.build(torch.device("cuda"))
    return lambda: tensors(case.run(**inputs))


@pytest.mark.parametrize("op", OPS)
def test_results_pass_the_check_of_the_benchmark(op: str) -> None:
    for case in CASES:
        if case.op == op and not case.large:
            inputs = case.build(torch.device("cuda"))
            with use_kernels("reference"):
                expected = (case.expect or case.reference)(**inputs)
            assert case.check(case.run(**inputs), expected) is None, case.size


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_waits_for_the_gpu(op: str) -> None:
    work = build(SMALL[op])
    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
def test_a_cuda_graph_replays_the_same(op: str) -> None:
    work = build(SMALL[op])
    wanted = [x.clone() for x in work()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_the_same_every_time(op: str) -> None:
    """A race would show in one of many repetitions, with other work between them."""
    work = build(SMALL[op])
    wanted = [x.clone() for x in work()]
    side = torch.cuda.Stream()
    for _ in range(30):
        with torch.cuda.stream(side):
            torch.randn(512, 512, device="cuda") @ torch.randn(512, 512, device="cuda")
        assert all(torch.equal(a, b) for a, b in zip(work(), wanted, strict=True))


@pytest.mark.parametrize("op", ["pack_top", "dechunk", "sample", "token_probabilities", "tree_verify", "kv_compact"])
def test_compiled_as_one_graph(op: str) -> None:
    case = SMALL[op]
    inputs = case.build(torch.device("cuda"))
    wanted = [x.clone() for x in tensors(case.run(**inputs))]

    def flat(**inputs: Any) -> Any:
        result = case.run(**inputs)
        return (result.mask, result.positions, result.cu_seqlens) if isinstance(result, Packing) else result

    torch._dynamo.reset()
    got = tensors(torch.compile(flat, fullgraph=True)(**inputs))
    wanted = wanted[: len(got)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_store_above_two_gigabytes() -> None:
    """Offsets of 64 bits: 1.25 * 2^31 elements, of which the last row is looked at."""
    store = torch.zeros(5, 2, 16, 2**11, 64, 128, dtype=torch.bfloat16, device="cuda")
    store[-1, -1, -1, 9:12] = torch.arange(1, 4, device="cuda", dtype=torch.bfloat16)[:, None, None]
    long = {"dtype": torch.int64, "device": "cuda"}
    lengths, count = torch.full((16,), 5, **long), torch.full((16,), 3, **long)
    kv_compact(store, lengths, torch.tensor([[4, 5, 6]] * 16, **long), count)
    assert store[-1, -1, -1, 5:8, -1, -1].tolist() == [1.0, 2.0, 3.0]
    assert not store[:-1].any()


def test_gradients_through_a_training_step_are_the_same_every_time() -> None:
    tokens = torch.randn(4, 1024, 256, device="cuda", dtype=torch.bfloat16)
    scores = torch.rand(4, 1024, device="cuda")
    found = []
    for _ in range(5):
        x, p = tokens.clone().requires_grad_(), scores.clone().requires_grad_()
        packing = pack_top(p, 256)
        kept = pack(x, packing)
        whole = dechunk(kept, packing.positions, p, packing.mask, (32, 32), rows=packing.rows)
        (whole.float().cos().sum() + scatter(kept, packing).float().sin().sum()).backward()
        found.append((x.grad, p.grad))
    for x_grad, p_grad in found[1:]:
        assert torch.equal(x_grad, found[0][0]) and torch.equal(p_grad, found[0][1])


def test_de_chunking_needs_no_more_memory_than_tokens_and_grid() -> None:
    case = next(case for case in CASES if case.op == "dechunk" and case.size == "64² x 16")
    inputs = case.build(torch.device("cuda"))
    case.run(**inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = case.run(**inputs)
    extra = torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()
    tokens = inputs["tokens"]
    assert extra < tokens.numel() * tokens.element_size() + 8 * 2**20, extra / 2**20
