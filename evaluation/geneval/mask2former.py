"""The detector of GenEval, Mask2Former with Swin-S, on transformers: what mmdet 2.27 does around the network, exactly.

Input: short side 800, long side at most 1333, OpenCV's bilinear on uint8, padded at the right and at the bottom with
grey to multiples of 32, normalised. Output: masks upsampled to the padded input, cut, resized to the picture; top 100
of all (query, class) pairs; score = class probability times mean mask probability. The preprocessors and
postprocessors of the hub do neither.

The weights on the hub are Meta's. GenEval uses OpenMMLab's retraining of the same architecture, which
:mod:`fastgen.evaluation.geneval.convert` translates. So scores with the former are named otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import Detections, check_image
from fastgen.evaluation.geneval.opencv_resize import resize_linear
from fastgen.evaluation.geneval.prompts import CLASSES
from fastgen.evaluation.geneval.verdict_files import DETECTORS
from fastgen.pretrained import load_pretrained

HUB_ID = "facebook/mask2former-swin-small-coco-instance"
SOURCES = ("hf", "mmdet-converted")
CONVERTED_FILE = "fastgen-mmdet.json"
"""Written by the converter next to its weights; a folder that contains it is OpenMMLab's network."""
SHORT_SIDE, LONG_SIDE, MULTIPLE, PAD = 800, 1333, 32, 128
_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_FACTOR = 1 / np.array([58.395, 57.12, 57.375])
_TOP = 100
_QUERIES_AT_ONCE = 10  # a mask of a 1024x1024 picture takes 4 MB in each of three sizes
# Buffers and weights that no output depends on; published checkpoints lack some of them.
UNUSED = ("criterion.empty_weight", ".swin.layernorm.", "relative_position_index")


def input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture in front of the detector, without padding."""
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def prepare(image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """A picture uint8 [H, W, 3] RGB as the network takes it: float32 [3, h, w] with h and w multiples of 32, and the
    (height, width) of the part that is no padding."""
    height, width = input_size(*image.shape[:2])
    padded = np.full((-height % MULTIPLE + height, -width % MULTIPLE + width, 3), PAD, np.uint8)
    padded[:height, :width] = resize_linear(image, height, width)
    # As OpenCV rounds: the difference is single precision, the product double.
    pixels = ((padded.astype(np.float32) - _MEAN) * _FACTOR).astype(np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), (height, width)


def postprocess(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
    *,
    top: int = _TOP,
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections of one picture.

    Args:
        class_logits: [queries, classes + 1], the last class is "no object".
        mask_logits: [queries, h, w], a quarter of `padded`.
        padded, inner, size: (height, width) of the network's input, of its part without padding, of the picture.
        top: pairs of query and class that are kept, the most probable first; a query may appear under several classes.
        min_score: pairs whose class probability, and with it their score, cannot exceed this are left out early.

    Returns:
        labels int [n], scores float [n], boxes float [n, 4] (x2 and y2 exclusive; zeros of an empty mask), masks bool
        [n, height, width].
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    best, places = probabilities.flatten().topk(min(top, probabilities.numel()))
    # A mean of float probabilities may exceed 1 by rounding.
    possible = best * 1.001 >= min_score if min_score > 0 else torch.ones_like(best, dtype=torch.bool)
    best, places = best[possible], places[possible]
    labels, queries = places % probabilities.shape[1], places // probabilities.shape[1]
    scores = torch.zeros_like(best)
    boxes = best.new_zeros(len(best), 4)
    masks = torch.zeros((len(best), *size), dtype=torch.bool, device=best.device)
    for part in queries.unique().split(_QUERIES_AT_ONCE):
        logits = _resized(mask_logits[part], padded)[:, : inner[0], : inner[1]]
        logits = _resized(logits, size)
        positive = logits > 0
        area = positive.flatten(1).sum(1)
        quality = (logits.sigmoid() * positive).flatten(1).sum(1) / (area + 1e-6)
        tight = _boxes(positive)
        for row, query in enumerate(part.tolist()):
            mine = queries == query
            scores[mine] = best[mine] * quality[row]
            boxes[mine] = tight[row]
            masks[mine] = positive[row]
    return labels, scores, boxes, masks


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _boxes(masks: Tensor) -> Tensor:
    """Tight boxes [n, 4] of masks [n, h, w]."""
    ends = []
    for axis in (1, 2):  # over rows: which columns are set; over columns: which rows
        hit = masks.any(dim=axis)
        count = hit.shape[1]
        first = hit.int().argmax(dim=1)
        last = count - hit.flip(1).int().argmax(dim=1)
        ends.append((first * hit.any(1), last * hit.any(1)))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], dim=1).float()


class Mask2FormerDetector:
    """Mask2Former behind the `ObjectDetector` protocol.

    Args:
        model: `Mask2FormerForUniversalSegmentation` of 80 classes.
        source: "hf" or "mmdet-converted"; goes into every result.
        weights: what the user named.
        device: where it runs, in single precision.
        min_score: detections that cannot exceed it are left out. The rules of GenEval ignore scores up to 0.3.

    Raises:
        FastgenError: the model knows another number of classes.
    """

    class_names: tuple[str, ...] = CLASSES

    def __init__(
        self,
        model: Any,
        *,
        source: str = "hf",
        weights: str = "",
        device: str | torch.device = "cpu",
        min_score: float = 0.0,
    ) -> None:
        if model.config.num_labels != len(CLASSES):
            raise FastgenError(
                f"detector mask2former: {weights or 'the model'} knows {model.config.num_labels} classes, GenEval "
                f"needs the {len(CLASSES)} things of COCO (an instance checkpoint, not a panoptic or semantic one)"
            )
        if source not in SOURCES:
            raise ValueError(f"source: needs one of {', '.join(SOURCES)}, got {source!r}")
        self.device = torch.device(device)
        self.model = model.to(self.device, torch.float32).eval()
        self.name, self.weights, self.min_score = source, weights, min_score

    @classmethod
    def load(
        cls, weights: str = HUB_ID, *, device: str | torch.device = "cpu", min_score: float = 0.0
    ) -> Mask2FormerDetector:
        """From a Hub id or a folder in the layout of transformers.

        Raises:
            FastgenError: there are no such weights, or they are incomplete or of another network.
        """
        from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

        from fastgen.evaluation.verifiers.hub import check_loaded, explained, find_file

        who, use = "detector mask2former", "name its folder with --detector FOLDER"
        find_file(who, weights, ("config.json",), use)
        with explained(who, weights, use):
            config = load_pretrained(AutoConfig, weights)
            if config.model_type != "mask2former":
                raise FastgenError(f"{who}: {weights} is a {config.model_type}, not a mask2former")
            config.backbone_config.drop_path_rate = 0.0
            model, info = load_pretrained(
                Mask2FormerForUniversalSegmentation,
                weights,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        missing = [key for key in info["missing_keys"] if not any(part in key for part in UNUSED)]
        check_loaded(who, weights, {**info, "missing_keys": missing})
        converted = (Path(weights) / CONVERTED_FILE).is_file()
        source = "mmdet-converted" if converted else "hf"
        return cls(model, source=source, weights=weights, device=device, min_score=min_score)

    @property
    def benchmark(self) -> str:
        """The name of a score by this detector."""
        return DETECTORS[self.name]

    def fingerprint(self) -> str:
        """sha256 of the weights."""
        from fastgen.evaluation.geneval.shapes_checker import fingerprint

        return fingerprint(self.model)

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of each picture (uint8 [H, W, 3], any sizes), one by one: batches would round otherwise.

        Raises:
            ValueError: a picture is not uint8 RGB.
        """
        checked = [check_image(image, f"images[{i}]") for i, image in enumerate(images)]
        with full_precision():
            return [self._detect(image) for image in checked]

    def _detect(self, image: np.ndarray) -> Detections:
        pixels, inner = prepare(image)
        pixels = pixels[None].to(self.device)
        padded = (pixels.shape[2], pixels.shape[3])
        seen = torch.ones((1, *padded), dtype=torch.long, device=self.device)
        out = self.model(pixel_values=pixels, pixel_mask=seen)
        size = (image.shape[0], image.shape[1])
        found = postprocess(
            out.class_queries_logits[0],
            out.masks_queries_logits[0],
            padded,
            inner,
            size,
            min_score=self.min_score,
        )
        labels, scores, boxes, masks = (part.cpu().numpy() for part in found)
        return Detections(tuple(CLASSES[label] for label in labels), scores, boxes, masks)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 arithmetic on CUDA: the ten bits of TF32, the default of convolutions, move FID, and scores across the
    thresholds."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
