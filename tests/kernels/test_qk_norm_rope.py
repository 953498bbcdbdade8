"""Norm and rotation of queries and keys: the kernel against a float64 oracle, forward, backward and in place."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_checks import DEVICE, DTYPES, assert_matches, lay_out, layouts, random
from long_tail import long_tail
from torch import Tensor

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.qk_norm_rope import can_use_triton, qk_norm_rope, qk_norm_rope_reference

pytestmark = pytest.mark.usefixtures("triton_kernels")

WEIGHTS = ("query_weight", "key_weight", "query_bias", "key_bias")


def table(rows: int, width: int, samples: int | None = None, seed: int = 5) -> dict[str, Tensor]:
    shape = (rows, width // 2) if samples is None else (samples, rows, width // 2)
    angle = random(*shape, seed=seed) * 3
    return {"cos": angle.cos(), "sin": angle.sin()}


def vectors(width: int, dtype: torch.dtype, bias: bool = False) -> dict[str, Tensor]:
    return {name: random(width, seed=10 + i, dtype=dtype) for i, name in enumerate(WEIGHTS[: 4 if bias else 2])}


def qk(shape: tuple[int, ...], key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(*shape, seed=0, dtype=dtype), random(*shape[:-2], key_heads, shape[-1], seed=1, dtype=dtype)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in arguments.items()}


def check(query: Tensor, key: Tensor, **arguments: Any) -> None:
    turned = qk_norm_rope(query, key, **arguments)
    assert ran() == {"qk_norm_rope": "triton"}
    expected = qk_norm_rope_reference(query.double(), key.double(), **widened(arguments))
    for name, actual, oracle in zip(("query", "key"), turned, expected, strict=True):
        assert actual.dtype == query.dtype
        assert_matches(actual, oracle, name)


@pytest.mark.parametrize("dtype", long_tail(DTYPES, fast=(torch.float32,)), ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_norms_layouts_and_shapes(norm: str, interleaved: bool, dtype: torch.dtype) -> None:
    for shape, key_heads in (
        ((2, 3, 4, 16), 2),
        ((1, 1, 1, 2), 1),
        ((2, 2, 3, 72), 3),
        ((5, 5, 128), 1),
        ((0, 2, 8), 2),
    ):
        length, width = shape[-3], shape[-1]
        arguments = {**table(length, width), "norm": norm, "interleaved": interleaved, "eps": 1e-5}
        if norm != "none":
            arguments |= vectors(width, dtype, bias=norm == "layer")
        check(*qk(shape, key_heads, dtype), **arguments)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_kept_tokens_keep_their_positions(kind: torch.dtype) -> None:
    kept = torch.tensor([0, 3, 4, 11, 3], dtype=kind, device=DEVICE)
    query, key = qk((5, 2, 16), 2, torch.float32)
    tables = table(12, 16)
    check(query, key, **tables, positions=kept, **vectors(16, torch.float32))
    gathered = {name: value[kept.long()] for name, value in tables.items()}
    for a, b in zip(
        qk_norm_rope(query, key, **tables, positions=kept), qk_norm_rope(query, key, **gathered), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axes", long_tail([(16,), (6, 10), (4, 6, 6)], fast=((4, 6, 6),)), ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("samples", [None, 1, 2])
def test_axes_have_positions_of_their_own(axes: tuple[int, ...], interleaved: bool, samples: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (3,) if samples is None else (samples, 3)
    positions = torch.randint(0, 9, (*shape, *((len(axes),) if len(axes) > 1 else ())), generator=generator)
    arguments = {"positions": positions.to(DEVICE), "axes": axes, "interleaved": interleaved}
    query, key = qk((2, 3, 2, 16), 1, torch.float32)
    check(query, key, **table(9, 16), **arguments)
    check(query, key, **table(9, 16, samples=2), **arguments)


def test_axes_rotate_by_row_and_column() -> None:
    """Against an oracle of its own: two axes written out."""
    rows, columns = torch.tensor([0, 1, 2], device=DEVICE), torch.tensor([4, 0, 3], device=DEVICE)
    angle = torch.outer(torch.arange(5, device=DEVICE), 0.5 ** torch.arange(4, device=DEVICE)).double()
    query, key = qk((3, 1, 8), 1, torch.float32)
    turned, _ = qk_norm_rope(
        query,
        key,
        angle.cos().float(),
        angle.sin().float(),
        positions=torch.stack([rows, columns], dim=1),
        axes=(4, 4),
        norm="none",
    )
    pairs = torch.view_as_complex(query.double().unflatten(-1, (4, 2)))
    phase = torch.cat([angle[rows, :2], angle[columns, 2:]], dim=1)[:, None]
    assert_matches(turned, torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2))


def test_tables_by_sample_and_strided_tables() -> None:
    query, key = qk((2, 3, 2, 8), 2, torch.float32)
    check(query, key, **table(3, 8, samples=2))
    complex_table = torch.polar(torch.ones(2, 3, 4), random(2, 3, 4).cpu()).to(DEVICE)  # as Z-Image has it
    check(query, key, cos=torch.view_as_real(complex_table)[..., 0], sin=torch.view_as_real(complex_table)[..., 1])
    repeated = {
        name: value.repeat_interleave(2, dim=1)[:, ::2] for name, value in table(3, 8).items()
    }  # as FLUX has it
    check(query, key, **repeated)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 5), st.integers(1, 20).map(lambda n: 2 * n)),
    key_heads=st.integers(1, 5),
    norm=st.sampled_from(["rms", "layer", "none"]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    layout=layouts("contiguous", "row_stride", "misaligned", "slice", "transposed", "huge_stride"),
)
def test_any_shape_and_layout(
    shape: tuple[int, ...], key_heads: int, norm: str, dtype: torch.dtype, interleaved: bool, layout: str
) -> None:
    query, key = (lay_out(x, layout) for x in qk(shape, key_heads, dtype))
    # A layer norm of two features that are nearly equal is their difference, blown up: eps keeps it well conditioned.
    check(query, key, **table(shape[1], shape[-1]), norm=norm, interleaved=interleaved, eps=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_on_slices_of_a_packed_qkv(compiled: bool) -> None:
    qkv = random(2, 3, 3, 4, 16)
    before = qkv.clone()
    arguments = {**table(3, 16), **vectors(16, torch.float32)}
    expected = qk_norm_rope(before[:, :, 0], before[:, :, 1, :2], **arguments)

    def work(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(qkv[:, :, 0], qkv[:, :, 1, :2], **arguments, inplace=True)

    if compiled:
        work = torch.compile(work, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    query, key = work(qkv)
    for actual, wanted, there in zip((query, key), expected, (qkv[:, :, 0], qkv[:, :, 1, :2]), strict=True):
        assert torch.equal(actual, wanted)
        assert torch.equal(there, wanted)
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])
    assert torch.equal(qkv[:, :, 1, 2:], before[:, :, 1, 2:])
    if not compiled:
        assert query.data_ptr() == qkv.data_ptr()
    with use_kernels("reference"):
        again = qk_norm_rope(before[:, :, 0], before[:, :, 1, :2], **arguments, inplace=True)
    assert again[0].data_ptr() == before.data_ptr()
    assert_matches(before[:, :, 0], expected[0].double())


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients(
    function: Any, query: Tensor, key: Tensor, arguments: dict[str, Any], rounded: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    names = ("query", "key", *(name for name in WEIGHTS if name in arguments))
    everything = {"query": query, "key": key, **arguments}
    leaves = {name: everything[name].detach().clone().requires_grad_() for name in names}
    turned = function(**{**everything, **leaves})
    sum((x * random(*x.shape, seed=20 + i, dtype=rounded).to(x)).sum() for i, x in enumerate(turned)).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_gradients_match_those_of_the_oracle(norm: str, interleaved: bool) -> None:
    arguments = {**table(9, 16), "norm": norm, "interleaved": interleaved, "axes": (6, 10)}
    arguments["positions"] = torch.tensor([[1, 2], [8, 0], [3, 3]], device=DEVICE)
    if norm != "none":
        arguments |= vectors(16, torch.float32, bias=norm == "layer")
    query, key = qk((2, 3, 3, 16), 1, torch.float32)
    actual = gradients(qk_norm_rope, query, key, arguments)
    expected = gradients(qk_norm_rope_reference, query.double(), key.double(), widened(arguments))
    for name in expected:
        assert_matches(actual[name], expected[name], name, rms=1e-5, ulp=256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_of_strided_inputs(dtype: torch.dtype) -> None:
    qkv = random(2, 3, 3, 2, 24, dtype=dtype)
    arguments = {**table(3, 24), **vectors(24, dtype)}
    query, key = qkv[:, :, 0], qkv[:, :, 1]
    actual = gradients(qk_norm_rope, query, key, arguments, dtype)
    expected = gradients(qk_norm_rope_reference, query.double(), key.double(), widened(arguments), dtype)
    for name in expected:
        assert actual[name].dtype == dtype
        assert_matches(actual[name], expected[name], name, ulp=1.1)


def test_gradients_of_one_of_both_and_without_weights() -> None:
    query, key = qk((2, 3, 2, 8), 2, torch.float32)
    leaf = query.clone().requires_grad_()
    qk_norm_rope(leaf, key, **table(3, 8))[0].sum().backward()
    wide = query.double().requires_grad_()
    qk_norm_rope_reference(wide, key.double(), **widened(table(3, 8)))[0].sum().backward()
    assert_matches(leaf.grad, wide.grad, rms=1e-5, ulp=256)
    with pytest.raises(ValueError, match="inplace: is not possible"):
        qk_norm_rope(leaf, key, **table(3, 8), inplace=True)


# --- compilers ---------------------------------------------------------------------------------------------------


def test_operators() -> None:
    query, key = qk((2, 3, 2, 8), 1, torch.float32)
    tables = table(3, 8)
    weights = [random(8, seed=i).requires_grad_() for i in range(2)]
    rest = (tables["cos"], tables["sin"], None, [8], *weights, None, None, "rms", 1e-6, True)
    torch.library.opcheck(
        torch.ops.fastgen.qk_norm_rope.default, (query.requires_grad_(), key.requires_grad_(), *rest)
    )
    rest = (tables["cos"], tables["sin"], None, [8], None, None, None, None, "rms", 1e-6, True)
    torch.library.opcheck(torch.ops.fastgen.qk_norm_rope_visible.default, (query.detach(), key.detach(), *rest))
    torch.library.opcheck(torch.ops.fastgen.qk_norm_rope_.default, (query.detach(), key.detach(), *rest))


def test_compiled_in_one_graph() -> None:
    query, key = qk((2, 3, 2, 8), 1, torch.float32)
    arguments = {**table(3, 8), **vectors(8, torch.float32)}
    expected = gradients(qk_norm_rope, query, key, arguments)
    compiled = torch.compile(
        qk_norm_rope, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager"
    )
    actual = gradients(compiled, query, key, arguments)
    for name in expected:
        assert_matches(actual[name], expected[name].double(), name)


def test_one_graph_serves_all_sizes() -> None:
    torch._dynamo.reset()
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(qk_norm_rope, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n, length in ((2, 3), (3, 5), (4, 2)):
            query, key = qk((n, length, 7, 8), 7, torch.float32)  # equal sizes would be one symbol
            positions = torch.arange(n * length, device=DEVICE).view(n, length) % 9
            arguments = {**table(9, 8), **vectors(8, torch.float32), "positions": positions}
            expected = qk_norm_rope(query, key, **arguments)
            # The compiler starts the same kernel, with settings of its own.
            for actual, wanted in zip(compiled(query, key, **arguments), expected, strict=True):
                assert_matches(actual, wanted.double())


# --- the reference, and what is not allowed ----------------------------------------------------------------------


def test_the_reference_is_what_models_compute() -> None:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    from fastgen.models.layers import rotate_halves, rotate_pairs

    query, key = qk((2, 3, 2, 8), 2, torch.float32)
    tables = table(3, 8)
    cos, sin = tables["cos"], tables["sin"]
    turned, _ = qk_norm_rope_reference(query, key, cos, sin, norm="none")
    doubled = tuple(x.repeat_interleave(2, dim=1) for x in (cos, sin))
    assert_matches(turned, apply_rotary_emb(query, doubled, sequence_dim=1).double())
    assert_matches(turned, apply_rotary_emb_qwen(query, torch.complex(cos, sin), use_real=False).double())
    assert_matches(turned, rotate_pairs(query, (cos, sin)).double())
    turned, _ = qk_norm_rope_reference(query, key, cos, sin, norm="none", interleaved=False)
    assert_matches(turned, rotate_halves(query, tuple(torch.cat([x, x], dim=-1) for x in (cos, sin))).double())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the reference on a CPU")
@pytest.mark.parametrize("interleaved", long_tail([True, False], fast=(True,)))
def test_the_reference_on_a_cpu_equals_its_compiled_form(interleaved: bool) -> None:
    for dtype in (*DTYPES, torch.float64):
        query, key = (lay_out(x, "slice") for x in qk((2, 3, 2, 24), 1, dtype))
        tables = {name: value.double() if dtype == torch.float64 else value for name, value in table(3, 24).items()}
        compiled = torch.compile(qk_norm_rope_reference, backend="eager")
        expected = compiled(query, key, **tables, interleaved=interleaved)
        actual = qk_norm_rope_reference(query, key, **tables, interleaved=interleaved)
        for a, b in zip(actual, expected, strict=True):
            assert_matches(a, b.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": random(2, 3, 2, 7)}, "query: needs floats .* d even"),
        ({"key": random(2, 4, 2, 8)}, "key: needs the shape and dtype of query but for its heads"),
        ({"key": random(2, 3, 2, 8).half()}, "key: needs the shape and dtype of query"),
        ({"norm": "group"}, "norm: 'group' is unknown; choose one of rms, layer, none"),
        ({"sin": None}, "cos, sin: need both or neither"),
        ({"cos": random(3, 8)}, r"cos: needs floats \[P, 4\]"),
        ({"cos": random(4, 4)}, "cos: needs a row for each of 3 tokens"),
        ({"axes": (3, 5)}, "axes: needs one to three even numbers that add up to 8"),
        ({"axes": (4, 4)}, "axes: are unused without positions"),
        ({"positions": torch.zeros(4, dtype=torch.int64, device=DEVICE)}, "positions: needs "),
        ({"positions": torch.zeros(3, device=DEVICE)}, "positions: needs int32 or int64, got torch.float32"),
        ({"query_weight": random(9)}, r"query_weight: needs floats \[8\]"),
    ],
    ids=str,
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    query, key = qk((2, 3, 2, 8), 2, torch.float32)
    for mode in ("triton", "reference"):
        with use_kernels(mode), pytest.raises(ValueError, match=message):
            qk_norm_rope(**{"query": query, "key": key, **table(3, 8), **change})


def test_what_the_kernel_does_not_take() -> None:
    query, key = qk((2, 3, 2, 8), 2, torch.float32)
    assert can_use_triton(query, key)
    apart = lay_out(query, "inner_stride")
    assert not can_use_triton(apart, key)
    with pytest.raises(ValueError, match="last axis is contiguous"):
        qk_norm_rope(apart, key)
    with use_kernels("auto"):
        assert torch.equal(qk_norm_rope(apart, key)[0], qk_norm_rope_reference(query, key)[0])
