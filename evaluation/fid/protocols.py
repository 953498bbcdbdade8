"""Named protocols: who computes FID so, and what that means. Numbers of different protocols do not compare.

| protocol | resize to 299 | pixels | inception score |
|---|---|---|---|
| adm | TensorFlow 1 bilinear inside the graph | (x - 128) / 128 | parts of 5,000 in order, no bias |
| torch-fidelity | the same | the same | 10 parts, shuffled with seed 2020, no bias |
| clean-fid | Pillow bicubic in floating point | (x - 128) / 128 | - |
| legacy-pytorch | PyTorch bilinear | x / 127.5 - 1 | - |
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgen.errors import FastgenError

__all__ = ["METRICS", "PROTOCOLS", "Metric", "Protocol", "check_metrics", "count_name", "find_protocol"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The preprocessing for Inception, and the statistics.

    Attributes:
        name: what users write.
        label: printed with a number.
        resize: a mode of `fastgen.evaluation.fid.resize_modes.RESIZE`.
        shift, scale: pixels are (x - shift) / scale.
        split_size, splits, shuffle_seed: of the inception score; all None: the protocol has none.
        spatial: it has sFID.
    """

    name: str
    label: str
    resize: str
    shift: float
    scale: float
    split_size: int | None = None
    splits: int | None = None
    shuffle_seed: int | None = None
    spatial: bool = False

    @property
    def has_inception_score(self) -> bool:
        """Whether the protocol defines an inception score."""
        return self.split_size is not None or self.splits is not None


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("adm", "adm", "tf1-bilinear", 128.0, 128.0, split_size=5000, spatial=True),
        Protocol("torch-fidelity", "torch-fidelity", "tf1-bilinear", 128.0, 128.0, splits=10, shuffle_seed=2020),
        Protocol("clean-fid", "clean", "pil-bicubic-float", 128.0, 128.0),
        Protocol("legacy-pytorch", "legacy-pytorch", "torch-bilinear", 127.5, 127.5),
    )
}
DEFAULT_PROTOCOL = "clean-fid"


@dataclass(frozen=True, slots=True)
class Metric:
    """One number.

    Attributes:
        name: what users write.
        extractor: whose features it takes: inception, shapes, dinov2, cmmd or clip-score.
        kind: frechet, kid, inception-score, precision, recall, cmmd or mean.
        tap: which features of the extractor.
        better: "lower" or "higher".
        default: computed when only the extractor is named.
    """

    name: str
    extractor: str
    kind: str
    tap: str = "pool"
    better: str = "lower"
    default: bool = True

    @property
    def needs_features(self) -> bool:
        """Whether sums of the images' features are not enough."""
        return self.kind != "frechet"

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with other images."""
        return self.kind not in ("inception-score", "mean")


def _family(extractor: str, suffix: str) -> list[Metric]:
    return [
        Metric(f"fd-{suffix}", extractor, "frechet"),
        Metric(f"kd-{suffix}", extractor, "kid"),
        Metric(f"precision-{suffix}", extractor, "precision", better="higher"),
        Metric(f"recall-{suffix}", extractor, "recall", better="higher"),
    ]


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "inception", "frechet"),
        Metric("kid", "inception", "kid"),
        Metric("is", "inception", "inception-score", better="higher"),
        Metric("sfid", "inception", "frechet", tap="spatial"),
        Metric("precision", "inception", "precision", better="higher"),
        Metric("recall", "inception", "recall", better="higher"),
        *_family("shapes", "shapes"),
        *_family("dinov2", "dinov2"),
        Metric("cmmd", "cmmd", "cmmd"),
        Metric("clip-score", "clip-score", "mean", better="higher"),
    )
}
EXTRACTORS = tuple(dict.fromkeys(metric.extractor for metric in METRICS.values()))


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        FastgenError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise FastgenError(f"protocol: {name!r} is unknown, needs one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_metrics(names: list[str], protocol: Protocol) -> list[Metric]:
    """The metrics of these names, each once.

    Raises:
        FastgenError: one is unknown, or the protocol does not define it.
    """
    found = []
    for name in dict.fromkeys(names):
        if name not in METRICS:
            raise FastgenError(f"metric: {name!r} is unknown, needs some of {', '.join(METRICS)}")
        if not supported(METRICS[name], protocol):
            able = [other.name for other in PROTOCOLS.values() if supported(METRICS[name], other)]
            raise FastgenError(f"metric: {name} is not defined by protocol {protocol.name}, only by {', '.join(able)}")
        found.append(METRICS[name])
    if not found:
        raise FastgenError(f"metric: needs at least one of {', '.join(METRICS)}")
    return found


def supported(metric: Metric, protocol: Protocol) -> bool:
    """Whether a protocol defines a metric; only those of Inception depend on it."""
    if metric.extractor != "inception":
        return True
    if metric.kind == "inception-score":
        return protocol.has_inception_score
    return metric.tap != "spatial" or protocol.spatial


def count_name(n: int) -> str:
    """A number of images as results print it: 50k, 10k, 4321."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)
