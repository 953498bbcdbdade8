"""Folders of tiny models, each made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import tiny_verifiers as tiny  # noqa: E402


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("verifiers") / "clip")


@pytest.fixture(scope="session")
def vqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip_flan_t5(tmp_path_factory.mktemp("verifiers") / "vqa")


@pytest.fixture
def images() -> Tensor:
    """Six pictures uint8 [6, 3, 40, 56]."""
    coarse = torch.randint(0, 256, (6, 3, 5, 7), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
