"""Kernels run on CUDA where there is a device, else under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from kernel_checks import poisoned

if not torch.cuda.is_available():
    # Read when a kernel is decorated: before any is imported, which happens on its first use.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """No kernel may depend on what fresh memory holds."""
    with poisoned():
        yield


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    """Kernels run, or say why they cannot."""
    from fastgen.kernels.dispatch import reset_ran, use_kernels

    reset_ran()
    with use_kernels("triton"):
        yield
