"""Targets whose image codes are part of a text vocabulary: Emu3, and the Chameleon family (Anole, Lumina-mGPT)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.drafters.decoder import Rotary, RotaryTable, layers_of
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.targets.base import Prefix, Target, check_tokenizer, codes_of, unit_range

__all__ = ["ChameleonTarget", "Emu3Target", "VocabularyTarget"]


class VocabularyTarget(Target):
    """Local ids are the image codes in codebook order, then the special tokens; `ids` are the model's.

    The model's head is restricted to these tokens: exact, because the grammar forbids all others. A head with adapters
    or offloading computes all tokens and is restricted afterwards.

    Args:
        model: the whole model, with `lm_head`.
        decoder: its decoder: `embed_tokens`, `layers`, `norm`, `rotary_emb`.
        ids: [V] ids of codes and special tokens in the text vocabulary.
        num_codes: how many of them are codes.
        forced: [N] local id of the special token at each position, or -1.
        codes: the embedding of the codebook, [num_codes, d].
    """

    def __init__(
        self, model: Any, decoder: Any, ids: list[int], num_codes: int, forced: Tensor, codes: torch.nn.Module
    ) -> None:
        self.model, self.decoder = model, decoder
        self.layers, self.final_norm = layers_of(decoder), decoder.norm
        self._table = RotaryTable(decoder.rotary_emb, decoder.config.max_position_embeddings)
        self.ids = torch.tensor(ids)
        self.num_codes, self.vocab_size = num_codes, len(ids)
        self.forced, self.num_tokens = forced, len(forced)
        self.max_positions = int(decoder.config.max_position_embeddings)
        self._codes = codes

    @property
    def codebook(self) -> Tensor:
        codes = codes_of(self._codes)
        return torch.cat([codes, codes.new_full((self.vocab_size - self.num_codes, codes.shape[1]), torch.nan)])

    @abstractmethod
    def texts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt with its frame."""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.texts(prompts)]

    def embed(self, tokens: Tensor) -> Tensor:
        embeds: Tensor = self.decoder.embed_tokens(self.ids.to(tokens.device)[tokens])
        return embeds

    def rotary(self, positions: Tensor) -> Rotary:
        return self._table(positions, self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        ids = self.ids.to(hidden.device)
        head = self.model.lm_head
        if type(head) is not torch.nn.Linear or "forward" in vars(head) or head._forward_pre_hooks:
            logits: Tensor = head(hidden)[..., ids]  # adapters, or hooks that bring the weights in
            return logits
        bias = None if head.bias is None else head.bias[ids]
        return torch.nn.functional.linear(hidden, head.weight[ids], bias)

    def rows(self, texts: Sequence[list[int]], unconditional: Sequence[list[int]] | None, pad: int) -> Prefix:
        """Prompts of token ids, all rows padded on the left to one length."""
        lines = [*texts, *(unconditional or [])]
        width = max(map(len, lines))
        ids = torch.tensor([[pad] * (width - len(line)) + line for line in lines], device=self.device)
        mask = torch.tensor([[False] * (width - len(line)) + [True] * len(line) for line in lines], device=self.device)
        return Prefix(self.decoder.embed_tokens(ids), mask, guided=unconditional is not None)


class Emu3Target(VocabularyTarget):
    """`Emu3ForConditionalGeneration`: rows of codes, each followed by an end-of-line.

    Args:
        model: the model.
        tokenizer: its tokenizer, with `boi_token` and `image_wrapper_token`.
        size: height and width of a picture in tokens.
        negative: the text of the unconditional rows.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, model: Any, tokenizer: Any, size: tuple[int, int] = (90, 90), negative: str = "") -> None:
        check_tokenizer(tokenizer)
        for side in size:
            check_integer("size", side, 1)
        self.tokenizer, self.size, self.negative = tokenizer, tuple(size), negative
        mapping = model.model.vocabulary_mapping
        codes = [mapping.img2bpe[code] for code in sorted(mapping.img2bpe)]
        height, width = size
        row = torch.full((width + 1,), -1, dtype=torch.int64)
        row[-1] = len(codes)
        book = model.model.vqmodel.quantize.embedding
        ids = [*codes, mapping.eol_token_id]
        super().__init__(model, model.model.text_model, ids, len(codes), row.repeat(height), book)

    def texts(self, prompts: Sequence[str]) -> list[list[int]]:
        token, height, width = self.tokenizer, *self.size
        end = f"{token.boi_token}{height}*{width}{token.image_wrapper_token}"
        framed = [f"{token.bos_token}{text}{end}" for text in prompts]
        return [list(token(text, add_special_tokens=False)["input_ids"]) for text in framed]

    def prefix(self, prompts: Sequence[str], guided: bool) -> Prefix:
        self.check_prompts([*prompts, self.negative] if guided else prompts)
        blank = self.texts([self.negative]) * len(prompts) if guided else None
        return self.rows(self.texts(prompts), blank, pad=self.tokenizer.pad_token_id)

    def pixels(self, tokens: Tensor) -> Tensor:
        height, width = self.size
        codes = tokens.view(-1, height, width + 1)[..., :-1]
        decoded: Tensor = self.model.model.vqmodel.decode(codes)
        return unit_range(decoded.permute(0, 2, 3, 1))

    @property
    def default_law(self) -> TokenLaw:
        return TokenLaw(guidance_scale=3.0, top_k=2048)


class ChameleonTarget(VocabularyTarget):
    """`ChameleonForConditionalGeneration`: Anole's squares of 1,024 codes, or Lumina-mGPT's rows with line ends.

    transformers has no decoder for Chameleon's VQ codes.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        size: height and width of a picture in tokens.
        line_end: id of the token after each row (Lumina-mGPT: 8803); None for none (Anole).
        begin: ids of the tokens that open a picture; the unconditional rows are these alone. None takes the
            tokenizer's `boi_token`.
        decode: maps codes [B, height, width] to pictures [B, H, W, 3] in [0, 1]; the registry makes one from a
            diffusers `VQModel`.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        size: tuple[int, int] = (32, 32),
        line_end: int | None = None,
        begin: list[int] | None = None,
        decode: Any = None,
    ) -> None:
        check_tokenizer(tokenizer)
        for side in size:
            check_integer("size", side, 1)
        self.tokenizer, self.size, self.decode, self.line_end = tokenizer, tuple(size), decode, line_end
        self.begin = begin if begin is not None else [tokenizer.convert_tokens_to_ids(tokenizer.boi_token)]
        mapping = model.model.vocabulary_mapping
        codes = [mapping.img2bpe[code] for code in sorted(mapping.img2bpe)]
        height, width = size
        row = torch.full((width + (line_end is not None),), -1, dtype=torch.int64)
        if line_end is not None:
            row[-1] = len(codes)
        ids = codes if line_end is None else [*codes, line_end]
        book = model.model.vqmodel.quantize.embedding
        super().__init__(model, model.model, ids, len(codes), row.repeat(height), book)

    def texts(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[*self.tokenizer(prompt)["input_ids"], *self.begin] for prompt in prompts]

    def prefix(self, prompts: Sequence[str], guided: bool) -> Prefix:
        self.check_prompts(prompts)
        blank = [self.begin] * len(prompts) if guided else None
        return self.rows(self.texts(prompts), blank, pad=self.tokenizer.pad_token_id or 0)

    def pixels(self, tokens: Tensor) -> Tensor:
        if self.decode is None:
            raise ValueError(
                "decode: transformers has no decoder for Chameleon's codes; pass one to the target, or ask for "
                'output_type="tokens"'
            )
        height, width = self.size
        codes = tokens.view(len(tokens), height, -1)[..., :width]
        pictures: Tensor = self.decode(codes)
        return pictures

    @property
    def default_law(self) -> TokenLaw:
        return TokenLaw(guidance_scale=3.0, top_k=2000)
