"""The colour classifier on a tiny open_clip model, against its own arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_open_clip import save_open_clip

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.colors import BACKGROUND, ClipColors, cut_out, require_quick_gelu
from fastgen.evaluation.geneval.detections import ColorClassifier, Detections
from fastgen.evaluation.geneval.prompts import COLORS

pytest.importorskip("torchvision", reason="open_clip's transforms need torchvision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_open_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def colors(folder: str) -> ClipColors:
    return ClipColors.load(folder)


def scene(seed: int = 0, n: int = 40) -> tuple[np.ndarray, Detections]:
    """Plain-coloured objects of odd shapes and sizes on noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)
    boxes, masks = [], []
    for _ in range(n):
        x, y = rng.integers(0, 40, 2)
        w, h = rng.integers(1, 30), rng.integers(1, 50)
        mask = np.zeros((90, 70), bool)
        mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.7
        mask[y, x] = mask[y + h - 1, x + w - 1] = True
        boxes.append((x, y, x + w, y + h))
        masks.append(mask)
    scores = rng.uniform(0.4, 1, n).astype(np.float32)
    return image, Detections(("car",) * n, scores, np.array(boxes, np.float32), np.stack(masks))


def by_hand(model, tokenizer, image: np.ndarray, detections: Detections, name: str) -> np.ndarray:
    """Logits [objects, colours], float64 after the encoders; pixels by Pillow and numpy alone."""
    rows = []
    for box, mask in zip(detections.boxes.astype(int), detections.masks, strict=True):
        pixels = image.copy()
        pixels[~mask] = BACKGROUND
        crop = Image.fromarray(pixels[box[1] : box[3], box[0] : box[2]])
        short = min(crop.size)
        width, height = (int(32 * side / short) for side in crop.size)
        crop = crop.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        values = np.asarray(crop.crop((left, top, left + 32, top + 32))) / 255
        values = (values - np.array([0.48, 0.45, 0.4])) / np.array([0.26, 0.26, 0.27])
        with torch.no_grad():
            row = model.encode_image(torch.tensor(values.transpose(2, 0, 1)[None], dtype=torch.float32))
        rows.append(row[0].double().numpy())
    columns = []
    for color in COLORS:
        texts = [
            f"a photo of a {color} {name}",
            f"a photo of a {color}-colored {name}",
            f"a photo of a {color} object",
        ]
        with torch.no_grad():
            embedded = model.encode_text(tokenizer(texts)).double().numpy()
        mean = (embedded / np.linalg.norm(embedded, axis=1, keepdims=True)).mean(0)
        columns.append(mean / np.linalg.norm(mean))
    units = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    return 100 * units @ np.stack(columns).T


def test_classifies_as_by_hand(colors: ClipColors) -> None:
    image, detections = scene()
    wanted = by_hand(colors.model, colors.tokenizer, image, detections, "car")
    found = colors.classify(image, detections, "car", range(len(detections)))
    best = [COLORS[row.argmax()] for row in wanted]
    clear = np.diff(np.sort(wanted, axis=1)[:, -2:], axis=1)[:, 0] > 1e-3
    assert clear.sum() >= 35 and len(set(best)) >= 3
    assert [a for a, sure in zip(found, clear, strict=True) if sure] == [
        b for b, sure in zip(best, clear, strict=True) if sure
    ]
    assert isinstance(colors, ColorClassifier)


def test_order_batch_and_class_name(colors: ClipColors) -> None:
    image, detections = scene(1)
    everything = colors.classify(image, detections, "car", range(40))
    assert colors.classify(image, detections, "car", [7, 3, 39]) == [everything[i] for i in (7, 3, 39)]
    assert [colors.classify(image, detections, "car", [i])[0] for i in range(0, 40, 8)] == everything[::8]
    assert colors.classify(image, detections, "car", []) == []
    heads = [colors._head(name) for name in ("car", "apple")]
    assert heads[0].shape == (16, 10) and not torch.allclose(heads[0], heads[1], atol=1e-3)


def test_cut_out_pastes_on_grey_and_crops() -> None:
    image, detections = scene(2, 1)
    x1, y1, x2, y2 = detections.boxes[0].astype(int)
    pixels = np.asarray(cut_out(image, detections, 0))
    mask = detections.masks[0][y1:y2, x1:x2]
    assert pixels.shape == (y2 - y1, x2 - x1, 3)
    assert (pixels[~mask] == 0x99).all() and (pixels[mask] == image[y1:y2, x1:x2][mask]).all()
    bare = Detections(detections.labels, detections.scores, detections.boxes)
    assert np.array_equal(np.asarray(cut_out(image, bare, 0)), image[y1:y2, x1:x2])


def test_quick_gelu_is_forced_on_a_configuration_with_gelu(tmp_path: Path, folder: str) -> None:
    import open_clip

    plain = save_open_clip(tmp_path / "plain", quick_gelu=False)
    without = open_clip.create_model(f"local-dir:{plain}")
    forced = ClipColors.load(plain)
    assert forced.fingerprint() == ClipColors.load(folder).fingerprint()  # the same weights
    require_quick_gelu(forced.model, "it")
    with pytest.raises(FastgenError, match="does not use QuickGELU"):
        require_quick_gelu(without, "it")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(forced.model.encode_image(pixels), ClipColors.load(folder).model.encode_image(pixels))
        assert (forced.model.encode_image(pixels) - without.encode_image(pixels)).abs().max() > 1e-3
    with pytest.raises(FastgenError, match="does not use QuickGELU"):
        ClipColors(without, forced.preprocess, forced.tokenizer)


def test_weights_that_are_not_there(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastgenError, match="none of open_clip's weights of ViT-L-14: .*openai"):
        ClipColors.load("nonsense")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastgenError, match="colour classifier: .*has no open_clip_config.json"):
        ClipColors.load(str(tmp_path / "empty"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        (broken / name).write_bytes((Path(folder) / name).read_bytes()[: 10**5 if "bin" in name else None])
    with pytest.raises(FastgenError, match="colour classifier: .*broken cannot be loaded"):
        ClipColors.load(str(broken))


def test_weights_that_cannot_be_downloaded_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai': no route")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    with pytest.raises(FastgenError, match="ViT-L-14/openai is not in the local cache.*--color-model"):
        ClipColors.load()
