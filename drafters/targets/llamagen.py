"""LlamaGen as a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.drafters.decoder import Rotary, layers_of
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.targets.base import Prefix, Target, check_tokenizer, codes_of, unit_range
from fastgen.models.llamagen import LlamaGen

__all__ = ["LlamaGenTarget"]

_SPARE = 64  # positions past the picture that the deepest tree may reach


class LlamaGenTarget(Target):
    """LlamaGen draws a square of codes after 120 caption slots; pads count as positions, and nothing is forced.

    Args:
        model: `fastgen.models.llamagen.LlamaGen`.
        tokenizer: of its T5.

    Raises:
        ValueError: a class-conditional model.
    """

    def __init__(self, model: LlamaGen, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        transformer: Any = model.transformer
        vq: Any = model.vq
        if transformer.config.num_classes is not None:
            raise ValueError("model: a class-conditional LlamaGen takes no prompts")
        self.model, self.tokenizer, self.transformer, self.vq = model, tokenizer, transformer, vq
        self.layers = layers_of(transformer, rotary="pairs")
        self._table = transformer.rotary(_SPARE)
        self.final_norm = transformer.norm
        self.num_tokens = transformer.config.grid**2
        self.num_codes = self.vocab_size = transformer.config.vocab_size
        self.forced = torch.full((self.num_tokens,), -1, dtype=torch.int64)
        self.max_positions = self.num_tokens + int(transformer.condition_tokens)

    @property
    def codebook(self) -> Tensor:
        return nn.functional.normalize(codes_of(self.vq.quantize.embedding), dim=-1)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]

    def prefix(self, prompts: Sequence[str], guided: bool) -> Prefix:
        self.check_prompts(prompts)
        slots = self.transformer.condition_tokens
        inputs = self.tokenizer(
            list(prompts), max_length=slots, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = inputs["attention_mask"]
        features = self.model.text_encoder(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        # Real features go to the end, pads to the front.
        turn = (torch.arange(slots, device=mask.device) + mask.sum(dim=1, keepdim=True)) % slots
        features = features.gather(1, turn[..., None].expand(-1, -1, features.shape[-1]))
        mask = mask.gather(1, turn)
        embeds = self.transformer.embed_caption(features * mask[..., None])
        if guided:
            # The null caption has the mask of the caption.
            embeds = torch.cat([embeds, self.transformer.embed_caption(None, len(embeds))])
            mask = torch.cat([mask, mask])
        return Prefix(embeds, mask.bool(), guided, counts_pads=True)

    def embed(self, tokens: Tensor) -> Tensor:
        embeds: Tensor = self.transformer.tok_embeddings(tokens)
        return embeds

    def rotary(self, positions: Tensor) -> Rotary:
        if self._table.device != positions.device or self._table.dtype != self.dtype:
            self._table = self.transformer.rotary(_SPARE).to(positions.device, self.dtype)
        cos, sin = self._table[positions.clamp_max(len(self._table) - 1)].unbind(-1)
        return cos, sin

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.transformer.output(hidden)
        return logits

    def pixels(self, tokens: Tensor) -> Tensor:
        decoded: Tensor = self.vq.decode(tokens)
        return unit_range(decoded.permute(0, 2, 3, 1))

    @property
    def default_law(self) -> TokenLaw:
        return TokenLaw(guidance_scale=7.5, top_k=1000)
