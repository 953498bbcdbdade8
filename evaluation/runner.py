"""Evaluation runs: a folder of generated images in GenEval's layout, resumable, and its scores.

    <folder>/run.json                  settings; a run never continues under others
    <folder>/timing.json               images made and seconds spent, over all sessions of the run (one more file,
                                       timing-N.json, for each further process)
    <folder>/notes.json                what the user should know of the images, if anything (and notes-N.json)
    <folder>/NNNNN/metadata.jsonl      one prompt
    <folder>/NNNNN/samples/0000.png    its images
    <folder>/results.jsonl             one verdict an image, in the fields of the official scorer

Every file is written atomically, and image i of a prompt depends only on the prompt, the settings and i. So a run
killed at any moment and started again ends with the files of an uninterrupted one, with however many processes.

An image counts as finished when its seal is valid (`fastgen.evaluation.seals`): it is whole, and was drawn for this
prompt, number and settings.
Processes of one run share its folder; another run is refused meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.accounting import account
from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.evaluation.distributed import Group, OnProgress
from fastgen.evaluation.geneval.metadata import Metadata, check_distinct, format_metadata
from fastgen.evaluation.samples import Sample, judge_samples, read_samples, results_jsonl, spread
from fastgen.evaluation.seals import is_sealed, sealed_png
from fastgen.io import atomic_write_bytes, atomic_write_json, check_format, check_writable, read_json, remove_leftovers
from fastgen.locks import locked_folder
from fastgen.pipelines.schema import DRAWING

__all__ = [
    "EvaluationRun",
    "Generate",
    "OnProgress",
    "RunSettings",
    "Sample",
    "image_seed",
    "judge_samples",
    "model_fingerprint",
    "read_samples",
    "results_jsonl",
    "spread",
]

Generate = Callable[[list[str], list[int]], Iterator[Image.Image]]
"""(prompts, seeds) of equal length -> one image per pair, in order; it loads in the call, not in the iterator."""

_FORMAT = 2  # 1: the same few seeds for every prompt
_WHOLE_HASH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything the pixels of a run depend on, besides the prompts.

    Attributes:
        model: what the user named.
        model_fingerprint: of its files, see `model_fingerprint`.
        variant: of its weight files ("fp16"); None for those of none.
        images_per_prompt: >= 1.
        seed: of the run; each image has its own seed, see `image_seed`.
        steps, guidance_scale: None takes the model's defaults.
        tail_drop, uncond_tail_drop, token_budget: compute budget of a model with dynamic chunking.
        method: "speculative", "search", or None for what the model is.
        tree, acceptance, quality, drafter: of speculative decoding.
        search: policy, verifier, budget and other settings of a search for noise.
        plan: parts of `accelerate` that are on, as names and settings.
        loading: scheduler, LoRA weights and others that the model is loaded with.
        device, dtype: as named by the user.
        batch_size: a number makes rounding part of the run, and a resumed run then equals an uninterrupted one up to
            rounding only; None when the pixels do not depend on it (batch-invariant generation).
    """

    model: str
    model_fingerprint: str
    images_per_prompt: int = 4
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int | None = None
    tail_drop: float | None = None
    uncond_tail_drop: float | None = None
    token_budget: int | None = None
    method: str | None = None
    tree: str | None = None
    acceptance: str | None = None
    quality: float | None = None
    drafter: str | None = None
    search: dict[str, Any] | None = None
    variant: str | None = None
    plan: list[list[Any]] | None = None
    loading: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_integer("images_per_prompt", self.images_per_prompt, 1)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        for method in DRAWING:
            method.of(asdict(self))
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, 0)

    def as_dict(self) -> dict[str, Any]:
        """As the run keeps them; without what not every run has, as older runs have them."""
        optional = ("variant", "plan", "loading")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


def image_seed(seed: int, prompt: str, image: int) -> int:
    """The seed, in [0, 2**32), of image number `image` of `prompt` in a run with seed `seed`.

    Prompts must not share noise: an image's layout follows its noise as well as its prompt, so with a handful of seeds
    for all prompts the scores of different prompts are no independent samples, and a standard error over prompts does
    not see how much the choice of seeds moves them.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{image}/{prompt}".encode()).digest()[:4], "big")


def model_fingerprint(*folders: Path) -> str:
    """sha256 over the names, sizes and contents of a model's folders; of a file above 64 MiB only the first and last
    MiB (a safetensors header and the last weights) are read, so that a large model does not wait for its disk."""
    digest = hashlib.sha256()
    files = [(folder, path) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    for folder, path in files:
        if path.suffix in (".md", ".png") or path.name == "training.json":
            continue  # describes the model; no picture depends on it
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_HASH_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(1 << 20))
                file.seek(-(1 << 20), 2)
                digest.update(file.read())
    return digest.hexdigest()


class EvaluationRun:
    """A folder of images for `prompts`, made or continued under `settings`.

    Args:
        folder: created when missing; one that all processes see.
        prompts: what to draw, in order; prompt k lives in folder `k` with five digits.
        settings: must equal those of a run that the folder contains already.
        group: the processes that share the run.

    Raises:
        FastgenError: a task has a prompt twice; or the folder contains another run, other settings or prompts, foreign
            files, or is not writable.
    """

    def __init__(
        self, folder: str | Path, prompts: Sequence[Metadata], settings: RunSettings, group: Group | None = None
    ) -> None:
        if not prompts:
            raise ValueError("prompts: needs at least one")
        check_distinct(prompts, [f"prompt {number}" for number in range(1, len(prompts) + 1)])
        self.folder, self.prompts, self.settings = Path(folder), list(prompts), settings
        self.group = group or Group()
        self.group.meet()  # no process holds the folder for an earlier part of the run
        self.group.main_first(self._open)
        self._digest = hashlib.sha256(json.dumps(settings.as_dict(), sort_keys=True).encode()).hexdigest()

    def _open(self) -> None:
        """Check or make the record of the run."""
        digest = hashlib.sha256(format_metadata(self.prompts)).hexdigest()
        record = {"format": _FORMAT, "settings": self.settings.as_dict(), "metadata_sha256": digest}
        path = self.folder / "run.json"
        check_writable(self.folder)
        with locked_folder(self.folder) if self.group.is_main else contextlib.nullcontext():
            self._open_record(path, record)

    def _open_record(self, path: Path, record: dict[str, Any]) -> None:
        if path.is_file():
            held = read_json(path)
            _check_record(self.folder, held, record)
            if self.group.is_main:
                remove_leftovers(self.folder)
        elif not self.group.is_main:
            raise FastgenError(
                f"{self.folder}: is not the folder that the first process sees; it must be a shared one"
            )
        elif any(not item.name.startswith(".") for item in self.folder.iterdir()):
            raise FastgenError(f"{self.folder}: is not empty and has no evaluation run; choose another folder")
        else:
            atomic_write_json(path, record)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other runs, by all processes of the group."""
        lock = locked_folder(self.folder, self.group.rank)
        self.group.meet()
        with contextlib.ExitStack() as stack:
            self.group.main_first(lambda: stack.enter_context(lock))
            yield

    def sample(self, prompt: int, image: int) -> Path:
        """Path of one image."""
        return self.folder / f"{prompt:05d}" / "samples" / f"{image:04d}.png"

    def missing(self) -> list[tuple[int, int]]:
        """(prompt, image) of every image that is not there whole, in order."""
        pairs = ((p, i) for p in range(len(self.prompts)) for i in range(self.settings.images_per_prompt))
        return [pair for pair in pairs if not self._is_finished(pair)]

    def _is_finished(self, pair: tuple[int, int]) -> bool:
        try:
            data = self.sample(*pair).read_bytes()
        except OSError:
            return False
        return is_sealed(data, self._identity(pair))

    def _identity(self, pair: tuple[int, int]) -> str:
        """The identity of an image in its run."""
        return json.dumps([self._digest, self.prompts[pair[0]].prompt, pair[1]])

    def generate(self, generate: Generate, on_progress: OnProgress | None = None) -> int:
        """Makes every missing image, by all processes of the group, and returns how many were made.

        Raises:
            FastgenError: an image cannot be written; those already made stay.
            PeerFailed: another process failed; finished images stay.
            RuntimeError: `generate` returned fewer images than asked.
        """
        with self.locked():
            return self._generate(generate, on_progress)

    def _generate(self, generate: Generate, on_progress: OnProgress | None) -> int:
        group = self.group
        # Reported by one process: another one may find less missing, when a third has begun.
        missing = group.share(self.missing() if group.is_main else None)
        total = len(self.prompts) * self.settings.images_per_prompt
        there = total - len(missing)

        def report_done(done: int) -> None:
            made = group.count(f"generate/{self.folder}", done)
            if on_progress is not None and group.is_main:
                on_progress("generate", there + (made if group.size > 1 else done), total)

        report_done(0)
        if not missing:
            return 0
        wanted = set(missing)
        asked = self._own(missing)
        if asked:
            self._draw(asked, wanted, generate, lambda done: report_done(1 if group.size > 1 else done))
        group.meet(lambda: report_done(0) if group.size > 1 else None)
        if group.is_main and (left := self.missing()):
            raise RuntimeError(
                f"{len(left)} of {len(missing)} images are missing; do all processes see {self.folder}?"
            )
        return len(missing)

    def _draw(
        self,
        asked: Sequence[tuple[int, int]],
        wanted: set[tuple[int, int]],
        generate: Generate,
        report_done: Callable[[int], None],
    ) -> None:
        """Make the images that this process is asked for, and write those that are wanted."""
        prompts = [self.prompts[p].prompt for p, _ in asked]
        seeds = [image_seed(self.settings.seed, self.prompts[p].prompt, i) for p, i in asked]
        with account() as stats:
            images = generate(prompts, seeds)
            made, seconds = _timing(self._own_file("timing"))
            clock = time.perf_counter()
            count = done = 0
            for count, (pair, image) in enumerate(zip(asked, images, strict=False), start=1):  # noqa: B007
                self.group.check()
                if pair not in wanted:
                    continue  # was there; its batch is recomputed for the others in it
                self._prepare(pair[0])
                self._keep_notes(stats.notes)
                atomic_write_bytes(self.sample(*pair), sealed_png(image, self._identity(pair)))
                now = time.perf_counter()
                made, seconds, clock, done = made + 1, seconds + now - clock, now, done + 1
                atomic_write_json(self._own_file("timing"), {"images": made, "seconds": seconds})
                report_done(done)
        if count < len(asked):
            raise RuntimeError(f"the generator returned too few images: {count} of {len(asked)}")

    def _own(self, missing: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The images that this process asks for, in order.

        Where rounding depends on the batch, batches are always cut from the whole run in the same places, and one with
        a missing image is made whole: images then do not depend on interruptions or on the number of processes.
        """
        size, per_prompt = self.settings.batch_size, self.settings.images_per_prompt
        if size is None:
            return [pair for place, pair in enumerate(missing) if self.group.owns(place)]
        batches = sorted({(p * per_prompt + i) // size for p, i in missing})
        own = [batch for place, batch in enumerate(batches) if self.group.owns(place)]
        last = len(self.prompts) * per_prompt
        places = [place for batch in own for place in range(batch * size, min((batch + 1) * size, last))]
        return [divmod(place, per_prompt) for place in places]

    def _prepare(self, prompt: int) -> None:
        """The folder and the metadata of a prompt."""
        home = self.folder / f"{prompt:05d}"
        if not (home / "metadata.jsonl").is_file():
            check_writable(home / "samples")
            atomic_write_bytes(home / "metadata.jsonl", format_metadata([self.prompts[prompt]]))

    def _own_file(self, name: str) -> Path:
        """The file of this process for what all sessions add to."""
        rank = self.group.rank
        return self.folder / (f"{name}-{rank}.json" if rank else f"{name}.json")

    def _keep_notes(self, found: Sequence[str]) -> None:
        """Before the image that they are of, so that a kill loses none."""
        file = self._own_file("notes")
        held = _notes(file)
        if new := [note for note in found if note not in held]:
            atomic_write_json(file, [*held, *new])

    def notes(self) -> list[str]:
        """Notes on the images from all sessions and processes of the run; each once."""
        files = sorted(self.folder.glob("notes*.json"))
        return list(dict.fromkeys(note for path in files for note in _notes(path)))

    def timing(self) -> tuple[int, float]:
        """(images made, seconds spent on them) over all sessions and processes of the run, saving included, loading
        excluded."""
        found = [_timing(path) for path in sorted(self.folder.glob("timing*.json"))]
        return sum(made for made, _ in found), sum(seconds for _, seconds in found)


def _notes(path: Path) -> list[str]:
    found = read_json(path) if path.is_file() else []
    if not isinstance(found, list) or not all(isinstance(note, str) for note in found):
        raise FastgenError(f"{path}: is damaged; delete it to continue without the earlier notes")
    return found


def _timing(path: Path) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    data = read_json(path)
    try:
        return int(data["images"]), float(data["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise FastgenError(f"{path}: is damaged; delete it to continue without the earlier timing") from error


def _check_record(folder: Path, held: Any, wanted: dict[str, Any]) -> None:
    """FastgenError naming what differs between the run in `folder` and the one that was asked for."""
    held = held if isinstance(held, dict) else {}
    check_format(held.get("format"), f"{folder}: its run.json", wanted["format"])
    if not isinstance(held.get("settings"), dict):
        raise FastgenError(f"{folder}: its run.json is damaged; choose another folder")
    keys = dict.fromkeys((*wanted["settings"], *held["settings"]))
    changed = [
        f"{key} is {held['settings'].get(key)!r} there and {wanted['settings'].get(key)!r} now"
        for key in keys
        if held["settings"].get(key) != wanted["settings"].get(key)
    ]
    if held.get("metadata_sha256") != wanted["metadata_sha256"]:
        changed.append("its prompts are others")
    if changed:
        raise FastgenError(f"{folder}: has a run with other settings ({'; '.join(changed)}); choose another folder")
