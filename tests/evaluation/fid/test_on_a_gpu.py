"""The FID family on a CUDA device: the numbers of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgen.evaluation.fid.evaluate import FidSettings, evaluate_images
from fastgen.evaluation.fid.extractors import Inception, ShapesNetwork
from fastgen.evaluation.fid.inception import InceptionV3
from fastgen.evaluation.fid.protocols import PROTOCOLS
from fastgen.evaluation.fid.readers import CallbackSource
from fastgen.evaluation.fid.reference import Reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noise(seed: int, count: int) -> CallbackSource:
    images = np.random.default_rng(seed).integers(0, 256 - 30 * seed, (count, 64, 64, 3), dtype=np.uint8)
    return CallbackSource(count, images.__getitem__, identity=str(seed), name=f"noise {seed}")


@pytest.mark.parametrize("name", ["shapes", "inception"])
def test_numbers_are_those_of_the_cpu(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = InceptionV3()
    metrics = {
        "shapes": ("fd-shapes", "kd-shapes", "precision-shapes", "recall-shapes"),
        "inception": ("fid", "sfid", "is", "kid", "precision", "recall"),
    }
    found = []
    for device in ("cpu", "cuda"):
        network = (
            ShapesNetwork(device=device) if name == "shapes" else Inception(PROTOCOLS["adm"], model, device=device)
        )
        data, _ = evaluate_images(
            noise(1, 300),
            FidSettings(metrics[name], "adm", allow_small=True, bootstrap=3, subset_size=100, device=device),
            reference=Reference("noise 2", noise(2, 280)),
            extractors={name: network},
            cache=tmp_path / device,
        )
        found.append({metric: values["value"] for metric, values in data["metrics"].items()})
    for metric, value in found[0].items():
        assert found[1][metric] == pytest.approx(value, rel=1e-3, abs=1e-3), metric
