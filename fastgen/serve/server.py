"""Runs the application: loads models, listens, and ends in order."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import typer
import uvicorn

from fastgen.cli.notes import quiet_libraries
from fastgen.errors import FastgenError
from fastgen.serve.app import Backend, create_app
from fastgen.serve.artist import Catalogue
from fastgen.serve.local import LocalBackend
from fastgen.serve.metrics import Metrics
from fastgen.serve.settings import ClusterSettings, ServeSettings

__all__ = ["serve"]


class _Server(uvicorn.Server):
    """Ctrl-C and SIGTERM end it in order: what is in the making is finished, the rest refused. A second one ends what
    is in the making after its step."""

    should_exit: bool

    def __init__(self, config: uvicorn.Config, backend: Backend) -> None:
        super().__init__(config)
        self._backend = backend

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        again, self.should_exit = self.should_exit, True
        # Not in the handler itself: the thread that it interrupts may hold the lock.
        threading.Thread(target=self._backend.close, kwargs={"now": again}, daemon=True).start()


def serve(settings: ServeSettings, cluster: ClusterSettings | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        settings: of the server.
        cluster: draw on Ray Serve; None draws in this process.

    Raises:
        FastgenError: a model that cannot be loaded, or an address that cannot be listened at.
    """
    catalogue, metrics = Catalogue(settings), Metrics()
    quiet_libraries()
    with _listen(settings) as listening, _drawing(catalogue, metrics, cluster) as backend:
        app = create_app(settings, catalogue, backend, metrics)
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        listening.listen(2048)  # not before there is somebody to answer
        host, port = listening.getsockname()[:2]
        typer.echo(f"fastgen serves {', '.join(settings.models)} at http://{_shown(host)}:{port}")
        _Server(config, backend).run(sockets=[listening])


@contextlib.contextmanager
def _drawing(catalogue: Catalogue, metrics: Metrics, cluster: ClusterSettings | None) -> Iterator[Backend]:
    """Who draws, ready to."""
    if cluster is None:
        backend = LocalBackend(catalogue, metrics)
        backend.load()
        yield backend
        backend.close(now=True)
        backend.worker.join(60)
        return
    from fastgen.serve.cluster import deploy, shut_down

    try:
        yield deploy(catalogue.settings, cluster, metrics)
    finally:
        shut_down()


def _listen(settings: ServeSettings) -> socket.socket:
    """Before models load, so that a port in use is reported immediately."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise FastgenError(f"--port: cannot listen at {settings.host}:{settings.port}: {error.strerror}") from error
    return opened


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
