"""Group norm and SiLU for channels_last images, for VAE and VQ decoders.

The kernel reads the image twice and writes it once: sums by channel first, then norm, affine map and SiLU together.
PyTorch's own group norm changes the memory format instead. Loss contract: exact, up to rounding; statistics and
arithmetic are in float32, rounded once. For inference: if gradients are needed, the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_bool
from fastgen.kernels.arguments import check_int, check_number, check_shape, check_tensors, shown
from fastgen.kernels.dispatch import Checked, choose, direct, needs_gradients
from fastgen.kernels.group_norm_silu.reference import group_norm_silu_reference

__all__ = ["can_use_triton", "group_norm_silu", "group_norm_silu_reference"]

_checked = Checked()
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_GROUP = 1024
_LARGE = 2**23  # elements from which the kernel beats the compiled reference: 512 channels of 128² pixels


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """silu(group_norm(x) * weight + bias).

    Args:
        x: [n, C, ...] with one to three spatial axes.
        groups: number of groups; divides C.
        weight, bias: [C].
        eps: added to the variance.
        silu: False skips the SiLU.

    Returns:
        the shape, dtype and memory format of `x`.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit, naming the argument.
    """
    options = (groups, eps, silu)
    reason = _checked(lambda: _check(x, weight, bias, *options), (x, weight, bias), *options)
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    # Compilers fuse the reference of small images well; eager PyTorch does not, and changes the memory format.
    default = not torch.compiler.is_compiling() or x.numel() >= _LARGE
    if not choose("group_norm_silu", reason, default, *given):
        return group_norm_silu_reference(x, groups, weight, bias, eps, silu)
    operator = _launch if direct(x, weight, bias) else torch.ops.fastgen.group_norm_silu
    result: Tensor = operator(x, groups, weight, bias, eps, silu)
    return result


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool) -> str | None:
    """Check the arguments. Returns why the kernel does not support them, or None."""
    check_tensors({"x": x}, {"weight": weight, "bias": bias})
    check_int("groups", groups, 1)
    check_number("eps", eps, minimum=0)
    check_bool("silu", silu)
    if not 3 <= x.ndim <= 5 or not x.is_floating_point():
        raise ValueError(f"x: needs floats [n, C, ...], got {shown(x)}")
    if x.shape[1] % groups:
        raise ValueError(f"groups: needs a divisor of {x.shape[1]} channels, got {groups}")
    check_shape("weight", weight, x.shape[1:2])
    check_shape("bias", bias, x.shape[1:2])
    return _why_not(x, groups, weight, bias)


def can_use_triton(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether the kernel supports this image, on any device."""
    return _why_not(x, groups, weight, bias) is None


def _why_not(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why the kernel does not support this image, or None."""
    for tensor in (x, weight, bias):
        if tensor is not None and tensor.dtype not in _TYPES:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
    if needs_gradients(x, weight, bias):
        return "gradients are needed"
    width = x.shape[1] // groups
    if width > _MAX_GROUP:
        return f"it takes groups of at most {_MAX_GROUP} channels, not {width}"
    if not _channels_inside(x):
        return "its memory is not channels_last"
    return None


def _channels_inside(x: Tensor) -> bool:
    """Whether each pixel's channels are contiguous and pixels have one stride."""
    if not x.numel():
        return True
    if x.shape[1] > 1 and x.stride(1) != 1:
        return False
    space = [(size, step) for size, step in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    even = all(step == inner * size for (_, step), (size, inner) in zip(space[:-1], space[1:], strict=True))
    return even and (not space or space[-1][1] >= x.shape[1])


def _launch(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    from fastgen.kernels.group_norm_silu import triton as group_norm_silu_triton

    pixels = x.flatten(2).transpose(1, 2) if x.numel() else x.new_empty((0, 0, x.shape[1]))
    out = _empty(x)
    flat = out.permute(0, *range(2, out.ndim), 1).view(pixels.shape)
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    group_norm_silu_triton.forward(pixels, flat, groups, weight, bias, eps, silu)
    return out


def _empty(x: Tensor) -> Tensor:
    """An empty result of shape [n, C, ...] in channels_last format."""
    made = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))
    return made.permute(0, made.ndim - 1, *range(1, made.ndim - 1))


_operator = torch.library.custom_op("fastgen::group_norm_silu", _launch, mutates_args=())


@_operator.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return _empty(x)
