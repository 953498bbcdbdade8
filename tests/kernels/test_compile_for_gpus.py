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
from fastgen.kernels.adaln import operator as adaln_operator
from fastgen.kernels.qk_norm_rope import operator as qk_norm_rope_operator
from fastgen.kernels import group_norm_silu

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
            qk_norm_rope_operator.launch_inplace(query, key, table, table, places, axes, *[weight] * 4, *rest)
            qk_norm_rope_operator._launch_backward(query, key, table, table, places, axes, weight, *rest)
    print(sorted(made))
with compile_for({target!r}) as made:
    for channels, side in ((96, 16), (96, 128), (512, 16), (512, 128)):
        image = noise(1, channels, side, side).to(memory_format=torch.channels_last)
        group_norm_silu._launch(image, 32, noise(channels), noise(channels), 1e-6, True)
        group_norm_silu._launch(image, 32, None, None, 1e-6, False)
    print(sorted(made))
"""

DECODING = """
import sys
sys.path.insert(0, {helpers!r})
import torch
from compile_kernels import compile_for
from fastgen.drafters.tree import named_tree
from fastgen.kernels.dechunk import triton as dechunk_triton
from fastgen.kernels.kv_compact import triton as kv_compact_triton
from fastgen.kernels.pack import triton as pack_triton
from fastgen.kernels.sample import triton as sample_triton
from fastgen.kernels.tree_attention import triton as tree_attention_triton
from fastgen.kernels.tree_verify import triton as tree_verify_triton

def long(*shape):
    return torch.zeros(*shape, dtype=torch.int64)

rows = torch.arange(1024)
with compile_for({target!r}) as made:
    mask = torch.rand(4, 256) < 0.3
    pack_triton.launch_mask(mask, 1024)
    pack_triton.launch_top(torch.rand(4, 256), long(4), 200)
    pack_triton.launch_scatter(torch.rand(200, 1152).bfloat16(), mask, long(200), rows.view(4, 256))
    pack_triton.launch_scatter(torch.rand(200, 1152), mask, long(200), rows.view(4, 256))
    print(sorted(made))
with compile_for({target!r}) as made:
    dechunk_triton.launch_nearest(mask.view(4, 16, 16), rows)
    dechunk_triton.launch_nearest(torch.rand(1, 256, 256) < 0.3)
    for tokens in (torch.rand(300, 1152), torch.rand(300, 64).bfloat16()):
        dechunk_triton.launch_smooth(tokens, rows[:300], torch.rand(300), rows, 16, 16, 1.0)
    dechunk_triton.launch_blur(torch.rand(300, 65), rows[:300], rows, 16, 16, 1.0)
    print(sorted(made))
with compile_for({target!r}) as made:
    logits = torch.rand(2, 16384).bfloat16()
    sample_triton.launch_sample(logits, logits, torch.rand(2, 16384), 3.0, 0.9, 100, 0.9)
    sample_triton.launch_law(logits, None, 1.0, 1.0, None, None)
    store, tree = torch.rand(2, 2, 2, 700, 2, 64).bfloat16(), named_tree("3-4-2")
    kv_compact_triton.launch(store, long(2), long(2, 5), long(2))
    new = torch.rand(2, tree.n, 2, 64).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        given = (long(2, tree.n), long(2), torch.ones(2, 700, dtype=torch.bool), tree.mask, 700)
        tree_attention_triton.launch(new.repeat(1, 1, 3, 1), new, new, store.to(dtype), 0, *given)
    print(sorted(made))
with compile_for({target!r}) as made:
    law, inner = torch.rand(2, tree.n, 16384), len(tree.internal)
    given = (long(2, tree.n), tree.children, tree.internal)
    noise = (torch.rand(2, tree.n, dtype=torch.float64), torch.rand(2, 1, 16384), long(2), tree.max_depth)
    tree_verify_triton.launch(law, law, *given, *noise, None, None)
    tree_verify_triton.launch(law, None, *given, *noise, torch.ones(2, inner), None)
    tree_verify_triton.launch(law, law, *given, *noise, None, long(2, inner, 16384))
    tree_verify_triton.launch(law, None, *given, None, None, long(2), tree.max_depth, None, None)
    print(sorted(made))
"""
FUSED_NAMES = ["['_backward', '_forward']"] * 2 + ["['_apply', '_fold', '_sums', '_whole']"]
DECODING_NAMES = [
    "['_count', '_fill', '_scatter']",
    "['_band', '_nearest']",
    "['_attend', '_compact', '_merge', '_row']",
    "['_verify']",
]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "hip"])
@pytest.mark.parametrize(
    ("code", "names"), [(LAUNCHES, FUSED_NAMES), (DECODING, DECODING_NAMES)], ids=["fused", "decoding"]
)
def test_kernels_compile(code: str, names: list[str], target: str, tmp_path: Path) -> None:
    helpers = str(Path(__file__).parents[1] / "helpers")
    if torch.cuda.is_available():
        pytest.skip("compiles for the device itself elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    code = code.format(helpers=helpers, target=target)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == names
