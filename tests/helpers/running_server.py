"""A real server in this process, or in one of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading import load_pipeline
from fastgen.serve.app import create_app
from fastgen.serve.artist import Catalogue
from fastgen.serve.local import LocalBackend
from fastgen.serve.metrics import Metrics
from fastgen.serve.settings import ServeSettings


@dataclass
class Running:
    """A server that listens."""

    url: str
    backend: LocalBackend
    metrics: Metrics
    catalogue: Catalogue
    app: Any

    def count(self, name: str, **labels: str) -> float:
        """A figure of /metrics; 0 before it exists."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def running(settings: ServeSettings) -> Iterator[Running]:
    """Serve in a thread, on a free port."""
    catalogue, metrics = Catalogue(settings), Metrics()
    backend = LocalBackend(catalogue, metrics)
    backend.load()
    app = create_app(settings, catalogue, backend, metrics)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", backend, metrics, catalogue, app)
    finally:
        backend.worker.close(now=True)
        server.should_exit = True
        thread.join(60)
        assert backend.worker.join(60), "the thread that draws did not end"


def ask(url: str, **body: Any) -> httpx.Response:
    """One request for pictures."""
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=300)


def pixels(data: str | bytes | None) -> np.ndarray:
    raw = base64.b64decode(data) if isinstance(data, str) else data or b""
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def alone(model: str, prompt: str, seed: int, **more: Any) -> np.ndarray:
    """The picture that `generate_images` makes."""
    pipe = load_pipeline(model)
    return np.asarray(next(generate_images(pipe, [prompt], [seed], batch_invariant=True, **more)).image)
