"""Norm and rotary position embedding of queries and keys, in one launch over both.

Each head's vector is normalised (RMS, layer norm, or not at all) and weighted, and its pairs of features are rotated.
The angles come from tables of cosines and sines; tokens kept by a router look theirs up by grid position. Loss
contract: exact, up to rounding; the kernel computes in float32 and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.checks import check_bool
from fastgen.kernels.arguments import check_int, check_number, check_shape, check_tensors, overlaps
from fastgen.kernels.dispatch import Checked, check_range, choose, direct, needs_gradients, plain
from fastgen.kernels.qk_norm_rope.operator import launch, launch_inplace
from fastgen.kernels.qk_norm_rope.reference import qk_norm_rope_reference, references

__all__ = ["can_use_triton", "qk_norm_rope", "qk_norm_rope_reference"]

NORMS = ("rms", "layer", "none")
_VECTORS = ("query_weight", "key_weight", "query_bias", "key_bias")
_checked = Checked()
_overlap = Checked()
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD = 512


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    axes: tuple[int, ...] | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    interleaved: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated queries and keys.

    Args:
        query, key: [n, L, heads, d] or packed [T, heads, d]; the numbers of heads may differ; any strides (slices of a
            packed qkv).
        cos, sin: float tables [P, d / 2] for all samples or [n, P, d / 2]; None: no rotation. Token l uses row l
            unless `positions` is given.
        positions: int64 or int32 row of each token, [L] or [n, L] ([T] when packed), with an extra last axis for
            `axes`.
        axes: features of each axis, up to three even numbers that add up to d; they split the columns of the tables,
            so one table serves rows, columns and frames.
        query_weight, key_weight, query_bias, key_bias: [d], of the norms.
        norm: "rms", "layer" or "none".
        eps: of the norms.
        interleaved: pairs are features 2 i and 2 i + 1 (FLUX, Qwen-Image, Z-Image, LlamaGen), else i and i + d / 2
            (Llama, Janus).
        inplace: write to `query` and `key`, and return them. Not for tensors that need gradients or whose elements
            share memory (expanded tensors, overlapping slices); compiled code does not check the latter.

    Returns:
        query and key, in their shapes and dtypes.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit, naming the argument. `positions` are checked on
            a CPU, and with FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    vectors = (query_weight, key_weight, query_bias, key_bias)
    tensors = (query, key, cos, sin, positions, *vectors)
    if axes is not None:
        if not isinstance(axes, (tuple, list)):
            raise TypeError(f"axes: needs a tuple of integers, got {type(axes).__name__}")
        for part in axes:
            check_int("axes", part, 2)
        axes = tuple(axes)
    options = (norm, eps, interleaved)
    axes, reason = _checked(lambda: _check(*tensors[:5], axes, *options, *vectors), tensors, axes, *options)
    if positions is not None and cos is not None:
        check_range("positions", positions, cos.shape[-2])
    check_bool("inplace", inplace)
    if inplace and needs_gradients(query, key):
        raise ValueError("inplace: is not possible where query or key need gradients")
    if inplace and plain(query) and plain(key) and not torch.compiler.is_compiling():
        _check_overlaps(query, key)
    given = [x for x in tensors if x is not None]
    if not choose("qk_norm_rope", reason, True, *given):
        turned = references(*tensors[:5], axes, vectors, *options)
        return (query.copy_(turned[0]), key.copy_(turned[1])) if inplace else turned
    arguments = (query, key, cos, sin, positions, list(axes), *vectors, *options)
    plainly = direct(*tensors)
    if inplace:
        (launch_inplace if plainly else torch.ops.fastgen.qk_norm_rope_)(*arguments)
        return query, key
    operators = torch.ops.fastgen
    out_of_place = operators.qk_norm_rope if needs_gradients(*tensors) else operators.qk_norm_rope_visible
    out_query, out_key = (launch if plainly else out_of_place)(*arguments)
    return out_query, out_key


def can_use_triton(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel supports these queries and keys, on any device."""
    return _why_not(query, key) is None


def _check(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    axes: tuple[int, ...] | None,
    norm: str,
    eps: float,
    interleaved: bool,
    *vectors: Tensor | None,
) -> tuple[tuple[int, ...], str | None]:
    """Check the arguments. Returns the axes, and why the kernel does not support the arguments, or None."""
    optional = {"cos": cos, "sin": sin, "positions": positions, **dict(zip(_VECTORS, vectors, strict=True))}
    check_tensors({"query": query, "key": key}, optional)
    check_number("eps", eps, minimum=0)
    check_bool("interleaved", interleaved)
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if query.ndim not in (3, 4) or not query.is_floating_point() or query.shape[-1] % 2 or not query.shape[-1]:
        raise ValueError(f"query: needs floats [n, L, heads, d], d even; got {query.dtype} {tuple(query.shape)}")
    fits = key.ndim == query.ndim and key.shape[:-2] == query.shape[:-2] and key.shape[-1] == query.shape[-1]
    if not fits or key.dtype != query.dtype:
        raise ValueError(
            f"key: needs the shape and dtype of query but for its heads, {query.dtype} {tuple(query.shape)}; got "
            f"{key.dtype} {tuple(key.shape)}"
        )
    width = query.shape[-1]
    for name, x in zip(_VECTORS, vectors, strict=True):
        check_shape(name, x, (width,))
    axes = (width,) if axes is None else axes
    if not 1 <= len(axes) <= 3 or sum(axes) != width or any(part % 2 or part <= 0 for part in axes):
        raise ValueError(f"axes: needs one to three even numbers that add up to {width}, got {axes}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: need both or neither")
    samples, length = (1, query.shape[0]) if query.ndim == 3 else query.shape[:2]
    if positions is not None:
        _check_positions(positions, query, len(axes), samples, length)
        if cos is None:
            raise ValueError("positions: are unused without cos and sin")
    elif len(axes) > 1:
        raise ValueError("axes: are unused without positions")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            _check_table(name, table, query, samples, length, positions is not None)
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise ValueError(f"sin: needs the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}")
    return axes, _why_not(query, key, *vectors)


def _check_table(name: str, table: Tensor, query: Tensor, samples: int, length: int, looked_up: bool) -> None:
    """Check a table of cosines or sines."""
    half = query.shape[-1] // 2
    # Sizes may be symbolic: comparisons, no `in`.
    by_sample = table.ndim == 3 and query.ndim == 4 and (table.shape[0] == 1 or table.shape[0] == samples)
    if not (table.ndim == 2 or by_sample) or table.shape[-1] != half or not table.is_floating_point():
        raise ValueError(f"{name}: needs floats [P, {half}] or [n, P, {half}], got {tuple(table.shape)}")
    if not looked_up and table.shape[-2] != length:
        raise ValueError(f"{name}: needs a row for each of {length} tokens, got {tuple(table.shape)}")
    if looked_up and not table.shape[-2] and length:
        raise ValueError(f"{name}: has no rows")


def _check_positions(positions: Tensor, query: Tensor, axes: int, samples: int, length: int) -> None:
    shape = positions.shape if axes == 1 else positions.shape[:-1]
    fits = len(shape) > 0 and shape[-1] == length and (axes == 1 or positions.shape[-1] == axes)
    if len(shape) == 2:
        fits = fits and query.ndim == 4 and (shape[0] == 1 or shape[0] == samples)
    if not fits or len(shape) > 2:
        wanted = f"[{length}]" if query.ndim == 3 else f"[{length}] or [{samples}, {length}]"
        more = f", with {axes} axes last" if axes > 1 else ""
        raise ValueError(f"positions: needs {wanted}{more}, got {tuple(positions.shape)}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions: needs int32 or int64, got {positions.dtype}")


def _check_overlaps(query: Tensor, key: Tensor) -> None:
    """Check that no two elements of queries and keys share memory, once per layout."""
    apart = key.data_ptr() - query.data_ptr()
    near = query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    if _overlap(
        lambda: overlaps((query, key)) if near else overlaps((query,)) or overlaps((key,)),
        (query, key),
        apart if near else None,
    ):
        raise ValueError("inplace: is not possible where elements of query or key share memory")


def _why_not(query: Tensor, key: Tensor, *vectors: Tensor | None) -> str | None:
    """Why the kernel does not support these tensors, or None."""
    if query.shape[-1] > _MAX_HEAD:
        return f"it takes heads of at most {_MAX_HEAD}, not {query.shape[-1]}"
    for x in (query, key, *vectors):
        if x is not None and x.dtype not in _TYPES:
            return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        return "it takes queries and keys whose last axis is contiguous"
    return None
