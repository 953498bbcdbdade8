"""Drawing image tokens: the target law of an autoregressive image model, and exact samples from it per generator.

The law of the next token is the softmax of `token_logits(...)`: classifier-free guidance, then temperature, then
top-k, then top-p, all in float32. A sample is taken by the Gumbel-max identity: ``argmax(logits + G)`` with
independent standard Gumbel noise G has exactly the law ``softmax(logits)``. The noise of a row comes from its own
`torch.Generator`, so no other row of the batch has a say in it (`torch.multinomial` offers no such separation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

__all__ = ["GuidedGumbelSampler", "TokenLaw", "gumbel_noise", "token_logits"]

# How far rounding may move a score between two batch shapes, relative to the logits it is mixed from: 64 units in the
# last place of float32. On the embedded model (guidance 4, scores up to 20) the largest move among 500,000 scores was
# 0.45 of it, the typical one 0.03. A larger value would make more images be drawn twice: now about one in six.
ROUNDING = 2.0**-17


@dataclass(frozen=True, slots=True)
class TokenLaw:
    """How logits become the law of the next token.

    Args:
        guidance_scale: s of ``u + s * (c - u)``; 1 or less takes the conditional logits alone.
        temperature: divisor of the guided logits; 0 puts all mass on the largest one.
        top_k: keep the k largest logits (and what ties with the k-th); None keeps all.
        top_p: keep the smallest set of largest logits whose mass reaches p; None keeps all.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale: {self.guidance_scale} is not allowed, needs a finite number")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: {self.temperature} is not allowed, needs a finite number >= 0")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or int(self.top_k) != self.top_k or self.top_k < 1
        ):
            raise ValueError(f"top_k: {self.top_k} is not allowed, needs an integer >= 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not allowed, needs 0 < top_p <= 1, or None for no limit")

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


def token_logits(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """Logits whose softmax is the law of the next token; excluded tokens are -inf.

    Args:
        cond, uncond: [B, V] raw logits of the prompt rows and of the rows without a prompt.

    Returns:
        [B, V] float32. With temperature 0 the guided logits, of which the caller takes the largest.
    """
    return _restrict(_mix(cond, uncond, law), law)[0]


def gumbel_noise(generators: Sequence[torch.Generator], size: int, device: torch.device | str) -> torch.Tensor:
    """Standard Gumbel noise [B, size] in float32, row i drawn from generators[i] and from nothing else."""
    rows = []
    for generator in generators:
        # float64: with float32 uniforms the noise would stop at 16.6 and rare tokens would never be drawn. 0 is
        # possible and stands for the interval up to the next value, hence the half step.
        uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=generator.device)
        rows.append((-(uniform.clamp_min(2.0**-54).log())).log().neg().to(device, torch.float32))
    return torch.stack(rows)


class GuidedGumbelSampler(LogitsProcessor):
    """Logits processor that leaves nothing to choose: the argmax of what it returns *is* the sample.

    Made for ``JanusForConditionalGeneration.generate(generation_mode="image", do_sample=False, guidance_scale=1)``,
    whose own sampler draws from the global random state. It receives the scores of the prompt rows and of the rows
    without a prompt, [2B, V] in this order, and returns [B, V].

    Args:
        law: the law to sample from.
        generators: one per image, B in all; each step takes V uniforms from each (none at temperature 0).
        on_token: called after each token with its index.

    `margin` [B]: the smallest distance of a decision from being another one, in units of what rounding may move
    (`ROUNDING`). At 1 or above the tokens of the row are those that any other batch shape gives in float32.
    """

    def __init__(
        self,
        law: TokenLaw,
        generators: Sequence[torch.Generator],
        on_token: Callable[[int], None] | None = None,
    ) -> None:
        self.law = law
        self.generators = list(generators)
        self.on_token = on_token
        self.tokens_drawn = 0
        self.margin: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cond, uncond = scores.chunk(2)
        law = self.law
        logits = _mix(cond, uncond, law)
        noise = None
        if law.temperature > 0:
            noise = gumbel_noise(self.generators, scores.shape[-1], scores.device)
        restricted, keep, mass_before = _restrict(logits, law)
        noisy = restricted if noise is None else restricted + noise
        margin = _margin(logits, noise, noisy, keep, mass_before, self._rounding(cond, uncond), law)
        self.margin = margin if self.margin is None else torch.minimum(self.margin, margin)
        if self.on_token is not None:
            self.on_token(self.tokens_drawn)
        self.tokens_drawn += 1
        return noisy  # type: ignore[return-value]

    def _rounding(self, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        """[B, 1]: how far a score may move when the batch shape changes."""
        scale = self.law.guidance_scale if self.law.guided else 1.0
        size = scale * cond.abs().amax(-1, keepdim=True) + (scale - 1) * uncond.abs().amax(-1, keepdim=True)
        return ROUNDING * size.float() / (self.law.temperature or 1.0)


def _mix(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """Guidance and temperature, [B, V] float32."""
    logits = cond.float()
    if law.guided:
        base = uncond.float()
        logits = base + law.guidance_scale * (logits - base)
    return logits / law.temperature if law.temperature > 0 else logits


def _restrict(logits: torch.Tensor, law: TokenLaw) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Top-k, then top-p.

    Returns:
        the logits with excluded tokens at -inf; the mask of kept tokens (None: all are); and with top-p, per token,
        the mass [B, V] of the tokens in front of it, by which it is kept or not.
    """
    keep: torch.Tensor | None = None
    mass_before: torch.Tensor | None = None
    if law.temperature == 0:
        return logits, keep, mass_before
    if law.top_k is not None and law.top_k < logits.shape[-1]:
        keep = logits >= logits.topk(law.top_k).values[..., -1:]
        logits = logits.masked_fill(~keep, -math.inf)
    if law.top_p is not None and law.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        # The most likely token has no mass in front of it and therefore always stays.
        before = probability.cumsum(-1) - probability
        stays = (before < law.top_p) & (ordered > -math.inf)
        keep = torch.zeros_like(stays).scatter(-1, order, stays)
        mass_before = torch.zeros_like(before).scatter(-1, order, before)
        logits = logits.masked_fill(~keep, -math.inf)
    return logits, keep, mass_before


def _margin(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    noisy: torch.Tensor,
    keep: torch.Tensor | None,
    mass_before: torch.Tensor | None,
    rounding: torch.Tensor,
    law: TokenLaw,
) -> torch.Tensor:
    """[B]: distance of the decision from another one in units of `rounding` [B, 1], the largest move of one logit; 0
    if rounding may push the winner beyond the cut of top-k or top-p, or bring in a token that would beat it."""
    candidates = noisy
    lost = torch.zeros_like(rounding[:, 0], dtype=torch.bool)
    two = 2 * rounding  # two logits move towards each other
    if keep is not None:
        may_enter = logits >= logits.masked_fill(~keep, math.inf).amin(-1, keepdim=True) - two
        may_leave = logits <= logits.masked_fill(keep, -math.inf).amax(-1, keepdim=True) + two
        if mass_before is not None and law.top_p is not None:
            # A mass moves by less than the logits do.
            may_enter |= mass_before < law.top_p + two
            may_leave |= mass_before > law.top_p - two
        scores = logits if noise is None else logits + noise
        candidates = scores.masked_fill(~(keep | may_enter), -math.inf)
        winner = noisy.argmax(-1, keepdim=True)
        lost = may_leave.gather(-1, winner)[:, 0] | (candidates.amax(-1) > noisy.amax(-1))
    best = candidates.topk(min(2, candidates.shape[-1])).values
    gap = best[:, 0] - best[:, -1] if best.shape[-1] > 1 else torch.full_like(best[:, 0], math.inf)
    return torch.where(lost, 0.0, gap / two[:, 0])
