"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastgen.serve.orders import Drawn, Order

__all__ = ["Metrics"]


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.queue = Gauge("fastgen_queue_length", "Pictures that wait.", registry=registry)
        self.batches = Histogram("fastgen_batch_size", "Pictures of a batch.", buckets=sizes, registry=registry)
        self.requests = Counter("fastgen_requests", "Answers.", ["route", "status"], registry=registry)
        self.failures = Counter("fastgen_failures", "Pictures that failed.", ["code"], registry=registry)
        self.pictures = Counter("fastgen_pictures", "Finished pictures.", ["model", "method"], registry=registry)
        self.seconds = Counter("fastgen_phase_seconds", "Seconds by phase.", ["model", "phase"], registry=registry)
        self.nfe = Counter("fastgen_nfe", "Evaluations of the denoiser.", ["model"], registry=registry)
        self.accepted = Histogram(
            "fastgen_accepted_length", "Tokens that a round accepts.", ["model"], buckets=sizes, registry=registry
        )
        self.kept = Histogram(
            "fastgen_kept_tokens_share",
            "Share of the image tokens that a step keeps.",
            ["model"],
            buckets=[i / 10 for i in range(1, 11)],
            registry=registry,
        )

    def drawn(self, order: Order, picture: Drawn) -> None:
        """Count a finished picture with its part of what its batch cost."""
        stats, model = picture.record.get("stats", {}), order.model
        images = stats.get("images", 1)
        self.pictures.labels(model, order.method).inc()
        self.nfe.labels(model).inc(stats.get("nfe", 0) / images)
        for phase, seconds in stats.get("seconds", {}).items():
            self.seconds.labels(model, phase).inc(seconds / images)
        for length in stats.get("accepted_lengths", ()):
            self.accepted.labels(model).observe(length)
        for kept, total in zip(stats.get("kept_tokens", ()), stats.get("total_tokens", ()), strict=False):
            self.kept.labels(model).observe(kept / max(1, total))

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
