"""`transformers.GlmImageForConditionalGeneration` inside one call of its `generate`: see
`fastgen.pipelines.accelerate.token_stage`.

The processor of diffusers' `GlmImagePipeline` reads the prompts, and that pipeline's diffusion transformer turns the
tokens into a picture. So this target starts from the inputs that `generate` prepared and ends with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgen.drafters.decoder import Rotary, layers_of
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.targets.base import Prefix, Target, codes_of
from fastgen.errors import FastgenError

__all__ = ["GlmImageTarget"]

INSIDE_ITS_PIPELINE = (
    "model: GLM-Image's language model works inside diffusers' GlmImagePipeline; load the whole pipeline and call "
    "fastgen.accelerate(pipe)"
)


@dataclass(frozen=True, kw_only=True)
class _GridPrefix(Prefix):
    """Positions are (time, row, column), and the tokens' noise is known in advance.

    Attributes:
        prompt: [B, P, 3], positions of the prompts' tokens.
        picture: [B, N, 3], positions of the picture's tokens.
        noise: [B, N, V]; the token with the largest p / noise is drawn. None takes the most likely token.
    """

    prompt: Tensor
    picture: Tensor
    noise: Tensor | None

    @property
    def positions(self) -> Tensor:
        return self.prompt

    def at(self, steps: Tensor) -> Tensor:
        steps = steps.clamp_max(self.picture.shape[1] - 1)  # nodes past the end
        return self.picture.gather(1, steps[..., None].expand(-1, -1, 3))

    def narrowed(self, images: Tensor) -> Prefix:
        noise = None if self.noise is None else self.noise[images]
        fewer = replace(self, prompt=self.prompt[images], picture=self.picture[images], noise=noise)
        return Prefix.narrowed(fewer, images)


class GlmImageTarget(Target):
    """The tokens of GLM-Image: a small picture, then the large one, then an end mark, all from one vocabulary.

    All noise is drawn in advance, so the next token is a function of the tokens before it, and rounds at temperature 0
    give the tokens that the stock loop draws with the same noise.

    Args:
        model: `GlmImageForConditionalGeneration`.
        num_tokens: tokens to draw.
        scores: maps logits [n, V] to scores [n, V], like the processors of `generate`.
    """

    def __init__(self, model: Any, num_tokens: int, scores: Callable[[Tensor], Tensor]) -> None:
        self.model, self.inner, self.decoder, self.scores = model, model.model, model.model.language_model, scores
        self.layers, self.final_norm = layers_of(self.decoder), self.decoder.norm
        self.num_tokens = num_tokens
        self.num_codes = self.vocab_size = int(model.lm_head.out_features)
        self.forced = torch.full((num_tokens,), -1, dtype=torch.int64)
        self.max_positions = int(self.decoder.config.max_position_embeddings)

    def begin(self, ids: Tensor, mask: Tensor, noise: Tensor | None, **given: Any) -> Prefix:
        """Prompts as `generate` prepared them.

        Args:
            ids: [B, P].
            mask: [B, P], real tokens.
            noise: see `_GridPrefix`.
            given: `image_grid_thw`, `images_per_sample` and `mm_encoder_outputs` of the model.
        """
        images = (given.get("mm_encoder_outputs") or {}).get("image")
        if images is not None:
            codes = self.inner.get_image_tokens(images.pooler_output).view(-1).to(ids.device)
            ids = ids.masked_scatter(self.inner.get_placeholder_mask(ids, codes), codes)
        places, _ = self.inner.get_rope_index(ids, given["image_grid_thw"], given.get("images_per_sample"), mask)
        picture = self.inner._cached_decode_position_ids[:, :, : self.num_tokens]
        return _GridPrefix(
            embeds=self.decoder.embed_tokens(ids),
            mask=mask.bool(),
            guided=False,
            prompt=places.permute(1, 2, 0),
            picture=picture.transpose(1, 2),
            noise=noise,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        embeds: Tensor = self.decoder.embed_tokens(tokens)
        return embeds

    def rotary(self, positions: Tensor) -> Rotary:
        anything = torch.empty(0, dtype=self.dtype, device=positions.device)
        cos, sin = self.decoder.rotary_emb(anything, positions.permute(2, 0, 1))
        return cos, sin

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def token_law(self, logits: Tensor, prefix: Prefix, law: TokenLaw, index: Tensor) -> Tensor:
        logits = logits.float()
        prefix.watch(logits)
        scores = self.scores(logits.flatten(0, 1)).view_as(logits)
        if isinstance(prefix, _GridPrefix) and prefix.noise is not None:
            rows = torch.arange(len(index), device=index.device)[:, None]
            scores = scores.softmax(dim=-1) / prefix.noise[rows, index.clamp_max(self.num_tokens - 1)]
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)

    def next_token(
        self, logits: Tensor, prefix: Prefix, law: TokenLaw, index: Tensor, gumbel: Tensor | None
    ) -> Tensor:
        return self.token_law(logits, prefix, law, index)[:, 0].argmax(dim=-1)

    @property
    def codebook(self) -> Tensor:
        codes = torch.nn.functional.normalize(codes_of(self.inner.vqmodel.quantize.embedding), dim=-1)
        return torch.cat([codes, codes.new_full((self.vocab_size - len(codes), codes.shape[1]), torch.nan)])

    def prefix(self, prompts: Sequence[str], guided: bool) -> Prefix:
        raise FastgenError(INSIDE_ITS_PIPELINE)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        raise FastgenError(INSIDE_ITS_PIPELINE)

    def pixels(self, tokens: Tensor) -> Tensor:
        raise FastgenError(INSIDE_ITS_PIPELINE)
