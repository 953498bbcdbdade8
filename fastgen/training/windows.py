"""Recorded Jacobi windows of a target as training data: every round of whole pictures, in a folder of shards.

    <folder>/windows.json           settings; other settings need another folder
    <folder>/00000.safetensors      up to 16 pictures, all their rounds

Shards are written atomically and every picture has its own seed, so an interrupted recording resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastgen.drafters.acceptance import AcceptanceRule, Exact
from fastgen.drafters.decode import decode_speculative
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.sources import DraftSource, Generators, JacobiSource, Proposal
from fastgen.drafters.targets import Prefix, Target, TargetPass
from fastgen.drafters.verify import AcceptedPath, Drafted
from fastgen.errors import FastgenError
from fastgen.io import atomic_write_bytes, atomic_write_json, check_writable, read_json
from fastgen.training.samples import Shuffled

__all__ = ["Rounds", "WindowRecorder", "Windows", "record_windows"]

_SHARD = 16


@dataclass(frozen=True)
class Rounds:
    """Consecutive rounds of pictures; a finished picture repeats its last round.

    Attributes:
        hidden: [B, T, G, n, F] float16, the target's last hidden states, then the inputs of tapped layers, at the root
            and the places of the window; G is 2 with guidance.
        tokens: [B, T, n] int64, the root and the drafted tokens.
        before: [B, T, n - 1] int64, tokens drawn before the heads' correction; without heads, the drafted tokens.
        index: [B, T] int64, the root's index in its picture.
        length: [B, T] int64, accepted tokens; -1 once the picture is finished.
        picture: [B, N] int64, its tokens.
    """

    hidden: Tensor
    tokens: Tensor
    before: Tensor
    index: Tensor
    length: Tensor
    picture: Tensor


class WindowRecorder(DraftSource):
    """A window that records its rounds.

    Args:
        source: the window, with one candidate per place.
        taps: layers of the target whose inputs are recorded.

    Raises:
        ValueError: several candidates per place, or a source that reads other layers.
    """

    def __init__(self, source: JacobiSource, taps: tuple[int, ...] = ()) -> None:
        if source.width != 1:
            raise ValueError(f"source: {source.width} candidates per place, needs 1")
        if source.taps != taps[: len(source.taps)]:
            raise ValueError(f"taps: {taps} are not allowed, the source reads {source.taps}")
        self.source = source
        self.nodes, self.max_depth, self.draws, self.taps = source.nodes, source.max_depth, source.draws, taps
        self.passes = source.passes

    def check(self, target: Target, law: TokenLaw, rule: AcceptanceRule) -> None:
        self.source.check(target, law, rule)

    def start(
        self, target: Target, prefix: Prefix, law: TokenLaw, output: TargetPass, first: Tensor, generators: Generators
    ) -> None:
        self.total, self.guided = target.num_tokens, prefix.guided
        self.kept: list[tuple[Tensor, ...]] = []
        self.source.start(target, prefix, law, output, first, generators)

    def propose(self, root: Tensor, index: Tensor, gumbel: Tensor | None) -> Proposal:
        self.index = index
        return self.source.propose(root, index, gumbel)

    def absorb(self, drafted: Drafted, path: AcceptedPath, tokens: Tensor, kept: Tensor, output: TargetPass) -> None:
        states = torch.cat([output.hidden, *output.taps], dim=-1)
        hidden = torch.stack(states.chunk(2 if self.guided else 1), dim=1).half()
        before = getattr(self.source, "before", drafted.tokens[:, 1:])
        self.kept.append((hidden, drafted.tokens, before, self.index, torch.where(kept > 0, path.length, -1)))
        self.source.absorb(drafted, path, tokens, kept, output)

    def rounds(self, picture: Tensor) -> Rounds:
        """All rounds of the batch, with its tokens [B, N]."""
        hidden, tokens, before, index, length = (torch.stack(part, dim=1) for part in zip(*self.kept, strict=True))
        return Rounds(hidden, tokens, before, index, length, picture)


class Windows(Shuffled):
    """Random access to recorded rounds; each pass visits every picture once, in random order.

    Args:
        folder: written by `record_windows`.
        seed: of the order.

    Raises:
        FastgenError: the folder has no windows, or not all of them.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        if not (folder / "windows.json").is_file():
            raise FastgenError(f"{folder}: has no windows (windows.json is missing)")
        self.folder, self.asked = folder, read_json(folder / "windows.json")
        super().__init__(int(self.asked["count"]), seed)
        self.window = int(self.asked["window"])
        if absent := [index for index in range(-(-self.count // _SHARD)) if not _shard(folder, index).is_file()]:
            raise FastgenError(f"{folder}: {len(absent)} shards are missing; resume the command that records them")
        self._shards: dict[int, dict[str, Tensor]] = {}

    def picture(self, index: int) -> Rounds:
        """All rounds of the `index`-th picture, with a batch axis of 1."""
        shard, row = divmod(self.place(index), _SHARD)
        if shard not in self._shards:
            self._shards[shard] = load_file(_shard(self.folder, shard))  # memory-mapped: pages are read when used
        values = {name: value[row : row + 1] for name, value in self._shards[shard].items()}
        return Rounds(**{name: value if name == "hidden" else value.long() for name, value in values.items()})


@torch.no_grad()
def record_windows(
    target: Target,
    source: JacobiSource,
    law: TokenLaw,
    folder: Path,
    prompts: Sequence[str],
    count: int,
    *,
    name: str = "",
    taps: tuple[int, ...] = (),
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Windows:
    """Record the missing ones of `count` pictures; picture k has prompt k mod len(prompts).

    Args:
        target: the model.
        source: the window.
        law: sampling settings.
        folder: created if missing.
        prompts: of the pictures.
        count: total number of pictures.
        name: identifies the source; a folder resumes only with the same one.
        taps: layers of the target whose inputs are recorded.
        seed: picture k has a generator seeded with seed + k.
        report: called with (done, total).

    Raises:
        FastgenError: the folder has other windows, or is not writable.
        ValueError: no prompts, or a count below 1.
    """
    if not prompts or count < 1:
        raise ValueError(f"need prompts and count >= 1; got {len(prompts)} and {count}")
    check_writable(folder)
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    asked = {
        "count": count,
        "seed": seed,
        "prompts_sha256": digest,
        "window": source.window,
        "source": name,
        "taps": list(taps),
    }
    asked |= {"guidance_scale": law.guidance_scale, "temperature": law.temperature}
    path = folder / "windows.json"
    if path.is_file() and read_json(path) != asked:
        raise FastgenError(f"{folder}: has windows with other prompts or settings; choose another folder")
    atomic_write_json(path, asked)
    for shard in range(-(-count // _SHARD)):
        numbers = range(shard * _SHARD, min(count, (shard + 1) * _SHARD))
        if not _shard(folder, shard).is_file():
            recorder = WindowRecorder(source, taps)
            prefix = target.prefix([prompts[number % len(prompts)] for number in numbers], law.guided)
            generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
            decoded = decode_speculative(target, recorder, Exact(), prefix, law, generators)
            rounds = recorder.rounds(decoded.tokens)
            small = {key: value.to("cpu", torch.int32) for key, value in vars(rounds).items() if key != "hidden"}
            data = save({"hidden": rounds.hidden.cpu().contiguous()} | {k: v.contiguous() for k, v in small.items()})
            atomic_write_bytes(_shard(folder, shard), data)
        report(numbers.stop, count)
    return Windows(folder, seed)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"
