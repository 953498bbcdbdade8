"""Several processes on one evaluation, started by `torchrun`, `accelerate launch` or anything that sets RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT: gloo between CPUs, nccl between GPUs.

Work is shared by number (item i belongs to process i mod size), so nothing is done twice and nothing is left out. What
one process cannot do must not leave the others waiting: before every collective the processes meet in the store, where
a failure is posted with its reason and each process shows with a pulse that it is alive.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen.errors import FastgenError

__all__ = ["Group", "OnProgress", "PeerFailed"]

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]
"""(stage, done, total)"""

_POLL = 0.02  # seconds between polls of the store
_PULSE = 1.0  # seconds between two signs of life
_SILENCE = 120.0  # seconds without one after which a process counts as lost
_LEAVING = 10.0  # the same, while a group breaks up
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerFailed(FastgenError):
    """Another process of the group failed; the message says which and why."""


class Group:
    """The processes of this evaluation; by default only this one.

    Args:
        rank, size: of this process, and how many there are.
        store: a `torch.distributed.Store` that all of them reach; None for one process.
        silence: seconds without a sign of life after which another process counts as lost.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, *, silence: float = _SILENCE) -> None:
        if not 0 <= rank < size or (size > 1 and store is None):
            raise ValueError(f"Group: rank {rank} of {size} processes, store {store!r}")
        self.rank, self.size, self._store, self._silence = rank, size, store, silence
        self._meetings = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._checked = time.monotonic()
        if size > 1:
            self._beat()
            threading.Thread(target=self._pulse, name="fastgen-pulse", daemon=True).start()

    @classmethod
    def from_environment(cls, device: str = "cpu", *, silence: float = _SILENCE) -> Group:
        """The group that the launcher describes in the environment.

        Args:
            device: "cuda" also opens nccl, for tensors on GPUs.

        Raises:
            FastgenError: the description is incomplete, or the other processes cannot be reached.
        """
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls()
        if missing := [name for name in _VARIABLES if not os.environ.get(name)]:
            raise FastgenError(f"WORLD_SIZE is {size}, but {missing[0]} is not set: start with torchrun")
        if not torch.distributed.is_available():
            raise FastgenError("this build of torch has no torch.distributed; run one process")
        import torch.distributed as dist

        try:
            rank, count = int(os.environ["RANK"]), int(size)
            store, _, _ = next(dist.rendezvous("env://", rank, count))  # type: ignore[attr-defined]
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            if not dist.is_initialized():
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=600)
                )
        except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
            line = str(error).strip().splitlines()[0]
            raise FastgenError(f"the {size} processes cannot reach one another: {line}") from error
        return cls(rank, count, dist.PrefixStore("fastgen", store), silence=silence)  # type: ignore[attr-defined]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes results."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device of this process: "cuda" means one GPU a process."""
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if self.size > 1 and device == "cuda" else device

    def owns(self, index: int) -> bool:
        """Whether item `index` is this process's work."""
        return index % self.size == self.rank

    # --- failures ---

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Errors inside are sent to the other processes, which then stop with `PeerFailed`."""
        try:
            yield
            self.close()
        except PeerFailed:
            raise
        except BaseException as error:
            self._post(error)
            raise
        finally:
            self._stop.set()

    def _post(self, error: BaseException) -> None:
        if self.size == 1:
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):  # the store itself may be gone
            self._store.set("failed", f"process {self.rank} of {self.size} failed: {reason}"[:2000])
            if self.is_main:
                time.sleep(1.5)  # without a launcher the store ends with this process: let the others read it

    def check(self) -> None:
        """Raise `PeerFailed` if another process has failed; asks at most once a second, so call it at every item."""
        if self.size > 1 and time.monotonic() - self._checked > 1:
            self._look()

    def _look(self) -> None:
        self._checked = time.monotonic()
        if self._ask(lambda: self._store.check(["failed"])):
            raise PeerFailed(self._ask(lambda: self._store.get("failed")).decode("utf-8", "replace"))
        for rank in range(self.size):
            if rank == self.rank:
                continue
            beats = int(self._ask(lambda rank=rank: self._store.add(f"pulse/{rank}", 0)))  # type: ignore[misc]
            known, since = self._seen.get(rank, (-1, 0.0))
            if beats != known:
                self._seen[rank] = (beats, time.monotonic())
            elif time.monotonic() - since > self._silence:
                raise PeerFailed(f"process {rank} of {self.size} has shown no sign of life for {self._silence:.0f} s")

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:  # DistError is one
            raise PeerFailed(f"process {self.rank} of {self.size} has lost the others: {error}") from error

    def _beat(self) -> None:
        self._ask(lambda: self._store.add(f"pulse/{self.rank}", 1))

    def _pulse(self) -> None:
        while not self._stop.wait(_PULSE):
            with contextlib.suppress(FastgenError):
                self._beat()

    # --- meeting and sharing ---

    def meet(self, on_wait: Callable[[], None] | None = None) -> None:
        """Wait until every process is here.

        Args:
            on_wait: called now and then meanwhile.

        Raises:
            PeerFailed: one of them failed or was lost; the others do not wait for it.
        """
        if self.size == 1:
            return
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        self._ask(lambda: self._store.add(name, 1))
        while int(self._ask(lambda: self._store.add(name, 0))) < self.size:
            self._look()
            if on_wait is not None:
                on_wait()
            time.sleep(_POLL)

    def share(self, value: T | None = None) -> T:
        """The main process's value, on every process."""
        box = [value]
        if self.size > 1:
            import torch.distributed as dist

            self.meet()
            self._ask(lambda: dist.broadcast_object_list(box, src=0, device=torch.device("cpu")))
        return box[0]  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """`work` on the main process, then on the others, which may use its files."""
        if self.is_main:
            done = work()
            self.meet()
            return done
        self.meet()
        return work()

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            import torch.distributed as dist

            self.meet()
            for tensor in tensors:
                self._ask(lambda tensor=tensor: dist.all_reduce(tensor))  # type: ignore[misc]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on the main one; an empty list on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.meet()
        boxes: list[Any] | None = [None] * self.size if self.is_main else None
        self._ask(lambda: dist.gather_object(value, boxes, dst=0))
        return boxes or []

    def to_main(self, tensor: Tensor | None, source: int, shape: tuple[int, ...]) -> Tensor | None:
        """A float32 CPU tensor of process `source` on the main one, None elsewhere; all call it in the same order."""
        if source == 0:
            return tensor if self.is_main else None
        import torch.distributed as dist

        if self.rank == source and tensor is not None:
            self._ask(lambda: dist.send(tensor.contiguous(), 0))
        if not self.is_main:
            return None
        received = torch.empty(shape)
        self._ask(lambda: dist.recv(received, source))
        return received

    # --- progress ---

    def count(self, stage: str, done: int) -> int:
        """Report `done` further items of a stage and get the number that all processes have done."""
        return done if self.size == 1 else int(self._ask(lambda: self._store.add(f"done/{stage}", done)))

    def counter(self, stage: str, total: int, on_progress: OnProgress | None) -> Callable[[int], None]:
        """A function to call with how many items this process has just finished; the main one reports those of all."""
        done = 0

        def report_done(count: int) -> None:
            nonlocal done
            done = done + count if self.size == 1 else self.count(stage, count)
            if on_progress is not None and self.is_main:
                on_progress(stage, done, total)

        return report_done

    def close(self) -> None:
        """Leave the group; the main process, which the others ask through, leaves last."""
        if self.size > 1:
            import torch.distributed as dist

            # The work is done: a process that shows no sign of life now is not waited for as long as one at work.
            self._silence = min(self._silence, _LEAVING)
            with contextlib.suppress(FastgenError):
                left = self._ask(lambda: self._store.add("left", 1))
                while self.is_main and left < self.size:
                    self._look()
                    time.sleep(_POLL)
                    left = self._ask(lambda: self._store.add("left", 0))
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        self._stop.set()
