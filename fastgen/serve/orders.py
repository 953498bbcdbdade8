"""One picture that a request asks for, and what comes back for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Drawn", "Event", "Order"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """A picture to draw, checked. Pictures of equal `key` can share a batch.

    Attributes:
        model, method: with which.
        prompt, seed: of the picture.
        settings: of `generate_images`, resolved.
        search: settings of a search (`SearchSettings`), for method search.
        image, mask: files of uploaded pictures, for edits.
        strength: of an edit.
        batch_invariant: the picture must not depend on its batch.
        partial_images: pictures under way that are wanted.
        details: whether to record what the method did.
    """

    model: str
    method: str
    prompt: str
    seed: int
    settings: dict[str, Any]
    search: dict[str, Any] | None = None
    image: bytes | None = None
    mask: bytes | None = None
    strength: float | None = None
    batch_invariant: bool = False
    partial_images: int = 0
    details: bool = False

    @property
    def key(self) -> str:
        """Equal where pictures can share a forward pass."""
        shared = [self.model, self.method, self.settings, self.search, self.batch_invariant, self.details]
        alone = id(self) if self.image is not None or (self.search and self.details) else None
        return json.dumps([*shared, alone], sort_keys=True, default=repr)


@dataclass(frozen=True)
class Drawn:
    """A finished picture.

    Attributes:
        png: its file.
        record: prompt, seed, settings, loss contract, costs; as the sidecars of `fastgen generate`.
        details: of the method, if requested.
    """

    png: bytes
    record: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What is heard of an order while it is drawn: exactly one of `drawn` and `error` comes last.

    Attributes:
        step, steps: done and all, of a progress.
        partial: PNG of the picture under way.
        visits: of a search, what the round evaluated: [chain, number, parent, time, score] of each.
        score: of a search's candidate, whose preview `partial` is.
        drawn: the finished picture.
        error: it will not come.
    """

    step: int = 0
    steps: int = 0
    visits: Sequence[list[float | None]] = ()
    partial: bytes | None = None
    score: float | None = None
    drawn: Drawn | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.drawn is not None or self.error is not None
