"""Drawing in a thread of the server's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

from fastgen.serve.artist import Catalogue, Studio
from fastgen.serve.metrics import Metrics
from fastgen.serve.orders import Event, Order
from fastgen.serve.worker import Ticket, Worker

__all__ = ["LocalBackend"]


class LocalBackend:
    """Models in this process, drawn with by one thread.

    Args:
        catalogue: the models.
        metrics: where to count.
        keep: models that stay loaded, at most; None: all of them.
    """

    def __init__(self, catalogue: Catalogue, metrics: Metrics, keep: int | None = None) -> None:
        settings = catalogue.settings
        self._catalogue, self._studio = catalogue, Studio(catalogue, keep)
        wait = settings.max_wait_ms / 1000
        self.worker = Worker(self._studio, settings.batch_size, wait, settings.max_queue, metrics)
        self._loaded = threading.Event()

    def load(self, models: Iterable[str] | None = None) -> None:
        """Load models, all of them by default, then begin to draw.

        Raises:
            FastgenError: a model that cannot be loaded.
        """
        for name in self._catalogue.models if models is None else models:
            self._studio.load(name)
        self.worker.start()
        self._loaded.set()

    def ready(self) -> bool:
        """See `Backend`."""
        return self._loaded.is_set()

    def close(self, *, now: bool = False) -> None:
        """See `Backend`."""
        self.worker.close(now=now)

    async def draw(self, orders: Sequence[Order]) -> AsyncIterator[tuple[int, Event]]:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def tell(place: int, event: Event) -> None:
            try:
                loop.call_soon_threadsafe(heard.put_nowait, (place, event))
            except RuntimeError:  # the loop has ended, and with it the client
                return

        tickets = [Ticket(order, partial(tell, place)) for place, order in enumerate(orders)]
        self.worker.submit(tickets)
        left = len(tickets)
        try:
            while left:
                place, event = await heard.get()
                left -= event.last
                yield place, event
        finally:
            for ticket in tickets:
                ticket.cancel()
