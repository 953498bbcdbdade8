"""Verification of drafted token trees, one launch per batch: decisions, walk, and the token after the path.

Exact (speculative sampling: the target's distribution, whatever the draft), greedy, and relaxed in two forms: a factor
on every acceptance, or classes whose drafted token has the mass of its class. With a factor of one, or a separate
class for every token, the relaxed forms are exact. Loss contract: distribution; lossy when relaxed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_int, check_shape, check_tensors, shown
from fastgen.kernels.dispatch import Checked, check_range, checks_values, choose, needs_gradients
from fastgen.kernels.operators import register_launcher
from fastgen.kernels.tree_verify.reference import Verified, tree_verify_reference

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
    """Follow the accepted nodes from the root, and draw the token after them.

    Args:
        target: p, [B, n, V] float32, the distribution of the token after each node.
        draft: q, [B, n, V] float32 at nodes with children; None for a tree of most likely tokens.
        tokens: int64 [B, n]; the root's is the last committed one.
        children: int64 [b, n, C], b = 1 or B, in the order in which they were drawn; -1 where there are fewer. Nodes
            come after their parents.
        internal: int64 [A], the nodes that may have children, each once.
        coins: [B, n] uniform in [0, 1), one per node; None (together with `gumbel`) means temperature 0: a child is
            accepted if it is the most likely token.
        gumbel: [B, G, V] float32 standard Gumbel noise; G is 1, or max_depth + 1 for one row per length.
        remaining: int64 [B], tokens the image still needs, bonus included (0: it is finished).
        max_depth: depth of the tree, below n.
        factor: [B, A] float32 >= 1, multiplies the acceptance probability of each node's children.
        classes: int64 [B, A, V], class of every token at a node, below C + V.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit, or both relaxations. Numbers in tensors (except
            probabilities and noise) are checked on a CPU, and with FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    tensors = (target, draft, tokens, children, internal, coins, gumbel, remaining)
    relaxed = (factor, classes)
    _checked(lambda: _check(*tensors, max_depth, *relaxed), (*tensors, *relaxed), max_depth)
    _check_values(tokens, children, internal, coins, remaining, factor, classes, target.shape[2])
    given = [x for x in (*tensors, factor, classes) if x is not None]
    reason = "gradients are needed" if needs_gradients(target) else None
    if not choose("tree_verify", reason, True, *given):
        return tree_verify_reference(*tensors, max_depth, factor, classes)
    nodes, length, bonus, stolen = _launch(*tensors, max_depth, factor, classes)
    return Verified(nodes, length, bonus, stolen)


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
    """Check shapes, dtypes and devices."""
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
    check_shape("draft", draft, (batch, n, vocabulary), torch.float32)
    check_shape("tokens", tokens, (batch, n), torch.int64)
    check_shape("children", children, children.shape, torch.int64)
    check_shape("internal", internal, ("A",), torch.int64)
    check_shape("coins", coins, (batch, n))
    check_shape("gumbel", gumbel, (batch, "G", vocabulary), torch.float32)
    check_shape("remaining", remaining, (batch,), torch.int64)
    check_shape("factor", factor, (batch, len(internal)), torch.float32)
    check_shape("classes", classes, (batch, len(internal), vocabulary), torch.int64)
    if gumbel is not None and gumbel.shape[1] != 1 and gumbel.shape[1] != max_depth + 1:
        raise ValueError(f"gumbel: needs 1 or {max_depth + 1} rows of noise, got {tuple(gumbel.shape)}")


def _check_values(
    tokens: Tensor,
    children: Tensor,
    internal: Tensor,
    coins: Tensor | None,
    remaining: Tensor,
    factor: Tensor | None,
    classes: Tensor | None,
    vocabulary: int,
) -> None:
    """Check the values of index tensors, if `checks_values` says so."""
    if not checks_values(children):
        return
    n = tokens.shape[1]
    check_range("tokens", tokens, vocabulary)
    check_range("children", children + 1, n + 1)
    if bool(((children <= torch.arange(n, device=children.device)[:, None]) & (children >= 0)).any()):
        raise ValueError("children: need to come after their parents")
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
