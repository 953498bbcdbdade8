"""What a server's models are loaded with, as `fastgen generate` loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.load_options import LoadOptions
from fastgen.serve.settings import ServeSettings


def test_models_are_loaded_with_the_options_and_wrong_ones_refused_at_the_start(micro_z: Path) -> None:
    artist = pytest.importorskip("fastgen.serve.artist")

    def catalogue(scheduler: str) -> object:
        options = LoadOptions(scheduler=scheduler)
        return artist.Catalogue(ServeSettings(models=(str(micro_z),), device="cpu", options=options))

    pipe = artist.Studio(catalogue("UniPCMultistep")).load(str(micro_z))
    assert "UniPC" in type(pipe.scheduler).__name__
    with pytest.raises(FastgenError, match="scheduler: 'DDIM' is not allowed"):
        catalogue("DDIM")
