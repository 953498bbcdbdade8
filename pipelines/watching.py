"""Around a call of a diffusers pipeline: its stages are timed, its passes counted, its latents and pixels checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.accounting import add_nfe, add_passes, phase
from fastgen.pipelines.finite import check_output, finite_decoder

__all__ = ["watched", "watched_call"]

_inside: ContextVar[tuple[Any, ...]] = ContextVar("fastgen_watched", default=())


@contextmanager
def watched(pipe: Any) -> Iterator[None]:
    """Report the stages of one call, "text" until the denoiser runs, "denoise", then "decode", and the denoiser's
    passes and evaluations. Inside a call that is watched already it does nothing. A pipeline without a denoiser
    reports its own stages.

    Raises:
        NotFiniteError: latents or pixels of the decoder are NaN or infinite.
    """
    if any(pipe is other for other in _inside.get()):
        yield
        return
    before = _inside.set((*_inside.get(), pipe))
    try:
        with finite_decoder(pipe), _stages(pipe):
            yield
    finally:
        _inside.reset(before)


def watched_call(pipe: Any, stock: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any]]:
    """A stock `__call__` that is watched, and whose pictures are checked before they become PIL images.

    Args:
        pipe: the pipeline.
        stock: its call, which takes `return_dict` False.

    Raises:
        NotFiniteError: from the call, in place of the pictures.
    """

    def call(**arguments: Any) -> tuple[Any]:
        wanted = arguments.get("output_type", "pil")
        with watched(pipe):
            pictures = stock(**{**arguments, "output_type": "np" if wanted == "pil" else wanted})[0]
        check_output(pictures, "latents" if wanted == "latent" else "pixels")
        return (DiffusionPipeline.numpy_to_pil(pictures) if wanted == "pil" else pictures,)

    return call


@contextmanager
def _stages(pipe: Any) -> Iterator[None]:
    parts = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    denoiser = next((part for part in parts if isinstance(part, torch.nn.Module)), None)
    if denoiser is None:
        yield
        return
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    running = ExitStack()
    stage = ""

    def switch(name: str) -> None:
        nonlocal stage
        if name != stage:
            running.close()
            running.enter_context(phase(name))
            stage = name

    def before_pass(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if stage == "text":
            switch("denoise")
        add_passes("denoiser")
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        if isinstance(sample, list | tuple | torch.Tensor):
            add_nfe(len(sample))

    def before_decoding(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if stage == "denoise":
            switch("decode")

    with ExitStack() as hooks:
        for part, act in ((denoiser, before_pass), (decoder, before_decoding)):
            if isinstance(part, torch.nn.Module):
                hook = part.register_forward_pre_hook(_of_this_thread(act), with_kwargs=True)
                hooks.callback(hook.remove)
        with running:
            switch("text")
            yield


def _of_this_thread(act: Callable[..., None]) -> Callable[..., None]:
    """Other threads may call the same networks for other pictures."""
    thread = threading.get_ident()

    def hook(*given: Any) -> None:
        if threading.get_ident() == thread:
            act(*given)

    return hook
