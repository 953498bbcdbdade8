"""Images of an evaluation, drawn by workers of a Ray cluster. If a worker is lost, its batch is drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from fastgen.cli.eval_run import Cluster, Drawer
from fastgen.errors import FastgenError
from fastgen.serve.joining import join_cluster

__all__ = ["scattered"]

_TRIES = 4  # of a batch


def scattered(drawer: Drawer, prompts: list[str], seeds: list[int], cluster: Cluster) -> Iterator[Image.Image]:
    """Draw (prompt, seed) pairs on the workers; images in order.

    Batches are those of a run in one process, so that rounding is the same.

    Raises:
        FastgenError: there is no such cluster, or a batch failed on every try.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.util import ActorPool

    join_cluster(cluster.address)
    needs = {"num_gpus": 1} if drawer.device.startswith("cuda") else {"num_cpus": 1}
    worker: Any = ray.remote(max_restarts=-1, max_task_retries=_TRIES, **needs)(Worker)
    pool = ActorPool([worker.remote(drawer) for _ in range(cluster.workers)])
    size = drawer.batch_size
    parts = [(prompts[first : first + size], seeds[first : first + size]) for first in range(0, len(prompts), size)]

    def images() -> Iterator[Image.Image]:
        try:
            for found in pool.map(lambda actor, part: actor.draw.remote(*part), parts):
                yield from found
        except RayActorError as error:
            raise FastgenError(f"a batch was lost {_TRIES + 1} times with the worker that drew it") from error
        finally:
            ray.shutdown()

    return images()


class Worker:
    """Draws in its own process; the model is loaded once."""

    def __init__(self, drawer: Drawer) -> None:
        self._generate = drawer.load()

    def draw(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """One batch."""
        return list(self._generate(prompts, seeds))
