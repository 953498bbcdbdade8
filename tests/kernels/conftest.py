"""Kernels run on CUDA where there is a device, else under Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_checks import poisoned


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
