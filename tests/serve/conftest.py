"""Servers with tiny random models, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running_server import Running


@pytest.fixture(scope="session")
def server(micro_z: Path, micro_janus: Path, micro_dc: Path) -> Iterator[Running]:
    """Three random models, a short queue and narrow limits."""
    from running_server import running

    from fastgen.serve.settings import Limits, ServeSettings

    models = tuple(str(folder) for folder in (micro_z, micro_janus, micro_dc))
    limits = Limits(images=4, side=128, steps=40, nfe=200, prompt=200, body_megabytes=1)
    settings = ServeSettings(models=models, max_wait_ms=150, max_queue=24, device="cpu", limits=limits)
    with running(settings) as found:
        yield found
