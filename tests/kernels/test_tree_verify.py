"""Verification of trees: the kernel takes the very tokens that its reference takes, under the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE
from torch import Tensor

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.tree_verify import Verified, tree_verify, tree_verify_reference

# parents and children of the topologies of the tests; a node's children are verified in this order.
TREES = {
    "chain": [[1], [2], [3], []],
    "one child": [[1], []],
    "bushy": [[1, 2, 3], [4, 5], [6], [], [], [], []],
    "lopsided": [[1, 2, 3], [4, 5], [], [], [6], [], []],
    "root alone": [[]],
}
DEPTH = {"chain": 3, "one child": 1, "bushy": 2, "lopsided": 3, "root alone": 0}


def laws(generator: torch.Generator, *shape: int) -> Tensor:
    """Laws with zeros in them."""
    x = torch.rand(*shape, generator=generator) ** 3 * (torch.rand(*shape, generator=generator) > 0.3)
    x[..., 0] += 1e-3
    return x / x.sum(dim=-1, keepdim=True)


def gumbel(generator: torch.Generator, *shape: int) -> Tensor:
    return -torch.log(-torch.log(torch.rand(*shape, generator=generator).clamp(1e-6, 1 - 1e-6)))


def case(
    name: str, batch: int, vocabulary: int, sampled: bool, seed: int, per_image: bool = False, every: bool = False
) -> dict[str, Any]:
    """Arguments of a verification; children drawn without replacement from q, or its most likely tokens."""
    generator, tree = torch.Generator().manual_seed(seed), TREES[name]
    n, most = len(tree), max(1, *map(len, tree))
    children = torch.tensor([nodes + [-1] * (most - len(nodes)) for nodes in tree])[None]
    target, draft = laws(generator, batch, n, vocabulary), laws(generator, batch, n, vocabulary)
    target = (target + draft) / 2
    tokens = torch.randint(vocabulary, (batch, n), generator=generator)
    for node, below in enumerate(tree):
        if below:
            scores = draft[:, node].log() + (gumbel(generator, batch, vocabulary) if sampled else 0)
            tokens[:, below] = scores.topk(len(below)).indices
    return {
        "target": target,
        "draft": draft if sampled else None,
        "tokens": tokens,
        "children": children.expand(batch, -1, -1).clone() if per_image else children,
        "internal": torch.tensor([i for i, nodes in enumerate(tree) if nodes or every], dtype=torch.int64),
        "coins": torch.rand(batch, n, generator=generator, dtype=torch.float64),
        "gumbel": gumbel(generator, batch, DEPTH[name] + 1 if per_image else 1, vocabulary),
        "remaining": torch.randint(0, 6, (batch,), generator=generator),
        "max_depth": DEPTH[name],
    }


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_same(got: Verified, wanted: Verified) -> None:
    for name in ("nodes", "length", "bonus"):
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name
    assert torch.allclose(got.stolen.cpu(), wanted.stolen, atol=1e-6)


@settings(max_examples=16, deadline=None)
@given(
    name=st.sampled_from(sorted(TREES)),
    batch=st.integers(1, 4),
    vocabulary=st.integers(4, 40),
    sampled=st.booleans(),
    relaxed=st.sampled_from(["exact", "factor", "classes", "greedy"]),
    per_image=st.booleans(),
    every=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_the_same_tokens_on_the_same_noise(
    name: str, batch: int, vocabulary: int, sampled: bool, relaxed: str, per_image: bool, every: bool, seed: int
) -> None:
    arguments = case(name, batch, vocabulary, sampled, seed, per_image, every)
    inner = len(arguments["internal"])
    if relaxed == "factor":
        arguments["factor"] = 1 + torch.rand(batch, inner)
    elif relaxed == "classes":
        arguments["classes"] = torch.randint(5, (batch, inner, vocabulary))
    elif relaxed == "greedy":
        arguments["coins"] = arguments["gumbel"] = None
        arguments["tokens"][:, 1:] = torch.where(
            torch.rand(batch, len(TREES[name]) - 1) < 0.5,
            arguments["target"].argmax(-1)[:, :1],
            arguments["tokens"][:, 1:],
        )
    with use_kernels("triton"):
        got = tree_verify(**on_device(arguments))
    assert ran()["tree_verify"] == "triton"
    assert_same(got, tree_verify_reference(**arguments))


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_relaxation_that_relaxes_nothing_is_the_exact_rule_bit_for_bit(mode: str) -> None:
    arguments = on_device(case("bushy", 8, 30, True, 5))
    inner = len(arguments["internal"])
    arguments["remaining"] += 9
    alone = torch.arange(30, device=DEVICE).expand(8, inner, -1).contiguous()
    with use_kernels(mode):
        exact = tree_verify(**arguments)
        for options in ({"factor": torch.ones(8, inner, device=DEVICE)}, {"classes": alone}):
            relaxed = tree_verify(**arguments, **options)
            assert all(torch.equal(a, b) for a, b in zip(exact, relaxed, strict=True))
    assert int(exact.length.sum()) > 3


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_coin_of_zero_does_not_accept_a_token_of_probability_zero(mode: str) -> None:
    arguments = on_device(case("one child", 1, 5, True, 0))
    arguments["target"][0, 0] = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])
    arguments["draft"][0, 0] = torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0])
    arguments["tokens"][0, 1] = 3
    arguments["coins"][:] = 0
    arguments["remaining"][:] = 9
    with use_kernels(mode):
        result = tree_verify(**arguments)
        assert result.length.tolist() == [0] and result.bonus.item() in (1, 2)
        # Nor a token that the draft cannot have drawn, whatever the target says.
        arguments["tokens"][0, 1] = 1
        assert tree_verify(**arguments).length.tolist() == [0]


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_equal_distributions_accept_all_and_an_empty_residual_falls_back(mode: str) -> None:
    arguments = on_device(case("chain", 2, 9, True, 1))
    arguments["draft"] = arguments["target"].clone()
    arguments["tokens"] = arguments["target"].argmax(-1)[:, [0, 0, 1, 2]]
    arguments["remaining"][:] = 9
    with use_kernels(mode):
        assert tree_verify(**arguments).length.tolist() == [3, 3]
        arguments["coins"][:] = 1.0  # refused although p equals q: the bonus then comes from p itself
        refused = tree_verify(**arguments)
    assert refused.length.tolist() == [0, 0]
    first = arguments["target"][:, 0].gather(1, refused.bonus[:, None])
    assert bool((first > 0).all())


@pytest.mark.parametrize("name", ["root alone", "one child"])
@pytest.mark.parametrize("relaxed", ["factor", "classes"])
def test_a_tree_of_which_no_node_is_listed(triton_kernels: None, name: str, relaxed: str) -> None:
    """Nothing is read from relaxations of no node."""
    arguments = case(name, 2, 9, True, 1)
    arguments["internal"] = arguments["internal"][:0]
    shapes = {"factor": torch.ones(2, 0), "classes": torch.zeros(2, 0, 9, dtype=torch.int64)}
    result = tree_verify(**on_device({**arguments, relaxed: shapes[relaxed]}))
    assert result.length.tolist() == [0, 0]
    law = arguments["target"][:, 0].log() + arguments["gumbel"][:, 0]
    assert torch.equal(result.bonus.cpu(), law.argmax(dim=-1))


def test_later_siblings_are_judged_by_what_is_left_of_the_draft(triton_kernels: None) -> None:
    """Many first children are refused here: with a q that is not renormalised other tokens would be taken."""
    arguments = case("bushy", 24, 6, True, 7)
    arguments["target"] = arguments["target"].flip(-1).contiguous()
    arguments["remaining"][:] = 9
    wanted = tree_verify_reference(**arguments)
    assert int((wanted.nodes[:, 1] > 1).sum()) > 4
    assert_same(tree_verify(**on_device(arguments)), wanted)


def test_a_large_vocabulary_takes_several_blocks(triton_kernels: None) -> None:
    arguments = case("bushy", 1, 9000, True, 3)
    arguments["remaining"][:] = 9
    arguments["coins"][:] = 0.999999
    assert_same(tree_verify(**on_device(arguments)), tree_verify_reference(**arguments))


def test_the_operator_passes_opcheck(triton_kernels: None) -> None:
    arguments = on_device(case("bushy", 2, 9, True, 2))
    checks = ("test_schema", "test_faketensor")
    values = (*arguments.values(), None, None)
    torch.library.opcheck(torch.ops.fastgen.tree_verify.default, values, test_utils=checks)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_one_graph(mode: str) -> None:
    arguments = on_device(case("bushy", 2, 9, True, 4))
    torch._dynamo.reset()  # a graph keeps its choice
    with use_kernels(mode):
        wanted = tree_verify(**arguments)
        got = torch.compile(tree_verify, fullgraph=True, backend="aot_eager")(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_bad_input() -> None:
    good = case("bushy", 2, 9, True, 2)
    inner = len(good["internal"])
    for message, change in {
        "target: needs float32": {"target": good["target"].double()},
        "draft: needs torch.float32": {"draft": good["draft"][:, :-1]},
        "tokens: needs torch.int64": {"tokens": good["tokens"].int()},
        "children: need": {"children": good["children"][:, :-1]},
        "coins, gumbel": {"coins": None},
        "tokens: needs numbers in 0 … 8, got 9": {"tokens": good["tokens"] * 0 + 9},
        "children: needs numbers": {"children": good["children"] + 9},
        "remaining: needs": {"remaining": good["remaining"][:1]},
        "one relaxation": {
            "factor": torch.ones(2, inner),
            "classes": torch.zeros(2, inner, 9, dtype=torch.int64),
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            tree_verify(**{**good, **change})
