"""FD-shapes: Fréchet distance between pictures and fresh ShapesWorld renders in the features of the checker.

The distance is torchmetrics' `FrechetInceptionDistance` on a custom feature module; features reach it in double
precision, so sums, covariances and the result are double too. Reference statistics are cached, keyed by everything
they depend on.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.data.shapes import ShapesWorld
from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.shapes import ShapesModel, fingerprint, model_batch, to_model_size
from fastgen.evaluation.geneval.types import check_image
from fastgen.io import atomic_write_bytes, check_writable

logger = logging.getLogger(__name__)

REFERENCE_SEED = 1_000_003  # never a training seed: recipes use small ones
REFERENCE_IMAGES = 10_000
_FORMAT = 1  # of the cache file
_BATCH = 100


@dataclass(frozen=True, slots=True)
class FDResult:
    """A Fréchet distance and the protocol that gives it its meaning.

    Attributes:
        value: the distance, >= 0; lower is closer.
        protocol: printed with every value; values of different protocols do not compare.
        n_images, n_reference, dims: sizes of both sets and of the features.
        detector: sha256 of the feature network.
    """

    value: float
    protocol: str
    n_images: int
    n_reference: int
    dims: int
    detector: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        return asdict(self)


class ShapesFeatures(torch.nn.Module):
    """The detector's penultimate features as a torchmetrics feature module.

    Args:
        detector: the network; moved nowhere, called on the device it is on.
        device: where images go before the call.
    """

    def __init__(self, detector: ShapesModel, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self._detect = detector.features  # a bound method: the metric must not adopt or copy the weights
        self._device = torch.device(device)
        self.num_features = int(self(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape[1])

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, H, W, 3] -> float64 [n, num_features].

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        features = self._detect(to_model_size(images).to(self._device)).double().cpu()
        if not torch.isfinite(features).all():
            raise ValueError("FD-shapes: the feature network returned NaN or infinite values")
        return features


class FDShapes:
    """Fréchet distance to ShapesWorld renders.

    Args:
        detector: the feature network (see `load_detector`).
        n_reference: renders in the reference.
        seed: ShapesWorld seed of the reference.
        device: where the network is.
        cache_dir: folder of the reference statistics; the user's cache when None.
        on_progress: called with (renders done, renders in all) while a reference is computed.

    Raises:
        ValueError: fewer than two reference images.
    """

    def __init__(
        self,
        detector: ShapesModel,
        *,
        n_reference: int = REFERENCE_IMAGES,
        seed: int = REFERENCE_SEED,
        device: str | torch.device = "cpu",
        cache_dir: str | Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        if n_reference < 2:
            raise ValueError(f"n_reference: needs at least 2 renders, got {n_reference}")
        self.features = ShapesFeatures(detector, device)
        self.detector_hash = fingerprint(detector)
        self.n_reference, self.seed = n_reference, seed
        self._world = ShapesWorld(seed, held_out=False)
        self._cache_dir = user_cache_dir() if cache_dir is None else Path(cache_dir)
        self._on_progress = on_progress
        self._metric = FrechetInceptionDistance(feature=self.features, reset_real_features=False)
        self._metric.eval()
        self._has_reference = False

    @property
    def dims(self) -> int:
        """Width of the features."""
        return self.features.num_features

    @property
    def protocol(self) -> str:
        """Named mode, e.g. `FD-shapes[10k, shapes-detector-128, seed 1000003, detector 0123abcd]`."""
        size = f"{self.n_reference // 1000}k" if self.n_reference % 1000 == 0 else str(self.n_reference)
        return f"FD-shapes[{size}, shapes-detector-{self.dims}, seed {self.seed}, detector {self.detector_hash[:8]}]"

    def check_size(self, n: int, allow_small: bool = False) -> None:
        """Refuses sets too small for a covariance of this width.

        Raises:
            FastgenError: n < 2 * dims, unless `allow_small`, or n < 2.
        """
        needed = 2 if allow_small else 2 * self.dims
        if n < needed:
            raise FastgenError(
                f"FD-shapes: {n} images are too few for a covariance of {self.dims} features, needs at least {needed}"
                + ("" if allow_small else " (--allow-small computes the biased value all the same)")
            )

    def __call__(self, images: Iterable[np.ndarray], *, allow_small: bool = False) -> FDResult:
        """Distance of `images` (uint8 [H, W, 3] each, sizes may differ; consumed once, in batches).

        Raises:
            FastgenError: too few images, see `check_size`.
            ValueError: an image is not uint8 RGB, or a feature is not finite.
        """
        if isinstance(images, Sequence):
            self.check_size(len(images), allow_small)  # before any work
        self._metric.reset()
        for batch in _batches(images):
            self._metric.update(batch, real=False)
        n = int(self._metric.fake_features_num_samples)
        self.check_size(n, allow_small)
        self._load_reference()
        # Rounding can leave a value a hair below zero for identical sets.
        value = max(float(self._metric.compute()), 0.0)
        return FDResult(value, self.protocol, n, self.n_reference, self.dims, self.detector_hash)

    # --- reference statistics ---

    def cache_path(self) -> Path:
        """File of the reference statistics: its name hashes the network, the seed, the size, and a sample of the
        renders themselves, so that a changed renderer never meets old statistics."""
        sample = self._world.batch(16).images.tobytes()
        key = f"{_FORMAT} {self.detector_hash} {self.seed} {self.n_reference} {hashlib.sha256(sample).hexdigest()}"
        return self._cache_dir / f"fd-shapes-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

    def _load_reference(self) -> None:
        if self._has_reference:
            return
        path = self.cache_path()
        if not self._read(path):
            self._compute_reference()
            self._write(path)
        self._has_reference = True

    def _compute_reference(self) -> None:
        for state in (self._metric.real_features_sum, self._metric.real_features_cov_sum):
            state.zero_()  # an interrupted earlier attempt may have left part of the sums
        self._metric.real_features_num_samples.zero_()
        for start in range(0, self.n_reference, _BATCH):
            batch = self._world.batch(min(_BATCH, self.n_reference - start), start)
            self._metric.update(torch.from_numpy(batch.images), real=True)
            if self._on_progress is not None:
                self._on_progress(start + len(batch.images), self.n_reference)

    def _read(self, path: Path) -> bool:
        """Takes the statistics from `path`; False when there are none that can be trusted."""
        try:
            raw = path.read_bytes()
        except OSError:
            return False
        try:
            with np.load(io.BytesIO(raw), allow_pickle=False) as data:  # the zip checks a CRC per array
                total, outer, count = data["sum"], data["outer"], int(data["count"])
            sound = (
                total.shape == (self.dims,)
                and outer.shape == (self.dims, self.dims)
                and total.dtype == outer.dtype == np.float64
                and count == self.n_reference
                and bool(np.isfinite(total).all() and np.isfinite(outer).all())
            )
        except Exception as error:  # zipfile, zlib, numpy and struct each raise their own type for a damaged file
            logger.warning("FD-shapes: recomputing damaged reference statistics in %s (%s)", path, error)
            return False
        if not sound:
            logger.warning("FD-shapes: recomputing unusable reference statistics in %s", path)
            return False
        self._metric.real_features_sum = torch.from_numpy(total)
        self._metric.real_features_cov_sum = torch.from_numpy(outer)
        self._metric.real_features_num_samples = torch.tensor(count)
        return True

    def _write(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            sum=self._metric.real_features_sum.numpy(),
            outer=self._metric.real_features_cov_sum.numpy(),
            count=np.int64(self.n_reference),
        )
        try:
            check_writable(path.parent)
            atomic_write_bytes(path, buffer.getvalue())
        except FastgenError as error:  # a read-only home costs time at the next run, never the result
            logger.warning("FD-shapes: reference statistics not cached: %s", error)


def user_cache_dir() -> Path:
    """$FASTGEN_CACHE, else $XDG_CACHE_HOME/fastgen, else ~/.cache/fastgen."""
    if os.environ.get("FASTGEN_CACHE"):
        return Path(os.environ["FASTGEN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastgen"


def _batches(images: Iterable[np.ndarray]) -> Iterable[torch.Tensor]:
    """uint8 [b, 64, 64, 3] batches of `images`."""
    waiting: list[np.ndarray] = []
    for index, image in enumerate(images):
        waiting.append(check_image(image, f"images[{index}]"))
        if len(waiting) == _BATCH:
            yield model_batch(waiting)
            waiting = []
    if waiting:
        yield model_batch(waiting)
