"""Gated residual, norm and modulation: the kernel against a float64 oracle, forward and backward."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_checks import DEVICE, DTYPES, assert_matches, lay_out, layouts, random
from torch import Tensor

from fastgen.kernels.adaln import adaln, adaln_reference, can_use_triton, rms_norm
from fastgen.kernels.dispatch import ran, use_kernels

pytestmark = pytest.mark.usefixtures("triton_kernels")

# What each model's block asks for: tensors by name, and options.
DIT: dict[str, Any] = {"tensors": ("update", "gate", "scale", "shift"), "norm": "layer"}
DIT_FIRST: dict[str, Any] = {"tensors": ("scale", "shift"), "norm": "layer"}
Z_FIRST: dict[str, Any] = {"tensors": ("scale", "weight"), "norm": "rms"}
Z_MIDDLE: dict[str, Any] = {
    "tensors": ("update", "gate", "scale", "weight", "update_weight"),
    "norm": "rms",
    "update_norm": True,
    "tanh_gate": True,
}
Z_LAST: dict[str, Any] = {
    "tensors": ("update", "gate", "update_weight"),
    "norm": "none",
    "update_norm": True,
    "tanh_gate": True,
}
PLAIN: dict[str, Any] = {"tensors": ("update", "weight", "bias"), "norm": "layer", "eps": 1e-2}
ALL: dict[str, Any] = {
    "tensors": ("update", "gate", "scale", "shift", "weight", "bias", "update_weight"),
    "norm": "rms",
    "update_norm": True,
    "tanh_gate": True,
}
FORMS = {
    "dit": DIT,
    "dit_first": DIT_FIRST,
    "z_first": Z_FIRST,
    "z_middle": Z_MIDDLE,
    "z_last": Z_LAST,
    "plain": PLAIN,
    "all": ALL,
}
SHAPES = ((2, 5, 64), (1, 1, 1), (3, 7, 123), (5, 2, 48), (1, 3, 1152), (2, 0, 16))


def build(
    form: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, samples: int | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """hidden, the tensors and the options of a form; conditioning as strided views of one tensor, as in models."""
    samples = shape[0] if samples is None else samples
    width = shape[-1]
    chunks = random(samples, 6 * width, seed=1, dtype=dtype).chunk(6, dim=1)
    made = {
        "update": random(*shape, seed=2, dtype=dtype),
        "gate": chunks[2],
        "scale": chunks[0],
        "shift": chunks[4],
        **{name: random(width, seed=3 + i, dtype=dtype) for i, name in enumerate(("weight", "bias", "update_weight"))},
    }
    options = {name: value for name, value in form.items() if name != "tensors"}
    return random(*shape, seed=0, dtype=dtype), {name: made[name] for name in form["tensors"]}, options


def check(hidden: Tensor, tensors: dict[str, Tensor], options: dict[str, Any], **packed: Tensor) -> None:
    """Kernel against oracle; z against the norm of the kernel's own rounded y."""
    y, z = adaln(hidden, **tensors, **options, **packed)
    assert ran() == {"adaln": "triton"}
    ids = {name: value for name, value in packed.items() if name == "sequence_ids"}
    wide = {name: value.double() for name, value in tensors.items()}
    expected, _ = adaln_reference(hidden.double(), **wide, **options, **ids)
    if "update" in tensors:
        assert_matches(y, expected, "y")
    else:
        assert y is hidden
    for name in ("update", "gate", "update_weight"):
        wide.pop(name, None)
    _, expected = adaln_reference(y.double(), **wide, **options, **ids)
    assert_matches(z, expected, "z")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_padded(form: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(*build(FORMS[form], shape, dtype))


@pytest.mark.parametrize("ids", [[0, 0, 2, 2, 2, 1], [1], [], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("form", ["dit", "z_middle", "dit_first"])
def test_packed_rows_look_up_their_sample(form: str, ids: list[int]) -> None:
    hidden, tensors, options = build(FORMS[form], (len(ids), 40), torch.float32, samples=4)
    check(hidden, tensors, options, sequence_ids=torch.tensor(ids, dtype=torch.int64, device=DEVICE))


def test_packed_equals_padded_sample_by_sample() -> None:
    hidden, tensors, options = build(DIT, (3, 4, 40), torch.float32)
    expected = adaln(hidden, **tensors, **options)
    tensors["update"] = tensors["update"].flatten(0, 1)
    ids = torch.arange(3, device=DEVICE, dtype=torch.int32).repeat_interleave(4)
    actual = adaln(hidden.flatten(0, 1), **tensors, **options, sequence_ids=ids)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.view_as(b), b)


def test_one_row_of_conditioning_serves_all_samples() -> None:
    hidden, tensors, options = build(DIT, (3, 4, 40), torch.float32, samples=1)
    check(hidden, tensors, options)
    hidden, tensors, options = build(DIT, (5, 40), torch.float32, samples=1)
    check(hidden, tensors, options)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("bounds", [True, False])
@pytest.mark.parametrize("rows", [{"gate": 1, "scale": 1, "shift": 1}, {"gate": 1, "scale": 3, "shift": 1}], ids=str)
def test_one_row_of_conditioning_serves_all_packed_sequences(rows: dict[str, int], bounds: bool, mode: str) -> None:
    """As that row for each of them, forward and backward."""
    ids = torch.tensor([0, 0, 2, 2, 2], device=DEVICE)
    hidden, tensors, options = build(DIT, (5, 40), torch.float32, samples=3)
    tensors |= {name: tensors[name][:count] for name, count in rows.items()}
    packed = {"sequence_ids": ids}
    if bounds:
        packed["cu_seqlens"] = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)

    def spread(hidden: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        given |= {name: given[name].expand(3, -1) for name in rows}
        return adaln_reference(hidden, **given, sequence_ids=ids)

    with use_kernels(mode):
        made = adaln(hidden, **tensors, **options, **packed)
        actual = gradients(hidden, tensors, options, adaln, **packed)
    wide = {name: value.double() for name, value in tensors.items()}
    for a, b in zip(made, spread(hidden.double(), **wide), strict=True):
        assert_matches(a, b, rms=1e-5, ulp=512)
    expected = gradients(hidden.double(), wide, {}, spread)
    assert actual.keys() == expected.keys() == {"hidden", *tensors}
    for name in actual:
        assert actual[name].shape == tensors.get(name, hidden).shape
        assert_matches(actual[name], expected[name], name, rms=1e-5, ulp=512)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(1, 70)),
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(DTYPES),
    hidden_layout=layouts(),
    update_layout=layouts("contiguous", "row_stride", "transposed", "misaligned", "slice", "huge_stride"),
)
def test_any_shape_and_layout(
    shape: tuple[int, int, int], form: str, dtype: torch.dtype, hidden_layout: str, update_layout: str
) -> None:
    hidden, tensors, options = build(FORMS[form], shape, dtype)
    hidden = lay_out(hidden, hidden_layout)
    if "update" in tensors:
        tensors["update"] = lay_out(tensors["update"], update_layout)
    if hidden.stride(-1) != 1 and shape[-1] > 1:
        with pytest.raises(ValueError, match="adaln: the Triton kernel cannot run: it takes tensors whose last axis"):
            adaln(hidden, **tensors, **options)
        hidden = hidden.contiguous()
    check(hidden, tensors, options)


def test_mixed_dtypes_promote_as_pytorch_does() -> None:
    hidden, tensors, options = build(Z_MIDDLE, (2, 3, 32), torch.bfloat16)
    tensors["scale"] = tensors["scale"].float()
    y, z = adaln(hidden, **tensors, **options)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    y, z = adaln(hidden.float(), **tensors, **options)
    assert (y.dtype, z.dtype) == (torch.float32, torch.float32)


def test_large_means_do_not_cancel() -> None:
    hidden, tensors, options = build(DIT_FIRST, (2, 3, 64), torch.float32)
    hidden = hidden + 1000
    _, z = adaln(hidden, **tensors, **options)
    _, expected = adaln_reference(hidden.double(), **{n: t.double() for n, t in tensors.items()}, **options)
    # The input's own rounding: 1000 has a unit of 6e-5.
    assert_matches(z, expected, ulp=4000, rms=1e-4)


def test_constant_rows_give_the_shift() -> None:
    hidden, tensors, options = build(DIT_FIRST, (2, 3, 64), torch.float32)
    _, z = adaln(torch.full_like(hidden, 2.5), **tensors, **options)
    assert_matches(z, tensors["shift"][:, None].expand_as(z).double())


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients(
    hidden: Tensor,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    function: Any,
    rounded: torch.dtype = torch.float32,
    **packed: Tensor,
) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in {"hidden": hidden, **tensors}.items()}
    given = dict(leaves)
    y, z = function(given.pop("hidden"), **given, **options, **packed)
    weights = [random(*y.shape, seed=8 + i, dtype=rounded).to(y) for i in range(2)]
    ((y * weights[0]).sum() + (z * weights[1]).sum()).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 5, 40), (1, 1, 3), (3, 2, 123)], ids=str)
def test_gradients_match_those_of_the_oracle(form: str, shape: tuple[int, ...]) -> None:
    hidden, tensors, options = build(FORMS[form], shape, torch.float32)
    actual = gradients(hidden, tensors, options, adaln)
    wide = {name: value.double() for name, value in tensors.items()}
    expected = gradients(hidden.double(), wide, options, adaln_reference)
    assert actual.keys() == expected.keys() == {"hidden", *tensors}
    for name in actual:
        assert_matches(actual[name], expected[name], name, rms=1e-5, ulp=512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    hidden, tensors, options = build(ALL, (2, 5, 40), dtype)
    actual = gradients(hidden, tensors, options, adaln, dtype)
    wide = {name: value.double() for name, value in tensors.items()}
    expected = gradients(hidden.double(), wide, options, adaln_reference, dtype)
    for name in actual:
        assert actual[name].dtype == dtype
        # y was rounded before the norm: a unit or two more than one rounding.
        assert_matches(actual[name], expected[name], name, rms=torch.finfo(dtype).eps, ulp=16)


@pytest.mark.parametrize("sorted_ids", [True, False])
def test_gradients_of_packed_sequences(sorted_ids: bool) -> None:
    ids = torch.tensor([0, 0, 0, 2, 2, 3] if sorted_ids else [2, 0, 3, 0, 2, 0], device=DEVICE)
    packed = {"sequence_ids": ids}
    hidden, tensors, options = build(ALL, (6, 40), torch.float32, samples=4)
    wide = {name: value.double() for name, value in tensors.items()}
    expected = gradients(hidden.double(), wide, options, adaln_reference, **packed)
    if sorted_ids:
        packed["cu_seqlens"] = torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32, device=DEVICE)
    actual = gradients(hidden, tensors, options, adaln, **packed)
    for name in actual:
        assert_matches(actual[name], expected[name], name, rms=1e-5, ulp=512)
    assert not actual["gate"][1].any()


def test_gradients_of_one_output_and_of_expanded_ones() -> None:
    hidden, tensors, options = build(DIT, (2, 3, 40), torch.float32)
    for which in (0, 1):
        results = []
        for function, kind in ((adaln, torch.float32), (adaln_reference, torch.float64)):
            leaf = hidden.detach().to(kind).requires_grad_()
            given = {name: value.to(kind) for name, value in tensors.items()}
            function(leaf, **given, **options)[which].sum().backward()
            results.append(leaf.grad)
        assert_matches(results[0], results[1], rms=1e-5, ulp=512)


@pytest.mark.filterwarnings("ignore:Input #")  # it is not in float64: the steps below are made for that
def test_gradcheck() -> None:
    hidden, tensors, options = build(DIT, (1, 2, 6), torch.float32)
    names = list(tensors)

    def function(hidden: Tensor, *values: Tensor) -> Any:
        return adaln(hidden, **dict(zip(names, values, strict=True)), **options)

    inputs = [value.detach().clone().requires_grad_() for value in (hidden, *tensors.values())]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-2, rtol=1e-2, fast_mode=True)


def test_gradients_are_the_same_twice() -> None:
    hidden, tensors, options = build(ALL, (2, 9, 40), torch.float32)
    first, second = (gradients(hidden, tensors, options, adaln) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- compilers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dit", "z_last", "dit_first"])
def test_operator(form: str) -> None:
    hidden, tensors, options = build(FORMS[form], (2, 3, 8), torch.float32)
    names = ("update", "gate", "scale", "shift", "weight", "bias", "update_weight")
    inputs = [value.detach().clone().requires_grad_() for value in (hidden, *tensors.values())]
    given = dict(zip(("hidden", *tensors), inputs, strict=True))
    chosen = {"eps": 1e-6, "update_norm": False, "update_eps": 1e-6, "tanh_gate": False, **options}
    arguments = (given["hidden"], *(given.get(name) for name in names), None, None, chosen["norm"], chosen["eps"])
    arguments += (chosen["update_norm"], chosen["update_eps"], chosen["tanh_gate"])
    torch.library.opcheck(torch.ops.fastgen.adaln.default, arguments)
    if form == "dit":  # with a sum and its norm: the others are never visible
        plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        torch.library.opcheck(torch.ops.fastgen.adaln_visible.default, plain)


def test_compiled_in_one_graph() -> None:
    hidden, tensors, options = build(Z_MIDDLE, (2, 3, 40), torch.float32)
    expected = gradients(hidden, tensors, options, adaln)
    compiled = torch.compile(adaln, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    actual = gradients(hidden, tensors, options, compiled)
    for name in expected:
        assert_matches(actual[name], expected[name].double(), name)


def test_one_graph_serves_all_sizes() -> None:
    torch._dynamo.reset()
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(adaln, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n, length in ((2, 3), (3, 5), (4, 2)):
            hidden, tensors, options = build(DIT, (n, length, 40), torch.float32)
            expected = adaln(hidden, **tensors, **options)
            # The compiler starts the same kernel, with settings of its own.
            for actual, wanted in zip(compiled(hidden, **tensors, **options), expected, strict=True):
                assert_matches(actual, wanted.double())
    torch._dynamo.reset()
    compiled = torch.compile(adaln, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 9, 4):
            hidden, tensors, options = build(DIT, (tokens, 40), torch.float32, samples=3)
            packed = {"sequence_ids": torch.arange(tokens, device=DEVICE) * 3 // tokens}
            expected = adaln(hidden, **tensors, **options, **packed)
            for actual, wanted in zip(compiled(hidden, **tensors, **options, **packed), expected, strict=True):
                assert_matches(actual, wanted.double())


def test_exported() -> None:
    hidden, tensors, options = build(DIT, (2, 3, 40), torch.float32)

    class Block(torch.nn.Module):
        def forward(self, hidden: Tensor, update: Tensor, conditioning: Tensor) -> Any:
            scale, shift, gate = conditioning.chunk(3, dim=1)
            return adaln(hidden, update=update, gate=gate, scale=scale, shift=shift)

    conditioning = torch.cat([tensors["scale"], tensors["shift"], tensors["gate"]], dim=1)
    inputs = (hidden, tensors["update"], conditioning)
    program = torch.export.export(Block(), inputs).module()
    for actual, expected in zip(program(*inputs), Block()(*inputs), strict=True):
        assert torch.equal(actual, expected)


# --- the reference, and what is not allowed ----------------------------------------------------------------------


def test_the_reference_is_what_models_compute() -> None:
    from diffusers.models.normalization import AdaLayerNormZero, RMSNorm

    norm = AdaLayerNormZero(32).to(DEVICE)
    x, condition = random(2, 3, 32), random(2, 32, seed=1)
    z, gate, *_ = norm(x, emb=condition)
    shift, scale, *_ = norm.linear(norm.silu(condition)).chunk(6, dim=1)
    assert_matches(adaln_reference(x, scale=scale, shift=shift)[1], z.double())
    for dtype in DTYPES:
        rms = RMSNorm(32, eps=1e-5).to(DEVICE, dtype)
        with torch.no_grad():
            rms.weight.copy_(random(32, seed=2))
        assert torch.equal(rms_norm(x.to(dtype), rms.weight, 1e-5), rms(x.to(dtype)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (4,)}, "hidden: needs floats"),
        ({"update": (2, 3, 7)}, r"update: needs floats \(2, 3, 8\), got torch.float32 \(2, 3, 7\)"),
        ({"gate": (3, 8)}, r"gate: needs 2 rows, got \(3, 8\)"),
        ({"scale": (2, 1, 8)}, r"scale: needs floats \[n, 8\]"),
        ({"shift": (2, 9)}, r"shift: needs floats \[n, 8\]"),
        ({"weight": (9,)}, r"weight: needs floats \[8\]"),
        ({"update_weight": (1, 8)}, r"update_weight: needs floats \[8\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_shapes_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str, mode: str) -> None:
    shapes = {"hidden": (2, 3, 8), "update": (2, 3, 8), "gate": (2, 8), "scale": (2, 8), "shift": (2, 8)} | change
    made = {name: random(*shape) for name, shape in shapes.items()}
    with use_kernels(mode), pytest.raises(ValueError, match=message):
        adaln(made.pop("hidden"), **made)


def test_wrong_values_of_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_KERNELS_DEBUG", "1")
    x, c = random(4, 8), random(2, 8)
    for wrong in ([0, 0, 2, 1], [0, -1, 1, 1]):
        with pytest.raises(ValueError, match=r"sequence_ids: needs numbers in 0 … 1, got (2|-1)"):
            adaln(x, scale=c, sequence_ids=torch.tensor(wrong, device=DEVICE))
    ids = torch.tensor([0, 0, 0, 1], device=DEVICE)
    for wrong in ([0, 3, 5], [1, 3, 4], [0, 5, 4]):
        with pytest.raises(ValueError, match=r"cu_seqlens: needs increasing bounds from 0 to 4, got \["):
            adaln(x, scale=c, sequence_ids=ids, cu_seqlens=torch.tensor(wrong, device=DEVICE))


def test_wrong_norm_ids_and_dtypes() -> None:
    x, c = random(4, 8), random(2, 8)
    with pytest.raises(ValueError, match="norm: 'batch' is unknown; choose one of layer, rms, none"):
        adaln(x, norm="batch")
    with pytest.raises(ValueError, match="sequence_ids: needs one number for each row"):
        adaln(x, scale=c, sequence_ids=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="sequence_ids: needs int32 or int64, got torch.float32"):
        adaln(x, scale=c, sequence_ids=torch.zeros(4, device=DEVICE))
    ids = torch.tensor([0, 0, 0, 1], device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens: is unused without sequence_ids"):
        adaln(x, scale=c[:1], cu_seqlens=torch.zeros(3, dtype=torch.int32, device=DEVICE))
    for bounds in (torch.zeros(3, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)):
        with pytest.raises(ValueError, match=r"cu_seqlens: needs int32 or int64 \[n \+ 1\]"):
            adaln(x, scale=c, sequence_ids=ids, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="it takes float32, float16 and bfloat16, not torch.float64"):
        adaln(x.double(), scale=c.double()[:1])
    assert can_use_triton(x, scale=c)
    assert not can_use_triton(x.double())
    with use_kernels("auto"):
        _, z = adaln(x.double(), scale=c.double()[:1])
    assert z.dtype == torch.float64
    assert ran()["adaln"] == "reference"
