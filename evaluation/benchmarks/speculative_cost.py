"""What speculative decoding costs and gives at real sizes, with random weights: no checkpoint is needed.

Two tables, all half-way through a picture. By tokens of a pass: the pass, a drafter's level, and what is left of a
round (noise, laws, verification). A drafter's chain of n nodes in D levels is faster than the plain loop if it accepts
more tokens a round (bonus included) than

    (t_verify(n) + D * t_draft + t_left) / t_plain

By source: whole rounds of the pipeline (on a GPU as CUDA graphs, which the pipeline does not use), and what they give
with the tokens per pass that `tiny-janus` was measured to accept. Random weights say nothing about acceptance, and the
model in question may accept more or less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen._assets import ROOT
from fastgen.checks import check_choice, check_integer
from fastgen.drafters.acceptance import Exact
from fastgen.drafters.cache import KVCache
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.compiled import compiled, many_graphs
from fastgen.drafters.decode import PROMPT_MULTIPLE, PlainLoop, Rounds
from fastgen.drafters.draft import StaticPlan
from fastgen.drafters.drafter import DraftState
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import window_source
from fastgen.drafters.law import TokenLaw, gumbel_noise
from fastgen.drafters.loading import build_rule
from fastgen.drafters.names import PLAIN, window_of
from fastgen.drafters.targets import Prefix, Target
from fastgen.drafters.targets.janus import JanusTarget
from fastgen.drafters.targets.llamagen import LlamaGenTarget
from fastgen.drafters.tree import Tree, chain
from fastgen.drafters.verify import AcceptedPath, Drafted, Noise
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, take_turns
from fastgen.pretrained import load_pretrained

__all__ = ["NODES", "SIZES", "SOURCES", "benchmark_speculative_cost", "build_target", "measure_target"]

NODES = (1, 2, 4, 8, 16, 32, 64)
#: Acceptance rules and windows.
SOURCES = (("exact", "jacobi-16"), ("exact", "heads-20"), ("cascade", "heads-20"))
#: Width, layers, heads and inner width of the language models.
_JANUS = {"janus-pro-1b": (2048, 24, 16, 5632), "janus-pro-7b": (4096, 30, 32, 11008)}
SIZES = (*_JANUS, "llamagen-xl")
_CODES, _GRID, _PROMPT = 16384, 24, 64
_RECORDED, _QUALITY = "tiny-janus", 0.5


def benchmark_speculative_cost(
    sizes: Sequence[str] = SIZES,
    nodes: Sequence[int] = NODES,
    *,
    runs: int = 20,
    device: str = "cpu",
    dtype: str = "bfloat16",
    compile: bool | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        sizes: of `SIZES`.
        nodes: tokens of a pass; 1 is the plain step.
        runs: measured rounds, after three of warm-up; all passes and sources take turns.
        device, dtype: where and in what.
        compile: compile passes and rounds, the plain loop's as well; on a GPU they are replayed as CUDA graphs, with
            new noise. None: on a GPU only.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings", and

        "rows" with size, nodes, verify, draft and left (seconds), and break_even, the accepted length (bonus counted)
        from which on a chain of that many nodes is faster than the fastest plain loop: ours, or its pass padded to
        more tokens where that takes less time.

        "sources", the plain loop's first: size, rule, source, nodes, round (seconds), tokens (per pass, of the model
        that settings names as "acceptance_of"), seconds_per_picture with them, speedup_vs_plain (our plain loop),
        speedup_vs_fastest_plain, and break_even, the tokens per pass from which on it is faster than the fastest.

    Raises:
        FastgenError: an unknown size, or a number out of range.
    """
    for size in sizes:
        check_choice("size", size, SIZES)
    check_integer("runs", runs, 1)
    check_integer("nodes", min(nodes, default=0), 1)
    place = torch.device(device)
    compile = place.type == "cuda" if compile is None else compile
    rows, sources = list[dict[str, Any]](), list[dict[str, Any]]()
    for size in sizes:
        report(size)
        target = build_target(size, place, getattr(torch, dtype))
        costs, gains = measure_target(target, sorted({1, *nodes}), runs, SOURCES, compile)
        rows += [{"size": size, **row} for row in costs]
        sources += [{"size": size, **row} for row in gains]
    settings = {"device": device, "dtype": dtype, "runs": runs, "compile": compile, "guided": True}
    settings |= {"acceptance_of": _RECORDED, "quality": _QUALITY, "threads": torch.get_num_threads()}
    return result_of("speculative-cost", settings, rows=rows, sources=sources)


def build_target(size: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A target of real size with random weights; what does not run in a round is as small as it can be."""
    from transformers import (
        AutoTokenizer,
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
    tokenizer = load_pretrained(AutoTokenizer, ROOT / _RECORDED)  # reads nothing here
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if size == "llamagen-xl":
                transformer = LlamaGenTransformer.from_preset("XL", grid=_GRID)
                made = LlamaGen(transformer, JanusVQVAE(JanusVQVAEConfig(**vq)), torch.nn.Identity())
                return LlamaGenTarget(made.eval().requires_grad_(False), tokenizer)
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
            return JanusTarget(model.eval().requires_grad_(False), tokenizer)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def measure_target(
    target: Target, nodes: Sequence[int], runs: int, sources: Sequence[tuple[str, str]] = (), compile: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Costs half-way through a picture, one picture with guidance: by tokens of a pass, and by acceptance rule and
    source. All take turns. See `benchmark_speculative_cost`."""
    device, width = target.device, target.hidden_size
    law = TokenLaw(guidance_scale=4.0)
    vectors = torch.randn(2, _PROMPT, width, generator=torch.Generator().manual_seed(0)).to(device, target.dtype)
    prefix = Prefix(vectors, torch.ones(2, _PROMPT, dtype=torch.bool, device=device), guided=True).watched()
    if compile:
        prefix = prefix.padded(PROMPT_MULTIPLE)  # static shapes
    recorded = Calibration.load(ROOT / _RECORDED / "drafter")
    assert recorded.pace is not None  # the embedded one has it
    with many_graphs(compile):
        works = _passes(target, prefix, law, nodes, compile)
        works |= _loops(target, prefix, law, sources, recorded, compile)
        graphs = compile and device.type == "cuda"
        calls = {name: work.graphed() if graphs else work.run for name, work in works.items()}
        turns = take_turns(calls, runs, warm_up=3, device=device)
    times = {key: percentiles(values) for key, values in turns.items()}
    median = {key: value["p50"] for key, value in times.items()}
    # A plain step may be padded: on some processors a pass over one token takes longer than one over two.
    plain = median["", PLAIN]
    fastest = min(plain, min(median["verify", count] for count in nodes) + median["left", 1])
    rows, found = list[dict[str, Any]](), list[dict[str, Any]]()
    for count in nodes:
        whole = median["verify", count] + median["left", count] + (count - 1) * median["draft", 0]
        row = {"verify": times["verify", count], "draft": times["draft", 0], "left": times["left", count]}
        rows.append({"nodes": count, **row, "break_even": whole / fastest})
    accepted = {"": {PLAIN: 1.0}, **recorded.pace.tokens}
    for rule, name in (("", PLAIN), *sources):
        tokens = accepted[rule][name]
        seconds = median[rule, name] / tokens
        found.append(
            {
                "rule": rule or None,
                "source": name,
                "nodes": works[rule, name].nodes,
                "round": times[rule, name],
                "tokens": tokens,
                "break_even": median[rule, name] / fastest,
                "seconds_per_picture": target.num_tokens * seconds,
                "speedup_vs_plain": plain / seconds,
                "speedup_vs_fastest_plain": fastest / seconds,
            }
        )
    return rows, found


def _passes(
    target: Target, prefix: Prefix, law: TokenLaw, nodes: Sequence[int], compile: bool
) -> dict[tuple[str, Any], _Work]:
    """Passes over chains of each number of nodes, a level of a drafter, and what is left of a round."""
    fast = compiled if compile else lambda step: step
    device, half, cache = target.device, target.num_tokens // 2, target.new_cache(prefix, 2 * max(nodes))
    output = target.prefill(prefix, cache)
    cache.advance(half, half)  # what they hold does not change the cost
    drafter = EagleDrafter.for_target(target, heads=max(1, target.hidden_size // 128)).to(device, target.dtype)
    drafter.eval().requires_grad_(False)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    state = drafter.start(target, prefix, drafter.features(output), first, 2)
    state.cache.advance(half, half)
    level = StaticPlan.of(chain(2)).to(device).levels[1]
    works: dict[tuple[str, Any], _Work] = {
        ("draft", 0): _Work(partial(fast(_draft), target, prefix, law, drafter, state, first[:, None], level.mask))
    }
    generator = torch.Generator()
    for count in nodes:
        tokens, index = first[:, None].expand(1, count), torch.arange(count, device=device)[None]
        mask = torch.ones(1, count, count, dtype=torch.bool, device=device).tril()
        works["verify", count] = _Work(partial(fast(_verify), target, prefix, cache, tokens, index, mask))
        logits = torch.randn(2, count, target.vocab_size, generator=torch.Generator().manual_seed(0)).to(device)
        tree = chain(count - 1).to(device) if count > 1 else None

        def noise(count: int = count) -> tuple[Tensor, Tensor]:
            coins = torch.rand(1, count, generator=generator, dtype=torch.float64).to(device)
            return coins, gumbel_noise([generator], target.vocab_size, device)[:, None]

        works["left", count] = _Work(partial(fast(_left), target, prefix, law, tree, tokens, index, logits), noise)
    return works


def _verify(target: Target, prefix: Prefix, cache: KVCache, tokens: Tensor, depth: Tensor, mask: Tensor) -> Tensor:
    return target.head(target.verify(tokens, depth, mask, cache, prefix).hidden)


def _draft(
    target: Target,
    prefix: Prefix,
    law: TokenLaw,
    drafter: EagleDrafter,
    state: DraftState,
    tokens: Tensor,
    mask: Tensor,
) -> Tensor:
    places = torch.ones_like(tokens)
    hidden = drafter.grow(state, tokens, state.root, places, mask, 0)
    return target.token_law(drafter.logits(state, hidden, 1), prefix, law, places)


def _left(
    target: Target,
    prefix: Prefix,
    law: TokenLaw,
    tree: Tree | None,
    tokens: Tensor,
    index: Tensor,
    logits: Tensor,
    coins: Tensor,
    gumbel: Tensor,
) -> Tensor | AcceptedPath:
    """Probabilities, verification and walk of a round over a chain, root included; None: of the plain loop."""
    p = target.token_law(logits, prefix, law, index)
    if tree is None:
        return (p[:, 0].log() + gumbel[:, 0]).argmax(dim=-1)
    remaining = torch.full_like(tokens[:, 0], target.num_tokens)
    return Exact().walk(Drafted(tree, tokens, p, p), Noise(coins, gumbel), coins[:, 0], remaining)


def _loops(
    target: Target,
    prefix: Prefix,
    law: TokenLaw,
    sources: Sequence[tuple[str, str]],
    recorded: Calibration,
    compile: bool,
) -> dict[tuple[str, Any], _Work]:
    """A token of the plain loop, and a round of each source with heads as `fastgen train heads` makes them."""
    half, loop = target.num_tokens // 2, PlainLoop(target, prefix, law, [torch.Generator()], compile)
    target.prefill(prefix, loop.cache)
    loop.cache.advance(half, half)
    loop.index = loop.index + half
    token = torch.zeros(1, dtype=torch.int64, device=target.device)

    def noise() -> tuple[Tensor, ...]:
        return (gumbel_noise(loop.generators, target.vocab_size, target.device),)

    step = partial(loop.advance, loop, token)
    works: dict[tuple[str, Any], _Work] = {("", PLAIN): _Work(step, noise, states=(loop, loop.cache))}
    if not sources:
        return works
    longest = max(window_of(name)[0] for _, name in sources)
    heads = WindowHeads.for_target(target, window=longest, taps=(len(target.layers) // 2,))
    heads = heads.to(target.device, target.dtype).eval().requires_grad_(False)
    for rule, name in sources:
        settings = asdict(recorded.config(_QUALITY)) if rule == "cascade" else {}
        judge = build_rule(rule, target, **settings).to(target.device)
        source = window_source(name, judge, heads)
        rounds = Rounds(target, source, judge, prefix, law, [torch.Generator()], compile)
        rounds.cache.advance(half, half)
        rounds.count = rounds.count + half
        states = (rounds, rounds.cache, source)
        works[rule, name] = _Work(partial(_round, rounds), partial(_noise, rounds), source.nodes, states)
    return works


def _round(rounds: Rounds, coins: Tensor, gumbel: Tensor) -> None:
    rounds.advance(rounds, Noise(coins, gumbel), None)


def _noise(rounds: Rounds) -> tuple[Tensor, Tensor]:
    noise, _ = rounds.noise()  # windows that keep their noise draw no other
    return noise.coins, noise.gumbel


@dataclass
class _Work:
    """Something to measure.

    Attributes:
        step: takes the noise.
        noise: draws it.
        nodes: tokens of its pass.
        states: objects whose attributes the step replaces; every run begins with those of now.
    """

    step: Callable[..., object]
    noise: Callable[[], tuple[Tensor, ...]] = tuple
    nodes: int = 1
    states: Sequence[object] = ()
    before: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.before = [dict(vars(state)) for state in self.states]

    def run(self, given: tuple[Tensor, ...] | None = None) -> None:
        """One step with this noise, or with new noise."""
        for state, attributes in zip(self.states, self.before, strict=True):
            vars(state).update(attributes)
        self.step(*(self.noise() if given is None else given))

    def graphed(self) -> Callable[[], None]:
        """The step as a CUDA graph, with new noise at every replay."""
        given = self.noise()
        for _ in range(3):  # compiles
            self.run(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(given)

        def replay() -> None:
            for old, new in zip(given, self.noise(), strict=True):
                old.copy_(new)
            graph.replay()

        return replay
