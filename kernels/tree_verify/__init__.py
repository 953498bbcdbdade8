"""Verification of drafted token trees, one launch for a batch: decisions, walk, and the token after the path.

Exact (speculative sampling: the target's law, whatever the draft), greedy, and relaxed in two forms: a factor on every
acceptance, or classes whose mass their drafted member holds. With a factor of one, or a class for every token, the
relaxed forms are the exact one. Loss contract: distribution; lossy when relaxed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_int, check_tensors, shown
from fastgen.kernels.dispatch import Checked, check_range, choose, looks, needs_gradients
from fastgen.kernels.operators import register_launcher
from fastgen.kernels.rejection import Lent, Rejection, Scaled, draw, follow, pick, reject

__all__ = ["Verified", "tree_verify", "tree_verify_reference"]

_checked = Checked()


def _fake(target: Tensor, draft: Any, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, max_depth = target.shape[0], rest[5]
    nodes = tokens.new_empty(batch, max_depth + 1)
    return nodes, tokens.new_empty(batch), tokens.new_empty(batch), target.new_empty(batch)


_launch = register_launcher(
    "tree_verify(Tensor target, Tensor? draft, Tensor tokens, Tensor children, Tensor internal, Tensor? coins, "
    "Tensor? gumbel, Tensor remaining, SymInt max_depth, Tensor? factor, Tensor? classes) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "fastgen.kernels.tree_verify.triton:launch",
    _fake,
)


class Verified(NamedTuple):
    """An accepted path of every image.

    Attributes:
        nodes: int64 [B, max_depth + 1] from the root; past the end the last node repeats.
        length: int64 [B], accepted nodes, the root not counted.
        bonus: int64 [B], the token after them.
        stolen: float32 [B], mass that relaxed acceptances were given along the path.
    """

    nodes: Tensor
    length: Tensor
    bonus: Tensor
    stolen: Tensor


def tree_verify(
    target: Tensor,
    draft: Tensor | None,
    tokens: Tensor,
    children: Tensor,
    internal: Tensor,
    coins: Tensor | None,
    gumbel: Tensor | None,
    remaining: Tensor,
    max_depth: int,
    factor: Tensor | None = None,
    classes: Tensor | None = None,
) -> Verified:
    """Decide every node on the way from the root, follow what is accepted, and draw what comes after it.

    Args:
        target: p, [B, n, V] float32, the law of the token that follows each node.
        draft: q, [B, n, V] float32 at nodes with children; None for a tree of most likely tokens.
        tokens: int64 [B, n]; the root's is the last committed one.
        children: int64 [b, n, C], b = 1 or B, in the order in which they were drawn; -1 where there are fewer. Nodes
            come behind their parents.
        internal: int64 [A], the nodes that may have children, each once.
        coins: [B, n] uniform in [0, 1), one for every node; None (together with `gumbel`) is temperature 0: a child is
            accepted if it is the most likely token.
        gumbel: [B, G, V] float32 standard Gumbel noise; G is 1, or max_depth + 1 to have one row for every length.
        remaining: int64 [B], tokens that the image still lacks, the bonus counted (0: it is finished).
        max_depth: depth of the tree, below n.
        factor: [B, A] float32 >= 1, on the acceptance of each node's children.
        classes: int64 [B, A, V], class of every token at a node, below C + V.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, dtypes, devices or numbers that do not fit, or both relaxations. Numbers in tensors (but
            for the laws and the noise) are looked at on a CPU, and with FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    tensors = (target, draft, tokens, children, internal, coins, gumbel, remaining)
    relaxed = (factor, classes)
    _checked(lambda: _check(*tensors, max_depth, *relaxed), (*tensors, *relaxed), max_depth)
    _look(tokens, children, internal, coins, remaining, factor, classes, target.shape[2])
    given = [x for x in (*tensors, factor, classes) if x is not None]
    reason = "gradients are asked for" if needs_gradients(target) else None
    if not choose("tree_verify", reason, True, *given):
        return tree_verify_reference(*tensors, max_depth, factor, classes)
    nodes, length, bonus, stolen = _launch(*tensors, max_depth, factor, classes)
    return Verified(nodes, length, bonus, stolen)


def tree_verify_reference(
    target: Tensor,
    draft: Tensor | None,
    tokens: Tensor,
    children: Tensor,
    internal: Tensor,
    coins: Tensor | None,
    gumbel: Tensor | None,
    remaining: Tensor,
    max_depth: int,
    factor: Tensor | None = None,
    classes: Tensor | None = None,
) -> Verified:
    """The specification of `tree_verify`: all nodes decide at once, then a walk."""
    batch, n, vocabulary = target.shape
    children = children.expand(batch, -1, -1)
    if coins is None or gumbel is None:
        best = target.argmax(dim=-1)
        match = (tokens.gather(1, children.clamp_min(0).flatten(1)).view_as(children) == best[..., None]) & (
            children >= 0
        )
        nodes, length = follow(torch.where(match, children, -1).amax(dim=-1), remaining, max_depth)
        ends = nodes[:, -1:]
        return Verified(nodes, length, best.gather(1, ends)[:, 0], target.new_zeros(batch))
    inner = children.index_select(1, internal)
    places = inner.clamp_min(0).flatten(1)
    rule = Rejection()
    if factor is not None:
        rule = Scaled(factor)
    elif classes is not None:
        rule = Lent(classes)
    outcome = reject(
        target.index_select(1, internal),
        None if draft is None else draft.index_select(1, internal),
        tokens.gather(1, places).view_as(inner),
        inner >= 0,
        coins.gather(1, places).view_as(inner),
        torch.zeros_like(inner[..., 0]),
        rule,
    )
    accepted = torch.where(outcome.slot >= 0, pick(inner, outcome.slot.clamp_min(0)), -1)
    child = torch.full_like(tokens, -1).index_copy(1, internal, accepted)
    stolen = torch.zeros_like(target[..., 0]).index_copy(1, internal, outcome.stolen)
    nodes, length = follow(child, remaining, max_depth)
    end = nodes[:, -1:]
    # A leaf's token comes from p itself: the law after the same processors as everywhere.
    law = target.index_copy(1, internal, outcome.left).gather(1, end[..., None].expand(-1, 1, vocabulary))[:, 0]
    row = length.clamp_max(gumbel.shape[1] - 1)[:, None, None].expand(-1, 1, vocabulary)
    bonus = draw(law, gumbel.gather(1, row)[:, 0])
    # Where the image ends before the path, the accepted child is the last token: by itself it has the law of a node.
    cut = child.gather(1, end)
    bonus = torch.where(cut[:, 0] >= 0, tokens.gather(1, cut.clamp_min(0))[:, 0], bonus)
    passed = torch.arange(max_depth + 1, device=nodes.device) <= length[:, None]
    return Verified(nodes, length, bonus, (stolen.gather(1, nodes) * passed).sum(dim=1))


def _check(
    target: Tensor,
    draft: Tensor | None,
    tokens: Tensor,
    children: Tensor,
    internal: Tensor,
    coins: Tensor | None,
    gumbel: Tensor | None,
    remaining: Tensor,
    max_depth: int,
    factor: Tensor | None,
    classes: Tensor | None,
) -> None:
    """See that shapes, dtypes and devices fit."""
    needed = {"target": target, "tokens": tokens, "children": children, "internal": internal, "remaining": remaining}
    optional = {"draft": draft, "coins": coins, "gumbel": gumbel, "factor": factor, "classes": classes}
    check_tensors(needed, optional)
    if target.ndim != 3 or target.dtype != torch.float32 or not target.shape[1] or not target.shape[2]:
        raise ValueError(f"target: needs float32 [B, n, V], got {shown(target)}")
    batch, n, vocabulary = target.shape
    check_int("max_depth", max_depth, 0, n - 1)
    if (coins is None) != (gumbel is None):
        raise ValueError("coins, gumbel: both or neither are needed")
    if factor is not None and classes is not None:
        raise ValueError("factor, classes: one relaxation at a time")
    if children.ndim != 3 or children.shape[0] not in (1, batch) or children.shape[1] != n or not children.shape[2]:
        raise ValueError(f"children: need [1 or {batch}, {n}, C], got {tuple(children.shape)}")
    noise = 1 if gumbel is None or gumbel.ndim < 2 else gumbel.shape[1]
    shapes: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]] = [
        ("draft", draft, (batch, n, vocabulary), torch.float32),
        ("tokens", tokens, (batch, n), torch.int64),
        ("children", children, tuple(children.shape), torch.int64),
        ("internal", internal, (internal.numel(),), torch.int64),
        ("coins", coins, (batch, n), None),
        ("gumbel", gumbel, (batch, noise, vocabulary), torch.float32),
        ("remaining", remaining, (batch,), torch.int64),
        ("factor", factor, (batch, internal.numel()), torch.float32),
        ("classes", classes, (batch, internal.numel(), vocabulary), torch.int64),
    ]
    for name, value, shape, dtype in shapes:
        if value is not None and (value.shape != shape or (dtype is not None and value.dtype != dtype)):
            raise ValueError(f"{name}: needs {dtype or 'floats'} {list(shape)}, got {shown(value)}")
    if coins is not None and not coins.is_floating_point():
        raise ValueError(f"coins: needs floats [{batch}, {n}], got {shown(coins)}")
    if gumbel is not None and gumbel.shape[1] != 1 and gumbel.shape[1] != max_depth + 1:
        raise ValueError(f"gumbel: needs 1 or {max_depth + 1} rows of noise, got {tuple(gumbel.shape)}")


def _look(
    tokens: Tensor,
    children: Tensor,
    internal: Tensor,
    coins: Tensor | None,
    remaining: Tensor,
    factor: Tensor | None,
    classes: Tensor | None,
    vocabulary: int,
) -> None:
    """See that numbers in tensors fit, where looking is cheap."""
    if not looks(children):
        return
    n = tokens.shape[1]
    check_range("tokens", tokens, vocabulary)
    check_range("children", children + 1, n + 1)
    if bool(((children <= torch.arange(n, device=children.device)[:, None]) & (children >= 0)).any()):
        raise ValueError("children: need to come behind their parents")
    check_range("internal", internal, n)
    if len(set(internal.tolist())) < len(internal):
        raise ValueError("internal: needs every node at most once")
    check_range("remaining", remaining, 2**62)
    if coins is not None and not bool(((coins >= 0) & (coins <= 1)).all()):
        raise ValueError("coins: need numbers from 0 to 1")
    if factor is not None and not bool((factor >= 1).all()):
        raise ValueError("factor: needs numbers >= 1")
    if classes is not None:
        check_range("classes", classes, children.shape[2] + vocabulary)
