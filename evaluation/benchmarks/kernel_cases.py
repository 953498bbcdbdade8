"""Cases of the benchmark of kernels: norms, rotation and group norm at the sizes of real models.

Sizes: DiT-XL (width 1152, 16 heads of 72), FLUX (3072, 24 heads of 128) and Z-Image (3840, 30 heads of 128) at 1024²,
decoders of Stable Diffusion's VAE at 1024². Everything is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.benchmarks import kernel_cases_decode, kernel_cases_routing
from fastgen.evaluation.benchmarks.kernel_case import Case, Inputs, close, noise, size_of
from fastgen.kernels.adaln import adaln, adaln_reference
from fastgen.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from fastgen.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

__all__ = ["cases"]


def cases() -> list[Case]:
    """All cases of all operations."""
    fused = [*_adaln(), *_qk_norm_rope(), *_group_norm_silu()]
    return [*fused, *kernel_cases_routing.cases(), *kernel_cases_decode.cases()]


Size = tuple[str, Callable[[torch.device], Inputs], bool, bool]
"""Label, builder of the inputs, whether the share of the roofline counts, whether it is measured on a CPU."""


def _cases(op: str, run: Any, reference: Any, moved: Callable[[Inputs], int], sizes: Sequence[Size]) -> list[Case]:
    return [
        Case(op, size, build, run, reference, moved, close(), large=large, on_cpu=on_cpu)
        for size, build, large, on_cpu in sizes
    ]


# --- adaln -------------------------------------------------------------------------------------------------------


def _dit(n: int, length: int, width: int) -> Callable[[torch.device], Inputs]:
    def build(device: torch.device) -> Inputs:
        chunks = noise(device, n, 6 * width, seed=2).chunk(6, dim=1)
        return {
            "hidden": noise(device, n, length, width),
            "update": noise(device, n, length, width, seed=1),
            "gate": chunks[2],
            "shift": chunks[3],
            "scale": chunks[4],
        }

    return build


def _z_image(n: int, length: int, width: int) -> Callable[[torch.device], Inputs]:
    def build(device: torch.device) -> Inputs:
        chunks = noise(device, n, 4 * width, seed=2).chunk(4, dim=1)
        return {
            "hidden": noise(device, n, length, width),
            "update": noise(device, n, length, width, seed=1),
            "gate": chunks[1],
            "scale": chunks[2],
            "weight": noise(device, width, seed=3),
            "update_weight": noise(device, width, seed=4),
            "norm": "rms",
            "update_norm": True,
            "tanh_gate": True,
        }

    return build


def _packed(tokens: int, n: int, width: int) -> Callable[[torch.device], Inputs]:
    def build(device: torch.device) -> Inputs:
        inputs = dict(_dit(1, tokens, width)(device))
        chunks = noise(device, n, 6 * width, seed=2).chunk(6, dim=1)
        inputs |= {name: inputs[name][0] for name in ("hidden", "update")}
        inputs |= {"gate": chunks[2], "shift": chunks[3], "scale": chunks[4]}
        cuts = torch.randint(1, tokens, (n - 1,), generator=torch.Generator().manual_seed(0)).sort().values
        lengths = torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]))
        ids = torch.repeat_interleave(torch.arange(n), lengths)
        return inputs | {"sequence_ids": ids.to(device)}

    return build


def _adaln() -> list[Case]:
    def moved(inputs: Inputs) -> int:
        # Residual and update in, sum and norm out.
        alone = inputs["update"] is None or inputs.get("norm") == "none"
        return (2 if inputs["update"] is None else 3 if alone else 4) * size_of(inputs["hidden"])

    def some(build: Callable[[torch.device], Inputs], **changes: Any) -> Callable[[torch.device], Inputs]:
        return lambda device: {**build(device), **changes}

    made = [
        ("DiT-XL 256 x 2", _dit(2, 256, 1152), False, True),
        ("DiT-XL 1024 x 32, norm alone", some(_dit(32, 1024, 1152), update=None, gate=None), False, False),
        ("DiT-XL 1024 x 32, gated sum alone", some(_dit(32, 1024, 1152), norm="none"), False, False),
        ("DiT-XL 1024 x 32", _dit(32, 1024, 1152), True, False),
        ("DC-DiT-XL packed 8000 of 32", _packed(8000, 32, 1152), False, False),
        ("FLUX 4608 x 1", _dit(1, 4608, 3072), False, False),
        ("Z-Image 4128 x 2", _z_image(2, 4128, 3840), False, False),
        ("Z-Image 4128 x 8", _z_image(8, 4128, 3840), True, False),
    ]
    return _cases("adaln", adaln, adaln_reference, moved, made)


# --- qk_norm_rope ------------------------------------------------------------------------------------------------


def _qkv(
    n: int, length: int, heads: int, width: int, norm: bool = True, interleaved: bool = True, kept: int | None = None
) -> Callable[[torch.device], Inputs]:
    def build(device: torch.device) -> Inputs:
        inputs: dict[str, Any] = {"norm": "rms" if norm else "none", "interleaved": interleaved}
        qkv = noise(device, n, length, 3, heads, width)
        rows = kept or length
        angle = noise(device, rows, width // 2, seed=1, dtype=torch.float32)
        inputs |= {"query": qkv[:, :, 0], "key": qkv[:, :, 1], "cos": angle.cos(), "sin": angle.sin()}
        if norm:
            inputs |= {"query_weight": noise(device, width, seed=2), "key_weight": noise(device, width, seed=3)}
        if kept:
            generator = torch.Generator(device).manual_seed(0)
            inputs["positions"] = torch.randint(0, kept, (n, length), generator=generator, device=device)
        return inputs

    return build


def _qk_norm_rope() -> list[Case]:
    def moved(inputs: Inputs) -> int:
        return 2 * size_of(inputs["query"], inputs["key"])

    made = [
        ("Z-Image 1056 x 2", _qkv(2, 1056, 30, 128), False, False),
        ("Z-Image 4128 x 8", _qkv(8, 4128, 30, 128), True, False),
        ("FLUX 4608 x 1", _qkv(1, 4608, 24, 128), False, False),
        ("Z-Image kept 1024 of 4096 x 8", _qkv(8, 1024, 30, 128, kept=4096), False, False),
        ("half-split 576 x 2, heads of 128", _qkv(2, 576, 16, 128, norm=False, interleaved=False), False, True),
        ("heads of 72, 4096 x 8", _qkv(8, 4096, 16, 72), True, False),
    ]
    return _cases("qk_norm_rope", qk_norm_rope, qk_norm_rope_reference, moved, made)


# --- group_norm_silu ---------------------------------------------------------------------------------------------


def _image(n: int, channels: int, side: int) -> Callable[[torch.device], Inputs]:
    def build(device: torch.device) -> Inputs:
        x = noise(device, n, channels, side, side)
        vectors = {name: noise(device, channels, seed=1 + i) for i, name in enumerate(("weight", "bias"))}
        return {"x": x.contiguous(memory_format=torch.channels_last), "groups": 32, **vectors}

    return build


def _group_norm_silu() -> list[Case]:
    def moved(inputs: Inputs) -> int:
        x: Tensor = inputs["x"]
        # Statistics come first: two reads and a write, unless the image stays in the cache.
        return 3 * size_of(x)

    made = [
        ("scaffold 288 x 32² x 8", _image(8, 288, 32), False, True),
        ("VAE 512 x 64²", _image(1, 512, 64), False, False),
        ("VAE 512 x 128²", _image(1, 512, 128), False, False),
        ("VAE 512 x 256² x 2", _image(2, 512, 256), True, False),
        ("VAE 256 x 512²", _image(1, 256, 512), True, False),
        ("VAE 128 x 1024² x 2", _image(2, 128, 1024), True, False),
    ]
    return _cases("group_norm_silu", group_norm_silu, group_norm_silu_reference, moved, made)
