"""One call from images to numbers: every metric of a network from one pass, each printed with its protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from fastgen.accounting import phase
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ChunkStore
from fastgen.evaluation.distributed import Group, OnProgress
from fastgen.evaluation.fid.extractors import Extractor, Inception, load_extractor
from fastgen.evaluation.fid.features import Features, check_count, extract
from fastgen.evaluation.fid.frechet import bootstrap_frechet, frechet_distance
from fastgen.evaluation.fid.inception_score import inception_score
from fastgen.evaluation.fid.manifold import NEIGHBOURS, precision_recall
from fastgen.evaluation.fid.mmd import cmmd, kid
from fastgen.evaluation.fid.npz import write_statistics
from fastgen.evaluation.fid.protocols import (
    DEFAULT_PROTOCOL,
    METRICS,
    Metric,
    check_metrics,
    count_name,
    find_protocol,
)
from fastgen.evaluation.fid.readers import ImageSource
from fastgen.evaluation.fid.reference import Reference, ReferenceStatistics, load_reference

__all__ = ["FidSettings", "check_evaluation", "check_size", "evaluate_images", "load_extractors"]

BENCHMARK = "FID family"


@dataclass(frozen=True, slots=True)
class FidSettings:
    """Settings of an evaluation.

    Attributes:
        metrics: names, see `fastgen.evaluation.fid.protocols.METRICS`.
        protocol: of Inception.
        n: how many images are taken; all when None.
        reference_n: the same of the reference.
        allow_small: compute a Fréchet distance of fewer images than twice its features, which is biased upwards.
        bootstrap: replicates behind a confidence interval of Fréchet distances; 0: none.
        seed: of bootstrap and subsets.
        subsets, subset_size: of kernel distances; a set smaller than a subset is one subset.
        batch_size: images in one pass of a network.
        workers: threads that decode and resize; None chooses.
        mixed_sizes: allow images of different sizes.
        device: cpu, cuda ...
    """

    metrics: tuple[str, ...]
    protocol: str = DEFAULT_PROTOCOL
    n: int | None = None
    reference_n: int | None = None
    allow_small: bool = False
    bootstrap: int = 100
    seed: int = 0
    subsets: int = 100
    subset_size: int = 1000
    batch_size: int = 64
    workers: int | None = None
    mixed_sizes: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("subsets", 1), ("subset_size", 2), ("batch_size", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FastgenError(f"{name}: {value} is not allowed, needs >= {least}")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise FastgenError(f"bootstrap: {self.bootstrap} is not allowed, needs 0 or >= 2")
        if not 0 <= self.seed < 2**63:
            raise FastgenError(f"seed: {self.seed} is not allowed, needs 0 .. 2**63 - 1")
        check_metrics(list(self.metrics), find_protocol(self.protocol))

    def by_extractor(self) -> dict[str, list[Metric]]:
        """Extractor -> its metrics."""
        found: dict[str, list[Metric]] = {}
        for name in dict.fromkeys(self.metrics):
            found.setdefault(METRICS[name].extractor, []).append(METRICS[name])
        return found


@dataclass(slots=True)
class _Work:
    """One network with its metrics and their values."""

    extractor: Extractor
    metrics: list[Metric]
    taps: list[str] = field(default_factory=list)
    frechet: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    manifold: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.taps = [tap for tap in self.extractor.taps if any(metric.tap == tap for metric in self.metrics)]
        self.frechet = [t for t in self.taps if any(m.tap == t and m.kind == "frechet" for m in self.metrics)]
        compared = [m for m in self.metrics if m.needs_features and m.needs_reference]
        self.compared = [tap for tap in self.taps if any(m.tap == tap for m in compared)]

    def kept(self, bootstrap: int) -> list[str]:
        """Taps whose features of the images are needed."""
        wanted = {m.tap for m in self.metrics if m.needs_features} | (set(self.frechet) if bootstrap else set())
        return [tap for tap in self.taps if tap in wanted]


def check_size(what: str, n: int | None, dims: int, allow_small: bool) -> None:
    """Refuse a set too small for a covariance.

    Raises:
        FastgenError: n < 2 * dims, unless `allow_small`, or n < 2.
    """
    needed = 2 if allow_small else 2 * dims
    if n is not None and n < needed:
        hint = "" if allow_small else " (--allow-small computes the biased value anyway)"
        raise FastgenError(
            f"{what}: {n} images are too few for a covariance of {dims} features, needs at least {needed}{hint}"
        )


def load_extractors(
    settings: FidSettings, weights: Mapping[str, str] | None = None, group: Group | None = None
) -> dict[str, Extractor]:
    """The networks of the metrics.

    Raises:
        FastgenError: weights are missing or broken; the line says how to get them.
    """
    device = (group or Group()).device(settings.device)
    protocol, given = find_protocol(settings.protocol), weights or {}
    with phase("load"):
        return {
            name: load_extractor(name, protocol, weights=given.get(name), device=device)
            for name in settings.by_extractor()
        }


def check_evaluation(
    images: ImageSource, settings: FidSettings, reference: Reference | None, extractors: Mapping[str, Extractor]
) -> list[_Work]:
    """Everything that can be refused before an image is read (or drawn).

    Raises:
        FastgenError: as `evaluate_images`.
    """
    n = check_count(images, settings.n)
    jobs = [_Work(extractors[name], metrics) for name, metrics in settings.by_extractor().items()]
    for job in jobs:
        _check_job(job, images, n, reference, settings)
    return jobs


def evaluate_images(
    images: ImageSource,
    settings: FidSettings,
    *,
    reference: Reference | None = None,
    weights: Mapping[str, str] | None = None,
    extractors: Mapping[str, Extractor] | None = None,
    group: Group | None = None,
    cache: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    save_statistics: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Any], list[ChunkStore]]:
    """Every metric of `settings` for `images`.

    Args:
        reference: what they are compared with.
        weights: extractor -> file, folder or Hub id.
        extractors: networks to use instead of loading them.
        group: the processes that share the work; all of them call this, the main one gets the numbers.
        cache: folder of the reference's statistics.
        work: folder where finished parts are kept, so that an interrupted call can resume; None keeps none.
        save_statistics: an npz to write with the statistics of `images`, to be a reference later.

    Returns:
        the result, JSON-ready, without values on other processes than the main one; and the stores of finished parts,
        to be discarded when the result is written.

    Raises:
        FastgenError: images too few, unreadable or of several sizes, a reference of another protocol, weights that
            are missing, features that are not finite.
    """
    group = group or Group()
    networks = extractors or load_extractors(settings, weights, group)
    jobs = check_evaluation(images, settings, reference, networks)
    n = check_count(images, settings.n)
    data: dict[str, Any] = {
        "benchmark": BENCHMARK,
        "metrics": {},
        "n_images": n,
        "images": images.name,
        "reference": None if reference is None else {"name": reference.name},
        "extractors": {},
        "settings": {**asdict(settings), "metrics": list(settings.metrics), "processes": group.size},
    }
    stores: list[ChunkStore] = []
    for job in jobs:
        name = job.metrics[0].extractor
        described = data["extractors"][name] = job.extractor.describe()
        found = ReferenceStatistics()
        if reference is not None and (job.frechet or job.compared):
            with phase("reference"):
                known = len(reference.images) if reference.images is not None else 0
                found = load_reference(
                    reference,
                    job.extractor,
                    taps=job.frechet,
                    keep=job.compared,
                    count=settings.reference_n,
                    group=group,
                    cache=cache,
                    batch_size=settings.batch_size,
                    workers=settings.workers,
                    mixed_sizes=settings.mixed_sizes,
                    on_done=group.counter(f"reference {name}", settings.reference_n or known, on_progress),
                )
            described["reference"] = found.describe()
        with phase("features"):
            features, store = extract(
                images,
                job.extractor,
                count=n,
                taps=job.taps,
                sums=job.frechet if save_statistics is None else job.taps,
                keep=job.kept(settings.bootstrap),
                group=group,
                store_root=work,
                batch_size=settings.batch_size,
                workers=settings.workers,
                mixed_sizes=settings.mixed_sizes,
                on_done=group.counter(f"features {name}", n, on_progress),
            )
        stores.append(store)
        data["resolution"] = None if features.resolution is None else list(features.resolution)
        if group.is_main:
            with phase("metrics"):
                for metric in job.metrics:
                    data["metrics"][metric.name] = _measure(metric, job, features, found, settings, on_progress)
            if save_statistics is not None:
                gaussians = {tap: features.moments[tap].gaussian() for tap in job.taps}
                record = {**job.extractor.describe(), "protocol": _protocol_name(job, settings)}
                write_statistics(save_statistics, gaussians, record)
        group.meet()
    data["environment"] = environment()
    return data, stores


def _protocol_name(job: _Work, settings: FidSettings) -> str:
    return settings.protocol if job.metrics[0].extractor == "inception" else job.extractor.label


def _check_job(job: _Work, images: ImageSource, n: int, reference: Reference | None, settings: FidSettings) -> None:
    extractor = job.extractor
    if extractor.needs_prompts and images.prompts is None:
        raise FastgenError(f"{images.name}: has no prompts, which {job.metrics[0].name} needs; see --prompts")
    if job.frechet or job.compared:
        if reference is None:
            raise FastgenError(f"{job.metrics[0].name}: needs a reference; see --reference")
        reference.check(extractor, job.frechet, _protocol_name(job, settings))
        if job.compared and reference.images is None:
            names = ", ".join(m.name for m in job.metrics if m.needs_features and m.needs_reference)
            raise FastgenError(f"{reference.name}: has statistics only; {names} needs images")
        if reference.images is not None:
            check_count(reference.images, settings.reference_n)
    for tap in job.frechet:
        dims = extractor.taps[tap]
        check_size(images.name, n, dims, settings.allow_small)
        if reference is not None:
            if reference.statistics is not None:
                count = reference.statistics.taps[tap].count
            else:
                count = settings.reference_n or (None if reference.images is None else len(reference.images))
            check_size(reference.name, count, dims, settings.allow_small)


def _measure(
    metric: Metric,
    job: _Work,
    features: Features,
    reference: ReferenceStatistics,
    settings: FidSettings,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    """One number with its label and its error."""
    extractor = job.extractor
    # Double precision is not everywhere.
    where = extractor.device if extractor.device.type in ("cpu", "cuda") else torch.device("cpu")
    parts = [extractor.label, count_name(features.count), extractor.name]
    found: dict[str, Any]
    if metric.kind == "frechet":
        gaussian = features.moments[metric.tap].gaussian()
        value = frechet_distance(gaussian, reference.gaussians[metric.tap])
        found = {"value": value, "dims": gaussian.dims}
        if settings.bootstrap:
            progress = None if on_progress is None else lambda done, total: on_progress("bootstrap", done, total)
            found |= bootstrap_frechet(
                features.arrays[metric.tap].to(where),
                reference.gaussians[metric.tap],
                value,
                replicates=settings.bootstrap,
                seed=settings.seed,
                on_progress=progress,
            ).as_dict()
    elif metric.kind == "kid":
        x, y = features.arrays[metric.tap].to(where), reference.features[metric.tap].to(where)
        size = min(settings.subset_size, len(x), len(y))
        mean, std = kid(x, y, subsets=settings.subsets, subset_size=size, seed=settings.seed)
        found = {"value": mean, "std": std, "subsets": settings.subsets, "subset_size": size}
        if size != 1000 or settings.subsets != 100:
            parts.append(f"{settings.subsets} x {size}")
    elif metric.kind == "inception-score":
        protocol = find_protocol(settings.protocol)
        mean, std = inception_score(
            features.arrays[metric.tap],
            cast(Inception, extractor).logits,
            split_size=protocol.split_size,
            splits=protocol.splits,
            shuffle_seed=protocol.shuffle_seed,
        )
        found = {"value": mean, "std": std}
    elif metric.kind in ("precision", "recall"):
        if job.manifold is None:  # both come from one computation
            job.manifold = precision_recall(
                features.arrays[metric.tap].to(where), reference.features[metric.tap].to(where)
            )
        found = {"value": job.manifold[metric.kind == "recall"], "neighbours": NEIGHBOURS}
    elif metric.kind == "cmmd":
        found = {"value": cmmd(features.arrays[metric.tap].to(where), reference.features[metric.tap].to(where))}
    else:
        scores = features.arrays[metric.tap][:, 0].double()
        stderr = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else None
        found = {"value": float(scores.mean()), "stderr": stderr}
    if not torch.isfinite(torch.tensor(found["value"])):
        raise FastgenError(f"{metric.name}: is {found['value']}; the features of one set are degenerate")
    return {"label": f"{metric.name}[{', '.join(parts)}]", "better": metric.better, **found}
