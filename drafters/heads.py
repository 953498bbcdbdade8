"""Parallel heads: one small pass that corrects all places of a Jacobi window before the target reads it.

A window's draft laws are what the target said in the round before, in the context of then. The context changed where
the target refused a token. `WindowHeads` reads what that round left (the target's hidden states at the places, the
tokens that stood there) and what stands there now (the newest committed token first), and moves each place's law to
what the target will say.

Place j reads nothing of the tokens at place j or behind it, old or new. Those depend on the noise of their places,
and a window that keeps its noise may not draw a token from a law that knows it.
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

_KINDS = 5  # of tokens read: now, before, above to the left, above, above to the right
_DROPOUT = 0.15  # in training: a few hundred pictures are soon known by heart
_FLOOR = -30.0  # logarithm of a probability that is none


@dataclass(frozen=True)
class Reading:
    """What heads read, for the token before the root, the root, and all places but the last: [B, L + 1, …].

    Attributes:
        hidden: [B, L + 1, F] what the round before left at the places, see `WindowHeads.features`.
        tokens: [B, L + 1, 5] now, then, and the three above the following place; V stands for none.
        fresh: [B, L + 1] how many places behind the last state it lies; 0 where the state is of this very place.
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
    """What a round and the start of the next one give.

    Args:
        hidden: [B, n, F] features of the round, root first.
        then: [B, n] its tokens.
        length: [B] accepted tokens of the round; n - 1 makes all places new.
        root: [B] the newest committed token.
        window: [B, L] tokens of the places behind it, as the round's own laws draw them.
        index: [B] which token of the picture the root is.
        picture: [B, m] tokens, right up to `index`.
        row_length: tokens of a row of the picture.
        none: stands for no token.
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
    """A causal attention layer with its MLP, over the few places of a window."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.second, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[B, n, width] to the same."""
        query, key, value = self.qkv(self.norm(states)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = states + self.down(F.silu(self.up(self.second(states))))
        return out


class WindowHeads(ModelMixin, ConfigMixin):
    """See the module.

    Args:
        hidden_size, vocab_size, target_layers: of the target.
        window: the longest that it can correct.
        row_length: tokens of a row of the picture.
        width, heads, layers: of the small network.
        taps: layers of the target whose inputs are read, in addition to its last states.

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
            raise FastgenError(f"taps: {taps} are not allowed, need rising numbers")
        self.read = nn.Linear(2 * hidden_size * (1 + len(taps)), width)
        self.tokens = nn.Linear(hidden_size, _KINDS * width, bias=False)
        self.place, self.fresh = nn.Embedding(window + 1, width), nn.Embedding(window + 1, width)
        for table in (self.place, self.fresh):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Mix(width, heads) for _ in range(layers))
        self.last = nn.RMSNorm(width)
        self.speak, self.trust = nn.Linear(width, vocab_size), nn.Linear(width, 1)
        for layer in (self.speak, self.trust):  # they start as the window without heads
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def for_target(cls, target: Target, **config: Any) -> WindowHeads:
        """Untrained heads of the target's sizes."""
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
        """Refuse another target, or one of another dtype.

        Raises:
            FastgenError: names the mismatch.
        """
        check_fits("heads", self, describe(target) | {"row_length": row_length(target)}, target)

    def features(self, output: TargetPass, guided: bool) -> Tensor:
        """What they read of a pass of the target, [B, n, F]: both rows of guidance side by side, or twice the same."""
        rows = torch.cat([output.hidden, *output.taps[: len(self.config.taps)]], dim=-1)
        return torch.cat(rows.chunk(2) if guided else (rows, rows), dim=-1)

    def tables(self, target: Target) -> Tensor:
        """What each token adds, [V + 1, 5, width]; the last row stands for no token."""
        embeds = target.embed(torch.arange(target.vocab_size, device=target.device))
        rows = self.tokens(embeds.to(self.tokens.weight.dtype)).unflatten(-1, (_KINDS, -1))
        return F.pad(rows, (0, 0, 0, 0, 0, 1))

    def forward(self, reading: Reading, tables: Tensor, laws: Tensor, temperature: float = 1.0) -> Tensor:
        """Logarithms of the corrected draft laws, [B, L, V] float32.

        Args:
            reading: of the round.
            tables: see `tables`.
            laws: [B, L, V] that the round before left.
            temperature: of the law.
        """
        kinds = torch.arange(_KINDS, device=tables.device)
        parts = reading.hidden.unflatten(-1, (-1, self.config.hidden_size))
        parts = F.rms_norm(parts, parts.shape[-1:], eps=1e-6)  # states and inputs of layers are of other sizes
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
    """Tokens from a place to the one below it: up to the end of the first row where the grammar has ends of lines,
    else the side of a square."""
    ends = (target.forced >= 0).nonzero()[:, 0].tolist()
    if len(ends) > 1:
        return int(ends[-1] - ends[-2])
    return int(round(target.num_tokens**0.5))
