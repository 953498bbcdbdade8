"""Recipe `heads`: parallel heads learn to predict the target's next round on a window, from recorded windows."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.drafters.acceptance import Exact
from fastgen.drafters.heads import Reading, WindowHeads, read_round
from fastgen.drafters.heads_source import window_source
from fastgen.drafters.law import TokenLaw, guide
from fastgen.drafters.loading import load_drafter
from fastgen.drafters.targets import Target, target_of
from fastgen.errors import FastgenError
from fastgen.io import file_sha256
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import write_record
from fastgen.training.windows import Windows, record_windows

__all__ = ["HeadsRecipe", "initial_heads", "load_target", "record"]

_ROUNDS = 8  # per picture in a batch
#: Loss weights of a window's places: few rounds reach the later ones.
_NEAR, _FADE = 0.9, 0.8


def load_target(folder: Path) -> Target:
    """A Janus, frozen and in float32."""
    from fastgen.pipelines.janus import JanusImagePipeline

    pipe: Any = load_pretrained(JanusImagePipeline, folder, torch_dtype=torch.float32)
    return target_of(pipe.model.requires_grad_(False), pipe.tokenizer)


def initial_heads(folder: Path, window: int | None = None) -> WindowHeads:
    """Load the heads that training or a recording starts from, in float32.

    Args:
        folder: of the heads.
        window: places that they must correct; None: as many as they were trained for.

    Raises:
        FastgenError: the folder has none, or its heads are for longer windows.
    """
    heads = load_drafter(folder, torch.float32)
    if not isinstance(heads, WindowHeads):
        raise FastgenError(f"--init: {folder} holds {type(heads).__name__}, needs heads of a window")
    return heads if window is None else heads.lengthened(window)


def record(
    folder: Path,
    data: Path,
    prompts: Sequence[str],
    count: int,
    *,
    init: Path | None = None,
    window: int | None = None,
    taps: tuple[int, ...] | None = None,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Windows:
    """Record windows of a Janus at its default guidance.

    Args:
        folder: of the model.
        data: output folder.
        prompts, count, seed, report: see `record_windows`.
        init: heads that correct the windows; None records windows without heads.
        window: places in the window; None: as many as `init` corrects, or 16.
        taps: layers whose inputs new heads will read; None takes those of `init`, or the middle one.

    Raises:
        FastgenError: see `record_windows` and `initial_heads`.
        ValueError: heads of another model, or a window or taps that do not fit them.
    """
    heads = None if init is None else initial_heads(init, window)
    if window is None:
        window = 16 if heads is None else heads.config.window
    target = load_target(folder)
    if taps is None:
        taps = (len(target.layers) // 2,) if heads is None else tuple(heads.config.taps)
    law = TokenLaw(float(target.model.generation_config.guidance_scale or target.default_law.guidance_scale))
    source = window_source(f"{'jacobi' if heads is None else 'heads'}-{window}", Exact(), heads)
    name = "" if init is None else _digest(init)
    return record_windows(target, source, law, data, prompts, count, name=name, taps=taps, seed=seed, report=report)


def _digest(folder: Path) -> str:
    """Digest of the weights in a folder."""
    parts = [bytes.fromhex(file_sha256(file)) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


class HeadsModule(torch.nn.Module):
    """The heads, with their tables."""

    adamw_names = ("speak", "trust")

    def __init__(self, heads: WindowHeads, target: Target) -> None:
        super().__init__()
        self.heads, self._target = heads, [target]

    def forward(self, reading: Reading, laws: Tensor, temperature: float) -> Tensor:
        """See `WindowHeads`."""
        return self.heads(reading, self.heads.tables(self._target[0]), laws, temperature)


class HeadsRecipe:
    """See the module.

    Args:
        seed: seed of weights, data and noise.
        target: the model; stays frozen.
        windows: recorded with it.
        init: heads to continue from.
        heads: configuration of new heads.

    Raises:
        FastgenError: windows that are too long for the heads, or lack layers that they read.
        ValueError: heads of another model, or an invalid configuration.
    """

    name = "heads"

    def __init__(
        self, seed: int, target: Target, windows: Windows, init: WindowHeads | None = None, **heads: Any
    ) -> None:
        self.target, self.windows = target, windows
        asked = windows.asked
        self.law = TokenLaw(float(asked["guidance_scale"]), float(asked["temperature"]))
        target.model.requires_grad_(False)
        torch.manual_seed(seed)
        if init is not None:
            init.check(target)
        usual = {"window": windows.window, "taps": tuple(asked.get("taps", ())), **heads}
        self.heads = init or WindowHeads.for_target(target, **usual)
        if self.heads.config.window < windows.window:
            raise FastgenError(
                f"--data: holds windows of {windows.window} places, the heads correct up to {self.heads.config.window}"
            )
        if (own := tuple(self.heads.config.taps)) != tuple(asked.get("taps", ()))[: len(own)]:
            raise FastgenError(f"--data: was recorded with taps {asked.get('taps', [])}, the heads read {list(own)}")

    def build(self) -> torch.nn.Module:
        """The heads; the target stays frozen."""
        return HeadsModule(self.heads.train(), self.target)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Some rounds of `size` pictures, each with the round after it."""
        parts = []
        for number in range(start, start + size):
            rounds = self.windows.picture(number)
            # A round and the next one, both of an unfinished picture.
            pairs = int((rounds.length[0] >= 0).sum()) - 1
            if pairs < 1:
                continue
            at = torch.randint(pairs, (_ROUNDS,), generator=generator)
            parts.append(
                {
                    "hidden": rounds.hidden[0, at].float(),
                    "later": rounds.hidden[0, at + 1, :, :-1, : self.target.hidden_size].float(),
                    "then": rounds.tokens[0, at],
                    "root": rounds.tokens[0, at + 1, 0],
                    "before": rounds.before[0, at + 1],
                    "length": rounds.length[0, at],
                    "index": rounds.index[0, at + 1],
                    "picture": rounds.picture.expand(_ROUNDS, -1),
                }
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy to the next round's distributions, plus the mass that does not overlap."""
        target, places = self.target, batch["before"].shape[1]
        target.model.to(batch["hidden"].device)
        steps = torch.arange(1, places + 1, device=batch["root"].device)
        following = batch["index"][:, None] + steps
        with torch.no_grad():
            wanted = self._laws(batch["later"], following)
            node = (batch["length"][:, None] + steps).clamp_max(places)
            states = batch["hidden"][..., : target.hidden_size]
            stale = states.gather(2, node[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1]))
            laws = self._laws(stale, following)
        read = batch["hidden"][..., : target.hidden_size * (1 + len(self.heads.config.taps))]
        both = torch.cat([read[:, 0], read[:, -1]], dim=-1)
        picture = torch.nn.functional.pad(batch["picture"], (0, places + 1))
        reading = read_round(
            both,
            batch["then"],
            batch["length"],
            batch["root"],
            batch["before"],
            batch["index"],
            picture,
            self.heads.config.row_length,
            target.vocab_size,
        )
        log_q = module(reading, laws, self.law.temperature)
        overlap = torch.minimum(wanted, log_q.exp()).sum(dim=-1)
        cross = -(wanted * log_q.clamp_min(-80.0)).sum(dim=-1)
        weight = (1 - _NEAR + _NEAR * _FADE ** (steps - 1)) * (following < target.num_tokens)
        loss = ((cross + 1 - overlap) * weight).sum() / weight.sum()
        with torch.no_grad():
            inside = following < target.num_tokens
            numbers = {"cross": float((cross * weight).sum() / weight.sum())}
            was = torch.minimum(wanted, laws).sum(dim=-1)
            for place in (1, 2, 4, 8, 16):
                if place <= places:
                    here = inside[:, place - 1]
                    numbers[f"overlap_{place}"] = float(overlap[here, place - 1].mean())
                    numbers[f"window_{place}"] = float(was[here, place - 1].mean())
        return loss, numbers

    def _laws(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Next-token probabilities [B, L, V] from states [B, G, L, D]."""
        target = self.target
        logits = target.head(hidden.to(target.dtype))
        mixed = logits[:, 0].float() if logits.shape[1] == 1 else guide(logits[:, 0], logits[:, 1], self.law)
        return (target.apply_grammar(mixed, following) / self.law.temperature).softmax(dim=-1)

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the heads in half precision."""
        half: Any = copy.deepcopy(self.heads).to(torch.float16)
        half.save_pretrained(folder)
        write_record(folder, self.name, record)
