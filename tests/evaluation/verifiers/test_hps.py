"""HPSv2.1 on a tiny open_clip network, and ImageReward with a stand-in for its package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_verifiers import PROMPTS, strengthen
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.hps import HPS
from fastgen.evaluation.verifiers.image_reward import ImageReward
from fastgen.evaluation.verifiers.pixels import fit_and_pad

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hps")
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (made / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{made}", load_weights=False)
    strengthen(model, 4.0)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, made / "HPS_v2.1_compressed.pt")
    return made


def slow_score(folder: Path, image: Tensor, prompt: str) -> float:
    """By the network's own forward pass on one pair, in float64."""
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, output_dict=True)
    model.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"])
    # 40 x 56 pixels: 56 becomes 32, 40 becomes 23, and 9 black rows are 4 above and 5 below.
    small = torch.nn.functional.interpolate(image[None].double() / 255, (23, 32), mode="bicubic", antialias=True)
    padded = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    padded[:, :, 4:27] = small
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, dtype=torch.float64).view(3, 1, 1)
    with torch.no_grad():
        out = model.double().eval()((padded - mean) / std, open_clip.get_tokenizer("ViT-H-14")([prompt]))
    return float(out["image_features"] @ out["text_features"].T)


def test_the_score_is_the_cosine(folder: Path, images: Tensor) -> None:
    verifier = HPS.load(str(folder), batch_size=4)
    wanted = torch.tensor([slow_score(folder, *pair) for pair in zip(images, PROMPTS, strict=True)])
    assert wanted.std() > 0.02
    torch.testing.assert_close(verifier.score(images, PROMPTS), wanted, atol=1e-5, rtol=0)
    by_file = HPS.load(str(folder / "HPS_v2.1_compressed.pt"))
    torch.testing.assert_close(by_file.score(images, PROMPTS), wanted, atol=1e-5, rtol=0)
    assert (verifier.name, verifier.range) == ("hps-v2.1", (-1.0, 1.0))


def test_the_text_tower_runs_once_for_a_prompt(folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = HPS.load(str(folder))
    calls: list[int] = []
    encode = verifier.clip.encode_text
    monkeypatch.setattr(verifier.clip, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    for _ in range(3):
        verifier.score(images, PROMPTS)
    assert calls == [len(set(PROMPTS))]


def test_pictures_of_the_right_size_are_not_resized() -> None:
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(fit_and_pad(pictures, 8), pictures / 255)
    assert fit_and_pad(torch.zeros(1, 3, 1, 300, dtype=torch.uint8), 8).shape == (1, 3, 8, 8)


def test_a_folder_without_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match=r"verifier hps-v2.1: .* has no HPS_v2.1_compressed.pt"):
        HPS.load(str(tmp_path))


def test_without_open_clip_the_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(FastgenError, match="hps-v2.1 needs the package open-clip-torch: pip install"):
        HPS.load(str(folder))


# --- ImageReward -------------------------------------------------------------------------------------------------


class StandIn:
    """Scores as the package's model does: a prompt and a PIL picture give a float."""

    device = "cpu"

    def score(self, prompt: str, picture: Image.Image) -> float:
        assert isinstance(picture, Image.Image) and picture.mode == "RGB"
        return len(prompt) + picture.getpixel((1, 0))[2] / 256

    def to(self, device: Any) -> None:
        pass


def test_image_reward_asks_its_package(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []

    def load(name: str, device: str) -> StandIn:
        loaded.append((name, device))
        return StandIn()

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    verifier = ImageReward.load()
    assert loaded == [("ImageReward-v1.0", "cpu")] and verifier.range is None
    wanted = [len(prompt) + int(image[2, 0, 1]) / 256 for image, prompt in zip(images, PROMPTS, strict=True)]
    assert verifier.to("cpu").score(images, PROMPTS).tolist() == wanted
    assert verifier.score(images[:0], []).shape == (0,)


def test_without_image_reward_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(FastgenError, match="verifier image-reward needs the package image-reward: pip install"):
        ImageReward.load()
    with pytest.raises(FastgenError, match="dtype: 'float16' is not allowed, verifier image-reward"):
        ImageReward.load(dtype="float16")
