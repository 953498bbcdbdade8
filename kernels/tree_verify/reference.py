"""Reference implementation of verifying drafted trees, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.kernels.rejection import Lent, Rejection, Scaled, draw, follow, pick, reject

__all__ = ["Verified", "tree_verify_reference"]


class Verified(NamedTuple):
    """An accepted path of every image.

    Attributes:
        nodes: int64 [B, max_depth + 1] from the root; the last node repeats past the end.
        length: int64 [B], accepted nodes, without the root.
        bonus: int64 [B], the token after them.
        stolen: float32 [B], mass that relaxed acceptances took from other tokens along the path.
    """

    nodes: Tensor
    length: Tensor
    bonus: Tensor
    stolen: Tensor


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
    """Reference implementation of `tree_verify`: decisions at all nodes, then a walk."""
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
    # A leaf's token is drawn from p itself.
    law = target.index_copy(1, internal, outcome.residual).gather(1, end[..., None].expand(-1, 1, vocabulary))[:, 0]
    row = length.clamp_max(gumbel.shape[1] - 1)[:, None, None].expand(-1, 1, vocabulary)
    bonus = draw(law, gumbel.gather(1, row)[:, 0])
    # If the image ends before the path, the accepted child is the last token: it has the node's distribution.
    cut = child.gather(1, end)
    bonus = torch.where(cut[:, 0] >= 0, tokens.gather(1, cut.clamp_min(0))[:, 0], bonus)
    passed = torch.arange(max_depth + 1, device=nodes.device) <= length[:, None]
    return Verified(nodes, length, bonus, (stolen.gather(1, nodes) * passed).sum(dim=1))
