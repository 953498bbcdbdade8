"""Evaluation runs: a folder of generated images in GenEval's layout, resumable, and its scores.

    <folder>/run.json                  settings; a run never continues under others
    <folder>/timing.json               images made and seconds spent, over all sessions of the run
    <folder>/NNNNN/metadata.jsonl      one prompt
    <folder>/NNNNN/samples/0000.png    its images
    <folder>/results.jsonl             one verdict an image, in the fields of the official scorer

Every file is written atomically, and image i of a prompt depends only on the prompt, the settings and i. So a run
killed at any moment and started again ends with the files of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.metadata import Metadata, check_vocabulary, format_metadata, read_metadata
from fastgen.evaluation.geneval.rules import ImageResult, RuleSettings, evaluate_image
from fastgen.evaluation.geneval.types import ColorClassifier, ObjectDetector
from fastgen.io import atomic_write_bytes, atomic_write_json, check_writable, read_json, save_png

Generate = Callable[[list[str], list[int]], Iterator[Image.Image]]
"""(prompts, seeds) of equal length -> one image per pair, in order; it loads in the call, not in the iterator."""
OnProgress = Callable[[str, int, int], None]
"""(stage, done, total)"""

_FORMAT = 2  # 1: the same few seeds for every prompt
_SAMPLE = re.compile(r"\d+\.png")
_PROMPT = re.compile(r"\d+")
_CHUNK = 64  # images in memory while scoring
_WHOLE_HASH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything the pixels of a run depend on, besides the prompts.

    Attributes:
        model: what the user named.
        model_fingerprint: of its files, see `model_fingerprint`.
        images_per_prompt: >= 1.
        seed: of the run; each image has a seed of its own, see `image_seed`.
        steps, guidance_scale: None takes the model's defaults.
        tail_drop, uncond_tail_drop, token_budget: compute budget of a model with dynamic chunking.
        method: "speculative", or None for what the model is.
        tree, acceptance, quality, drafter: of speculative decoding.
        device, dtype: as named by the user.
        batch_size: None when the pixels do not depend on it (batch-invariant generation, the default); a number makes
            rounding part of the run, and a resumed run then equals an uninterrupted one up to rounding only.
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

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt: needs an integer >= 1, got {self.images_per_prompt}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: needs an integer in 0 .. 2**63 - 1, got {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: needs an integer >= 1, got {self.steps}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: needs a number >= 0, got {self.guidance_scale}")


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
            continue  # told of the model; no picture depends on it
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
        folder: created when missing.
        prompts: what to draw, in order; prompt k lives in folder `k` with five digits.
        settings: must equal those of a run that the folder holds already.

    Raises:
        FastgenError: the folder holds another run, other settings or prompts, foreign files, or is not writable.
    """

    def __init__(self, folder: str | Path, prompts: Sequence[Metadata], settings: RunSettings) -> None:
        if not prompts:
            raise ValueError("prompts: needs at least one")
        self.folder, self.prompts, self.settings = Path(folder), list(prompts), settings
        self._open()

    def _open(self) -> None:
        digest = hashlib.sha256(format_metadata(self.prompts)).hexdigest()
        record = {"format": _FORMAT, "settings": asdict(self.settings), "metadata_sha256": digest}
        path = self.folder / "run.json"
        check_writable(self.folder)
        if path.is_file():
            _check_record(self.folder, read_json(path), record)
        elif any(not item.name.startswith(".") for item in self.folder.iterdir()):
            raise FastgenError(f"{self.folder}: is not empty and holds no evaluation run; choose another folder")
        else:
            atomic_write_json(path, record)

    def sample(self, prompt: int, image: int) -> Path:
        """Path of one image."""
        return self.folder / f"{prompt:05d}" / "samples" / f"{image:04d}.png"

    def missing(self) -> list[tuple[int, int]]:
        """(prompt, image) of every image that is not there whole, in order."""
        pairs = ((p, i) for p in range(len(self.prompts)) for i in range(self.settings.images_per_prompt))
        return [pair for pair in pairs if not _is_whole(self.sample(*pair))]

    def generate(self, generate: Generate, on_progress: OnProgress | None = None) -> int:
        """Makes every missing image and returns how many were made.

        Raises:
            FastgenError: an image cannot be written; those already made stay.
            RuntimeError: `generate` returned fewer images than asked.
        """
        missing = self.missing()
        total = len(self.prompts) * self.settings.images_per_prompt
        if on_progress is not None:
            on_progress("generate", total - len(missing), total)
        if not missing:
            return 0
        prompts = [self.prompts[p].prompt for p, _ in missing]
        seeds = [image_seed(self.settings.seed, self.prompts[p].prompt, i) for p, i in missing]
        images = generate(prompts, seeds)
        made, seconds = self.timing()
        clock = time.perf_counter()
        for done, (pair, image) in enumerate(zip(missing, images, strict=False), start=1):
            self._prepare(pair[0])
            save_png(self.sample(*pair), image)
            now = time.perf_counter()
            made, seconds, clock = made + 1, seconds + now - clock, now
            atomic_write_json(self.folder / "timing.json", {"images": made, "seconds": seconds})
            if on_progress is not None:
                on_progress("generate", total - len(missing) + done, total)
        if left := self.missing():
            raise RuntimeError(f"the generator returned too few images: {len(left)} of {len(missing)} are missing")
        return len(missing)

    def _prepare(self, prompt: int) -> None:
        """The folder and the metadata of a prompt."""
        home = self.folder / f"{prompt:05d}"
        if not (home / "metadata.jsonl").is_file():
            check_writable(home / "samples")
            atomic_write_bytes(home / "metadata.jsonl", format_metadata([self.prompts[prompt]]))

    def timing(self) -> tuple[int, float]:
        """(images made, seconds spent on them) over all sessions of the run, saving included, loading excluded."""
        path = self.folder / "timing.json"
        if not path.is_file():
            return 0, 0.0
        data = read_json(path)
        try:
            return int(data["images"]), float(data["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise FastgenError(f"{path}: is damaged; delete it to go on without the earlier timing") from error


def _check_record(folder: Path, held: Any, wanted: dict[str, Any]) -> None:
    """FastgenError naming what differs between the run in `folder` and the one that was asked for."""
    held = held if isinstance(held, dict) else {}
    if held.get("format") != wanted["format"] or not isinstance(held.get("settings"), dict):
        raise FastgenError(f"{folder}: holds a run of another version; choose another folder")
    keys = dict.fromkeys((*wanted["settings"], *held["settings"]))
    changed = [
        f"{key} is {held['settings'].get(key)!r} there and {wanted['settings'].get(key)!r} now"
        for key in keys
        if held["settings"].get(key) != wanted["settings"].get(key)
    ]
    if held.get("metadata_sha256") != wanted["metadata_sha256"]:
        changed.append("its prompts are others")
    if changed:
        raise FastgenError(f"{folder}: holds a run with other settings ({'; '.join(changed)}); choose another folder")


def _is_whole(path: Path) -> bool:
    """A PNG whose chunks all pass their checksum."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # Pillow reports damage as any of these
        return False
    return True


# --- scoring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a folder in GenEval's layout, and the prompt it answers."""

    path: Path
    prompt_id: int
    metadata: Metadata

    def load(self) -> np.ndarray:
        """uint8 [H, W, 3].

        Raises:
            FastgenError: the file is no readable image.
        """
        try:
            with Image.open(self.path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise FastgenError(f"{self.path}: not a readable image: {error}") from error


def read_samples(folder: str | Path, detector: ObjectDetector | None = None) -> list[Sample]:
    """Every image under `folder`, prompts and images in numeric order.

    Args:
        detector: when given, a class or colour it cannot report is an error.

    Raises:
        FastgenError: the folder is missing or holds no prompt folder, a prompt folder has no valid metadata or no
            image, or a prompt names what the detector cannot see.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FastgenError(f"{folder}: no such folder of images")
    homes = sorted(
        (p for p in folder.iterdir() if p.is_dir() and _PROMPT.fullmatch(p.name)), key=lambda p: int(p.name)
    )
    if not homes:
        raise FastgenError(f"{folder}: holds no prompt folders (00000/metadata.jsonl, 00000/samples/0000.png, ...)")
    samples: list[Sample] = []
    for home in homes:
        items = read_metadata(home / "metadata.jsonl")
        if len(items) != 1:
            raise FastgenError(f"{home / 'metadata.jsonl'}: needs exactly one line, has {len(items)}")
        if detector is not None:
            try:
                check_vocabulary(items[0], detector.class_names, getattr(detector, "color_names", None))
            except ValueError as error:
                raise FastgenError(f"{home / 'metadata.jsonl'}: {error}") from error
        images = home / "samples"
        found = [p for p in images.iterdir() if _SAMPLE.fullmatch(p.name)] if images.is_dir() else []
        if not found:
            raise FastgenError(f"{images}: holds no image")
        samples += [Sample(p, int(home.name), items[0]) for p in sorted(found, key=lambda p: int(p.stem))]
    return samples


def judge_samples(
    samples: Sequence[Sample],
    detector: ObjectDetector,
    colors: ColorClassifier | None = None,
    *,
    settings: RuleSettings | None = None,
    on_progress: OnProgress | None = None,
) -> list[ImageResult]:
    """The verdict of the GenEval rules on every sample, in order; `colors` None takes the detector's own colours."""
    results: list[ImageResult] = []
    for start in range(0, len(samples), _CHUNK):
        part = samples[start : start + _CHUNK]
        images = [sample.load() for sample in part]
        for sample, image, found in zip(part, images, detector.detect(images), strict=True):
            classify = None if colors is None else partial(colors.classify, image)
            results.append(
                evaluate_image(
                    sample.metadata, found, classify, prompt_id=sample.prompt_id, settings=settings or RuleSettings()
                )
            )
        if on_progress is not None:
            on_progress("check", len(results), len(samples))
    return results


def iterate_images(samples: Iterable[Sample], on_progress: OnProgress | None = None) -> Iterator[np.ndarray]:
    """The images of `samples`, one in memory at a time."""
    items = list(samples)
    for done, sample in enumerate(items, start=1):
        yield sample.load()
        if on_progress is not None:
            on_progress("features", done, len(items))


def results_jsonl(folder: str | Path, samples: Sequence[Sample], results: Sequence[ImageResult]) -> bytes:
    """The verdicts as the official scorer writes them, one JSON object a line; file names relative to `folder`."""
    lines = []
    for sample, result in zip(samples, results, strict=True):
        lines.append(
            json.dumps(
                {
                    "filename": sample.path.relative_to(folder).as_posix(),
                    "tag": result.tag,
                    "prompt": sample.metadata.prompt,
                    "correct": result.correct,
                    "reason": result.reason,
                    "metadata": sample.metadata.to_json(),
                    "details": json.dumps(result.details),
                }
            )
        )
    return "".join(line + "\n" for line in lines).encode()


def spread(total: int, count: int) -> list[int]:
    """`count` indices (or all, when fewer) evenly spread over range(total)."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
