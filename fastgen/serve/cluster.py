"""The same application on Ray Serve: replicas that draw, on one machine or many.

Each replica keeps its most recently used models, and shares batches among the requests that reach it. A
picture of a lost replica is drawn again by another one, from the same seed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from fastgen.errors import FastgenError
from fastgen.serve.artist import Catalogue
from fastgen.serve.errors import ApiError
from fastgen.serve.joining import join_cluster
from fastgen.serve.local import LocalBackend
from fastgen.serve.metrics import Metrics
from fastgen.serve.orders import Event, Order
from fastgen.serve.settings import ClusterSettings, ServeSettings

__all__ = ["ClusterBackend", "deploy", "shut_down"]

logger = logging.getLogger(__name__)
NAME = "fastgen"
_LOST = (RayActorError, RayServeException)
_TRIES = 3  # of a picture, on as many replicas


def _replica_class(kept: int) -> Any:
    """What a replica runs, with that many models loaded at most."""

    class Replica:
        """Draws in a separate process."""

        def __init__(self, settings: ServeSettings) -> None:
            self._backend = LocalBackend(Catalogue(settings), Metrics(), keep=kept)
            self._backend.load(settings.models[:1])

        @serve.multiplexed(max_num_models_per_replica=kept)
        async def model(self, name: str) -> str:
            """Tells Ray which replica has which model; the thread that draws loads it."""
            return name

        async def draw(self, orders: list[Order]) -> AsyncIterator[tuple[int, Event]]:
            """See `Backend`."""
            await self.model(serve.get_multiplexed_model_id())
            async for place, event in self._backend.draw(orders):
                yield place, event

    return Replica


class ClusterBackend:
    """Replicas behind a handle, which sends requests of one model to where it is loaded."""

    def __init__(self, handle: Any, metrics: Metrics) -> None:
        self._handle, self._metrics = handle, metrics
        self._closing = self._stopping = False

    def ready(self) -> bool:
        """See `Backend`."""
        return bool(serve.status().applications[NAME].status == "RUNNING")

    def close(self, *, now: bool = False) -> None:
        """See `Backend`."""
        self._closing, self._stopping = True, now

    async def draw(self, orders: Sequence[Order]) -> AsyncIterator[tuple[int, Event]]:
        """See `Backend`."""
        if self._closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        left = dict(enumerate(orders))
        for attempt in range(1, _TRIES + 1):
            places = list(left)
            handle = self._handle.options(stream=True, multiplexed_model_id=orders[0].model)
            answer = handle.draw.remote([left[place] for place in places])
            try:
                async for number, event in answer:
                    if self._stopping:
                        raise ApiError(503, "the server is shutting down", code="shutting_down")
                    place = places[number]
                    if event.last:
                        if event.drawn is not None:
                            self._metrics.drawn(left[place], event.drawn)
                        del left[place]
                    yield place, event
                return
            except RayTaskError as error:
                if isinstance(error.cause, ApiError):
                    raise error.cause from None
                raise
            except _LOST as error:
                logger.warning("a replica was lost (%s); %d pictures are drawn again", type(error).__name__, len(left))
                self._metrics.failures.labels("replica_lost").inc(len(left))
                if not left:
                    return
                await asyncio.sleep(0.2 * attempt)
            finally:
                answer.cancel()
        lost = ApiError(503, "the pictures were lost with the replicas that drew them; try again", code="replica_lost")
        for place in left:
            yield place, Event(error=lost)


def deploy(settings: ServeSettings, cluster: ClusterSettings, metrics: Metrics) -> ClusterBackend:
    """Start the replicas and wait until they can draw.

    Raises:
        FastgenError: there is no such cluster, or the replicas do not start.
    """
    join_cluster(cluster.ray_address)
    scaling: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None and cluster.max_replicas > cluster.replicas:
        limits = {"min_replicas": cluster.replicas, "max_replicas": cluster.max_replicas}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": settings.batch_size}}
    deployment = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": cluster.replica_cpus, "num_gpus": cluster.replica_gpus},
        max_ongoing_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.timeout,
        health_check_period_s=2,
        **scaling,
    )(_replica_class(cluster.replica_models))
    try:
        handle = serve.run(deployment.bind(settings), name=NAME, route_prefix=None)
    except RuntimeError as error:
        raise FastgenError(f"--engine ray: the replicas do not start: {str(error).splitlines()[0]}") from error
    return ClusterBackend(handle, metrics)


def shut_down() -> None:
    """End the replicas, and the cluster where it was started here."""
    serve.shutdown()
    ray.shutdown()
