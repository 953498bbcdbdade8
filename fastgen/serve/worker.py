"""One thread that draws: it takes orders that can share a batch, and reports events to each.

Models run one after the other on their device, so there is one thread, and requests wait in one bounded queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from fastgen.errors import FastgenError
from fastgen.serve.errors import ApiError, from_message
from fastgen.serve.metrics import Metrics
from fastgen.serve.orders import Drawn, Event, Order

__all__ = ["Stopped", "Ticket", "Worker"]

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Nobody waits for this batch any more."""


@dataclass(eq=False)
class Ticket:
    """An order in the queue or in the making.

    Attributes:
        order: what to draw.
        tell: called with its events, from the worker's thread.
        arrived: `time.monotonic` of its arrival.
    """

    order: Order
    tell: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    finished: bool = False

    def cancel(self) -> None:
        """Nobody waits for it: it is not begun, or stops after its step unless others share the batch."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def finish(self, event: Event) -> None:
        """Tell the last event, once."""
        if not self.finished:
            self.finished = True
            self.tell(event)


class Artist(Protocol):
    """What the worker draws with."""

    def draw(self, orders: Sequence[Order], report: Callable[[Event, int | None], None]) -> Iterator[Drawn]:
        """Pictures of orders with equal keys, in order. `report` takes an event, and of which order (None: of all);
        it raises `Stopped` where the work is to end."""
        ...


class Worker:
    """
    Args:
        artist: what draws.
        batch_size: orders of a batch, at most.
        max_wait: seconds that the first order of a batch waits for others.
        max_queue: orders that wait, at most.
        metrics: where to count.
    """

    def __init__(self, artist: Artist, batch_size: int, max_wait: float, max_queue: int, metrics: Metrics) -> None:
        self._artist, self._batch_size, self._max_wait, self._max_queue = artist, batch_size, max_wait, max_queue
        self._metrics = metrics
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._running: list[Ticket] = []
        self._closing = False
        self._seconds_each = 1.0  # of a picture, smoothed
        self._thread = threading.Thread(target=self._run, name="fastgen-serve", daemon=True)

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of them, or none.

        Raises:
            ApiError: the queue is full (429), or the server ends (503).
        """
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            if len(self._waiting) + len(tickets) > self._max_queue:
                self._metrics.failures.labels("queue_full").inc()
                wait = max(1, round(self._seconds_each * (len(self._waiting) + len(self._running))))
                message = f"{len(self._waiting)} pictures are waiting, at most {self._max_queue} can"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(min(wait, 3600))})
            self._waiting.extend(tickets)
            self._metrics.queue.set(len(self._waiting))
            self._changed.notify_all()

    def close(self, *, now: bool = False) -> None:
        """Refuse what waits and what comes; what is in the making is finished, or stopped after its step if `now`."""
        with self._changed:
            self._closing = True
            refused, self._waiting = list(self._waiting), deque()
            self._metrics.queue.set(0)
            if now:
                for ticket in self._running:
                    ticket.cancel()
            self._changed.notify_all()
        for ticket in refused:
            ticket.finish(Event(error=ApiError(503, "the server is shutting down", code="shutting_down")))

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended; False: it has not."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether something waits or is in the making."""
        return bool(self._waiting or self._running)

    # ---- the thread ----

    def _run(self) -> None:
        while batch := self._next():
            self._running = batch
            try:
                self._draw(batch)
            finally:
                self._running = []

    def _next(self) -> list[Ticket]:
        """The next batch; empty: the server ends."""
        with self._changed:
            while True:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
                if self._closing:
                    return []
                if not self._waiting:
                    self._metrics.queue.set(0)
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [ticket for ticket in self._waiting if ticket.order.key == first.order.key]
                left = first.arrived + self._max_wait - time.monotonic()
                if len(batch) < self._batch_size and left > 0:
                    self._changed.wait(left)
                    continue
                batch = batch[: self._batch_size]
                self._waiting = deque(ticket for ticket in self._waiting if ticket not in batch)
                self._metrics.queue.set(len(self._waiting))
                return batch

    def _draw(self, batch: list[Ticket]) -> None:
        """Draw a batch; where it fails, draw each of its orders separately, so that only the bad one fails."""
        started = time.monotonic()
        self._metrics.batches.observe(len(batch))
        try:
            self._draw_together(batch)
        except Stopped:
            for ticket in batch:
                ticket.finish(Event(error=ApiError(499, "cancelled", code="cancelled")))
        except Exception as error:
            left = [ticket for ticket in batch if not ticket.finished and not ticket.cancelled]
            if len(batch) > 1:
                logger.warning("a batch of %d failed (%s); each is drawn separately", len(batch), type(error).__name__)
                for ticket in left:
                    self._draw([ticket])
                return
            self._fail(left, error)
        each = (time.monotonic() - started) / len(batch)
        self._seconds_each += 0.2 * (each - self._seconds_each)

    def _draw_together(self, batch: list[Ticket]) -> None:
        def report(event: Event, of: int | None) -> None:
            if all(ticket.cancelled or ticket.finished for ticket in batch):
                raise Stopped
            for ticket in batch if of is None else [batch[of]]:
                if not ticket.cancelled and not ticket.finished:
                    ticket.tell(event)

        drawn = self._artist.draw([ticket.order for ticket in batch], report)
        for ticket, picture in zip(batch, drawn, strict=True):
            self._metrics.drawn(ticket.order, picture)
            ticket.finish(Event(drawn=picture))

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        known = error if isinstance(error, ApiError) else None
        if known is None and isinstance(error, FastgenError):
            known = from_message(error)
        if known is None:
            logger.error("a picture failed", exc_info=error)
            known = ApiError(500, "the picture could not be drawn; the server's log says why", code="internal")
        for ticket in tickets:
            self._metrics.failures.labels(known.code or "other").inc()
            with suppress(Exception):  # a client that is gone is no reason to end the thread
                ticket.finish(Event(error=known))
