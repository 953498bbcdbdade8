"""Every kernel compiles for NVIDIA and AMD GPUs; none is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCHES = """
import sys
sys.path.insert(0, {helpers!r})
import torch
from compile_kernels import compile_for
from fastgen.kernels import adaln_operator, group_norm_silu, qk_norm_rope_operator

def noise(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)

with compile_for({target!r}) as made:
    hidden, weight = noise(2, 16, 1152), noise(1152)
    shift, scale, gate = noise(2, 3 * 1152).chunk(3, dim=1)
    ids = torch.zeros(16, dtype=torch.int64)
    plain = ("layer", 1e-6, False, 1e-6, False)
    sandwich = ("rms", 1e-6, True, 1e-6, True)
    adaln_operator.launch(hidden, hidden, gate, scale, shift, None, None, None, None, None, *plain)
    adaln_operator.launch(hidden, None, None, scale, None, weight, None, weight, None, None, *sandwich)
    adaln_operator.launch(hidden[0], hidden[0], gate, scale, None, weight, weight, weight, ids, None, *sandwich)
    backward = adaln_operator._launch_backward
    backward(hidden, hidden, hidden, hidden, gate, scale, weight, weight, None, None, 2, *sandwich)
    backward(None, hidden[0], hidden[0], None, None, scale, None, None, ids, None, 2, *plain)
    print(sorted(made))
with compile_for({target!r}) as made:
    for width in (72, 128):
        query, key = noise(2, 16, 3, 6, width)[:, :, :2].unbind(2)
        table, weight = torch.randn(16, width // 2), noise(width)
        places = torch.zeros(2, 16, 3, dtype=torch.int64)
        for pairs in (True, False):
            rest = ("rms", 1e-6, pairs)
            qk_norm_rope_operator.launch(query, key, table, table, None, [width], weight, weight, None, None, *rest)
            axes = [width - 8, 4, 4]
            rest = ("layer", 1e-6, pairs)
            qk_norm_rope_operator.launch(query, key, table, table, places, axes, *[weight] * 4, *rest, inplace=True)
            qk_norm_rope_operator._launch_backward(query, key, table, table, places, axes, weight, *rest)
    print(sorted(made))
with compile_for({target!r}) as made:
    for channels, side in ((96, 16), (96, 128), (512, 16), (512, 128)):
        image = noise(1, channels, side, side).to(memory_format=torch.channels_last)
        group_norm_silu._launch(image, 32, noise(channels), noise(channels), 1e-6, True)
        group_norm_silu._launch(image, 32, None, None, 1e-6, False)
    print(sorted(made))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "hip"])
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    helpers = str(Path(__file__).parents[1] / "helpers")
    if torch.cuda.is_available():
        pytest.skip("compiles for the device itself elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    code = LAUNCHES.format(helpers=helpers, target=target)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["['_backward', '_forward']"] * 2 + ["['_apply', '_fold', '_sums', '_whole']"]
