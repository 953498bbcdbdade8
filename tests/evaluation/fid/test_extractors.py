"""CLIP and DINOv2 behind the engine on tiny random models, against calling them by hand; Inception by the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.fid.extractors import CLIPEmbeddings, CLIPScores, DINOv2, ShapesNetwork, load_extractor
from fastgen.evaluation.fid.inception import InceptionV3
from fastgen.evaluation.fid.inception_score import inception_score
from fastgen.evaluation.fid.protocols import PROTOCOLS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "verifiers"))
from tiny_verifiers import save_clip  # noqa: E402

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 40, 56, 3), dtype=np.uint8)
ADM = PROTOCOLS["adm"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
    folder = tmp_path_factory.mktemp("dino") / "tiny-dinov2"
    Dinov2Model(config).save_pretrained(folder)
    return folder


def features(extractor, images: np.ndarray, prompts=()) -> torch.Tensor:
    return extractor(torch.stack([extractor.prepare(image) for image in images]), prompts)["pool"]


def test_cmmd_takes_the_whole_picture(clip: Path) -> None:
    from transformers import CLIPModel

    extractor = CLIPEmbeddings(str(clip))
    model = CLIPModel.from_pretrained(clip).eval()
    side = model.config.vision_config.image_size
    pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 255
    pixels = functional.interpolate(pixels, (side, side), mode="bicubic")
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        expected = functional.normalize(model.visual_projection(pooled), dim=-1)
    found = features(extractor, PICTURES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert extractor.name == "tiny-clip" and extractor.taps == {"pool": expected.shape[1]}
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))


def test_dinov2_is_the_normed_class_token(dinov2: Path) -> None:
    from transformers import Dinov2Model

    extractor = DINOv2(str(dinov2))
    model = Dinov2Model.from_pretrained(dinov2).eval()
    small = np.stack([np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in PICTURES])
    pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        states = model(pixel_values=(pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state
    torch.testing.assert_close(features(extractor, PICTURES), states[:, 0], atol=1e-5, rtol=1e-4)


def test_clip_scores_are_those_of_the_verifier(clip: Path) -> None:
    from fastgen.evaluation.verifiers.clip import CLIPScore

    prompts = ["a red circle", "two blue squares"] * 3
    extractor = CLIPScores(str(clip))
    expected = CLIPScore.load(str(clip)).score(torch.from_numpy(PICTURES).permute(0, 3, 1, 2), prompts)
    torch.testing.assert_close(features(extractor, PICTURES, prompts)[:, 0], expected)


def test_a_network_is_recognised_by_its_weights(clip: Path, tmp_path: Path) -> None:
    other = save_clip(tmp_path / "tiny-clip", seed=1)
    assert CLIPEmbeddings(str(clip)).fingerprint == CLIPEmbeddings(str(clip)).fingerprint
    assert CLIPEmbeddings(str(clip)).fingerprint != CLIPEmbeddings(str(other)).fingerprint


def test_broken_weights_are_an_error(tmp_path: Path, dinov2: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("dinov2", "cmmd"):
        with pytest.raises(FastgenError, match="empty has no config.json"):
            load_extractor(name, ADM, weights=str(tmp_path / "empty"))
    with pytest.raises(FastgenError, match="verifier cmmd: .*tiny-dinov2"):
        load_extractor("cmmd", ADM, weights=str(dinov2))


def test_shapes_network_is_the_embedded_detector() -> None:
    extractor = ShapesNetwork()
    assert extractor.name == "shapes-detector-128" and extractor.taps == {"pool": 128}
    large = np.repeat(np.repeat(PICTURES[:1], 4, 1), 4, 2)
    assert extractor.prepare(large[0]).shape == (64, 64, 3)
    together = features(extractor, PICTURES)
    apart = torch.cat([features(extractor, PICTURES[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture()
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(1)
    for name, count in (("mine", 5), ("real", 4)):
        (tmp_path / name).mkdir()
        for index in range(count):
            image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text("a red circle")
    return tmp_path


def test_clip_and_dinov2_through_the_command(folders: Path, clip: Path, dinov2: Path, capsys) -> None:
    names = "cmmd,clip-score,fd-dinov2,kd-dinov2"
    weights = [f"cmmd={clip}", f"clip-score={clip}", f"dinov2={dinov2}"]
    options = ["--metrics", names, "--allow-small", "--bootstrap", "3", "--json"]
    options += [part for item in weights for part in ("--weights", item)]
    assert run(["eval", "fid", "mine", "--reference", "real", *options]) == 0
    data = json.loads(capsys.readouterr().out)
    labels = {name: found["label"] for name, found in data["metrics"].items()}
    assert labels == {
        "cmmd": "cmmd[torch-bicubic, 5, tiny-clip]",
        "clip-score": "clip-score[clip-processor, 5, tiny-clip]",
        "fd-dinov2": "fd-dinov2[pil-bicubic, 5, tiny-dinov2]",
        "kd-dinov2": "kd-dinov2[pil-bicubic, 5, tiny-dinov2, 100 x 4]",
    }
    assert data["metrics"]["clip-score"]["stderr"] >= 0
    assert set(data["extractors"]) == {"cmmd", "clip-score", "dinov2"}


ALL_OF_ADM = ["fid", "kid", "is", "sfid", "precision", "recall"]


@pytest.mark.parametrize(
    "names",
    [["kid", "is", "precision", "recall"], pytest.param(ALL_OF_ADM, marks=pytest.mark.slow)],  # roots of 2048 x 2048
)
def test_inception_metrics_of_a_protocol_come_from_one_pass(folders: Path, capsys, names: list[str]) -> None:
    torch.manual_seed(0)
    model = InceptionV3().eval()
    torch.save(model.state_dict(), folders / "random.pth")
    calls: list[int] = []
    forward = InceptionV3.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InceptionV3, "forward", lambda self, x: (calls.append(len(x)), forward(self, x))[1])
        chosen = ["--extractor", "inception"] if names == ALL_OF_ADM else ["--metrics", ",".join(names)]
        options = [*chosen, "--protocol", "adm", "--weights", "inception=random.pth"]
        assert (
            run(
                ["eval", "fid", "mine", "--reference", "real", *options, "--allow-small", "--bootstrap", "0", "--json"]
            )
            == 0
        )
    data = json.loads(capsys.readouterr().out)
    assert sum(calls) == 5 + 4
    assert list(data["metrics"]) == names
    assert data["metrics"]["is"]["label"] == "is[adm, 5, inception-tf]"
    assert data["extractors"]["inception"]["resize"] == "tf1-bilinear"
    if "sfid" in names:
        assert (data["metrics"]["fid"]["dims"], data["metrics"]["sfid"]["dims"]) == (2048, 2023)
    from fastgen.evaluation.fid.extractors import Inception
    from fastgen.evaluation.fid.features import extract
    from fastgen.evaluation.fid.readers import open_images

    network = Inception(ADM, model)
    found, _ = extract(open_images("mine"), network, keep=["pool"])
    score = inception_score(network.logits(found.arrays["pool"]), split_size=5000)[0]
    assert data["metrics"]["is"]["value"] == pytest.approx(score, rel=1e-6)
    with torch.no_grad():
        x = network.prepare(open_images("mine").read(2))[None]
        torch.testing.assert_close(found.arrays["pool"][2:3], model((x - 128) / 128)[0], atol=1e-6, rtol=1e-4)
