"""The embedded checkpoints load with stock libraries alone, in a process that cannot import fastgen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen import _assets
from fastgen._compat import repair_torchvision

_NO_FASTGEN = """
import importlib.util, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fastgen":
            raise ImportError("fastgen is out of bounds here")
sys.meta_path.insert(0, Refuse())
"""
_Z_IMAGE = """
import sys, torch
from diffusers import ZImagePipeline
pipe = ZImagePipeline.from_pretrained(sys.argv[1])
image = pipe("a red circle", height=64, width=64, num_inference_steps=1).images[0]
print(type(pipe.transformer).__name__, image.size)
"""
_JANUS = """
import sys, torch
from transformers import AutoTokenizer, JanusForConditionalGeneration
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = JanusForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
inputs = tokenizer("a red circle" + tokenizer.boi_token, return_tensors="pt")
tokens = model.generate(**inputs, generation_mode="image", do_sample=True)
print(type(model).__name__, tuple(model.decode_image_tokens(tokens).shape))
"""


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("tiny", _Z_IMAGE, "ZImageTransformer2DModel (64, 64)"),
        pytest.param("tiny-janus", _JANUS, "JanusForConditionalGeneration (1, 64, 64, 3)", marks=pytest.mark.slow),
    ],
)
def test_stock_libraries_load_and_generate_without_fastgen(
    name: str, code: str, expected: str, tmp_path: Path
) -> None:
    if repair_torchvision().startswith(("repaired", "broken")):
        pytest.skip("this torchvision breaks stock diffusers; `fastgen info` says how to repair it")
    folder = _assets.ROOT / name
    run = subprocess.run(
        [sys.executable, "-c", _NO_FASTGEN + code, str(folder)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == expected


@pytest.mark.parametrize("name", _assets.names())
def test_no_file_names_the_machine_it_was_made_on(name: str) -> None:
    for path in (_assets.ROOT / name).rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path
