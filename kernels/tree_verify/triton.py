"""Triton kernel of `fastgen.kernels.tree_verify`: one image per program, from the root along the accepted nodes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import power_of_two, run_kernel

_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _most_likely(law, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Index of the largest number, the first of equal ones."""
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int64)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = tl.load(law + index, mask=index < vocabulary, other=float("-inf"))
        top = tl.max(value, axis=0)
        at = (start + tl.argmax(value, axis=0)).to(tl.int64)
        token = tl.where(top > best, at, token)
        best = tl.maximum(best, top)
    return token


@triton.jit
def _drawn(law, mass, gumbel, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gumbel-max over law / mass."""
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int64)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < vocabulary
        score = tl.log(tl.load(law + index, mask=inside, other=0.0) / mass)
        score = tl.where(inside, score + tl.load(gumbel + index, mask=inside, other=0.0), float("-inf"))
        top = tl.max(score, axis=0)
        at = (start + tl.argmax(score, axis=0)).to(tl.int64)
        token = tl.where(top > best, at, token)
        best = tl.maximum(best, top)
    return token


@triton.jit
def _class_mass(law, classes, own, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of law over the tokens of class `own`."""
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < vocabulary
        mates = tl.load(classes + index, mask=inside, other=-1) == own
        total += tl.sum(tl.load(law + index, mask=inside & mates, other=0.0), axis=0)
    return total


@triton.jit
def _refuse(  # type: ignore[no-untyped-def]
    law, mass, proposal, drafted_mass, classes, own, held, token, child_of, drafted, every, slot, into, vocabulary,
    DRAFT: tl.constexpr, LENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the residual of p after rejecting `token`, the positive part of p - q. Returns its mass, and that of q
    without the tokens up to `slot` (1 if nothing is left)."""
    total = tl.full([], 0.0, tl.float32)
    rest_of_q = tl.full([], 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < vocabulary
        left = tl.load(law + index, mask=inside, other=0.0) / mass
        if LENT:
            mates = tl.load(classes + index, mask=inside, other=-1) == own
            left = tl.where(index == token, held, tl.where(mates, 0.0, left))
        if DRAFT:
            q = tl.load(proposal + index, mask=inside, other=0.0)
            left = left - q / drafted_mass
            rejected = index == token
            for before in range(0, slot):
                other = tl.sum(tl.where(every == before, drafted, 0), axis=0)
                there = tl.sum(tl.where(every == before, child_of, 0), axis=0) >= 0
                rejected = rejected | ((index == other) & there)
            rest_of_q += tl.sum(tl.where(rejected, 0.0, q), axis=0)
        else:
            left = tl.where(index == token, left - 1, left)
        left = tl.maximum(left, 0.0)
        total += tl.sum(tl.where(inside, left, 0.0), axis=0)
        tl.store(into + index, left, mask=inside)
    return total, tl.where(rest_of_q > 0, rest_of_q, 1.0)


@triton.jit
def _verify(  # type: ignore[no-untyped-def]
    target, draft, tokens, children, internal, coins, gumbel, remaining, factor, classes, scratch,
    nodes, length_out, bonus_out, stolen_out,
    n, vocabulary, slots, inner_count, max_depth, noise_rows, child_stride,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, SCALED: tl.constexpr, LENT: tl.constexpr, SLOTS: tl.constexpr,
    INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    target += image * n * vocabulary
    draft += image * n * vocabulary
    tokens += image * n
    coins += image * n
    children += image * child_stride
    nodes += image * (max_depth + 1)
    rest = tl.load(remaining + image)
    spare = scratch + image * 2 * vocabulary
    node = tl.full([], 0, tl.int64)
    length = tl.full([], 0, tl.int64)
    bonus = tl.full([], 0, tl.int64)
    stolen = tl.full([], 0.0, tl.float32)
    every = tl.arange(0, SLOTS)
    tl.store(nodes, node)
    going = True
    while going:
        child_of = tl.load(children + node * slots + every, mask=every < slots, other=-1)
        child_of = tl.minimum(child_of, n - 1)
        exist = child_of >= 0
        drafted = tl.load(tokens + tl.maximum(child_of, 0))
        drafted = tl.minimum(tl.maximum(drafted, 0), vocabulary - 1)  # never out of bounds
        accepted = tl.full([], -1, tl.int64)
        if GREEDY:
            bonus = _most_likely(target + node * vocabulary, vocabulary, BLOCK)
            accepted = tl.max(tl.where(exist & (drafted == bonus), child_of, -1), axis=0)
        else:
            # The residual of p is `law` / `mass`, that of q is q / `drafted_mass` without the rejected tokens.
            law = target + node * vocabulary
            mass = tl.full([], 1.0, tl.float32)
            proposal = draft + node * vocabulary
            drafted_mass = tl.full([], 1.0, tl.float32)
            flips = 0
            place = tl.arange(0, INNER)
            known = tl.load(internal + place, mask=place < inner_count, other=-1) == node
            at = image * inner_count + tl.sum(tl.where(known, place, 0), axis=0)
            # A node that is not listed has no children.
            some = tl.sum(known.to(tl.int32), axis=0) > 0
            boost = tl.full([], 1.0, tl.float32)
            if SCALED:
                boost = tl.load(factor + at, mask=some, other=1.0)
            slot = 0
            while (slot < slots) & (accepted < 0) & some:
                child = tl.sum(tl.where(every == slot, child_of, 0), axis=0)
                token = tl.sum(tl.where(every == slot, drafted, 0), axis=0)
                # Other threads of this program have written what is read here.
                tl.debug_barrier()
                p = tl.load(law + token) / mass
                q = tl.full([], 1.0, tl.float32)
                if DRAFT:
                    seen = tl.sum(((every < slot) & exist & (drafted == token)).to(tl.int32), axis=0) > 0
                    q = tl.where(seen, 0.0, tl.load(proposal + token) / drafted_mass)
                if (child >= 0) & (q > 0):
                    held = p
                    own = tl.full([], 0, tl.int64)
                    if LENT:
                        own = tl.load(classes + at * vocabulary + token)
                        held = _class_mass(law, classes + at * vocabulary, own, vocabulary, BLOCK) / mass
                    chance = boost * (held / tl.maximum(q, _TINY))
                    if tl.load(coins + child) < chance:
                        accepted = child
                        stolen += (boost - 1) * p + (held - p)
                    else:
                        into = spare + flips % 2 * vocabulary  # the half that is not being read
                        total, drafted_mass = _refuse(
                            law, mass, proposal, drafted_mass, classes + at * vocabulary, own, held, token, child_of,
                            drafted, every, slot, into, vocabulary, DRAFT, LENT, BLOCK,
                        )  # fmt: skip
                        if total > 0:  # otherwise (rounding) p stays unchanged
                            law = into
                            mass = total
                            flips += 1
                slot += 1
            tl.debug_barrier()
            if accepted < 0:
                row = image * noise_rows + tl.minimum(length, noise_rows - 1)
                bonus = _drawn(law, mass, gumbel + row * vocabulary, vocabulary, BLOCK)
            else:
                bonus = tl.load(tokens + accepted)
        going = (accepted >= 0) & (length + 1 < rest) & (length < max_depth)
        if going:
            node = accepted
            length += 1
            tl.store(nodes + length, node)
    for behind in range(length + 1, max_depth + 1):
        tl.store(nodes + behind, node)
    tl.store(length_out + image, length)
    tl.store(bonus_out + image, bonus)
    tl.store(stolen_out + image, stolen)


def _plan(vocabulary: int) -> tuple[int, int]:
    """Tokens that a program processes at once, and its warps."""
    block = min(4096, power_of_two(vocabulary))
    return block, 16 if block >= 4096 else 4


def launch(
    target: Tensor, draft: Tensor | None, tokens: Tensor, children: Tensor, internal: Tensor,
    coins: Tensor | None, gumbel: Tensor | None, remaining: Tensor, max_depth: int,
    factor: Tensor | None, classes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fastgen.kernels.tree_verify.tree_verify`."""
    batch, n, vocabulary = target.shape
    nodes = tokens.new_empty(batch, max_depth + 1)
    length, bonus, stolen = tokens.new_empty(batch), tokens.new_empty(batch), target.new_empty(batch)
    if not batch:
        return nodes, length, bonus, stolen
    target, tokens, children, internal = (x.contiguous() for x in (target, tokens, children, internal))
    greedy = coins is None or gumbel is None
    scratch = target if greedy else target.new_empty(batch, 2, vocabulary)
    block, warps = _plan(vocabulary)
    optional = (draft, coins, gumbel, factor, classes)
    draft, coins, gumbel, factor, classes = (x if x is None else x.contiguous() for x in optional)
    run_kernel(
        _verify,
        (batch,),
        target, target if draft is None else draft, tokens, children, internal,
        target if coins is None else coins, target if gumbel is None else gumbel, remaining.contiguous(),
        target if factor is None else factor, tokens if classes is None else classes, scratch,
        nodes, length, bonus, stolen,
        n, vocabulary, children.shape[2], len(internal), max_depth, 1 if gumbel is None else gumbel.shape[1],
        0 if len(children) == 1 else children.stride(0),
        GREEDY=greedy, DRAFT=draft is not None, SCALED=factor is not None, LENT=classes is not None,
        SLOTS=power_of_two(children.shape[2]), INNER=max(1, power_of_two(len(internal))),
        BLOCK=block, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return nodes, length, bonus, stolen
