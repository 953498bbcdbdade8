"""Small models for the tests of the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Not the folder above: it has a folder of the name of our package.
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))


@pytest.fixture(scope="session")
def micro_z(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from micro_models import save_micro_z_image

    return save_micro_z_image(tmp_path_factory.mktemp("micro") / "z")


@pytest.fixture(scope="session")
def micro_janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from micro_models import save_micro_janus

    return save_micro_janus(tmp_path_factory.mktemp("micro") / "janus")
