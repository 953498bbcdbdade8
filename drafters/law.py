"""The law (probability distribution) of the next image token, and the noise for exact samples from it.

The law is the softmax of `token_logits(...)`: classifier-free guidance, then temperature, top-k and top-p, all in
float32. Samples use the Gumbel-max identity: ``argmax(logits + G)`` with independent standard Gumbel noise G has
exactly the distribution ``softmax(logits)``. Each row's noise comes from its own `torch.Generator` and does not depend
on other rows of the batch (`torch.multinomial` offers no such separation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastgen.checks import check_integer, check_number
from fastgen.drafters.names import check_temperature
from fastgen.kernels.sample import mix_logits, restrict_logits, sample, token_probabilities

__all__ = ["TokenLaw", "draw_token", "gumbel_noise", "guide", "mix", "probabilities", "restrict", "token_logits"]


@dataclass(frozen=True, slots=True)
class TokenLaw:
    """Sampling settings: how logits become the law of the next token.

    Args:
        guidance_scale: s of ``u + s * (c - u)``; 1 or less uses only the conditional logits.
        temperature: divisor of the guided logits, 1e-6 or more; 0 takes the largest logit.
        top_k: keep the k largest logits (and ties with the k-th); None keeps all.
        top_p: keep the smallest set of largest logits whose mass reaches p; None keeps all.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        checked = {
            "guidance_scale": check_number("guidance_scale", self.guidance_scale),
            "temperature": check_temperature("temperature", self.temperature),
            "top_k": None if self.top_k is None else check_integer("top_k", self.top_k, 1),
            "top_p": None if self.top_p is None else check_number("top_p", self.top_p, above=0, maximum=1),
        }
        for name, value in checked.items():  # Python numbers: NumPy's would give other keys and graphs
            object.__setattr__(self, name, value)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def numbers(self) -> tuple[float, float, int | None, float | None]:
        """Guidance scale, temperature, top-k and top-p."""
        return self.guidance_scale, self.temperature, self.top_k, self.top_p


def token_logits(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """Logits whose softmax is the law of the next token; excluded tokens are -inf.

    Args:
        cond, uncond: [B, V] raw logits of the rows with and without the prompt.

    Returns:
        [B, V] float32. At temperature 0 the guided logits, of which you take the largest.
    """
    return restrict(mix(cond, uncond, law), law)[0]


def gumbel_noise(generators: Sequence[torch.Generator], size: int, device: torch.device | str) -> torch.Tensor:
    """Standard Gumbel noise [B, size] in float32; row i depends only on generators[i]."""
    rows = []
    for generator in generators:
        # float64: with float32 uniforms the noise would never exceed 16.6, and rare tokens would never be drawn. A
        # uniform of 0 means the interval up to the next value, hence the half step.
        uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=generator.device)
        rows.append((-(uniform.clamp_min(2.0**-54).log())).log().neg().to(device, torch.float32))
    return torch.stack(rows)


def guide(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """Classifier-free guidance, u + s (c - u), in float32."""
    return mix_logits(cond, uncond, law.guidance_scale, 1.0)


def mix(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """Guidance and temperature, [B, V] float32."""
    return mix_logits(cond, uncond if law.guided else None, law.guidance_scale, law.temperature)


def restrict(logits: torch.Tensor, law: TokenLaw) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Top-k, then top-p; nothing at temperature 0.

    Returns:
        the logits with excluded tokens at -inf; the mask of kept tokens (None: all are); and with top-p, per token,
        the mass [B, V] of the tokens before it, which decides whether it is kept.
    """
    return (logits, None, None) if law.temperature == 0 else restrict_logits(logits, law.top_k, law.top_p)


def probabilities(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """The law of the next token, [..., V] float32, from raw logits [..., V]."""
    return token_probabilities(cond, uncond if law.guided else None, *law.numbers)


def draw_token(cond: torch.Tensor, uncond: torch.Tensor, gumbel: torch.Tensor | None, law: TokenLaw) -> torch.Tensor:
    """Tokens [B] from raw logits [B, V] and noise [B, V]; without noise the most likely ones."""
    return sample(cond, uncond if law.guided else None, gumbel, *law.numbers)
