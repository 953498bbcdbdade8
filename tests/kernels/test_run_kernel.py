"""Arguments that share an entry of the table of compiled kernels are of one version by Triton's own rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgen.kernels.dispatch import Bounded
from fastgen.kernels.triton_tools import _Kernel, cdiv, power_of_two

CODE = """
import random, sys
sys.path.insert(0, {helpers!r})
import torch
from compile_kernels import compile_for
from fastgen.kernels.adaln import triton as adaln_triton
from fastgen.kernels.group_norm_silu import triton as group_norm_silu_triton
from fastgen.kernels.kv_compact import triton as kv_compact_triton
from fastgen.kernels.qk_norm_rope import triton as qk_norm_rope_triton
from fastgen.kernels.sample import triton as sample_triton
from fastgen.kernels.tree_attention import triton as tree_attention_triton
from fastgen.kernels.triton_tools import _Kernel

draw = random.Random(0)
storage = {{dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}}

def tensor():
    dtype = draw.choice(list(storage))
    return draw.choice([None, storage[dtype], storage[dtype][1:], storage[dtype][8:]])

with compile_for("cuda"):
    kernels = (
        (adaln_triton._forward, 11), (qk_norm_rope_triton._forward, 11), (group_norm_silu_triton._sums, 2),
        (kv_compact_triton._compact, 4), (sample_triton._row, 4), (tree_attention_triton._attend, 10),
    )
    pairs = 0
    for kernel, tensors in kernels:
        binder = kernel.device_caches[0][-1]
        numbers = [p.name for p in kernel.params[tensors:] if p.name.isupper()]
        positional = len(kernel.params) - len(numbers)
        floats = {{p.name for p in kernel.params if "eps" in p.name or "scale" in p.name and "stride" not in p.name
                  or p.name in ("inverse_temperature", "top_p")}}
        seen, known = {{}}, None
        for _ in range(1500):
            given = [storage[torch.float32]] + [tensor() for _ in range(tensors - 1)]
            for p in kernel.params[tensors:positional]:
                sizes = [0.5, 1.0] if p.name in floats else [1, 2, 16, 17, 2**31, 2**33]
                given.append(draw.choice(sizes))
            if draw.random() < 0.7 and seen:  # close to one that was there
                base = list(draw.choice(list(seen.values()))[0])
                spot = draw.randrange(1, positional)
                base[spot] = given[spot]
                given = base
            options = {{name: draw.choice([0, 1]) for name in numbers}} | {{"num_warps": 4}}
            known = known or _Kernel(kernel, (torch.zeros(1), *[None] * (tensors - 1), *given[tensors:]))
            assert known.tensors == tensors
            key = known.key(0, tuple(given), options)
            rule = str(binder(*given, **options)[1])
            if key in seen:
                pairs += 1
                assert seen[key][1] == rule, (kernel.fn.__name__, key)
            seen[key] = (given, rule)
    print(pairs > 50)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a device")
@pytest.mark.slow
def test_one_entry_is_one_version(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    code = CODE.format(helpers=str(Path(__file__).parents[1] / "helpers"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True"]


def test_the_table_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Jit:
        arg_names = ("x", "count", "BLOCK")

    monkeypatch.setattr(Bounded, "MOST", 3)
    x = torch.zeros(4)
    known = _Kernel(Jit, (x, 1))
    assert known.names == ("BLOCK",) and known.tensors == 1
    keys = [known.key(0, (x, count), {"BLOCK": 2}) for count in range(5)]
    for key in keys:
        known.versions[key] = "version"
    assert set(known.versions) == set(keys[3:])
    assert known.key(1, (x, 0), {"BLOCK": 2}) != keys[0] != known.key(0, (x[1:], 0), {"BLOCK": 2})


@given(number=st.integers(1, 2**40), by=st.integers(1, 2**20))
def test_numbers_of_grids(number: int, by: int) -> None:
    assert (cdiv(number, by) - 1) * by < number <= cdiv(number, by) * by
    power = power_of_two(number)
    assert power & (power - 1) == 0 and power // 2 < number <= power
