"""What a round of speculative decoding costs at real sizes, with random weights: no checkpoint is needed.

Measured are the plain step t_AR, a pass over n nodes t_verify(n), a drafter's level t_draft, and what is left of a
round (laws, verification, commit). A tree of n nodes in D levels then is faster by

    accepted length * t_AR / (t_verify(n) + D * t_draft + t_left)

with the bonus token in the accepted length: the table gives the length from which on it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgen.checks import check_choice, check_integer
from fastgen.drafters.acceptance import Exact
from fastgen.drafters.draft import StaticPlan
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.law import TokenLaw, gumbel_noise
from fastgen.drafters.targets import Prefix, Target
from fastgen.drafters.targets.janus import JanusTarget
from fastgen.drafters.targets.llamagen import LlamaGenTarget
from fastgen.drafters.tree import chain
from fastgen.drafters.verify import Drafted, Noise
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, take_turns

__all__ = ["NODES", "SIZES", "benchmark_speculative_cost", "build_target", "measure_target"]

NODES = (1, 2, 4, 8, 16, 32, 64)
#: Width, layers, heads and inner width of the language models.
_JANUS = {"janus-pro-1b": (2048, 24, 16, 5632), "janus-pro-7b": (4096, 30, 32, 11008)}
SIZES = (*_JANUS, "llamagen-xl")
_CODES, _GRID, _PROMPT = 16384, 24, 64


def benchmark_speculative_cost(
    sizes: Sequence[str] = SIZES,
    nodes: Sequence[int] = NODES,
    *,
    runs: int = 20,
    device: str = "cpu",
    dtype: str = "bfloat16",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        sizes: of `SIZES`.
        nodes: tokens of a pass; 1 is the plain step.
        runs: measured rounds, after three of warm-up; all passes take turns.
        device, dtype: where and in what.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with size, nodes, verify, draft and left (seconds), and
        break_even, the accepted length (bonus counted) from which on a chain of that many nodes is faster than the
        plain loop, whose pass is the fastest of all, padded where that helps.

    Raises:
        FastgenError: an unknown size, or a number out of range.
    """
    for size in sizes:
        check_choice("size", size, SIZES)
    check_integer("runs", runs, 1)
    check_integer("nodes", min(nodes, default=0), 1)
    rows = []
    for size in sizes:
        report(size)
        target = build_target(size, torch.device(device), getattr(torch, dtype))
        rows += [{"size": size, **row} for row in measure_target(target, sorted({1, *nodes}), runs)]
    settings = {"device": device, "dtype": dtype, "runs": runs, "guided": True, "threads": torch.get_num_threads()}
    return result_of("speculative-cost", settings, rows=rows)


def build_target(size: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A target of real size with random weights; what does not run in a round is as small as it can be."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )
    from transformers.models.janus.modeling_janus import JanusVQVAE

    from fastgen.models.llamagen import LlamaGen, LlamaGenTransformer

    vq: dict[str, Any] = {"embed_dim": 8, "num_embeddings": _CODES, "base_channels": 32, "latent_channels": 32}
    vq |= {"channel_multiplier": [1], "num_res_blocks": 0, "num_patches": _GRID}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if size == "llamagen-xl":
                transformer = LlamaGenTransformer.from_preset("XL", grid=_GRID)
                made = LlamaGen(transformer, JanusVQVAE(JanusVQVAEConfig(**vq)), torch.nn.Identity())
                return LlamaGenTarget(made.eval().requires_grad_(False), None)
            width, layers, heads, inner = _JANUS[size]
            model = JanusForConditionalGeneration(
                JanusConfig(
                    text_config=LlamaConfig(
                        vocab_size=1024,
                        hidden_size=width,
                        intermediate_size=inner,
                        num_hidden_layers=layers,
                        num_attention_heads=heads,
                        num_key_value_heads=heads,
                        max_position_embeddings=4096,
                    ),
                    vision_config=JanusVisionConfig(
                        hidden_size=16,
                        num_hidden_layers=1,
                        num_attention_heads=1,
                        image_size=_GRID,
                        patch_size=1,
                        num_image_tokens=_GRID**2,
                        mlp_ratio=1.0,
                        projection_dim=width,
                        depth=1,
                    ),
                    vq_config=JanusVQVAEConfig(**vq, projection_dim=width, image_token_embed_dim=width),
                )
            )
            return JanusTarget(model.eval().requires_grad_(False), None)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def measure_target(target: Target, nodes: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """Costs of chains of each number of nodes, half-way through a picture, one picture with guidance."""
    device, width = target.device, target.hidden_size
    law = TokenLaw(guidance_scale=4.0)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, _PROMPT, width, generator=generator).to(device, target.dtype)
    prefix = Prefix(vectors, torch.ones(2, _PROMPT, dtype=torch.bool, device=device), guided=True)
    cache = target.new_cache(prefix, 2 * max(nodes))
    output = target.prefill(prefix, cache)
    half = target.num_tokens // 2
    cache.advance(half, half)  # what they hold does not change the cost
    drafter = EagleDrafter.for_target(target, heads=max(1, width // 128)).to(device, target.dtype).eval()
    drafter.requires_grad_(False)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    state = drafter.start(target, prefix, drafter.features(output), first, 2)
    state.cache.advance(half, half)
    plan = StaticPlan.of(chain(2)).to(device)

    def draft() -> None:
        level = plan.levels[1]
        places = torch.ones(1, 1, dtype=torch.int64, device=device)
        hidden = drafter.grow(state, first[:, None], state.root, places, level.mask, 0)
        target.token_law(drafter.logits(state, hidden, 1), prefix, law, places)

    def verify(count: int) -> Callable[[], Any]:
        tokens = torch.zeros(1, count, dtype=torch.int64, device=device)
        depth = torch.arange(count, device=device)[None]
        mask = torch.ones(1, count, count, dtype=torch.bool, device=device).tril()
        return lambda: target.head(target.verify(tokens, depth, mask, cache, prefix).hidden)

    calls = {("verify", count): verify(count) for count in nodes}
    calls |= {("left", count): _left(target, prefix, law, count) for count in nodes}
    calls["draft", 0] = draft
    turns = take_turns(calls, runs, warm_up=3, device=device)
    times = {key: percentiles(values) for key, values in turns.items()}
    # A plain step may be padded: on some processors a pass over one token takes longer than one over two.
    plain = min(times["verify", count]["p50"] for count in nodes) + times["left", 1]["p50"]
    rows = []
    for count in nodes:
        verified, left, drafted = times["verify", count], times["left", count], times["draft", 0]
        whole = verified["p50"] + left["p50"] + (count - 1) * drafted["p50"]
        rows.append({"nodes": count, "verify": verified, "draft": drafted, "left": left, "break_even": whole / plain})
    return rows


def _left(target: Target, prefix: Prefix, law: TokenLaw, count: int) -> Callable[[], None]:
    """Noise, probabilities, verification and walk of a round over a chain of `count` nodes, root included."""
    device = target.device
    logits = torch.randn(2, count, target.vocab_size, generator=torch.Generator().manual_seed(0)).to(device)
    index = torch.arange(count, device=device)[None]
    tokens = torch.zeros(1, count, dtype=torch.int64, device=device)
    generator = torch.Generator()
    remaining = torch.tensor([target.num_tokens], device=device)

    def run() -> None:
        gumbel = gumbel_noise([generator], target.vocab_size, device)[:, None]
        coins = torch.rand(1, count, generator=generator, dtype=torch.float64).to(device)
        p = target.token_law(logits, prefix, law, index)
        if count == 1:
            (p[:, 0].log() + gumbel[:, 0]).argmax(dim=-1)
            return
        drafted, noise = Drafted(tree, tokens, p, p), Noise(coins, gumbel)
        Exact().walk(drafted, noise, coins[:, 0], remaining)

    tree = chain(count - 1).to(device) if count > 1 else chain(1)
    return run
