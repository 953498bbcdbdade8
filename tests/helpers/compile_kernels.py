"""Compiles Triton kernels for GPUs on a machine without one: every launch compiles and nothing runs.

Python started without TRITON_INTERPRET calls `compile_for(target)` and then launchers with CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

TARGETS = {"cuda": ("cuda", 90, 32), "hip": ("hip", "gfx942", 64)}


@contextlib.contextmanager
def compile_for(name: str) -> Iterator[dict[str, Any]]:
    """Launches inside compile for TARGETS[name]; gives kernel name -> what its last compilation made.

    The process keeps the pretended device.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*TARGETS[name])

        def get_active_torch_device(self) -> str:
            return "cpu"

    made: dict[str, Any] = {}
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        made[self.fn.__name__] = kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        return kernel

    driver.set_active(Driver())
    jit.JITFunction.run = compile_only
    try:
        yield made
    finally:
        jit.JITFunction.run = run
