"""What a run really did: FLOPs, tokens, passes, acceptance, seconds by phase and peak memory. A leaf.

    with account() as stats:
        with phase("load"):
            pipe = load_pipeline("tiny")
        with phase("denoise"), count_flops():
            ...
    stats.seconds["denoise"], stats.flops, stats.as_dict()

Code that does the work reports through the functions of this module; they do nothing when no account is open, so that
a library function needs neither a parameter nor a check. torch is imported by `count_flops` only.

**Who receives a report.** Open accounts nest: a report goes to the innermost account of the calling context and to
every account around it. An account lives in a `contextvars.ContextVar`. A thread starts without one; run the work with
``contextvars.copy_context().run`` to have it feed the account of the thread that started it. Reports are atomic.

**Seconds are exclusive.** The time of a phase inside another phase belongs to the inner one only, so that the seconds
of all phases of one thread add up to at most the wall time of the account (``wall_seconds``). Phases in helper threads
add their own time. A phase waits for the GPU at its start and its end, because otherwise it would time the launch of
the work, not the work.

**Memory.** ``peak_memory`` holds the high-water mark of the process ("process", resident bytes since the process
began, because the system keeps no other) and of every CUDA device that was used ("cuda:0" …, bytes allocated by torch
while the account was open; opening an account resets torch's own peak counters).
"""

from __future__ import annotations

import copy
import logging
import operator
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import FrozenInstanceError, dataclass, field, fields
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What speculative decoding accepted.

    Attributes:
        rule: name of the acceptance rule.
        counts: what the rule counts -> how much of it, over all images; "stolen": mass moved between tokens.
    """

    rule: str
    counts: dict[str, float] = field(default_factory=dict)


@dataclass
class Stats:
    """What was reported to one account. Read it at any time; it grows until the account closes, and is constant then.

    Attributes:
        seconds: phase -> exclusive seconds.
        passes: "target", "drafter", "denoiser" ... -> forward passes.
        flops: 0 as well where nothing counted them, see `flops_counted`.
        flops_by_kind: "linear", "attention" ... -> FLOPs.
        flops_counted: whether `count_flops` was used.
        nfe: evaluations of the denoiser, one per prompt row and step, both halves of guidance counted.
        kept_tokens: of each step.
        total_tokens: of each step, before any was dropped.
        accepted_lengths: of each verification of speculative decoding.
        acceptance: of speculative decoding; None without.
        verifier_calls: images scored by a verifier.
        paths: operation -> implementation that ran -> why not the faster one.
        notes: what the user should know of the pictures.
        peak_memory: "process", "cuda:0" ... -> bytes.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    flops_by_kind: dict[str, int] = field(default_factory=dict)
    flops_counted: bool = False
    nfe: int = 0
    kept_tokens: list[int] = field(default_factory=list)
    total_tokens: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    acceptance: Acceptance | None = None
    verifier_calls: int = 0
    paths: dict[str, dict[str, str | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peak_memory: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._stopped: float | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_stopped") is not None:
            raise FrozenInstanceError(f"{name}: the account is closed, its stats are constant")
        object.__setattr__(self, name, value)

    @property
    def wall_seconds(self) -> float:
        """Seconds from the opening of the account to its closing, or to now."""
        return (time.perf_counter() if self._stopped is None else self._stopped) - self._started

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak of the busiest CUDA device if one was used, else of the process; None if the system reports none."""
        devices = [size for name, size in self.peak_memory.items() if name != "process" and size]
        return max(devices, default=self.peak_memory.get("process"))

    def as_dict(self) -> dict[str, Any]:
        """A copy made of dicts, lists, strings, numbers and None; `flops` is None when nothing counted them."""
        with self._lock:
            accepted = self.acceptance
            found = {each.name: copy.deepcopy(getattr(self, each.name)) for each in fields(self)}
            found["flops"] = found["flops"] if found.pop("flops_counted") else None
            found["acceptance"] = None if accepted is None else {"rule": accepted.rule, **accepted.counts}
            return {"wall_seconds": self.wall_seconds, **found, "peak_memory_bytes": self.peak_memory_bytes}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}  # it cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


_active: ContextVar[tuple[Stats, ...]] = ContextVar("fastgen_accounts", default=())
_phases: ContextVar[tuple[phase, ...]] = ContextVar("fastgen_phases", default=())
_thread = threading.local()  # .counting: a FLOP counter is active in this thread
_open: list[Stats] = []  # all accounts of all threads, for the peak counters, which are global to the process
_open_lock = threading.Lock()
_logged_paths: set[tuple[str, str, str | None]] = set()


def current() -> Stats | None:
    """The innermost open account of this context."""
    active = _active.get()
    return active[-1] if active else None


def _accounts() -> Iterator[Stats]:
    """Every open account of this context, each locked while the caller writes to it."""
    for stats in _active.get():
        with stats._lock:
            yield stats


class account:
    """Open an account: ``with account() as stats``. Every entry opens a new one."""

    def __init__(self) -> None:
        self._entered: list[Stats] = []

    def __enter__(self) -> Stats:
        _fold_peaks(reset=True)
        stats = Stats(flops_counted=getattr(_thread, "counting", False))  # by a counter that an outer account opened
        with _open_lock:
            _open.append(stats)
        self._entered.append(stats)
        _active.set((*_active.get(), stats))
        return stats

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stats = self._entered.pop()
        # Removed by identity, not by a reset token: a generator that is closed late, or by another thread, must not
        # bring back accounts that have closed since.
        _active.set(tuple(other for other in _active.get() if other is not stats))
        stopped = time.perf_counter()
        _fold_peaks(reset=False)
        with _open_lock:
            _open[:] = [other for other in _open if other is not stats]
        stats._stopped = stopped


class phase:
    """Time a part of the run: ``with phase("denoise")``. Seconds of inner phases are not counted twice.

    Args:
        name: key in `Stats.seconds`; the same name may be entered any number of times and adds up.
    """

    __slots__ = ("_children", "_parent", "_start", "_stats", "_thread_id", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self._stats, self._thread_id, self._children = _active.get(), threading.get_ident(), 0.0
        outer = _phases.get()
        # A copied context carries the phase of the thread that started this one; that phase continues meanwhile.
        self._parent = outer[-1] if outer and outer[-1]._thread_id == self._thread_id else None
        if self._stats:
            _synchronize()
        _phases.set((*outer, self))
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _phases.set(tuple(other for other in _phases.get() if other is not self))
        if not self._stats:
            return
        if kind is None:  # after a CUDA error a wait would raise again and hide the first one
            _synchronize()
        elapsed = time.perf_counter() - self._start
        if self._parent is not None:
            self._parent._children += elapsed
        own = max(0.0, elapsed - self._children)
        for stats in self._stats:
            with stats._lock:
                stats.seconds[self.name] = stats.seconds.get(self.name, 0.0) + own


class count_flops:
    """Count the FLOPs of the torch operations called in this thread: ``with count_flops()``.

    2 FLOPs per multiply-add of linear layers, matrix products, convolutions and attention; what is and is not seen is
    listed in `fastgen._flops`. Does nothing, and imports nothing, when no account is open. Entering it again inside is
    free and counts nothing twice. ``torch.nn.MultiheadAttention`` takes its slower path while the counter is on.
    """

    __slots__ = ("_mode",)

    def __enter__(self) -> None:
        self._mode: Any = None
        active = _active.get()
        for stats in active:
            stats.flops_counted = True
        if not active or getattr(_thread, "counting", False):
            return
        from fastgen._flops import FlopCounter

        self._mode = FlopCounter(_report_flops)
        self._mode.__enter__()
        _thread.counting = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mode is not None:
            _thread.counting = False
            self._mode.__exit__(kind, error, trace)
            self._mode = None


def add_passes(name: str, n: int = 1) -> None:
    """Report `n` forward passes of the model `name` ("target", "drafter", "denoiser" ...)."""
    n = _count("n", n)
    for stats in _accounts():
        stats.passes[name] = stats.passes.get(name, 0) + n


def add_nfe(n: int = 1) -> None:
    """Report `n` function evaluations of the denoiser."""
    n = _count("n", n)
    for stats in _accounts():
        stats.nfe += n


def add_tokens(*, kept: int, total: int) -> None:
    """Report one step that worked on `kept` of `total` tokens.

    Raises:
        ValueError: `kept` is larger than `total`.
    """
    kept, total = _count("kept", kept), _count("total", total)
    if kept > total:
        raise ValueError(f"kept: {kept} tokens of {total}; needs kept <= total")
    for stats in _accounts():
        stats.kept_tokens.append(kept)
        stats.total_tokens.append(total)


def add_accepted(n: int | Iterable[int]) -> None:
    """Report the accepted length of one verification, or of several rows verified at once."""
    lengths = [_count("n", length) for length in (n if isinstance(n, Iterable) else (n,))]
    for stats in _accounts():
        stats.accepted_lengths.extend(lengths)


def add_acceptance(rule: str, counts: Mapping[str, float]) -> None:
    """Report what a rule of speculative decoding accepted; calls of one rule add up, another rule starts again."""
    for stats in _accounts():
        before = stats.acceptance.counts if stats.acceptance is not None and stats.acceptance.rule == rule else {}
        stats.acceptance = Acceptance(rule, {name: before.get(name, 0.0) + n for name, n in counts.items()})


def add_verifier_calls(n: int = 1) -> None:
    """Report `n` images scored by a verifier."""
    n = _count("n", n)
    for stats in _accounts():
        stats.verifier_calls += n


def note_path(name: str, used: str, reason: str | None = None) -> None:
    """Report which implementation ran: ``note_path("attention", "sdpa", "flash needs CUDA")``.

    Args:
        name: the operation ("attention", "qk_norm_rope" ...).
        used: the implementation that ran.
        reason: why not the faster one; None when this is the fastest. It is logged once per process, at level INFO.
    """
    for stats in _accounts():
        stats.paths.setdefault(name, {})[used] = reason
    key = (name, used, reason)
    if reason is not None and key not in _logged_paths:
        _logged_paths.add(key)
        logger.info("%s: %s runs, because %s", name, used, reason)


def is_in(name: str) -> bool:
    """Whether this context is inside ``phase(name)``."""
    return any(outer.name == name for outer in _phases.get())


def add_note(text: str) -> None:
    """Report what the user should know of the pictures ("this end of a prompt is cut off: ..."), kept once."""
    for stats in _accounts():
        if text not in stats.notes:
            stats.notes.append(text)


def _report_flops(kind: str, n: int) -> None:
    for stats in _accounts():
        stats.flops += n
        stats.flops_by_kind[kind] = stats.flops_by_kind.get(kind, 0) + n


def _count(argument: str, value: Any) -> int:
    """`value` as an int >= 0. A tensor on a GPU is refused: reading it would stop the GPU inside the step."""
    if getattr(value, "is_cuda", False):
        raise TypeError(f"{argument}: got a CUDA tensor; pass a number, and read it outside the step")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: {value!r} is not a whole number") from None
    if number < 0:
        raise ValueError(f"{argument}: {number} is not allowed; needs >= 0")
    return number


def _cuda() -> Any:
    """`torch.cuda` when this process has used it, else None; never imports torch and never starts CUDA."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # None as well while torch is being imported
    is_initialized = getattr(cuda, "is_initialized", None)
    return cuda if is_initialized is not None and is_initialized() else None


def _synchronize() -> None:
    cuda = _cuda()
    if cuda is not None and not cuda.is_current_stream_capturing():  # waiting would break the capture of a graph
        cuda.synchronize()


def wait_for(device: Any) -> None:
    """Wait until a `torch.device` has done its work; only a GPU has to be waited for."""
    if device.type == "cuda":
        sys.modules["torch"].cuda.synchronize(device)


def _fold_peaks(*, reset: bool) -> None:
    """Give the peaks since the last call to every open account, so that a reset loses nothing for an outer one."""
    peaks = {} if (process := _process_peak()) is None else {"process": process}
    with _open_lock:
        cuda = _cuda()
        for index in range(cuda.device_count() if cuda is not None else 0):
            peaks[f"cuda:{index}"] = cuda.max_memory_allocated(index)
            if reset:
                cuda.reset_peak_memory_stats(index)
        for stats in _open:
            with stats._lock:
                for name, size in peaks.items():
                    stats.peak_memory[name] = max(size, stats.peak_memory.get(name, 0))


def _process_peak() -> int | None:
    """High-water mark of resident memory in bytes; None on systems that do not report it (Windows)."""
    try:
        # Not getrusage: on Linux its mark outlives exec, so a small program would report its big parent's peak.
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
