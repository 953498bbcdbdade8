"""The detector around Mask2Former: its input, its output against an oracle in float64, and its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_mask2former import save, sees, tiny_mask2former

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import ObjectDetector
from fastgen.evaluation.geneval.mask2former import (
    CONVERTED_FILE,
    Mask2FormerDetector,
    full_precision,
    input_size,
    postprocess,
    prepare,
)
from fastgen.evaluation.geneval.opencv_resize import resize_linear
from fastgen.evaluation.geneval.prompts import CLASSES


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((768, 1344), (762, 1333), (768, 1344)),  # the long side decides
        ((300, 451), (800, 1203), (800, 1216)),
        ((451, 300), (1203, 800), (1216, 800)),
        ((1, 1000), (1, 1333), (32, 1344)),
    ],
)
def test_input_sizes(size: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]) -> None:
    assert input_size(*size) == inner
    pixels, found = prepare(picture(*size))
    assert found == inner and pixels.shape == (3, *padded) and pixels.dtype == torch.float32


def test_input_is_resized_padded_with_grey_and_normalised() -> None:
    image = picture(30, 47)
    pixels, (height, width) = prepare(image)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    whole = np.full((*pixels.shape[1:], 3), 128.0)
    whole[:height, :width] = resize_linear(image, height, width)
    assert np.abs(pixels.numpy().transpose(1, 2, 0) - (whole - mean) / std).max() < 1e-6
    assert (height, width) != tuple(pixels.shape[1:])


def test_normalisation_equals_opencv() -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    image = picture(800, 800)
    wanted = image.astype(np.float32)
    cv2.subtract(wanted, np.array([[123.675, 116.28, 103.53]]), wanted)
    cv2.multiply(wanted, 1 / np.array([[58.395, 57.12, 57.375]]), wanted)
    assert np.array_equal(prepare(image)[0].numpy(), wanted.transpose(2, 0, 1))


# --- output ------------------------------------------------------------------------------------------------------


def linear(source: int, target: int) -> np.ndarray:
    """Bilinear weights float64 [target, source], half-pixel centres."""
    weights = np.zeros((target, source))
    for t in range(target):
        at = min(max((t + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        low = int(at)
        weights[t, low] += 1 - (at - low)
        weights[t, min(low + 1, source - 1)] += at - low
    return weights


def oracle(class_logits, mask_logits, padded, inner, size, top=100) -> list[tuple]:
    """(label, score, box, mask logits) of every detection, best class probability first; float64 and loops."""
    pairs = []
    for query, row in enumerate(class_logits.double().numpy()):
        powers = np.exp(row - row.max())
        for label, probability in enumerate(powers[:-1] / powers.sum()):
            pairs.append((probability, query, label))
    pairs.sort(key=lambda pair: -pair[0])
    out, known = [], {}
    for probability, query, label in pairs[:top]:
        if query in known:
            quality, box, mask = known[query]
            out.append((label, probability * quality, box, mask))
            continue
        mask = mask_logits[query].double().numpy()
        mask = linear(mask.shape[0], padded[0]) @ mask @ linear(mask.shape[1], padded[1]).T
        mask = mask[: inner[0], : inner[1]]
        mask = linear(inner[0], size[0]) @ mask @ linear(inner[1], size[1]).T
        inside = [1 / (1 + np.exp(-value)) for value in mask.ravel() if value > 0]
        box = [0, 0, 0, 0]
        for y, x in np.argwhere(mask > 0):
            if box == [0, 0, 0, 0]:
                box = [x, y, x + 1, y + 1]
            box = [min(box[0], x), min(box[1], y), max(box[2], x + 1), max(box[3], y + 1)]
        known[query] = sum(inside) / (len(inside) + 1e-6), box, mask
        out.append((label, probability * known[query][0], box, mask))
    return out


@pytest.mark.parametrize("size", [(20, 31), (33, 17), (64, 64), (1, 5)])
@pytest.mark.parametrize("queries", [1, 3, 13])
def test_output_equals_the_oracle(size: tuple[int, int], queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    classes = 3 * torch.randn(queries, 81, generator=generator)
    blobs = torch.nn.functional.avg_pool2d(torch.randn(queries, 16, 24, generator=generator), 5, 1, 2)
    masks = 20 * blobs - 4
    masks[0] = -5.0  # never positive
    shape = ((64, 96), (60, 93), size)
    labels, scores, boxes, found = postprocess(classes, masks, *shape)
    wanted = oracle(classes, masks, *shape)
    assert len(labels) == len(wanted) == min(100, 80 * queries)
    assert labels.tolist() == [item[0] for item in wanted]
    np.testing.assert_allclose(scores, [item[1] for item in wanted], atol=2e-6)
    clear = np.abs(np.stack([item[3] for item in wanted])) > 1e-4
    assert clear.mean() > 0.99
    assert (found.numpy() == np.stack([item[3] > 0 for item in wanted]))[clear].all()
    same = np.array([m.all() for m in clear.reshape(len(clear), -1)])
    assert same.any() and np.array_equal(boxes.numpy()[same], np.array([item[2] for item in wanted])[same])
    empty = ~found.flatten(1).any(1)
    assert empty.any() and (scores[empty] == 0).all() and (boxes[empty] == 0).all()


def test_a_query_appears_under_several_classes() -> None:
    classes = torch.full((2, 81), -20.0)
    classes[0, 7], classes[0, 9] = 5.0, 4.0
    classes[1, 80] = 5.0
    labels, scores, _, _ = postprocess(classes, torch.full((2, 4, 4), 30.0), (16, 16), (16, 16), (9, 9))
    assert labels[:2].tolist() == [7, 9] and len(labels) == 100
    torch.testing.assert_close(scores[:2], torch.tensor([0.7310586, 0.2689414]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [0.05, 0.3, 0.9])
def test_early_leaving_out_loses_nothing(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = 6 * torch.randn(20, 81, generator=generator)
    masks = 4 * torch.randn(20, 8, 8, generator=generator)
    shape = ((32, 32), (32, 30), (21, 20))
    everything = postprocess(classes, masks, *shape)
    some = postprocess(classes, masks, *shape, min_score=limit)
    assert 0 < len(some[0]) < len(everything[0])
    for whole, part in zip(everything, some, strict=True):
        assert torch.equal(whole[everything[1] > limit], part[some[1] > limit])


def test_boxes_of_single_pixels_at_the_corners() -> None:
    masks = torch.full((4, 8, 8), -9.0)
    for row, (y, x) in enumerate(((0, 0), (0, 7), (7, 0), (7, 7))):
        masks[row, y, x] = 90.0
    classes = torch.full((4, 81), -20.0)
    for row in range(4):
        classes[row, row], classes[row, 80] = 3.0 - row, 0.0
    _, _, boxes, found = postprocess(classes, masks, (8, 8), (8, 8), (8, 8), top=4)
    assert found.sum((1, 2)).tolist() == [1, 1, 1, 1]
    assert boxes.tolist() == [[0, 0, 1, 1], [7, 0, 8, 1], [0, 7, 1, 8], [7, 7, 8, 8]]


# --- the detector ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector() -> Mask2FormerDetector:
    return Mask2FormerDetector(tiny_mask2former())


def test_detects_as_the_network_and_the_oracle_say(detector: Mask2FormerDetector) -> None:
    image = picture(64, 45)
    (found,) = detector.detect([image])
    pixels, inner = prepare(image)
    with torch.no_grad():
        out = detector.model(pixel_values=pixels[None])
    wanted = oracle(out.class_queries_logits[0], out.masks_queries_logits[0], pixels.shape[1:], inner, (64, 45))
    assert len(found) == 100 and found.masks is not None and found.masks.shape == (100, 64, 45)
    assert found.labels == tuple(CLASSES[item[0]] for item in wanted)
    np.testing.assert_allclose(found.scores, [item[1] for item in wanted], atol=1e-5)
    assert found.scores.dtype == np.float32
    assert 0.1 < found.masks.mean() < 0.9
    differing = found.masks != np.stack([item[3] > 0 for item in wanted])
    assert np.abs(np.stack([item[3] for item in wanted]))[differing].max(initial=0) < 1e-3


def test_pictures_do_not_influence_one_another(detector: Mask2FormerDetector) -> None:
    images = [picture(40, 40, 1), picture(30, 50, 2)]
    together = detector.detect(images)
    alone = [detector.detect([image])[0] for image in reversed(images)][::-1]
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.scores, b.scores) and np.array_equal(a.masks, b.masks) and a.labels == b.labels
    assert detector.detect([]) == []
    assert isinstance(detector, ObjectDetector)
    with pytest.raises(ValueError, match=r"images\[1\]"):
        detector.detect([images[0], images[1].astype(float)])


def test_names_are_by_index(tmp_path: Path) -> None:
    for name in ("computer mouse", "toothbrush"):
        found = Mask2FormerDetector(sees(name), min_score=0.3).detect([picture(40, 40)])[0]
        assert found.labels == (name,) and found.scores[0] > 0.99
        assert found.boxes.tolist() == [[0, 0, 40, 40]]
    assert [CLASSES[i] for i in (64, 65, 66)] == ["computer mouse", "tv remote", "computer keyboard"]


def test_load_is_the_saved_network_in_single_precision_without_stochastic_depth(tmp_path: Path) -> None:
    model = tiny_mask2former(seed=3)
    folder = save(model, tmp_path / "m")
    loaded = Mask2FormerDetector.load(folder)
    assert not loaded.model.training and {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    image = picture(40, 40)
    (ours,), (wanted,) = loaded.detect([image]), Mask2FormerDetector(model).detect([image])
    assert np.array_equal(ours.scores, wanted.scores)
    assert (loaded.name, loaded.benchmark, loaded.weights) == ("hf", "GenEval (HF-M2F)", folder)
    assert loaded.fingerprint() == Mask2FormerDetector(model).fingerprint()
    assert loaded.fingerprint() != Mask2FormerDetector(tiny_mask2former()).fingerprint()
    (tmp_path / "m" / CONVERTED_FILE).write_text("{}")
    converted = Mask2FormerDetector.load(folder)
    assert (converted.name, converted.benchmark) == ("mmdet-converted", "GenEval (converted M2F)")


def test_a_network_of_other_classes_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_mask2former(labels=133), tmp_path / "panoptic")
    with pytest.raises(FastgenError, match="knows 133 classes.*instance checkpoint"):
        Mask2FormerDetector.load(folder)


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(FastgenError, match="has no config.json"):
        Mask2FormerDetector.load(str(tmp_path))
    folder = Path(save(tiny_mask2former(), tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    missing = {key: value for key, value in tensors.items() if key != "class_predictor.weight"}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastgenError, match=r"detector mask2former: .*lacks 1 weights.*class_predictor.weight"):
        Mask2FormerDetector.load(str(folder))
    unused = [key for key in tensors if "swin.layernorm" in key or "empty_weight" in key]
    assert unused
    published = {key: value for key, value in tensors.items() if key not in unused}  # some checkpoints lack them
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    Mask2FormerDetector.load(str(folder))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FastgenError, match="detector mask2former: .*cannot be loaded"):
        Mask2FormerDetector.load(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(FastgenError, match="is a bert, not a mask2former"):
        Mask2FormerDetector.load(str(folder))


def test_weights_that_are_not_here_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FastgenError, match=r"hf download no-such-user/no-such-detector.*--detector FOLDER"):
        Mask2FormerDetector.load("no-such-user/no-such-detector")


@pytest.mark.parametrize("allowed", [True, False])
def test_networks_that_judge_compute_in_full_precision(allowed: bool) -> None:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        with pytest.raises(RuntimeError, match="stopped"), full_precision():
            assert not any(backend.allow_tf32 for backend in backends)
            raise RuntimeError("stopped")
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
