"""Pictures of where the compute goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fastgen.evaluation.chunk_maps import chunk_sheet, heat_map, kept_map
from fastgen.models.chunking import select_chunks
from fastgen.models.elastic import StepRecord


def test_heat_map_gets_lighter() -> None:
    values = np.linspace(-0.2, 1.2, 50)[None]
    lightness = np.asarray(heat_map(values).convert("L"), dtype=int)[0]
    assert (np.diff(lightness) >= 0).all() and lightness[0] < 30 and lightness[-1] > 230


def test_kept_map_darkens_what_was_dropped() -> None:
    picture = Image.new("RGB", (8, 4), (200, 100, 40))
    shown = np.asarray(kept_map(picture, np.array([[True, False]])))
    assert (shown[:, :4] == (200, 100, 40)).all() and (shown[:, 4:] == (50, 25, 10)).all()


def test_sheet_has_three_rows_and_thinned_columns() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    records = [
        StepRecord(torch.randn(2, 4, 3, 5), select_chunks(torch.rand(2, 15), (3, 5), token_budget=1 + i))
        for i in range(10)
    ]
    picture = Image.new("RGB", (5, 3), "white")
    wide, narrow = chunk_sheet(vae, records, picture, sample=1, most=5), chunk_sheet(vae, records[:2], picture)
    assert wide.height == narrow.height and wide.width > 2 * narrow.width
    for bad in ({"records": []}, {"records": records, "sample": 2}, {"records": records, "most": 0}):
        with pytest.raises(ValueError, match="chunk_sheet"):
            chunk_sheet(vae, picture=picture, **bad)  # type: ignore[arg-type]
