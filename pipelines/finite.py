"""Pictures are checked where they are decoded: afterwards NaN is black and infinity is white."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.checks import check_finite

__all__ = ["check_output", "finite_call", "finite_decoder"]


@contextmanager
def finite_decoder(pipe: Any) -> Iterator[None]:
    """Check latents and pixels of the pipeline's VAE inside, before pixels are clamped.

    Raises:
        NotFiniteError: from the decoder, in this thread; other threads that share it have checks of their own.
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


def finite_call(pipe: Any, stock: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any]]:
    """A stock `__call__` whose pictures are checked before they become PIL images.

    Args:
        pipe: the pipeline.
        stock: its call, which takes `return_dict` False.

    Raises:
        NotFiniteError: from the call, in place of the pictures.
    """

    def call(**arguments: Any) -> tuple[Any]:
        wanted = arguments.get("output_type", "pil")
        with finite_decoder(pipe):
            pictures = stock(**{**arguments, "output_type": "np" if wanted == "pil" else wanted})[0]
        check_output(pictures, "latents" if wanted == "latent" else "pixels")
        return (DiffusionPipeline.numpy_to_pil(pictures) if wanted == "pil" else pictures,)

    return call


def check_output(pictures: Any, what: str = "pixels") -> None:
    """Check what a pipeline returned; PIL images hold integers.

    Raises:
        NotFiniteError: it holds NaN or infinity.
    """
    for part in pictures if isinstance(pictures, list | tuple) else [pictures]:
        if isinstance(part, torch.Tensor | np.ndarray):
            check_finite(part, what)
