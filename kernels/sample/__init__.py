"""The law of the next token and a draw from it: guidance, temperature, top-k, top-p, Gumbel-max.

The noise is the caller's (`fastgen.drafters.law.gumbel_noise`), so a kernel is a pure function and an image does not
depend on the batch around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_int, check_number, check_tensors, shown
from fastgen.kernels.dispatch import choose, needs_gradients
from fastgen.kernels.operators import register_launcher

__all__ = ["mix_logits", "restrict_logits", "sample", "sample_reference", "token_probabilities"]
__all__ += ["token_probabilities_reference"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPILED = 512
_LARGEST_VOCABULARY = 2**16
"""Tokens that one program holds in registers."""
_SETTINGS = "float guidance_scale, float temperature, SymInt? top_k, float? top_p"
_launch_sample = register_launcher(
    f"sample(Tensor cond, Tensor? uncond, Tensor? gumbel, {_SETTINGS}) -> Tensor",
    "fastgen.kernels.sample.triton:launch_sample",
    lambda cond, *rest: cond.new_empty(cond.shape[0], dtype=torch.int64),
)
_launch_law = register_launcher(
    f"token_probabilities(Tensor cond, Tensor? uncond, {_SETTINGS}) -> Tensor",
    "fastgen.kernels.sample.triton:launch_law",
    lambda cond, *rest: torch.empty(cond.shape, dtype=torch.float32, device=cond.device),
)


def mix_logits(cond: Tensor, uncond: Tensor | None, guidance_scale: float, temperature: float) -> Tensor:
    """Guidance u + s (c - u), if there is a u, then temperature (0 and 1 leave the logits), in float32."""
    logits = cond.float()
    if uncond is not None:
        base = uncond.float()
        # Equal ones have no difference, not even where both are -inf: a masked token stays masked.
        logits = base + guidance_scale * torch.where(logits == base, 0.0, logits - base)
    return logits if temperature in (0, 1) else logits / temperature


def restrict_logits(
    logits: Tensor, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Top-k (and what ties with the k-th), then top-p: the smallest set of largest logits whose mass reaches it.

    Returns:
        the logits with excluded tokens at -inf; the mask of kept tokens (None: all are); and with top-p, per token,
        the mass [..., V] of the tokens in front of it (of equal ones those of lower index), by which it is kept.
    """
    keep: Tensor | None = None
    mass_before: Tensor | None = None
    if top_k is not None and top_k < logits.shape[-1]:
        keep = logits >= logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(~keep, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        # The most likely token has no mass in front of it and therefore always stays.
        before = probability.cumsum(-1) - probability
        stays = (before < top_p) & (ordered > -math.inf)
        keep = torch.zeros_like(stays).scatter(-1, order, stays)
        mass_before = torch.zeros_like(before).scatter(-1, order, before)
        logits = logits.masked_fill(~keep, -math.inf)
    return logits, keep, mass_before


def sample(
    cond: Tensor,
    uncond: Tensor | None,
    gumbel: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Tokens [B] drawn from logits [B, V]: the argmax of the restricted logits plus noise. Loss contract: exact.

    Args:
        cond, uncond: raw logits of the rows with and without a prompt; no `uncond`, no guidance.
        gumbel: [B, V] float32 standard Gumbel noise; None takes the most likely tokens.
        guidance_scale: s of u + s (c - u).
        temperature: > 0; 0 takes the most likely tokens, whatever the noise.
        top_k: keep the k largest logits (and what ties with the k-th); None keeps all.
        top_p: keep the smallest set of largest logits whose mass reaches p; None keeps all.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    check_tensors({"cond": cond}, {"uncond": uncond, "gumbel": gumbel})
    if cond.ndim != 2:
        raise ValueError(f"cond: needs [B, V], got {tuple(cond.shape)}")
    _check(cond, uncond, guidance_scale, temperature, top_k, top_p)
    if gumbel is not None and (gumbel.shape != cond.shape or gumbel.dtype != torch.float32):
        raise ValueError(f"gumbel: needs float32 {tuple(cond.shape)}, got {shown(gumbel)}")
    if temperature == 0:
        gumbel, top_k, top_p = None, None, None
    given = [x for x in (cond, uncond, gumbel) if x is not None]
    # One pass over many rows that takes nothing out: compilers make as fast a kernel (1024 rows, H100).
    default = not torch.compiler.is_compiling() or top_k is not None or top_p is not None or len(cond) < _COMPILED
    if not choose("sample", _why_not(*given), default, *given):
        return sample_reference(cond, uncond, gumbel, guidance_scale, temperature, top_k, top_p)
    return _launch_sample(cond, uncond, gumbel, guidance_scale, temperature, top_k, top_p)


def sample_reference(
    cond: Tensor,
    uncond: Tensor | None,
    gumbel: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The specification of `sample`."""
    logits = mix_logits(cond, uncond, guidance_scale, temperature)
    if temperature == 0 or gumbel is None:
        return logits.argmax(dim=-1)
    return (restrict_logits(logits, top_k, top_p)[0] + gumbel).argmax(dim=-1)


def token_probabilities(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Laws [..., V] float32 of logits [..., V]: guidance, temperature, top-k, top-p, softmax.

    Arguments and errors: see `sample`; at temperature 0 all mass is on the largest logit.
    """
    check_tensors({"cond": cond}, {"uncond": uncond})
    _check(cond, uncond, guidance_scale, temperature, top_k, top_p)
    if temperature == 0:
        return token_probabilities_reference(cond, uncond, guidance_scale, temperature)
    given = [x for x in (cond, uncond) if x is not None]
    if not choose("token_probabilities", _why_not(*given), True, *given):
        return token_probabilities_reference(cond, uncond, guidance_scale, temperature, top_k, top_p)
    return _launch_law(cond, uncond, guidance_scale, temperature, top_k, top_p)


def token_probabilities_reference(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The specification of `token_probabilities`."""
    logits = mix_logits(cond, uncond, guidance_scale, temperature)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return restrict_logits(logits, top_k, top_p)[0].softmax(dim=-1)


def _check(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if cond.ndim < 1 or cond.shape[-1] < 1 or not cond.is_floating_point():
        raise ValueError(f"cond: needs floating point [..., V], got {shown(cond)}")
    if uncond is not None and (uncond.shape != cond.shape or uncond.dtype != cond.dtype):
        raise ValueError(f"uncond: needs {cond.dtype} {tuple(cond.shape)} as cond, got {shown(uncond)}")
    check_number("guidance_scale", guidance_scale)
    check_number("temperature", temperature, minimum=0)
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p, above=0, maximum=1)


def _why_not(*tensors: Tensor) -> str | None:
    cond = tensors[0]
    if cond.dtype not in _TYPES:
        return f"logits of {cond.dtype}"
    if cond.shape[-1] > _LARGEST_VOCABULARY:
        return f"{cond.shape[-1]} tokens, more than {_LARGEST_VOCABULARY}"
    if needs_gradients(*tensors):
        return "gradients are asked for"
    return None
