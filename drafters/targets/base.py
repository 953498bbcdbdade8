"""The target protocol: an autoregressive image model as speculative decoding uses it.

Tokens are *local* ids 0 … V - 1: the image codes, then the special tokens that the model puts into a picture (ends of
lines and the like). Where a special token must come, the grammar forces it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastgen.drafters.cache import AttentionMask, KVCache, mask_for_tree
from fastgen.drafters.decoder import DecoderLayer, Rotary, run_layers
from fastgen.drafters.law import TokenLaw, draw_token, guide, mix, probabilities, restrict
from fastgen.drafters.offload import device_of
from fastgen.errors import FastgenError, NotFiniteError
from fastgen.models.layers import padded_causal_mask

__all__ = ["Prefix", "Target", "TargetPass", "check_lengths", "check_tokenizer", "codes_of", "unit_range"]


def unit_range(pixels: Tensor) -> Tensor:
    """Map pictures from [-1, 1] to [0, 1] in float32; NaN where they are not finite."""
    scaled = pixels.float().add(1).div(2)
    return scaled.clamp(0, 1) + (scaled - scaled)  # clamp alone would turn infinities into 0 and 1


def codes_of(embedding: nn.Module) -> Tensor:
    """All vectors [V, d] of a codebook in float32, through its own forward so that offload hooks run."""
    count = len(next(embedding.parameters()))
    codes: Tensor = embedding(torch.arange(count, device=device_of(embedding)))
    return codes.detach().float()


def check_tokenizer(tokenizer: object) -> None:
    """Check that this is a tokenizer.

    Raises:
        FastgenError: names its type.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise FastgenError(f"tokenizer: {type(tokenizer).__name__} is not a transformers tokenizer")


def check_lengths(prompts: Sequence[str], lengths: Sequence[int], most: int) -> None:
    """Check that prompts fit into the model's positions.

    Args:
        prompts: the texts.
        lengths: tokens of each, with the template around it.
        most: positions left for a prompt.

    Raises:
        FastgenError: names the first such prompt, its length and the limit.
    """
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > most:
            start = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
            raise FastgenError(
                f"prompt: {start!r} has {length} tokens with its frame, the model takes at most {max(most, 0)}"
            )


@dataclass(frozen=True)
class Prefix:
    """Prompts as the model reads them; with guidance the rows are [conditional …, unconditional …].

    Attributes:
        embeds: [R, P, D], left-padded.
        mask: [R, P] bool, real tokens.
        guided: whether there are unconditional rows.
        counts_pads: positions count padding too (LlamaGen); otherwise real tokens only.
        static: caches of this batch have static shapes, see `KVCache.allocate`.
        broken: [B] bool on the device, set by `Target.token_law` and `Target.next_token` where an image's logits give
            no distribution; None: not tracked.
    """

    embeds: Tensor
    mask: Tensor
    guided: bool
    counts_pads: bool = False
    static: bool = False
    broken: Tensor | None = None

    def watched(self) -> Prefix:
        """A copy with its own flag for logits that are not finite; see `check`."""
        return replace(self, broken=torch.zeros(self.images, dtype=torch.bool, device=self.mask.device))

    def watch(self, mixed: Tensor) -> None:
        """Record, without a host synchronisation, which rows of mixed logits [B, ..., V] give no distribution: those
        with NaN or +inf, and those that are all -inf. Tokens masked out by -inf are fine."""
        if self.broken is not None:
            self.broken.logical_or_(~mixed.amax(dim=-1).isfinite().flatten(1).all(dim=1))

    def check(self, what: str) -> None:
        """Check the flag. Synchronises with the device.

        Raises:
            NotFiniteError: the flag is set; `what` names the logits, in the plural.
        """
        if self.broken is not None and bool(self.broken.any()):
            raise NotFiniteError(f"{what} are not numbers (NaN, infinite); another dtype (float32, bfloat16) may help")

    @property
    def images(self) -> int:
        """B."""
        return len(self.mask) // 2 if self.guided else len(self.mask)

    @property
    def offset(self) -> Tensor:
        """[R], position of the first image token."""
        if self.counts_pads:
            return torch.full_like(self.mask[:, 0], self.mask.shape[1], dtype=torch.int64)
        return self.mask.sum(dim=1)

    @property
    def positions(self) -> Tensor:
        """[R, P], of the prompts' tokens; those of padding are never used."""
        if self.counts_pads:
            return torch.arange(self.mask.shape[1], device=self.mask.device).expand(self.mask.shape)
        return (self.mask.cumsum(dim=1) - 1).clamp_min(0)

    def at(self, steps: Tensor) -> Tensor:
        """Positions [R, n] of image tokens with index `steps` [R, n]."""
        return self.offset[:, None] + steps

    def padded(self, multiple: int) -> Prefix:
        """A copy with static shapes: padded on the left to a multiple, so that prompts of many lengths share a shape.

        Where positions count padding, the length is the same for all prompts and stays.
        """
        pads = 0 if self.counts_pads else -self.mask.shape[1] % multiple
        embeds = torch.nn.functional.pad(self.embeds, (0, 0, pads, 0))
        mask = torch.nn.functional.pad(self.mask, (pads, 0), value=False)
        return replace(self, embeds=embeds, mask=mask, static=True)

    def both(self, images: Tensor) -> Tensor:
        """Row indices of the images with these indices."""
        return torch.cat([images, images + self.images]) if self.guided else images

    def narrowed(self, images: Tensor) -> Prefix:
        """A copy for these images only, with its own flag for logits that are not finite."""
        rows = self.both(images)
        return replace(self, embeds=self.embeds[rows], mask=self.mask[rows]).watched()

    def followed_by(self, embeds: Tensor) -> Prefix:
        """A copy with vectors [R, m, D] appended."""
        mask = torch.nn.functional.pad(self.mask, (0, embeds.shape[1]), value=True)
        return replace(self, embeds=torch.cat([self.embeds, embeds], dim=1), mask=mask)


@dataclass(frozen=True)
class TargetPass:
    """Outputs of a pass over n tokens of every row.

    Attributes:
        hidden: [R, n, D] after the last norm.
        taps: [R, n, D] each, inputs of the requested layers.
    """

    hidden: Tensor
    taps: list[Tensor]


class Target(ABC):
    """An autoregressive image model.

    Attributes:
        model: the model itself.
        layers: its decoder layers.
        num_tokens: N, tokens of a picture, forced ones included.
        num_codes: image codes; local ids below it.
        vocab_size: V, codes and special tokens.
        forced: [N] int64, the special token of each position; -1 where a code is drawn.
        max_positions: positions for a prompt and a picture together; None: no limit.
    """

    model: Any
    layers: list[DecoderLayer]
    final_norm: nn.Module
    num_tokens: int
    num_codes: int
    vocab_size: int
    forced: Tensor
    max_positions: int | None = None

    @abstractmethod
    def prefix(self, prompts: Sequence[str], guided: bool) -> Prefix:
        """Prompts, and the rows without a prompt if `guided`."""

    @abstractmethod
    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as `prefix` reads it."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """Vectors [V, d] of the codes in float32, from the current weights; NaN for special tokens."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., D] of local ids [...]."""

    @abstractmethod
    def rotary(self, positions: Tensor) -> Rotary | None:
        """Rotary factors of positions [R, n]; 0 is the first prompt token."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""

    @abstractmethod
    def pixels(self, tokens: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in [0, 1] of local ids [B, N]."""

    def redundancy(self, hidden: Tensor) -> Tensor:
        """The feature [..., F] that the logits are a linear map of: the hidden state, if the head is linear."""
        return hidden

    def head_and_redundancy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once, for rules that compare hidden states."""
        return self.head(hidden), self.redundancy(hidden)

    @property
    def image_size(self) -> int | None:
        """Height and width in pixels, if the model draws one size only; None if it is not known."""
        return None

    @property
    def default_law(self) -> TokenLaw:
        """The sampling settings of the model's authors."""
        return TokenLaw()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.layers[0].query.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.layers[0].query)

    @property
    def hidden_size(self) -> int:
        return int(self.layers[0].query.in_features)  # type: ignore[arg-type]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the model would truncate or has no positions for.

        Raises:
            FastgenError: names the first such prompt, its length and the limit.
        """
        if self.max_positions is not None:
            check_lengths(prompts, self.lengths(prompts), self.max_positions - self.num_tokens)

    def new_cache(self, prefix: Prefix, room: int) -> KVCache:
        """A cache for the prompts, the picture and `room` more tokens."""
        layer = self.layers[0]
        heads = int(layer.key.out_features) // layer.head_dim  # type: ignore[arg-type]
        slots = self.num_tokens + room
        return KVCache.allocate(
            len(self.layers), prefix.mask, slots, heads, layer.head_dim, prefix.embeds.dtype, prefix.static
        )

    def prefill(self, prefix: Prefix, cache: KVCache, taps: tuple[int, ...] = ()) -> TargetPass:
        """Read the prompts. Padding sees only itself, so that nothing in the batch is undefined."""
        rows, length = prefix.mask.shape
        slots = torch.arange(length, device=prefix.mask.device).expand(rows, -1)
        output = self.run(prefix.embeds, prefix.positions, cache, slots, padded_causal_mask(prefix.mask), taps)
        cache.advance(length, length)
        return output

    def read(
        self, prefix: Prefix, tokens: Tensor, cache: KVCache, taps: tuple[int, ...] = ()
    ) -> tuple[TargetPass, Tensor]:
        """One pass over the prompts and whole pictures, as in training.

        Args:
            prefix: the prompts.
            tokens: [B, N] local ids.
            cache: an empty one; all P + N slots are committed afterwards.
            taps: see `run_layers`.

        Returns:
            the pass over [R, P + N], and its input vectors.
        """
        whole = prefix.followed_by(self.both_rows(self.embed(tokens), prefix))
        return self.prefill(whole, cache, taps), whole.embeds

    def verify(
        self, tokens: Tensor, depth: Tensor, mask: Tensor, cache: KVCache, prefix: Prefix, taps: tuple[int, ...] = ()
    ) -> TargetPass:
        """One pass over the nodes of a tree; their keys and values follow the committed ones.

        Args:
            tokens: [B, n] local ids, the same for both guidance rows.
            depth: [b, n], b = 1 or B.
            mask: [b, n, n] ancestors.
            cache: committed tokens; its lengths do not change.
            prefix: of this batch.
            taps: see `run_layers`.
        """
        rows, n = len(prefix.mask), tokens.shape[1]
        depth, mask = self.both_rows(depth.expand(len(tokens), -1), prefix), self.both_trees(mask, prefix)
        committed = cache.lengths - prefix.mask.shape[1]
        positions = prefix.at(committed[:, None] + depth)
        slots = cache.lengths[:, None] + torch.arange(n, device=tokens.device)
        visible = mask_for_tree(cache, mask)
        embeds = self.both_rows(self.embed(tokens), prefix)
        return self.run(embeds, positions, cache, slots.expand(rows, -1), visible, taps)

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        cache: KVCache,
        slots: Tensor,
        mask: AttentionMask,
        taps: tuple[int, ...],
    ) -> TargetPass:
        """A pass over vectors [R, n, D] at `positions`, written to `slots` of the cache, with an attention mask."""
        hidden, tapped = run_layers(self.layers, embeds, self.rotary(positions), cache, slots, mask, taps)
        return TargetPass(self.final_norm(hidden), tapped)

    @staticmethod
    def both_rows(values: Tensor, prefix: Prefix) -> Tensor:
        """Values [B, …] of the images for every row, [R, …]."""
        return torch.cat([values, values]) if prefix.guided else values

    @classmethod
    def both_trees(cls, mask: Tensor, prefix: Prefix) -> Tensor:
        """Masks [b, …] for every row; a single one serves all."""
        return mask if len(mask) == 1 else cls.both_rows(mask, prefix)

    def guided(self, values: Tensor, prefix: Prefix, law: TokenLaw) -> Tensor:
        """Rows [R, …] of something linear in the logits, combined as guidance combines logits: [B, …] float32."""
        if not prefix.guided:
            return values.float()
        cond, uncond = values.chunk(2)
        return guide(cond, uncond, law)

    def token_law(self, logits: Tensor, prefix: Prefix, law: TokenLaw, index: Tensor) -> Tensor:
        """Probabilities [B, n, V] float32: guidance, grammar, temperature, top-k, top-p.

        Args:
            logits: [R, n, V].
            prefix: defines the rows.
            law: sampling settings.
            index: [B, n] index of the token in the picture; results past the last are arbitrary.
        """
        cond, uncond = logits.chunk(2) if prefix.guided else (logits, logits)
        if not self.has_grammar:
            if prefix.broken is not None:
                prefix.watch(mix(cond, uncond, law))
            return probabilities(cond, uncond, law)
        mixed = mix(cond, uncond, law)
        prefix.watch(mixed)
        mixed = self.apply_grammar(mixed, index)
        if law.temperature == 0:
            return torch.zeros_like(mixed).scatter_(-1, mixed.argmax(dim=-1, keepdim=True), 1.0)
        return restrict(mixed, law)[0].softmax(dim=-1)

    def next_token(
        self, logits: Tensor, prefix: Prefix, law: TokenLaw, index: Tensor, gumbel: Tensor | None
    ) -> Tensor:
        """Tokens [B] drawn from `token_law` by Gumbel-max; without noise the most likely ones.

        Args:
            logits: [R, 1, V].
            prefix, law, index: see `token_law`; index [B, 1].
            gumbel: [B, V] noise.
        """
        cond, uncond = logits.chunk(2) if prefix.guided else (logits, logits)
        mixed = mix(cond, uncond, law)
        prefix.watch(mixed)
        if not self.has_grammar:
            return draw_token(cond[:, 0], uncond[:, 0], gumbel, law)
        mixed = restrict(self.apply_grammar(mixed, index), law)[0][:, 0]
        return (mixed if gumbel is None else mixed + gumbel).argmax(dim=-1)

    @property
    def has_grammar(self) -> bool:
        """Whether there are special tokens."""
        return self.vocab_size != self.num_codes

    def apply_grammar(self, logits: Tensor, index: Tensor) -> Tensor:
        """Allow special tokens only where they are forced."""
        if not self.has_grammar:
            return logits
        logits = logits.clone()
        logits[..., self.num_codes :] = -torch.inf
        forced = self.forced.to(index.device)[index.clamp_max(self.num_tokens - 1)]
        only = torch.full_like(logits, -torch.inf).scatter_(-1, forced.clamp_min(0)[..., None], 0.0)
        return torch.where((forced >= 0)[..., None], only, logits)
