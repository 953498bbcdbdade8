"""`transformers.JanusForConditionalGeneration` (Janus, Janus-Pro) as a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.drafters.decoder import Rotary, RotaryTable, layers_of
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.targets.base import Prefix, Target, check_tokenizer, codes_of, unit_range
from fastgen.models.janus_prompts import format_prompt, image_size, prompt_ids, prompt_lengths, unconditional_ids

__all__ = ["JanusTarget"]


class JanusTarget(Target):
    """Janus draws N codes in raster order; nothing is forced. Its head is an MLP.

    Args:
        model: `JanusForConditionalGeneration`.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        inner = model.model
        self.model, self.tokenizer, self.inner = model, tokenizer, inner
        self.layers = layers_of(inner.language_model)
        self.final_norm = inner.language_model.norm
        config = inner.language_model.config
        self._table = RotaryTable(inner.language_model.rotary_emb, config.max_position_embeddings)
        self.num_tokens = int(model.config.vision_config.num_image_tokens)
        self.num_codes = self.vocab_size = int(inner.vqmodel.quantize.embedding.num_embeddings)
        self.forced = torch.full((self.num_tokens,), -1, dtype=torch.int64)
        self.max_positions = int(config.max_position_embeddings)

    @property
    def codebook(self) -> Tensor:
        # With unit length, as the decoder reads them.
        return nn.functional.normalize(codes_of(self.inner.vqmodel.quantize.embedding), dim=-1)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return prompt_lengths(self.model, self.tokenizer, prompts)

    def prefix(self, prompts: Sequence[str], guided: bool) -> Prefix:
        self.check_prompts(prompts)
        texts = [format_prompt(self.model, self.tokenizer, prompt) for prompt in prompts]
        ids, mask = (tensor.to(self.device) for tensor in prompt_ids(self.tokenizer, texts))
        if guided:
            ids, mask = torch.cat([ids, unconditional_ids(self.model, ids)]), torch.cat([mask, mask])
        return Prefix(self.model.get_input_embeddings()(ids), mask.bool(), guided)

    def embed(self, tokens: Tensor) -> Tensor:
        embeds: Tensor = self.inner.generation_aligner(self.inner.generation_embeddings(tokens))
        return embeds

    def rotary(self, positions: Tensor) -> Rotary:
        return self._table(positions, self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.inner.generation_head(hidden)
        return logits

    def redundancy(self, hidden: Tensor) -> Tensor:
        """After the activation: the last layer of the head is linear."""
        head = self.inner.generation_head
        feature: Tensor = head.activation_fn(head.proj_out(hidden))
        return feature

    def head_and_redundancy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.redundancy(hidden)
        logits: Tensor = self.inner.generation_head.vision_head(feature)
        return logits, feature

    def pixels(self, tokens: Tensor) -> Tensor:
        return unit_range(self.model.decode_image_tokens(tokens))

    @property
    def image_size(self) -> int:
        return image_size(self.model)

    @property
    def default_law(self) -> TokenLaw:
        return TokenLaw(guidance_scale=5.0)
