"""Inception v3 as ported from the TensorFlow graph of 2015-12-05, the network behind FID.

Layer and parameter names are those of the published PyTorch conversion (``weights-inception-2015-12-05-6726825d.pth``
of torch-fidelity, the same tensors as pytorch-fid's ``pt_inception-2015-12-05-6726825d.pth``). Against the usual
Inception v3: 1008 classes, average pooling that leaves the padding out, and a max pool in the last block.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.hub import read_tensors
from fastgen.io import file_sha256

__all__ = ["POOL", "SIDE", "SPATIAL", "WEIGHT_FILES", "InceptionV3", "find_weights", "load_inception"]

SIDE = 299
POOL = 2048
SPATIAL = 7 * 17 * 17  # the first 7 channels of mixed_6/conv
CLASSES = 1008
WEIGHT_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
WEIGHT_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHT_FILES[0]}"


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = (height // 2, width // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


def _chain(module: nn.Module, x: Tensor, *names: str) -> Tensor:
    for name in names:
        x = module.get_submodule(name)(x)
    return x


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Block35(nn.Module):
    """The 35 x 35 blocks (Mixed_5b .. 5d)."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = _chain(self, x, "branch5x5_1", "branch5x5_2")
        three = _chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _To17(nn.Module):
    """35 x 35 to 17 x 17 (Mixed_6a)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, 2, pad=False)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        three = _chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), three, functional.max_pool2d(x, 3, 2)], 1)


class _Block17(nn.Module):
    """The 17 x 17 blocks (Mixed_6b .. 6e)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192, 1)
        self.branch7x7_1 = _Conv(inputs, width, 1)
        self.branch7x7_2 = _Conv(width, width, (1, 7))
        self.branch7x7_3 = _Conv(width, 192, (7, 1))
        self.branch7x7dbl_1 = _Conv(inputs, width, 1)
        self.branch7x7dbl_2 = _Conv(width, width, (7, 1))
        self.branch7x7dbl_3 = _Conv(width, width, (1, 7))
        self.branch7x7dbl_4 = _Conv(width, width, (7, 1))
        self.branch7x7dbl_5 = _Conv(width, 192, (1, 7))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = _chain(self, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        twice = _chain(self, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class _To8(nn.Module):
    """17 x 17 to 8 x 8 (Mixed_7a)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1 = _Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        three = _chain(self, x, "branch3x3_1", "branch3x3_2")
        seven = _chain(self, x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return torch.cat([three, seven, functional.max_pool2d(x, 3, 2)], 1)


class _Block8(nn.Module):
    """The 8 x 8 blocks (Mixed_7b, 7c); the last one pools by maximum, a quirk of the graph that FID inherited."""

    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(inputs, 192, 1)
        self.max_pool = max_pool

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = _chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """The network from normalised pixels to its two taps; `load_inception` fills in the weights.

    Random weights have the right shapes and no meaning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        self.Mixed_5b = _Block35(192, 32)
        self.Mixed_5c = _Block35(256, 64)
        self.Mixed_5d = _Block35(288, 64)
        self.Mixed_6a = _To17(288)
        self.Mixed_6b = _Block17(768, 128)
        self.Mixed_6c = _Block17(768, 160)
        self.Mixed_6d = _Block17(768, 160)
        self.Mixed_6e = _Block17(768, 192)
        self.Mixed_7a = _To8(768)
        self.Mixed_7b = _Block8(1280, max_pool=False)
        self.Mixed_7c = _Block8(2048, max_pool=True)
        self.fc = nn.Linear(POOL, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels around -1 .. 1, [n, 3, 299, 299] -> (pool_3 [n, 2048], spatial [n, 2023]).

        The spatial tap is that of sFID: the first 7 channels of mixed_6/conv (the 1 x 1 branch of Mixed_6d, which is
        the seventh mixed block of the graph), flattened with channels last as TensorFlow has them.
        """
        x = _chain(self, x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
        x = functional.max_pool2d(x, 3, 2)
        x = _chain(self, x, "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        x = functional.max_pool2d(x, 3, 2)
        x = _chain(self, x, "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c")
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = _chain(self, x, "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c")
        return x.mean((2, 3)), spatial

    def logits(self, pool: Tensor) -> Tensor:
        """Class logits of pool_3 features without the bias, as the inception score has always been computed."""
        return pool @ self.fc.weight.T.to(pool.dtype)


def find_weights(path: str | Path | None = None) -> Path:
    """The weights file: `path`, or the one in the cache of torch hub.

    Raises:
        FastgenError: there is no such file; the message says how to get it.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FastgenError(f"inception: {path}: no such weights file")
        return Path(path)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FastgenError(
        f"inception: the weights are not in {folder}: download {WEIGHT_URL} to there, or name the file with "
        "--weights inception=FILE"
    )


def load_inception(path: str | Path | None = None) -> InceptionV3:
    """The network with the weights of `find_weights`, in evaluation mode on the CPU.

    Raises:
        FastgenError: the file is missing, damaged (its name ends in the start of its sha256) or of another network.
    """
    file = find_weights(path)
    if (wanted := re.search(r"-([0-9a-f]{8})\.pth$", file.name)) and not file_sha256(file).startswith(wanted[1]):
        raise FastgenError(f"inception: {file}: is damaged (its sha256 does not start with {wanted[1]})")
    try:
        tensors = read_tensors(file)
        model = InceptionV3()
        # Counters of batch norm are in some copies only, and of no use here.
        known = model.state_dict()
        missing = [name for name in known if name not in tensors and not name.endswith("num_batches_tracked")]
        if missing:
            raise ValueError(f"lacks {len(missing)} weights, the first is {missing[0]}")
        model.load_state_dict({name: tensors.get(name, value) for name, value in known.items()})
    except Exception as error:  # pickle, zipfile and torch each raise their own type for a damaged file
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FastgenError(f"inception: {file}: not the weights of the FID network: {line[:200]}") from error
    return model.eval().requires_grad_(False)
