"""Models and decoders that use the kernels compute the same with them as without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE
from micro_models import PROMPTS

from fastgen.drafters.cache import KVCache, TreeMask, mask_for_tree
from fastgen.drafters.decode import Decoded, decode_plain, decode_speculative
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule
from fastgen.drafters.sources import TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import named_tree
from fastgen.kernels.dispatch import ran, reset_ran, use_kernels
from fastgen.models.dc_dit import DCDiTTransformer2DModel
from fastgen.pipelines.janus import JanusImagePipeline

DECODING = {"tree_verify", "tree_attention", "kv_compact", "token_probabilities", "sample"}


@pytest.fixture(scope="module")
def target(micro_janus: Path) -> Target:
    pipeline = JanusImagePipeline.from_pretrained(micro_janus)
    return target_of(pipeline.model.to(DEVICE), pipeline.tokenizer)


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        ("exact", TokenLaw(3.0, 0.9, top_k=30)),
        pytest.param("cascade", TokenLaw(3.0, 1.0), marks=pytest.mark.slow),
        pytest.param("exact", TokenLaw(3.0, 0.0), marks=pytest.mark.slow),
    ],
    ids=["exact", "cascade", "greedy"],
)
def test_speculative_decoding_draws_the_same_tokens(target: Target, rule: str, law: TokenLaw) -> None:
    relaxed = {"breadth": 0.2, "radius": 0.5} if rule == "cascade" else {}
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    torch.manual_seed(0)
    drafter = EagleDrafter.for_target(target, variant=1, heads=2).to(DEVICE)

    def decoded(mode: str) -> Decoded:
        source = TreeSource(drafter, named_tree("3-2"), sampled=law.temperature > 0)
        with use_kernels(mode):
            return decode_speculative(target, source, build_rule(rule, target, **relaxed), prefix, law, seeded(1))

    reset_ran()
    ours = decoded("triton")
    assert {name for name, used in ran().items() if used == "triton"} >= DECODING - (
        {"token_probabilities"} if law.temperature == 0 else set()
    )
    wanted = decoded("reference")
    assert torch.equal(ours.tokens, wanted.tokens) and ours.accepted == wanted.accepted
    for name, value in wanted.counts.items():
        assert torch.allclose(ours.counts[name].double(), value.double(), atol=1e-4)


@pytest.mark.slow
def test_plain_decoding_draws_the_same_tokens(target: Target) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    tokens = []
    for mode in ("triton", "reference"):
        with use_kernels(mode):
            tokens.append(decode_plain(target, prefix, TokenLaw(3.0, 1.0, top_k=20), seeded(1)).tokens)
    assert torch.equal(*tokens)


def test_a_mask_is_made_only_where_the_reference_reads_it() -> None:
    prefix = torch.ones(8, 4, dtype=torch.bool, device=DEVICE)
    cache = KVCache.allocate(1, prefix, 9, 2, 8, torch.float32)
    tree = named_tree("3-2").mask.to(DEVICE)
    with use_kernels("triton"):
        assert isinstance(mask_for_tree(cache, tree), TreeMask)
    with use_kernels("reference"):
        mask = mask_for_tree(cache, tree)
    assert isinstance(mask, torch.Tensor) and mask.shape[:3] == (8, 1, 6)


@pytest.mark.parametrize("budget", [{"tail_drop": 0.2}, {"token_budget": 6}], ids=str)
@torch.no_grad()
def test_a_dc_model_predicts_the_same(budget: dict[str, float]) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "scaffold_blocks": 1}
    model = DCDiTTransformer2DModel(sample_size=4, num_classes=3, **sizes).to(DEVICE).eval()
    for parameter in model.parameters():  # zero-initialised gates would hide the backbone
        torch.nn.init.normal_(parameter, std=0.1)
    latents, time, labels = torch.randn(2, 4, 4, 4).to(DEVICE), torch.tensor([3, 800]), torch.tensor([0, 3])
    samples = []
    for mode in ("triton", "reference"):
        reset_ran()
        with use_kernels(mode):
            samples.append(model(latents, time.to(DEVICE), labels.to(DEVICE), **budget).sample)
        ours = {"pack_top", "smooth_kept", "nearest_kept"}
        assert {ran()[name] for name in ours} == {mode}
    assert torch.allclose(*samples, rtol=1e-4, atol=1e-4 * float(samples[1].abs().max()))


def test_all_modules_load_where_triton_compiles() -> None:
    """Operators that compilers see are registered in another way than under Triton's interpreter, with one schema."""
    code = (
        "import importlib, pkgutil, torch, fastgen.kernels as kernels\n"
        "for module in pkgutil.walk_packages(kernels.__path__, 'fastgen.kernels.'):\n"
        "    importlib.import_module(module.name)\n"
        "for name in ('adaln', 'qk_norm_rope'):\n"
        "    both = (getattr(torch.ops.fastgen, each).default._schema for each in (name, f'{name}_visible'))\n"
        "    opaque, visible = both\n"
        "    assert [x.name for x in opaque.arguments] == [x.name for x in visible.arguments]\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
