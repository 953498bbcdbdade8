"""A Jacobi window that heads correct before the target reads it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.heads import WindowHeads, read_round
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.names import window_of
from fastgen.drafters.sources import Generators, JacobiSource
from fastgen.drafters.targets import Prefix, Target, TargetPass
from fastgen.drafters.verify import AcceptedPath, Drafted
from fastgen.errors import FastgenError

__all__ = ["HeadsSource", "window_source"]


class HeadsSource(JacobiSource):
    """See the module. As with any draft, the exact rule keeps the target's distribution.

    Args:
        heads: made for the target.
        window, width, wide_places, coupled: see `JacobiSource`.

    Raises:
        FastgenError: a window longer than the heads can correct.
    """

    passes = (1, 0)
    hidden: Tensor
    length: Tensor

    def __init__(
        self,
        heads: WindowHeads,
        window: int = 12,
        width: int = 1,
        wide_places: int | None = None,
        coupled: bool = True,
    ) -> None:
        super().__init__(window, width, wide_places, coupled)
        if window > heads.config.window:
            raise FastgenError(f"window: {window} is not allowed, these heads correct up to {heads.config.window}")
        self.heads, self.taps = heads, tuple(heads.config.taps)

    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        super().check(target, law, rule)
        self.heads.check(target)

    def start(
        self, target: Target, prefix: Prefix, law: TokenLaw, output: TargetPass, first: Tensor, generators: Generators
    ) -> None:
        super().start(target, prefix, law, output, first, generators)
        self.target, self.prefix, self.law = target, prefix, law
        # A separate flag for the heads' logits.
        self.flag = prefix.watched()
        self.tables = self.heads.tables(target)
        # The state that predicted the first token serves a whole window of new places.
        last = TargetPass(output.hidden[:, -1:], [tap[:, -1:] for tap in output.taps])
        self.then = torch.full((len(first), self.window + 1), target.vocab_size, device=first.device)
        self.picture = first.new_zeros(len(first), target.num_tokens + self.window + 1)
        self.picture[:, 0] = first
        self._keep(last, torch.zeros_like(first)[:, None], torch.full_like(first, self.window))
        self.hidden = self.hidden.expand(-1, self.window + 1, -1).contiguous()  # strides as in later rounds

    def narrow(self, images: Tensor, prefix: Prefix) -> bool:
        for name in ("hidden", "then", "length", "picture"):
            setattr(self, name, getattr(self, name)[images])
        self.prefix = prefix.narrowed(images)
        self.flag = self.prefix.watched()
        return super().narrow(images, prefix)

    def draft_laws(self, root: Tensor, index: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        _, logs = super().draft_laws(root, index, noise)
        scores = logs if noise is None else logs + noise
        # Tokens drawn from the uncorrected distributions.
        self.before, self.index = scores.argmax(dim=-1), index
        given = (self.hidden, self.then, self.length, root, self.before, index, self.picture)
        reading = read_round(*given, self.heads.config.row_length, self.target.vocab_size)
        corrected: Tensor = self.heads(reading, self.tables, self.laws, self.law.temperature or 1.0)
        self.flag.watch(corrected)
        return corrected.exp(), corrected

    def check_finite(self) -> None:
        self.flag.check("the heads' logits")

    def absorb(self, drafted: Drafted, path: AcceptedPath, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        super().absorb(drafted, path, tokens, kept, output)
        self.then = self._spine_of(drafted.tokens)
        steps = torch.arange(1, self.window + 2, device=tokens.device)
        places = self.index[:, None] + steps
        self.picture = self.picture.scatter(1, places, tokens)
        spine = TargetPass(self._spine_of(output.hidden), [self._spine_of(tap) for tap in output.taps])
        self._keep(spine, places, path.length)

    def _spine_of(self, values: Tensor) -> Tensor:
        """Values [B, n, …] at the root and at each place's first candidate."""
        return values if self.width == 1 else values[:, self.spine]

    def _keep(self, output: TargetPass, following: Tensor, length: Tensor) -> None:
        """Store a round's results. At temperature 0 the probabilities of temperature 1 are stored: a point mass leaves
        nothing to correct."""
        self.hidden, self.length = self.heads.features(output, self.prefix.guided), length
        if self.law.temperature == 0:
            warm = replace(self.law, temperature=1.0)
            laws = self.target.token_law(self.target.head(output.hidden), self.prefix, warm, following)
            steps = torch.arange(1, self.window + 1, device=length.device)
            node = (length[:, None] + steps).clamp_max(laws.shape[1] - 1)
            self.laws = laws.gather(1, node[..., None].expand(-1, -1, laws.shape[-1]))


def window_source(name: str, rule: AcceptanceRule, heads: WindowHeads | None) -> JacobiSource:
    """The window "jacobi-12", or "heads-12", which heads correct.

    Raises:
        FastgenError: an unknown name, or no heads.
    """
    if not name.startswith("heads-"):
        return JacobiSource.of_name(name, rule)
    if heads is None:
        raise FastgenError(f"tree: {name!r} needs heads of this model; train them with `fastgen train heads`")
    return HeadsSource(heads, *window_of(name), coupled=not rule.needs_fresh_noise)
