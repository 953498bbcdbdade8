"""Cases of the benchmark of kernels: what decoding with a token tree needs.

Sizes: Janus-Pro-7B (30 layers, 32 heads of 128, 16,384 codes) with a tree of 25 nodes, two rows an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.drafters.tree import named_tree
from fastgen.evaluation.benchmarks.kernel_case import Case, Check, Inputs, close, equal, noise, size_of
from fastgen.kernels.cached_attention import cached_attention
from fastgen.kernels.kv_compact import kv_compact, kv_compact_reference
from fastgen.kernels.sample import sample, sample_reference, token_probabilities, token_probabilities_reference
from fastgen.kernels.tree_attention import tree_attention, tree_mask
from fastgen.kernels.tree_verify import tree_verify, tree_verify_reference

__all__ = ["cases"]


def cases() -> list[Case]:
    """All cases of these operations."""
    return [*_sampling(), *_verification(), *_compaction(), *_attention()]


def mostly_equal(result: Any, expected: Any) -> str | None:
    """Of tokens that a rounding may decide, 99 in 100 agree (of fewer than 100, all but one)."""
    wrong = int((result != expected).sum())
    return None if wrong <= max(1, result.numel() // 100) else f"{wrong} of {result.numel()} tokens differ"


# --- sampling ----------------------------------------------------------------------------------------------------


def _sampling() -> list[Case]:
    vocabulary = 16_384

    def logits(rows: int, draw: bool, **options: Any) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            both = {name: 3 * noise(device, rows, vocabulary, seed=i) for i, name in enumerate(("cond", "uncond"))}
            if draw:
                uniform = noise(device, rows, vocabulary, seed=2, dtype=torch.float32).sigmoid()
                both["gumbel"] = -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))
            return both | {"guidance_scale": 5.0, **options}

        return build

    def moved(inputs: Inputs) -> int:
        law = 0 if "gumbel" in inputs else 4 * inputs["cond"].numel()
        return size_of(inputs["cond"], inputs["uncond"], inputs.get("gumbel")) + law

    draws: list[tuple[int, dict[str, Any], bool, bool]] = [
        (1, {}, False, True),
        (1, {"top_k": 1000}, False, True),
        (1, {"top_k": 1000, "top_p": 0.9}, False, False),
        (4, {"top_k": 1000}, False, True),
        (4, {"top_p": 0.9}, False, False),
        (64, {"top_k": 1000}, False, False),
        (1024, {}, True, False),
        (1024, {"top_k": 1000}, True, False),
    ]
    laws: list[tuple[int, dict[str, Any], bool, bool]] = [
        (26, {}, False, True),
        (26, {"top_k": 1000}, False, False),
        (2048, {}, True, False),
    ]

    def label(rows: int, options: dict[str, Any]) -> str:
        return ", ".join([f"{rows} rows", *(f"{name} {value}" for name, value in options.items())])

    def case(
        op: str, run: Any, reference: Any, check: Check, rows: int, options: dict[str, Any], large: bool, on_cpu: bool
    ) -> Case:
        build = logits(rows, op == "sample", **options)
        return Case(op, label(rows, options), build, run, reference, moved, check, large=large, on_cpu=on_cpu)

    drawn = [case("sample", sample, sample_reference, mostly_equal, *row) for row in draws]
    law, reference = token_probabilities, token_probabilities_reference
    return drawn + [case("token_probabilities", law, reference, close(1e-4), *row) for row in laws]


# --- verification ------------------------------------------------------------------------------------------------


def _verification() -> list[Case]:
    def tree(batch: int, vocabulary: int, relaxed: bool) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            shape = named_tree("lantern-25").to(device)
            target, draft = (
                (3 * noise(device, batch, shape.n, vocabulary, seed=seed, dtype=torch.float32)).softmax(-1)
                for seed in range(2)
            )
            target = 0.5 * (target + draft)
            tokens = torch.zeros(batch, shape.n, dtype=torch.int64, device=device)
            scores = draft.log() - torch.log(-torch.log(noise(device, *draft.shape, seed=3).float().sigmoid()))
            for node, below in enumerate(shape.children[0].tolist()):
                below = [child for child in below if child >= 0]
                if below:
                    tokens[:, below] = scores[:, node].topk(len(below)).indices
            uniform = noise(device, batch, 1, vocabulary, seed=5, dtype=torch.float32).sigmoid()
            inputs = {
                "target": target,
                "draft": draft,
                "tokens": tokens,
                "children": shape.children,
                "internal": shape.internal,
                "coins": noise(device, batch, shape.n, seed=4, dtype=torch.float32).sigmoid().double(),
                "gumbel": -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6))),
                "remaining": torch.full((batch,), 100, device=device),
                "max_depth": shape.max_depth,
            }
            if relaxed:
                inputs["factor"] = torch.full((batch, len(shape.internal)), 1.5, device=device)
            return inputs

        return build

    def moved(inputs: Inputs) -> int:
        # The least: p and q of one node, and the noise of one token.
        return 12 * int(inputs["target"].shape[0] * inputs["target"].shape[2])

    def same(result: Any, expected: Any) -> str | None:
        return mostly_equal(
            torch.cat([result.nodes, result.bonus[:, None]], 1),
            torch.cat([expected.nodes, expected.bonus[:, None]], 1),
        )

    return [
        Case(
            "tree_verify",
            name,
            tree(batch, 16_384, relaxed),
            tree_verify,
            tree_verify_reference,
            moved,
            same,
            on_cpu=on_cpu,
            compiled=not relaxed,  # a minute for much the same graph
        )
        for name, batch, relaxed, on_cpu in [
            ("1 image, 25 nodes", 1, False, True),
            ("1 image, 25 nodes, relaxed", 1, True, False),
            ("16 images, 25 nodes", 16, False, False),
        ]
    ]


# --- cache -------------------------------------------------------------------------------------------------------


def _compaction() -> list[Case]:
    def cache(layers: int, rows: int, heads: int, capacity: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            # Nodes beyond the length of the path: what is read is never overwritten, so every call does the same.
            nodes = torch.tensor([[7, 11, 14, 20, 25]], device=device).expand(rows, -1).contiguous()
            return {
                "store": noise(device, layers, 2, rows, capacity, heads, 128),
                "lengths": torch.full((rows,), capacity - 40, device=device),
                "nodes": nodes,
                "count": torch.full((rows,), 5, device=device),
            }

        return build

    def placed(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor, work: Any) -> Tensor:
        work(store, lengths, nodes, count)
        start = store.shape[3] - 40
        return store[:, :, :, start : start + 5]

    def run(**inputs: Any) -> Tensor:
        return placed(**inputs, work=kv_compact)

    def reference(**inputs: Any) -> Tensor:
        return placed(**inputs, work=kv_compact_reference)

    def expect(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> Tensor:
        return store[:, :, :, store.shape[3] - 40 + nodes[0]]

    def moved(inputs: Inputs) -> int:
        layers, _, rows, _, heads, width = inputs["store"].shape
        return int(2 * 2 * layers * 2 * rows * 5 * heads * width)

    return [
        Case(
            "kv_compact", name, cache(*shape), run, reference, moved, equal, expect=expect, large=large, on_cpu=on_cpu
        )
        for name, shape, large, on_cpu in [
            ("tiny, 4 layers x 2 rows", (4, 2, 2, 100), False, True),
            ("Janus-Pro-7B, 2 rows", (30, 2, 32, 700), False, False),
            ("Janus-Pro-7B, 32 rows", (30, 32, 32, 700), True, False),
        ]
    ]


# --- attention ---------------------------------------------------------------------------------------------------


def _attention() -> list[Case]:
    def layer(rows: int, heads: int, committed: int, tree: str) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            shape = named_tree(tree).to(device)
            n, capacity = shape.n, committed + shape.n
            lengths = torch.full((rows,), committed, device=device)
            visible = torch.ones(rows, capacity, dtype=torch.bool, device=device)
            return {
                "query": noise(device, rows, n, heads, 128),
                "key": noise(device, rows, n, heads, 128, seed=1),
                "value": noise(device, rows, n, heads, 128, seed=2),
                "store": noise(device, 1, 2, rows, capacity, heads, 128, seed=3),
                "layer": 0,
                "slots": lengths[:, None] + torch.arange(n, device=device),
                "lengths": lengths,
                "visible": visible,
                "tree": shape.mask,
                "limit": capacity,
                # All layers share it, so making it is no part of what one of them costs.
                "mask": tree_mask(lengths, visible, shape.mask, capacity),
            }

        return build

    def run(mask: Tensor, **inputs: Any) -> Tensor:
        return tree_attention(**inputs)

    def reference(
        query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor, **rest: Any
    ) -> Tensor:
        return cached_attention(query, key, value, store, layer, slots, mask)

    def moved(inputs: Inputs) -> int:
        return size_of(inputs["store"]) + 3 * size_of(inputs["query"])

    def flops(inputs: Inputs) -> int:
        return 4 * int(inputs["query"].numel()) * int(inputs["limit"])

    return [
        Case(
            "tree_attention",
            name,
            layer(*shape),
            run,
            reference,
            moved,
            close(1e-2),
            flops=flops,
            large=large,
            on_cpu=on_cpu,
        )
        for name, shape, large, on_cpu in [
            ("2 rows, 4 heads, 100 slots", (2, 4, 100, "4-2-1"), False, True),
            ("Janus-Pro-7B, 2 rows, 600 slots", (2, 32, 600, "lantern-25"), False, False),
            ("Janus-Pro-7B, 16 rows, 600 slots", (16, 32, 600, "lantern-25"), False, False),
            ("Janus-Pro-7B, 2 rows, 4096 slots", (2, 32, 4096, "lantern-25"), False, False),
            ("Janus-Pro-7B, 32 rows, 4096 slots", (32, 32, 4096, "lantern-25"), True, False),
        ]
    ]
