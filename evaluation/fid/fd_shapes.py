"""FD-shapes: Fréchet distance between pictures and fresh ShapesWorld renders in the features of the checker.

The common engine with a fixed reference: the network of `extractors.ShapesNetwork`, double-precision sums, and
reference statistics that are kept by everything they depend on, a sample of the renders included.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.data.shapes import IMAGE_SIZE, ShapesWorld
from fastgen.evaluation.chunks import ChunkStore
from fastgen.evaluation.distributed import Group
from fastgen.evaluation.fid.evaluate import check_size
from fastgen.evaluation.fid.extractors import ShapesNetwork
from fastgen.evaluation.fid.features import extract
from fastgen.evaluation.fid.frechet import frechet_distance
from fastgen.evaluation.fid.protocols import count_name
from fastgen.evaluation.fid.readers import CallbackSource, ImageSource
from fastgen.evaluation.fid.reference import Reference, load_reference
from fastgen.evaluation.fid.statistics import Gaussian, Moments
from fastgen.evaluation.geneval.shapes_checker import ShapesModel

__all__ = ["REFERENCE_IMAGES", "REFERENCE_SEED", "FDResult", "FDShapes", "render_reference"]

REFERENCE_SEED = 1_000_003  # never a training seed: recipes use small ones
REFERENCE_IMAGES = 10_000
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


def render_reference(count: int = REFERENCE_IMAGES, seed: int = REFERENCE_SEED, size: int = IMAGE_SIZE) -> Reference:
    """Fresh ShapesWorld renders as a reference; a changed renderer makes another one."""
    world = ShapesWorld(seed, held_out=False, size=size)
    drawn: dict[int, np.ndarray] = {}

    def make(index: int) -> np.ndarray:
        block = index // _BATCH
        if block not in drawn:
            drawn.clear()  # images are asked for in order, so one block is enough
            drawn[block] = world.batch(min(_BATCH, count - block * _BATCH), block * _BATCH).images
        return drawn[block][index % _BATCH]

    sample = hashlib.sha256(world.batch(16).images.tobytes()).hexdigest()
    return Reference("renders", CallbackSource(count, make, identity=f"shapesworld {seed} {sample}", name="renders"))


class FDShapes:
    """Fréchet distance to ShapesWorld renders.

    Args:
        detector: the feature network (see `load_detector`).
        n_reference: renders in the reference.
        seed: ShapesWorld seed of the reference.
        size: of the pictures, as `fastgen.evaluation.samples.size_name` gives it. Renders of the same size are the
            reference where ShapesWorld has it, else those of 64x64.
        device: where the network is.
        cache_dir: folder of the reference statistics; the user's cache when None.
        on_progress: called with (renders done, total renders) while a reference is computed.

    Raises:
        ValueError: fewer than two reference images.
    """

    def __init__(
        self,
        detector: ShapesModel,
        *,
        n_reference: int = REFERENCE_IMAGES,
        seed: int = REFERENCE_SEED,
        size: str = "",
        device: str | torch.device = "cpu",
        cache_dir: str | Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if n_reference < 2:
            raise ValueError(f"n_reference: needs at least 2 renders, got {n_reference}")
        self.extractor = ShapesNetwork(detector, device=device)
        self.n_reference, self.seed, self.size = n_reference, seed, size
        side = int(size[1:]) if size[1:].isdigit() else IMAGE_SIZE
        self.reference = render_reference(n_reference, seed, IMAGE_SIZE if side % IMAGE_SIZE else side)
        self._cache_dir = cache_dir
        self._on_progress = on_progress
        self._gaussian: Gaussian | None = None

    @property
    def dims(self) -> int:
        """Width of the features."""
        return self.extractor.taps["pool"]

    @property
    def detector_hash(self) -> str:
        """sha256 of the feature network."""
        return self.extractor.fingerprint

    @property
    def protocol(self) -> str:
        """Named mode, e.g. `FD-shapes[10k, shapes-detector-128, seed 1000003, detector 0123abcd]`."""
        parts = (count_name(self.n_reference), self.extractor.name, f"seed {self.seed}")
        return f"FD-shapes{self.size}[{', '.join(parts)}, detector {self.detector_hash[:8]}]"

    def check_size(self, n: int, allow_small: bool = False) -> None:
        """Refuses sets too small for a covariance of this width.

        Raises:
            FastgenError: n < 2 * dims, unless `allow_small`, or n < 2.
        """
        check_size("FD-shapes", n, self.dims, allow_small)

    def measure(
        self,
        images: ImageSource,
        *,
        allow_small: bool = False,
        group: Group | None = None,
        work: str | os.PathLike[str] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[FDResult, ChunkStore]:
        """Distance of a source, by all processes of `group`, resumed from the parts in `work`.

        Returns:
            the distance, and the store of finished parts.

        Raises:
            FastgenError: too few images, an unreadable one, or a feature that is not finite.
        """
        self.check_size(len(images), allow_small)
        group = group or Group()
        features, store = extract(
            images, self.extractor, group=group, store_root=work, mixed_sizes=True, on_done=on_done
        )
        return self._result(features.moments["pool"], group), store

    def _result(self, moments: Moments, group: Group) -> FDResult:
        value = frechet_distance(moments.gaussian(), self.reference_statistics(group))
        return FDResult(value, self.protocol, moments.count, self.n_reference, self.dims, self.detector_hash)

    def reference_statistics(self, group: Group | None = None) -> Gaussian:
        """Statistics of the renders, computed once and kept."""
        if self._gaussian is None:
            done = 0

            def report_done(count: int) -> None:
                nonlocal done
                done += count
                if self._on_progress is not None:
                    self._on_progress(done, self.n_reference)

            found = load_reference(
                self.reference,
                self.extractor,
                taps=["pool"],
                group=group,
                cache=self._cache_dir,
                on_done=report_done,
            )
            self._gaussian = found.gaussians["pool"]
        return self._gaussian
