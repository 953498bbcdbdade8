"""Parallel heads: one small pass that corrects all places of a Jacobi window before the target reads it.

A window's draft distributions are the target's from the round before, in that round's context. The context changes
where the target rejects a token. `WindowHeads` reads the old round (the target's hidden states and the tokens at the
places) and the current tokens (the newest committed one first), and moves each place's distribution towards what the
target will predict.

Place j reads no tokens at place j or later, old or new: those depend on the noise of their places, and a window that
reuses its noise must not draw a token from a distribution that depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.drafters.drafter import check_fits, describe
from fastgen.drafters.targets import Target, TargetPass
from fastgen.errors import FastgenError

__all__ = ["Reading", "WindowHeads", "read_round"]

_KINDS = 5  # of tokens read: now, before, above left, above, above right
_DROPOUT = 0.15  # a few hundred training pictures are quickly memorised
_FLOOR = -30.0  # smallest log-probability


@dataclass(frozen=True)
class Reading:
    """Inputs of the heads for the token before the root, the root, and all places but the last: [B, L + 1, …].

    Attributes:
        hidden: [B, L + 1, F] features of the round before, see `WindowHeads.features`.
        tokens: [B, L + 1, 5] now, before, and the three above the next place; V means none.
        fresh: [B, L + 1] distance to the place that the state belongs to; 0 if it is this place.
    """

    hidden: Tensor
    tokens: Tensor
    fresh: Tensor


def read_round(
    hidden: Tensor,
    then: Tensor,
    length: Tensor,
    root: Tensor,
    window: Tensor,
    index: Tensor,
    picture: Tensor,
    row_length: int,
    none: int,
) -> Reading:
    """Collect the inputs from a round and the start of the next one.

    Args:
        hidden: [B, n, F] features of the round, root first.
        then: [B, n] its tokens.
        length: [B] accepted tokens of the round; n - 1 makes all places new.
        root: [B] the newest committed token.
        window: [B, L] tokens of the places after it, drawn from the uncorrected distributions.
        index: [B] the root's index in the picture.
        picture: [B, m] tokens, valid up to `index`.
        row_length: tokens per row of the picture.
        none: id that means no token.
    """
    places = window.shape[1]
    steps = torch.arange(places + 1, device=root.device)
    wanted = length[:, None] + steps
    node = wanted.clamp_max(then.shape[1] - 1)
    fresh = wanted - node
    before = then.gather(1, node)
    now = torch.cat([before[:, :1], root[:, None], window[:, :-1]], dim=1)
    before = torch.where(fresh > 0, none, before)
    following = index[:, None] + steps
    known = picture.scatter(1, following[:, 1:], window)
    above = following[..., None] - row_length + torch.arange(-1, 2, device=root.device)
    tokens = known.gather(1, above.clamp_min(0).flatten(1)).view_as(above)
    tokens = torch.where(above >= 0, tokens, none)
    states = hidden.gather(1, node[..., None].expand(-1, -1, hidden.shape[-1]))
    return Reading(states, torch.cat([now[..., None], before[..., None], tokens], dim=-1), fresh)


class Mix(nn.Module):
    """A causal attention layer with an MLP, over the places of a window."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.second, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Map [B, n, width] to the same shape."""
        query, key, value = self.qkv(self.norm(states)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = states + self.down(F.silu(self.up(self.second(states))))
        return out


class WindowHeads(ModelMixin, ConfigMixin):
    """See the module.

    Args:
        hidden_size, vocab_size, target_layers: of the target.
        window: the longest window that it can correct.
        row_length: tokens per row of the picture.
        width, heads, layers: of the small network.
        taps: layers of the target whose inputs are read, in addition to its last hidden states.

    Raises:
        FastgenError: a number out of range, or heads that do not divide the width.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        target_layers: int,
        window: int = 16,
        row_length: int = 16,
        width: int = 160,
        heads: int = 4,
        layers: int = 1,
        taps: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        sizes = {"window": window, "row_length": row_length, "width": width, "heads": heads, "layers": layers}
        for name, number in sizes.items():
            check_integer(name, number, 1)
        if width % heads:
            raise FastgenError(f"heads: {heads} is not allowed, needs a divisor of width {width}")
        if list(taps) != sorted({check_integer("taps", tap, 0, target_layers - 1) for tap in taps}):
            raise FastgenError(f"taps: {taps} are not allowed, need increasing numbers")
        self.read = nn.Linear(2 * hidden_size * (1 + len(taps)), width)
        self.tokens = nn.Linear(hidden_size, _KINDS * width, bias=False)
        self.place, self.fresh = nn.Embedding(window + 1, width), nn.Embedding(window + 1, width)
        for table in (self.place, self.fresh):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Mix(width, heads) for _ in range(layers))
        self.last = nn.RMSNorm(width)
        self.speak, self.trust = nn.Linear(width, vocab_size), nn.Linear(width, 1)
        for layer in (self.speak, self.trust):  # zeros: start as the window without heads
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def for_target(cls, target: Target, **config: Any) -> WindowHeads:
        """Untrained heads with the target's sizes."""
        return cls(**{**describe(target), "row_length": row_length(target), **config})

    def lengthened(self, window: int) -> WindowHeads:
        """A copy that corrects windows of up to `window` places; the new places start as the last one.

        Raises:
            FastgenError: a window that is shorter than this one's.
        """
        check_integer("window", window, self.config.window)
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        copied = WindowHeads(**{**settings, "window": window}).to(self.place.weight)
        weights = self.state_dict()
        for name in ("place.weight", "fresh.weight"):
            rows = weights[name]
            weights[name] = torch.cat([rows, rows[-1:].expand(window + 1 - len(rows), -1)])
        copied.load_state_dict(weights)
        return copied.train(self.training)

    def check(self, target: Target) -> None:
        """Check that they fit the target and its dtype.

        Raises:
            FastgenError: names the mismatch.
        """
        check_fits("heads", self, describe(target) | {"row_length": row_length(target)}, target)

    def features(self, output: TargetPass, guided: bool) -> Tensor:
        """Inputs [B, n, F] from a pass of the target: both guidance rows concatenated, or one row twice."""
        rows = torch.cat([output.hidden, *output.taps[: len(self.config.taps)]], dim=-1)
        return torch.cat(rows.chunk(2) if guided else (rows, rows), dim=-1)

    def tables(self, target: Target) -> Tensor:
        """Embedding of each token by kind, [V + 1, 5, width]; the last row means no token."""
        embeds = target.embed(torch.arange(target.vocab_size, device=target.device))
        rows = self.tokens(embeds.to(self.tokens.weight.dtype)).unflatten(-1, (_KINDS, -1))
        return F.pad(rows, (0, 0, 0, 0, 0, 1))

    def forward(self, reading: Reading, tables: Tensor, laws: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the corrected draft, [B, L, V] float32.

        Args:
            reading: of the round.
            tables: see `tables`.
            laws: [B, L, V] draft probabilities from the round before.
            temperature: of the sampler.
        """
        kinds = torch.arange(_KINDS, device=tables.device)
        parts = reading.hidden.unflatten(-1, (-1, self.config.hidden_size))
        parts = F.rms_norm(parts, parts.shape[-1:], eps=1e-6)  # states and inputs of layers differ in scale
        states = self.read(parts.flatten(-2)) + tables[reading.tokens, kinds].sum(dim=-2)
        places = torch.arange(states.shape[1], device=states.device)
        states = states + self.place(places) + self.fresh(reading.fresh)
        states = F.dropout(states, _DROPOUT, self.training)
        for block in self.blocks:
            states = block(states)
        states = F.dropout(self.last(states)[:, 1:], _DROPOUT, self.training)
        moved = self.speak(states).float() / temperature
        kept: Tensor = laws.log().clamp_min(_FLOOR) * (1 + self.trust(states).float())
        return (kept + moved).log_softmax(dim=-1)


def row_length(target: Target) -> int:
    """Tokens from a place to the one below it: from the grammar's ends of lines, else the side of a square."""
    ends = (target.forced >= 0).nonzero()[:, 0].tolist()
    if len(ends) > 1:
        return int(ends[-1] - ends[-2])
    return int(round(target.num_tokens**0.5))
