"""What a server is started with, checked before any model is loaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields

from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.pipelines.loading.load_options import LoadOptions

__all__ = ["ClusterSettings", "Limits", "ServeSettings", "is_loopback"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        body_megabytes: size of a request, uploads included.
        prompt: characters.
        images: pictures of one request (`n`).
        side: pixels.
        steps: denoising steps.
        nfe: forward passes of a search for one picture.
    """

    body_megabytes: int = 32
    prompt: int = 4000
    images: int = 10
    side: int = 2048
    steps: int = 200
    nfe: int = 2000

    def __post_init__(self) -> None:
        for each in fields(self):
            check_integer(f"--limit-{each.name.replace('_', '-')}", getattr(self, each.name), 1)

    @property
    def body(self) -> int:
        """Bytes of a request."""
        return self.body_megabytes << 20


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """
    Attributes:
        models: names, folders or Hub ids; the first is what a request without `model` means.
        variant: of their weight files, as in diffusers.
        revision: branch, tag or commit of Hub ids.
        options: that each of them is loaded with.
        host, port: where to listen.
        api_key: that requests must carry as a bearer token; None: none is needed.
        insecure: allows another host than this machine without a key.
        verifier: of searches, as `fastgen generate` takes it; None: models that come with fastgen have their own.
        device, dtype: as `fastgen generate` takes them.
        batch_size: pictures that share a forward pass, at most.
        max_wait_ms: how long the first picture of a batch waits for others.
        max_queue: pictures that wait, at most; more are refused with status 429.
        timeout: seconds of a request, from its arrival.
        log_prompts: write prompts to the log.
        limits: of one request.
    """

    models: tuple[str, ...] = ("tiny",)
    variant: str | None = None
    revision: str | None = None
    options: LoadOptions = LoadOptions()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    verifier: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    max_wait_ms: float = 20
    max_queue: int = 64
    timeout: float = 600
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.models:
            raise FastgenError("--model: needs a model")
        check_integer("--port", self.port, 0, 65535)
        check_integer("--batch-size", self.batch_size, 1, 1024)
        check_number("--max-wait-ms", self.max_wait_ms, 0, 60_000)
        check_integer("--max-queue", self.max_queue, 1, 2**20)
        check_number("--timeout", self.timeout, above=0, maximum=86_400)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise FastgenError("--api-key: needs printable ASCII characters")
        if self.api_key is None and not self.insecure and not is_loopback(self.host):
            raise FastgenError(
                f"--host: {self.host} can be reached from other machines; needs --api-key, or --insecure for anyone"
            )


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """
    Attributes:
        replicas: that run at least.
        max_replicas: that run under load; None: no more than that.
        replica_gpus, replica_cpus: of a replica; parts of a GPU share one.
        replica_models: that a replica keeps loaded.
        ray_address: of a running cluster; None starts one on this machine.
    """

    replicas: int = 1
    max_replicas: int | None = None
    replica_gpus: float = 0
    replica_cpus: float = 1
    replica_models: int = 2
    ray_address: str | None = None

    def __post_init__(self) -> None:
        check_integer("--replicas", self.replicas, 1)
        if self.max_replicas is not None:
            check_integer("--max-replicas", self.max_replicas, self.replicas)
        check_number("--replica-gpus", self.replica_gpus, 0)
        check_number("--replica-cpus", self.replica_cpus, 0)
        check_integer("--replica-models", self.replica_models, 1)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
