"""Servers with tiny random models, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client", "multipart", "httpx", "openai"):
    pytest.importorskip(name, reason=f"{name} is not installed (extra serve)")

from running_server import Running, running  # noqa: E402

from fastgen.serve.settings import Limits, ServeSettings  # noqa: E402


@pytest.fixture(scope="session")
def server(micro_z: Path, micro_janus: Path, micro_dc: Path) -> Iterator[Running]:
    """Three random models, a short queue and narrow limits."""
    models = tuple(str(folder) for folder in (micro_z, micro_janus, micro_dc))
    limits = Limits(images=4, side=128, steps=40, nfe=200, prompt=200, body_megabytes=1)
    settings = ServeSettings(models=models, max_wait_ms=150, max_queue=24, device="cpu", limits=limits)
    with running(settings) as found:
        yield found
