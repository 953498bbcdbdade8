"""`count_flops` against `torch.utils.flop_counter` on the real model classes, and against arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_models import micro_z_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgen.accounting import account, count_flops


def ours(work: Callable[[], Any]) -> int:
    with account() as stats, count_flops():
        work()
    return stats.flops


def theirs(work: Callable[[], Any]) -> int:
    """torch's counter has no formula for the fused CPU attention; in the math backend it sees the two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def z_image() -> Callable[[], Any]:
    model = micro_z_transformer().eval()
    images = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 12, 8)]  # unequal sizes: padding counts as it is computed
    captions = [torch.randn(5, 24), torch.randn(9, 24)]
    return lambda: model(images, torch.tensor([0.2, 0.7]), captions, patch_size=2, f_patch_size=1)


def autoencoder() -> Callable[[], Any]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=True,
    ).eval()
    image = torch.randn(2, 3, 16, 24)
    return lambda: model(image)


TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama() -> Callable[[], Any]:
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(LlamaConfig(**TEXT, **HEADS)).eval()
    tokens = torch.randint(0, 50, (2, 11))

    def prefill_and_step() -> None:
        cache = model(tokens, use_cache=True).past_key_values
        model(tokens[:, :1], past_key_values=cache)

    return prefill_and_step


def qwen3() -> Callable[[], Any]:
    from transformers import Qwen3Config, Qwen3Model

    model = Qwen3Model(Qwen3Config(**TEXT, **HEADS, head_dim=12)).eval()
    tokens = torch.randint(0, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    return lambda: model(tokens, attention_mask=mask)


def janus_vqvae() -> Callable[[], Any]:
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    model = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=4,
            num_embeddings=32,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=8,
            projection_dim=16,
            image_token_embed_dim=16,
            num_hidden_layers=1,
        )
    ).eval()
    image = torch.randn(1, 3, 16, 16)
    return lambda: model.decode(model.encode(image).image_tokens.reshape(1, -1))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [z_image, autoencoder, llama, qwen3, janus_vqvae])
def test_models_cost_what_torch_counts(build: Callable[[], Callable[[], Any]], inference: Any) -> None:
    torch.manual_seed(0)
    with inference():
        work = build()
        expected = theirs(work)
        assert expected > 10_000
        assert ours(work) == expected


def test_counting_does_not_change_the_result() -> None:
    torch.manual_seed(0)
    work = llama()
    model_call = qwen3()
    with torch.no_grad():
        plain = model_call().last_hidden_state
        with account(), count_flops():
            counted = model_call().last_hidden_state
            work()
    assert torch.equal(plain, counted)


sizes = st.integers(1, 6)


@given(batch=st.lists(sizes, max_size=2), n=sizes, k=sizes, m=sizes, one=st.booleans())
@settings(deadline=None)
def test_matrix_products_cost_two_per_multiply_add(batch: list[int], n: int, k: int, m: int, one: bool) -> None:
    left, right = torch.randn(*batch, n, k), torch.randn(*([1] * len(batch) if one else batch), k, m)
    rows = left.numel() // k
    expected = 2 * rows * k * m
    assert ours(lambda: left @ right) == expected
    assert ours(lambda: torch.matmul(left, other=right)) == expected
    assert ours(lambda: left.matmul(right)) == expected
    assert ours(lambda: right.__rmatmul__(left)) == expected
    assert ours(lambda: F.linear(left, torch.randn(m, k), torch.randn(m))) == expected
    assert ours(lambda: torch.nn.Linear(k, m)(left)) == expected


wide = st.integers(2, 5)  # einsum multiplies element by element, without a product, where a size is 1


@given(batch=wide, n=wide, k=wide, m=wide)
@settings(deadline=None, max_examples=25)
def test_the_other_products(batch: int, n: int, k: int, m: int) -> None:
    a, b = torch.randn(batch, n, k), torch.randn(batch, k, m)
    one, batched = 2 * n * k * m, 2 * batch * n * k * m
    cases: list[tuple[Callable[[], Any], int]] = [
        (lambda: torch.bmm(a, b), batched),
        (lambda: a.bmm(mat2=b), batched),
        (lambda: torch.baddbmm(torch.zeros(batch, n, m), a, b), batched),
        (lambda: torch.zeros(batch, n, m).baddbmm_(a, b), batched),
        (lambda: torch.addbmm(torch.zeros(n, m), a, b), batched),
        (lambda: torch.mm(a[0], b[0]), one),
        (lambda: torch.addmm(torch.zeros(m), a[0], b[0]), one),
        (lambda: torch.addmm(torch.zeros(m), mat1=a[0], mat2=b[0]), one),
        (lambda: a[0].mv(b[0, :, 0]), 2 * n * k),
        (lambda: a[0, 0] @ b[0], 2 * k * m),
        (lambda: a[0, 0].dot(b[0, :, 0]), 2 * k),
        (lambda: torch.einsum("bnk,bkm->bnm", a, b), batched),
        (lambda: torch.tensordot(a, b[0], dims=1), batched),
        (lambda: torch.linalg.multi_dot([a[0], b[0]]), one),
        (lambda: torch.ops.aten.mm.default(a[0], b[0]), one),
        (lambda: torch.ops.aten.linear(a, b[0].mT), batched),
    ]
    for index, (work, expected) in enumerate(cases):
        assert ours(work) == expected, index
        with torch.inference_mode():
            assert ours(work) == expected, index


@given(
    dims=st.integers(1, 3),
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    channels=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    transposed=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_convolutions_cost_what_torch_counts(
    dims: int, batch: int, groups: int, channels: int, kernel: int, stride: int, padding: int, transposed: bool
) -> None:
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    layer = getattr(torch.nn, name)(groups * channels, groups * 3, kernel, stride, padding, groups=groups)
    image = torch.randn(batch, groups * channels, *[5] * dims)
    with torch.no_grad():
        assert ours(lambda: layer(image)) == theirs(lambda: layer(image)) > 0


@given(batch=sizes, heads=st.sampled_from([2, 4]), queries=sizes, keys=sizes, width=sizes, out=sizes)
@settings(deadline=None, max_examples=30)
def test_attention_costs_two_products(batch: int, heads: int, queries: int, keys: int, width: int, out: int) -> None:
    query = torch.randn(batch, heads, queries, width)
    key, value = torch.randn(batch, heads // 2, keys, width), torch.randn(batch, heads // 2, keys, out)

    def work() -> None:
        F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    assert ours(work) == 2 * batch * heads * queries * keys * (width + out)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_is_seen_below_its_python_wrapper(need_weights: bool) -> None:
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    tokens = torch.randn(3, 5, 8)
    rows, projections, products = 3 * 5, 4 * 8 * 8, 2 * 5 * 8
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # below the wrapper, torch's own formulas count
        assert ours(lambda: layer(tokens, tokens, tokens, need_weights=need_weights)) == 2 * rows * (
            projections + products
        )


def test_kinds_add_up() -> None:
    layer, conv = torch.nn.Linear(4, 6), torch.nn.Conv2d(2, 3, 3)
    tokens = torch.randn(2, 5, 4)
    with account() as stats, count_flops():
        layer(tokens)
        conv(torch.randn(1, 2, 4, 4))
        F.scaled_dot_product_attention(tokens, tokens, tokens)
        tokens @ tokens.mT
        torch.einsum("bik,bjk->bij", tokens, tokens)
    assert stats.flops_by_kind == {
        "linear": 2 * 2 * 5 * 4 * 6,
        "conv": 2 * 2 * 2 * 3 * 2 * 9,
        "attention": 2 * 2 * 5 * 5 * 8,
        "matmul": 2 * (2 * 2 * 5 * 5 * 4),
    }
    assert sum(stats.flops_by_kind.values()) == stats.flops


def test_only_what_runs_inside_is_counted_and_only_once() -> None:
    a = torch.randn(3, 3)
    with account() as outer:
        a @ a
        with count_flops():
            a @ a
            with account() as inner, count_flops():
                a @ a
            a @ a
        a @ a
    assert inner.flops == 54
    assert outer.flops == 3 * 54


def test_counting_stops_after_an_exception() -> None:
    a = torch.randn(3, 3)
    with account() as stats:
        with pytest.raises(RuntimeError), count_flops():
            a @ torch.randn(2, 2)
        a @ a
        assert stats.flops == 0
        with count_flops():
            a @ a
    assert stats.flops == 54


def test_a_custom_operator_counts_by_its_registered_formula() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("fastgen_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @register_flop_formula(torch.ops.fastgen_test.double)
    def _formula(x_shape: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 7 * x_shape[0]

    try:
        assert ours(lambda: torch.ops.fastgen_test.double(torch.randn(3))) == 21
        assert ours(lambda: double(torch.randn(3))) == 21
    finally:
        flop_registry.pop(torch.ops.fastgen_test.double)
