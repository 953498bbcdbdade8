"""Pictures are checked where they are decoded: afterwards NaN is black and infinity is white."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastgen.checks import check_finite

__all__ = ["check_output", "finite_decoder"]


@contextmanager
def finite_decoder(pipe: Any) -> Iterator[None]:
    """Check latents and pixels of the pipeline's VAE inside, before pixels are clamped.

    Raises:
        NotFiniteError: from the decoder, in this thread; other threads that share it have their own checks.
    """
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield
        return
    thread = threading.get_ident()

    def check(module: torch.nn.Module, given: tuple[Any, ...], decoded: Any) -> None:
        if threading.get_ident() != thread:
            return
        for values, what in ((given[:1], "latents"), ((decoded,), "pixels")):
            if values and isinstance(values[0], torch.Tensor):
                check_finite(values[0], what)

    handle = decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def check_output(pictures: Any, what: str = "pixels") -> None:
    """Check what a pipeline returned; PIL images contain integers.

    Raises:
        NotFiniteError: it contains NaN or infinity.
    """
    for part in pictures if isinstance(pictures, list | tuple) else [pictures]:
        if isinstance(part, torch.Tensor | np.ndarray):
            check_finite(part, what)
