"""The drafter protocol: a small model that predicts the target's next tokens, for both guidance rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgen.drafters.cache import KVCache
from fastgen.drafters.targets.base import Prefix, Target, TargetPass
from fastgen.errors import FastgenError

__all__ = ["DraftState", "Drafter", "check_fits", "describe"]


@dataclass
class DraftState:
    """A drafter's state between rounds.

    Attributes:
        target: provides the frozen embeddings and head.
        prefix: the prompts.
        cache: the drafter's own keys and values of committed tokens (and of the tree being drafted).
        root: [R, 1, D], its state at the root.
    """

    target: Target
    prefix: Prefix
    cache: KVCache
    root: Tensor


class Drafter(ABC):
    """A drafter.

    Attributes:
        taps: layers of the target whose inputs it reads.
        max_depth: the deepest node it can draft; None for any.
    """

    taps: tuple[int, ...] = ()
    max_depth: int | None = None

    def check(self, target: Target) -> None:
        """Check that it fits the target and its dtype.

        Raises:
            FastgenError: names the mismatch.
        """
        check_fits("drafter", self, describe(target), target)

    @abstractmethod
    def features(self, output: TargetPass) -> Tensor:
        """Its inputs [R, n, F] from a pass of the target."""

    @abstractmethod
    def start(self, target: Target, prefix: Prefix, features: Tensor, first: Tensor, room: int) -> DraftState:
        """Read the prompts.

        Args:
            target: the target.
            prefix: the prompts, [R, P].
            features: of the prompts, [R, P, F].
            first: [B] the first token of the picture, the root of the first tree.
            room: nodes of a tree that it will evaluate.
        """

    @abstractmethod
    def absorb(self, state: DraftState, tokens: Tensor, features: Tensor, count: Tensor) -> None:
        """Read committed tokens.

        Args:
            state: changed in place; its root becomes the last of the tokens.
            tokens: [B, m], the token after each feature's.
            features: [R, m, F] of committed tokens.
            count: [B] how many of the m are valid; 0 for finished images.
        """

    def narrow(self, state: DraftState, images: Tensor, prefix: Prefix) -> bool:
        """Keep only these images of the batch. A drafter that stores more than `state` returns False, and all stay."""
        rows = prefix.both(images)
        state.prefix, state.root = prefix.narrowed(images), state.root[rows]
        state.cache.narrow(rows)
        return True

    @abstractmethod
    def grow(
        self, state: DraftState, tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, first: int
    ) -> Tensor:
        """States [R, k, D] of drafted nodes.

        Args:
            state: of this batch.
            tokens: [B, k] the nodes' tokens.
            parents: [R, k, D], states of their parents.
            depth: [b, k], 1 for children of the root.
            mask: [b, k, first + k] which of the nodes so far (these come last) each one sees.
            first: number of earlier nodes in this tree.
        """

    @abstractmethod
    def logits(self, state: DraftState, hidden: Tensor, depth: int) -> Tensor:
        """Logits [R, k, V] of the tokens after nodes with states [R, k, D] at a depth (0: the root)."""


def check_fits(label: str, part: Any, wanted: dict[str, Any], target: Target) -> None:
    """Check that a part's configuration fits the target, and that both have one dtype.

    Raises:
        FastgenError: names the mismatch.
    """
    config: Any = getattr(part, "config", {})
    for name, value in wanted.items():
        if name in config and config[name] != value:
            raise FastgenError(f"{label}: made for a model of {name} {config[name]}, this one has {value}")
    dtype = getattr(part, "dtype", target.dtype)
    if dtype != target.dtype and target.dtype.is_floating_point:  # quantised weights are integers
        raise FastgenError(f"{label}: has {dtype}, the model {target.dtype}; convert one with .to(dtype)")


def describe(target: Target) -> dict[str, Any]:
    """The target's sizes, as a drafter's configuration records them."""
    return {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size, "target_layers": len(target.layers)}
