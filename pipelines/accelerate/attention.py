"""Attention backends of diffusers as parts: exact ones, and those that quantise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastgen.checks import check_choice
from fastgen.errors import one_line
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network

__all__ = ["Attention", "QuantizedAttention"]

#: Tried for "auto" on a GPU, the fastest first.
_FASTER = ("_flash_3", "flash", "_native_cudnn")
_EXACT = (*_FASTER, "native", "flex", "_native_flash", "_native_efficient", "_native_math", "xformers")
_QUANTIZED = ("sage", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp8_cuda")


class _Backend(Part):
    """Sets the backend of the denoiser's attention, and of no other model."""

    backend: str
    #: Largest difference from PyTorch's attention on the test input, whose outputs are below 1.
    allowed_error: ClassVar[float]

    def why_not(self, pipe: Any) -> str | None:
        if not (processors := _processors(pipe)):
            return "its attention takes no backends of diffusers"
        if any(getattr(each, "_attention_backend", None) is not None for each in processors):
            return "a backend is set already"
        found = self._found(pipe)
        return found if isinstance(found, _Fault) else None

    def enable(self, pipe: Any) -> Undo:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        before = [(each, "_attention_backend" in vars(each)) for each in _processors(pipe)]
        everywhere = _AttentionBackendRegistry._active_backend

        def undo() -> None:
            for each, had in before:
                if had:
                    each._attention_backend = None
                else:
                    vars(each).pop("_attention_backend", None)

        try:
            denoising_network(pipe).set_attention_backend(self._found(pipe))
        except BaseException:
            undo()
            raise
        finally:
            _AttentionBackendRegistry.set_active_backend(everywhere)  # it is set for all other models too
        return undo

    def _found(self, pipe: Any) -> str:
        """The backend to set, or a `_Fault`."""
        return _fault(pipe, self.backend, self.allowed_error) or self.backend


class _Fault(str):
    """Why a backend does not work."""


@dataclass(frozen=True)
class Attention(_Backend):
    """An attention backend that computes the same: flash, cuDNN, flex …, set for the denoiser.

    Args:
        backend: of diffusers; "auto" is the fastest that is installed and works on this GPU, with masks too.
    """

    name = "attention"
    loss = "exact"
    allowed_error = 0.05
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, ("auto", *_EXACT))

    def _found(self, pipe: Any) -> str:
        if self.backend != "auto":
            return super()._found(pipe)
        if _device(pipe).type != "cuda":
            return _Fault("PyTorch's own attention is the fastest without a GPU")
        faults = (_fault(pipe, each, self.allowed_error, masks=True) for each in _FASTER)
        working = (each for each, fault in zip(_FASTER, faults, strict=True) if fault is None)
        return next(working, _Fault("no faster backend is installed that works here"))


@dataclass(frozen=True)
class QuantizedAttention(_Backend):
    """Attention in 8 bits by SageAttention.

    Args:
        backend: of diffusers.
    """

    name = "quantized_attention"
    loss = "lossy"
    allowed_error = 0.3
    backend: str = "sage"

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, _QUANTIZED)


def _processors(pipe: Any) -> list[Any]:
    """Attention processors of the denoiser that take a backend; users' own that take none stay as they are."""
    from fastgen.pipelines.fused.attention import FusedProcessor

    found: dict[int, Any] = {}
    for module in denoising_network(pipe).modules():
        each = getattr(module, "processor", None)
        while isinstance(each, FusedProcessor):
            each = each.stock
        if each is not None and not isinstance(each, nn.Module) and hasattr(each, "_attention_backend"):
            found[id(each)] = each
    return list(found.values())


def _device(pipe: Any) -> torch.device:
    """Where the pipeline computes, also where its weights wait elsewhere."""
    return torch.device(pipe._execution_device)


def _fault(pipe: Any, backend: str, allowed_error: float, masks: bool = False) -> _Fault | None:
    """Why a backend does not work on the pipeline's device, found by computing with it; None if it does."""
    from diffusers.models import attention_dispatch as theirs

    model, name = denoising_network(pipe), theirs.AttentionBackendName(backend)
    device = _device(pipe)
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, 64, 4, getattr(model.config, "attention_head_dim", None) or 64)
    inputs = torch.randn(shape, generator=generator, device=device).to(model.dtype)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device).tril() if masks else None
    try:
        theirs._check_attention_backend_requirements(name)
        with torch.no_grad():
            ours = theirs.dispatch_attention_fn(*inputs, mask, backend=name).float()
            stock = theirs.dispatch_attention_fn(*inputs, mask, backend=theirs.AttentionBackendName.NATIVE).float()
    except Exception as error:  # of diffusers, the backend's package, or its kernels
        return _Fault(f"{backend} does not work here: {one_line(error)}")
    difference = float((ours - stock).abs().max())
    return None if difference <= allowed_error else _Fault(f"{backend} is off by {difference:.2g} here")
