"""Running mean and covariance of features, in double precision and in one pass.

Sum and outer product are what processes add up: statistics of shards, added, are the statistics of the whole.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean and covariance of a set of features.

    Attributes:
        mean: float64 [d].
        covariance: float64 [d, d], unbiased (divided by n - 1).
        count: features it was made from; None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        dims = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (dims, dims):
            raise ValueError(
                f"statistics: need a mean [d] and a covariance [d, d], got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}"
            )
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("statistics: contain NaN or infinite values")

    @property
    def dims(self) -> int:
        """Width of the features."""
        return int(self.mean.shape[0])


class Moments:
    """Running sum and outer product of features.

    Args:
        dims: width of the features.
        device: where the sums are kept; features are moved there.
    """

    def __init__(self, dims: int, device: str | torch.device = "cpu") -> None:
        if dims < 1:
            raise ValueError(f"dims: needs an integer >= 1, got {dims}")
        # Some devices (mps) have no double precision; the sums then stay on the CPU.
        where = torch.device(device) if torch.device(device).type in ("cpu", "cuda") else torch.device("cpu")
        self.total = torch.zeros(dims, dtype=torch.float64, device=where)
        self.outer = torch.zeros(dims, dims, dtype=torch.float64, device=where)
        self.count = 0

    @property
    def dims(self) -> int:
        """Width of the features."""
        return int(self.total.shape[0])

    def update(self, features: Tensor) -> None:
        """Add features, floating [n, d].

        Raises:
            ValueError: another width, or a value is NaN or infinite; nothing is added then.
        """
        if features.ndim != 2 or features.shape[1] != self.dims:
            raise ValueError(f"features: need shape [n, {self.dims}], got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError("features: contain NaN or infinite values")
        x = features.to(self.total.device, torch.float64)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)
        self.count += int(x.shape[0])

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance.

        Raises:
            ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"statistics: need at least 2 images, got {self.count}")
        mean = self.total / self.count
        # In place: a matrix of Inception takes 34 MB.
        covariance = self.outer.addr(mean, mean, alpha=-self.count).div_(self.count - 1)
        return Gaussian(mean, covariance.add_(covariance.T.clone()).div_(2), self.count)

    def to_bytes(self) -> bytes:
        """The sums as the bytes of an uncompressed npz."""
        buffer = io.BytesIO()
        arrays = {"sum": self.total.cpu().numpy(), "outer": self.outer.cpu().numpy(), "count": np.int64(self.count)}
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, dims: int, device: str | torch.device = "cpu") -> Moments:
        """The sums that `to_bytes` wrote.

        Raises:
            ValueError: the data is damaged, or contains something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:  # the zip checks a CRC per array
                total, outer, count = file["sum"], file["outer"], int(file["count"])
        except Exception as error:  # zipfile, zlib, numpy and struct each raise their own type for a damaged file
            raise ValueError(f"not the statistics of features: {error}") from error
        if (
            total.shape != (dims,)
            or outer.shape != (dims, dims)
            or not total.dtype == outer.dtype == np.float64
            or not (np.isfinite(total).all() and np.isfinite(outer).all())
        ):
            raise ValueError(f"not the finite double-precision statistics of {dims} features")
        made = cls(dims, device)
        made.total.copy_(torch.from_numpy(total))
        made.outer.copy_(torch.from_numpy(outer))
        made.count = count
        return made
