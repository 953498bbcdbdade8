"""A drafter that is the target itself: its law is p, so every path of a chain is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.drafters.drafter import Drafter, DraftState
from fastgen.drafters.targets import Prefix, Target, TargetPass


class OracleDrafter(Drafter):
    """Runs the target on its own cache; with `noise` its logits are disturbed, so that some paths are refused."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def check(self, target: Target) -> None: ...

    def features(self, output: TargetPass) -> Tensor:
        return output.hidden

    def start(self, target: Target, prefix: Prefix, features: Tensor, first: Tensor, room: int) -> DraftState:
        cache = target.new_cache(prefix, room + 1)
        target.prefill(prefix, cache)
        state = DraftState(target, prefix, cache, features[:, -1:])
        self._root(state, first)
        return state

    def _root(self, state: DraftState, token: Tensor) -> None:
        """The root is run but not committed, so that absorbing starts behind what was committed before."""
        zero = torch.zeros(1, 1, dtype=torch.int64)
        alone = torch.ones(1, 1, 1, dtype=torch.bool)
        state.root = state.target.verify(token[:, None], zero, alone, state.cache, state.prefix).hidden
        self.last = token

    def absorb(self, state: DraftState, tokens: Tensor, features: Tensor, count: Tensor) -> None:
        m = tokens.shape[1]
        whole = torch.cat([self.last[:, None], tokens[:, :-1]], dim=1)
        causal = torch.ones(1, m, m, dtype=torch.bool).tril()
        state.target.verify(whole, torch.arange(m)[None], causal, state.cache, state.prefix)
        rows = torch.cat([count, count]) if state.prefix.guided else count
        state.cache.advance(rows, m)
        self._root(state, tokens.gather(1, (count - 1).clamp_min(0)[:, None])[:, 0])

    def narrow(self, state: DraftState, images: Tensor, prefix: Prefix) -> bool:
        return False  # it keeps tokens of its own

    def grow(
        self, state: DraftState, tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, first: int
    ) -> Tensor:
        # Nodes seen so far are run again, root first: slow and simple.
        k = tokens.shape[1]
        if first == 0:
            self.grown, self.depths = tokens[:, :0], depth[:, :0]
            self.masks = torch.zeros(len(mask), 0, 0, dtype=torch.bool)
        self.grown = torch.cat([self.grown, tokens], dim=1)
        self.depths = torch.cat([self.depths.expand(len(depth), -1), depth], dim=1)
        old = torch.nn.functional.pad(self.masks, (0, k))
        self.masks = torch.cat([old.expand(len(mask), -1, -1), mask], dim=1)
        n = first + k + 1
        tree = torch.ones(len(mask), n, n, dtype=torch.bool).tril()
        tree[:, 1:, 1:], tree[:, 1:, 0] = self.masks, True
        whole = torch.cat([self.last[:, None], self.grown], dim=1)
        depths = torch.cat([torch.zeros(len(self.depths), 1, dtype=torch.int64), self.depths], dim=1)
        return state.target.verify(whole, depths, tree, state.cache, state.prefix).hidden[:, -k:]

    def logits(self, state: DraftState, hidden: Tensor, depth: int) -> Tensor:
        logits = state.target.head(hidden)
        disturbance = torch.sin(torch.arange(logits.shape[-1], dtype=logits.dtype) * 12.9898) * self.noise
        return logits + disturbance
