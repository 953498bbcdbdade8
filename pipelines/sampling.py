"""Drawing image tokens in the stock loop: exact samples, see `fastgen.drafters.law`, per generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor

from fastgen.drafters.law import TokenLaw, gumbel_noise, mix, restrict

__all__ = ["GuidedGumbelSampler"]

# How far rounding may move a score between two batch shapes, relative to the logits it is mixed from: 64 units in the
# last place of float32. On the embedded model (guidance 4, scores up to 20) the largest move among 500,000 scores was
# 0.45 of it, the typical one 0.03. A larger value would make more images be drawn twice: now about one in six.
ROUNDING = 2.0**-17


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

    `broken` [B] bool: in some step the row's scores gave no distribution: NaN, +inf, or -inf throughout. Both
    stay on the device.
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
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cond, uncond = scores.chunk(2)
        law = self.law
        logits = mix(cond, uncond, law)
        # Rows without a prompt that no guidance reads come from the same weights.
        broken = ~(logits.amax(dim=-1).isfinite() & uncond.amax(dim=-1).isfinite())
        self.broken = broken if self.broken is None else self.broken | broken
        noise = None
        if law.temperature > 0:
            noise = gumbel_noise(self.generators, scores.shape[-1], scores.device)
        restricted, keep, mass_before = restrict(logits, law)
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
        # Masked tokens (-inf) do not move.
        cond, uncond = (scores.masked_fill(scores == -math.inf, 0).abs() for scores in (cond, uncond))
        size = scale * cond.amax(-1, keepdim=True) + (scale - 1) * uncond.amax(-1, keepdim=True)
        return ROUNDING * size.float() / (self.law.temperature or 1.0)


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
