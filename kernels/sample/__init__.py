"""Next-token probabilities and samples from them: guidance, temperature, top-k, top-p, Gumbel-max.

The caller passes the noise (`fastgen.drafters.law.gumbel_noise`), so a kernel is a pure function and an image does not
depend on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_int, check_number, check_tensors, shown
from fastgen.kernels.dispatch import choose, needs_gradients
from fastgen.kernels.operators import register_launcher
from fastgen.kernels.sample.reference import (
    mix_logits,
    restrict_logits,
    sample_reference,
    token_probabilities_reference,
)

__all__ = ["mix_logits", "restrict_logits", "sample", "sample_reference", "token_probabilities"]
__all__ += ["token_probabilities_reference"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPILED = 512
_LARGEST_VOCABULARY = 2**16
"""Most tokens that one program can keep in registers."""
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
        cond, uncond: raw logits of the rows with and without a prompt; None for `uncond`: no guidance.
        gumbel: [B, V] float32 standard Gumbel noise; None takes the most likely tokens.
        guidance_scale: s of u + s (c - u).
        temperature: > 0; 0 takes the most likely tokens and ignores the noise.
        top_k: keep the k largest logits (and ties with the k-th); None keeps all.
        top_p: keep the smallest set of largest logits whose mass reaches p; None keeps all.

    Raises:
        TypeError: an argument that must be a tensor is not one.
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
    # Without top-k and top-p, a compiled reference is as fast for many rows (1024 rows, H100).
    default = not torch.compiler.is_compiling() or top_k is not None or top_p is not None or len(cond) < _COMPILED
    if not choose("sample", _why_not(*given), default, *given):
        return sample_reference(cond, uncond, gumbel, guidance_scale, temperature, top_k, top_p)
    return _launch_sample(cond, uncond, gumbel, guidance_scale, temperature, top_k, top_p)


def token_probabilities(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Probabilities [..., V] float32 from logits [..., V]: guidance, temperature, top-k, top-p, softmax.

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
        return "gradients are needed"
    return None
