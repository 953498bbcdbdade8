"""Cases of the benchmark of kernels: packing, de-chunking, and what decoding with a token tree needs.

Sizes: DC-DiT-XL (width 1152) at 256² and 512² pixels and at a grid of 64 x 64; Janus-Pro-7B (30 layers, 32 heads of
128, 16,384 codes) with a tree of 25 nodes, two rows an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.drafters.tree import named_tree
from fastgen.evaluation.benchmarks.kernel_case import Case, Check, Inputs, close, equal, noise, size_of
from fastgen.kernels.cached_attention import cached_attention
from fastgen.kernels.dechunk import (
    dechunk,
    nearest_kept,
    nearest_kept_reference,
    plug_back,
    plug_back_reference,
    smooth_kept,
    smooth_kept_reference,
)
from fastgen.kernels.dispatch import use_kernels
from fastgen.kernels.kv_compact import kv_compact, kv_compact_reference
from fastgen.kernels.pack import (
    Packing,
    pack,
    pack_mask,
    pack_mask_reference,
    pack_reference,
    pack_top,
    pack_top_reference,
    scatter,
    scatter_reference,
)
from fastgen.kernels.sample import sample, sample_reference, token_probabilities, token_probabilities_reference
from fastgen.kernels.tree_attention import tree_attention, tree_mask
from fastgen.kernels.tree_verify import tree_verify, tree_verify_reference

__all__ = ["cases"]

_WIDTH = 1152


def cases() -> list[Case]:
    """All cases of these operations."""
    return [*_packing(), *_dechunking(), *_sampling(), *_verification(), *_compaction(), *_attention()]


def mostly_equal(result: Any, expected: Any) -> str | None:
    """Of tokens that a rounding may decide, 99 in 100 agree (of fewer than 100, all but one)."""
    wrong = int((result != expected).sum())
    return None if wrong <= max(1, result.numel() // 100) else f"{wrong} of {result.numel()} tokens differ"


# --- packing -----------------------------------------------------------------------------------------------------


def _scores(device: torch.device, samples: int, side: int) -> Tensor:
    return noise(device, samples, side * side, dtype=torch.float32).sigmoid()


def _kept(device: torch.device, samples: int, side: int) -> Packing:
    """A quarter of the positions of every sample."""
    with use_kernels("reference"):
        return pack_top(_scores(device, samples, side), side * side // 4)


def _fields(packing: Packing) -> list[Tensor]:
    return [packing.mask, packing.positions, packing.cu_seqlens, packing.sequence_ids, packing.rows]


def _packing() -> list[Case]:
    def top(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            count = side * side // 4
            keep = torch.full((samples,), count, device=device)
            return {"scores": _scores(device, samples, side), "keep": keep, "capacity": samples * count, "full": True}

        return build

    def mask(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            return {"mask": _scores(device, samples, side) > 0.5, "capacity": samples * side * side}

        return build

    def rows(samples: int, side: int, packed: bool) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            packing = _kept(device, samples, side)
            if packed:
                return {"packed": noise(device, packing.capacity, _WIDTH), "packing": packing}
            return {"tokens": noise(device, samples, side * side, _WIDTH), "packing": packing}

        return build

    def index_bytes(inputs: Inputs) -> int:
        grid = inputs.get("scores", inputs.get("mask"))
        assert grid is not None
        return size_of(grid) + 9 * grid.numel() + 16 * int(inputs["capacity"])

    def packed_bytes(inputs: Inputs) -> int:
        packing = inputs["packing"]
        return packing.capacity * (4 * _WIDTH + 8)

    def grid_bytes(inputs: Inputs) -> int:
        return size_of(inputs["packed"]) + inputs["packing"].mask.numel() * (2 * _WIDTH + 9)

    def same(result: Any, expected: Any) -> str | None:
        return equal(_fields(result), _fields(expected))

    sizes = [("32² x 2", 2, 32, False, True), ("64² x 64", 64, 64, True, False)]
    found = []
    for name, samples, side, large, on_cpu in sizes:
        indexed = [
            Case("pack_top", name, top(samples, side), pack_top, pack_top_reference, index_bytes, same, on_cpu=on_cpu),
            Case(
                "pack_mask",
                name,
                mask(samples, side),
                pack_mask,
                pack_mask_reference,
                index_bytes,
                same,
                on_cpu=on_cpu,
            ),
        ]
        there, back = rows(samples, side, False), rows(samples, side, True)
        found += [
            *indexed,
            Case("pack", name, there, pack, pack_reference, packed_bytes, equal, large=large, on_cpu=on_cpu),
            Case("scatter", name, back, scatter, scatter_reference, grid_bytes, equal, large=large, on_cpu=on_cpu),
        ]
    return found


# --- de-chunking -------------------------------------------------------------------------------------------------


def _whole_reference(**inputs: Any) -> Tensor:
    with use_kernels("reference"):
        return dechunk(**inputs)


def _dechunking() -> list[Case]:
    def whole(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            packing = _kept(device, samples, side)
            return {
                "tokens": noise(device, packing.capacity, _WIDTH, seed=1),
                "positions": packing.positions,
                "probabilities": _scores(device, samples, side),
                "mask": packing.mask,
                "grid": (side, side),
                "rows": packing.rows,
            }

        return build

    def smoothing(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            inputs = dict(whole(samples, side)(device))
            del inputs["mask"], inputs["rows"]
            p = inputs["probabilities"].flatten()[inputs["positions"]]
            return inputs | {"probabilities": p, "samples": samples, "sigma": 1.0}

        return build

    def nearest(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        return lambda device: {"mask": _kept(device, samples, side).mask.view(samples, side, side)}

    def plugging(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            packing = _kept(device, samples, side)
            length = side * side
            with use_kernels("reference"):
                near = nearest_kept(packing.mask.view(samples, side, side)).view(samples, length)
            near = near + length * torch.arange(samples, device=device)[:, None]
            index = packing.rows.flatten()[near.flatten()]
            tokens = noise(device, packing.capacity, _WIDTH)
            return {"tokens": tokens, "index": index, "positions": packing.positions, "length": length}

        return build

    def plug_reference(tokens: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
        return plug_back_reference(tokens, index)

    def whole_bytes(inputs: Inputs) -> int:
        # Tokens in, smoothed, read again, and the grid out.
        return 3 * size_of(inputs["tokens"]) + 2 * _WIDTH * inputs["mask"].numel()

    def smooth_bytes(inputs: Inputs) -> int:
        return 2 * size_of(inputs["tokens"])

    def smooth_flops(inputs: Inputs) -> int:
        # What the least of algorithms needs: 9 x 9 cells around a token, a quarter of them kept.
        return 2 * int(inputs["tokens"].numel()) * 20

    def nearest_bytes(inputs: Inputs) -> int:
        return 9 * int(inputs["mask"].numel())

    def plug_bytes(inputs: Inputs) -> int:
        return size_of(inputs["tokens"], inputs["index"]) + 2 * _WIDTH * len(inputs["index"])

    found = []
    sizes = [("32² x 2", 2, 32, False, True), ("64² x 16", 16, 64, True, False)]
    for name, samples, side, large, on_cpu in sizes:
        parts: list[tuple[str, Any, Any, Any, Any, Check, bool]] = [
            ("dechunk", whole, dechunk, _whole_reference, whole_bytes, close(), False),
            ("smooth_kept", smoothing, smooth_kept, smooth_kept_reference, smooth_bytes, close(), False),
            ("nearest_kept", nearest, nearest_kept, nearest_kept_reference, nearest_bytes, equal, False),
            ("plug_back", plugging, plug_back, plug_reference, plug_bytes, equal, large),
        ]
        for op, build, run, reference, moved, check, counts in parts:
            options: dict[str, Any] = {"large": counts, "on_cpu": on_cpu}
            options["flops"] = smooth_flops if op == "smooth_kept" else None
            options["compiled"] = op != "dechunk"  # its parts are
            found.append(Case(op, name, build(samples, side), run, reference, moved, check, **options))
    return found


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
