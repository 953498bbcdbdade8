"""What the router keeps, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from fastgen.data.shapes import ShapesWorld
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.router_statistics import SIGMAS, cell_kinds, router_statistics


def test_kinds_of_cells_equal_a_walk_over_them() -> None:
    batch = ShapesWorld(3).batch(12)
    kinds = cell_kinds(batch, 16)
    for n in range(12):
        found = batch.instances[n]
        for index in range(256):
            row, column = divmod(index, 16)
            cell = found[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            around = found[max(0, row * 4 - 4) : row * 4 + 8, max(0, column * 4 - 4) : column * 4 + 8]
            assert kinds["boundary"][n, index] == (len(np.unique(cell)) > 1)
            assert kinds["inside"][n, index] == (len(np.unique(cell)) == 1 and cell[0, 0] > 0)
            assert kinds["background"][n, index] == (not around.any())


def test_statistics_tell_a_router_that_sees_edges_from_one_that_does_not(micro_dc: Path) -> None:
    """Probabilities set by hand to the truth: 0.8 on boundaries, 0.1 elsewhere."""
    import fastgen  # noqa: F401  (registers the transformer's class)

    pipe = ZImagePipeline.from_pretrained(micro_dc, torch_dtype=torch.float32)
    honest = router_statistics(pipe, renders=4)
    assert [row["sigma"] for row in honest["rows"]] == list(SIGMAS) and honest["boundary_to_background"] > 0
    again = router_statistics(pipe, renders=4)
    assert again == honest

    batch, grids = ShapesWorld(0).batch(4, 40_000_000), set()

    class Oracle(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            grids.add(grid[0])
            edges = torch.from_numpy(cell_kinds(batch, grid[0])["boundary"])
            return torch.logit(torch.where(edges, 0.8, 0.1))

    pipe.transformer.scaffold.router = Oracle()
    statistics = router_statistics(pipe, renders=4)
    (grid,) = grids
    assert statistics["boundary_to_background"] == pytest.approx(8, rel=1e-4)
    for row in statistics["rows"]:
        assert row["boundary"] == pytest.approx(0.8, rel=1e-4) and row["background"] == pytest.approx(0.1, rel=1e-4)
        assert row["kept"] == pytest.approx(cell_kinds(batch, grid)["boundary"].mean(), rel=1e-4)


def test_a_model_without_a_router_is_refused(micro_z: Path, micro_dc: Path) -> None:
    with pytest.raises(FastgenError, match="no dynamic chunking"):
        router_statistics(ZImagePipeline.from_pretrained(micro_z))
    with pytest.raises(FastgenError, match="renders"):
        router_statistics(ZImagePipeline.from_pretrained(micro_dc), renders=0)
