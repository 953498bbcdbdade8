"""A small yes/no model of ShapesWorld: does this picture show that prompt?

The words of the prompt attend to the picture's 16 x 16 grid and one of them answers. Prompts are encoded apart from
pictures, so that a prompt that is asked about many pictures is encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastgen.models.shapes_detector import ResidualBlock

__all__ = ["LONGEST", "ShapesVerifier", "numbered", "word_ids"]

LONGEST = 24
_FREQUENCIES = 3
_TALLY_SCALE = 8.0  # of places: about those of one object
_PAD, _ASK, _UNKNOWN = 0, 1, 2  # ids before those of the words


def numbered(words: Sequence[str]) -> dict[str, int]:
    """The id of each word."""
    return {word: index + 3 for index, word in enumerate(words)}


def word_ids(prompts: Sequence[str], ids: dict[str, int], longest: int = LONGEST) -> Tensor:
    """Word ids [n, longest], the asking token first; unknown words share one id."""
    rows = []
    for prompt in prompts:
        found = [ids.get(word, _UNKNOWN) for word in prompt.lower().replace(",", " ").split()]
        row = [_ASK, *found][:longest]
        rows.append(row + [_PAD] * (longest - len(row)))
    return torch.tensor(rows, dtype=torch.int64).view(-1, longest)


def _coordinates(grid: int) -> Tensor:
    """[1, grid^2, 2 + 4 frequencies]: x and y of each place in [-1, 1], and their sines and cosines."""
    axis = (2 * torch.arange(grid) + 1) / grid - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    both = torch.stack([x, y], dim=-1).flatten(0, 1)
    angles = [math.pi * 2**k / 2 * both for k in range(_FREQUENCIES)]
    return torch.cat([both, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))], dim=-1)[None]


class _Attention(nn.Module):
    """Queries [n, q, D] look at keys [n, k, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        context = normed if context is None else context
        query, key, value = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.query, normed), (self.key, context), (self.value, context))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class _Tally(nn.Module):
    """Queries [n, q, D] sum over keys [n, k, D]: the mean that attention takes does not tell how much there is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.bias = nn.Parameter(torch.full((heads, 1, 1), -3.0))  # at first hardly a place counts

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.query, self.norm(x)), (self.key, context), (self.value, context))
        )
        counts = torch.sigmoid(query @ key.mT * query.shape[-1] ** -0.5 + self.bias)
        return x + self.out((counts @ value).transpose(1, 2).flatten(2) / _TALLY_SCALE)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class _Layer(nn.Module):
    """Words look at each other, and with `crossed` at the picture: what is there, and how much of it."""

    def __init__(self, width: int, heads: int, crossed: bool) -> None:
        super().__init__()
        self.own = _Attention(width, heads)
        self.crossed = _Attention(width, heads) if crossed else None
        self.tally = _Tally(width, heads) if crossed else None
        self.feed = _FeedForward(width)

    def forward(self, words: Tensor, mask: Tensor, picture: Tensor | None = None) -> Tensor:
        words = self.own(words, mask=mask)
        if self.crossed is not None and self.tally is not None and picture is not None:
            # Prompts of one picture look at it side by side: its keys and values are made once.
            together = words.view(len(picture), -1, words.shape[-1])
            words = self.tally(self.crossed(together, picture), picture).view_as(words)
        return self.feed(words)


class ShapesVerifier(ModelMixin, ConfigMixin):
    """The network.

    Args:
        words: the vocabulary.
        width: of the words and of the picture's places.
        channels: of the picture's trunk.
        depth: residual blocks of it.
        heads: of attention.
        text_layers, fusion_layers: layers without and with a look at the picture.
        longest: words of a prompt; what is longer is cut.
        grid: places of the picture on a side.
    """

    @register_to_config
    def __init__(
        self,
        words: tuple[str, ...] = (),
        width: int = 128,
        channels: int = 80,
        depth: int = 3,
        heads: int = 4,
        text_layers: int = 1,
        fusion_layers: int = 3,
        longest: int = LONGEST,
        grid: int = 16,
    ) -> None:
        super().__init__()
        self.ids = numbered(words)
        self.stem = nn.Conv2d(3, channels // 2, 4, stride=2, padding=1)
        self.down = nn.Conv2d(channels // 2, channels, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, 1 + index % 2) for index in range(depth))
        self.norm = nn.GroupNorm(8, channels)
        self.to_width = nn.Conv2d(channels, width, 1)
        self.norm_picture = nn.LayerNorm(width)
        # Behind the norm and from fixed coordinates: learnt ones come too late to tell left from right.
        self.where = nn.Linear(2 + 4 * _FREQUENCIES, width)
        self.register_buffer("coordinates", _coordinates(grid), persistent=False)
        self.embed = nn.Embedding(len(words) + 3, width)
        self.order = nn.Parameter(torch.randn(1, longest, width) * 0.02)
        self.text = nn.ModuleList(_Layer(width, heads, False) for _ in range(text_layers))
        self.fusion = nn.ModuleList(_Layer(width, heads, True) for _ in range(fusion_layers))
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """See `word_ids`."""
        return word_ids(prompts, self.ids, self.config.longest)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Words [n, length, D] and the mask [n, 1, 1, length] of those that are there, of tokens [n, length]."""
        mask = (tokens != _PAD)[:, None, None]
        words = self.embed(tokens) + self.order[:, : tokens.shape[1]]
        for layer in self.text:
            words = layer(words, mask)
        return words, mask

    def encode_picture(self, pixels: Tensor) -> Tensor:
        """Places [n, grid^2, D] of pictures [n, 3, 64, 64] in [-1, 1]."""
        hidden = self.down(F.silu(self.stem(pixels)))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.to_width(F.silu(self.norm(hidden)))
        return self.norm_picture(hidden.flatten(2).mT) + self.where(self.coordinates)

    def fuse(self, words: Tensor, mask: Tensor, picture: Tensor) -> list[Tensor]:
        """Words [n k, length, D] behind each layer that looks at the picture; k prompts of each of n pictures, those
        of one picture in a row."""
        states = []
        for layer in self.fusion:
            words = layer(words, mask, picture)
            states.append(words)
        return states

    def conclude(self, words: Tensor) -> Tensor:
        """Logits [n k] of "yes" from words behind the last layer."""
        return self.head(self.norm_out(words[:, 0]))[:, 0]

    def answer(self, words: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        """Logits [n k] of "yes"; see `fuse`."""
        return self.conclude(self.fuse(words, mask, picture)[-1])

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Logits [n, k] of k prompts [n, k, length] for each picture [n, 3, 64, 64]."""
        words, mask = self.encode_text(tokens.flatten(0, 1))
        return self.answer(words, mask, self.encode_picture(pixels)).unflatten(0, (-1, tokens.shape[1]))
