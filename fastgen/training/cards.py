"""Model cards of the embedded checkpoints: training, data, duration and scores.

``python -m fastgen.training.cards`` regenerates the cards of all embedded checkpoints from their training records and
the committed scores in ``docs/results``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fastgen import _assets
from fastgen.io import read_json, read_object

_TITLES = {
    "tiny": "fastgen tiny: a ZImagePipeline for ShapesWorld",
    "tiny-janus": "fastgen tiny-janus: a JanusForConditionalGeneration for ShapesWorld",
    "small": "fastgen small: a ZImagePipeline for 128x128 pictures of ShapesWorld",
    "small-dc": "fastgen small-dc: a Z-Image transformer with dynamic chunking, upcycled from small",
    "shapes-detector": "fastgen shapes-detector: finds ShapesWorld objects",
    "shapes-verifier": "fastgen shapes-verifier: does this picture show that ShapesWorld caption?",
}
_TEXTS = {
    "tiny": """A `diffusers.ZImagePipeline` of stock classes: `AutoencoderKL` (f=4, 16 latent channels), a small
`Qwen3Model` text encoder with a word-level tokenizer, `ZImageTransformer2DModel` (width 192, 5 layers, patch 2) and
`FlowMatchEulerDiscreteScheduler`. It draws 64x64 pictures of ShapesWorld captions ("a red circle left of a blue
square") and exists so that everything in fastgen runs on a CPU in the first minute.

```python
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("fastgen/assets/tiny")
image = pipe("a red circle", height=64, width=64, num_inference_steps=12, guidance_scale=2.0).images[0]
```

Limits: it knows the 56 words of the ShapesWorld grammar (other words become one unknown token), one size, and
nothing about natural images. The text encoder was trained together with the transformer.

The recipe reproduces its scores: one run from random weights with its defaults (`fastgen train z-image --part
RUNS/vae/model/vae --compile --threads 1`, 10,000 steps, 138 minutes on one core) it gave 0.780 ± 0.011 and FD-shapes
0.33 (`docs/results.md`).""",
    "tiny-janus": """A stock `transformers.JanusForConditionalGeneration`: VQ tokenizer (16x16 tokens, 512
codes), 4-layer Llama of width 256, image heads. It draws 64x64 pictures of ShapesWorld captions with stock
`generate(generation_mode="image")`.

```python
from transformers import AutoTokenizer, JanusForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained("fastgen/assets/tiny-janus")
model = JanusForConditionalGeneration.from_pretrained("fastgen/assets/tiny-janus")
inputs = tokenizer("a red circle" + tokenizer.boi_token, return_tensors="pt")
tokens = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=4.0)
pixels = model.decode_image_tokens(tokens)  # [1, 64, 64, 3] in [-1, 1]
```

`drafter` contains its drafter for speculative decoding, a `fastgen.drafters.eagle.EagleDrafter` of width 128 with the
CASCADE-R thresholds for both (`fastgen generate --model tiny-janus --method speculative`). `drafter/heads` contains
`fastgen.drafters.heads.WindowHeads`, which correct Jacobi windows (`--tree heads-20`).

Limits: the 56 words of the ShapesWorld grammar, one size. The image-understanding tower and the text head are
untrained and as small as the class allows: this checkpoint only generates images.""",
    "small": """A `diffusers.ZImagePipeline` of stock classes for 128x128 pictures of ShapesWorld captions:
`ZImageTransformer2DModel` (width 192, 8 layers, patch 2, 256 image tokens), grown from that of `tiny`. VAE, text
encoder and tokenizer are those of `tiny`; the scheduler has a `shift` of 4. The VAE restores 256
fresh renders of this size with a PSNR of 37.5 dB, of 64x64 with 34.9 dB (AMD EPYC, torch 2.13).

```python
import fastgen

pipe = fastgen.load_pipeline("small")
image = pipe("a red circle", height=128, width=128, num_inference_steps=12, guidance_scale=2.0).images[0]
```

Limits: those of `tiny`; with 12 steps the count is right in 60 % of the pictures of 60 counting prompts.""",
    "small-dc": """A `fastgen.DCZImageTransformer2DModel` (width 192, 8 layers) upcycled from the transformer of
`small` on its own patches (`grid="patch"`): it started as `small` and learned to compute only the patches that its
router keeps. VAE, text encoder and tokenizer are those of `tiny`; the scheduler is UniPC with twice the shift of
`small`.

```python
import fastgen

pipe = fastgen.load_pipeline("small-dc")
settings = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 2.0}
image = pipe("a red circle", tail_drop=0.1, uncond_tail_drop=0.1, **settings).images[0]
```

Limits: those of `small`. Loss contract: lossy.""",
    "shapes-detector": """`fastgen.models.shapes_detector.ShapesDetector`: class, colour, box, mask and confidence of
the objects of a ShapesWorld picture. It computes the ShapesWorld-GenEval scores, and its 128 penultimate features are
the features of FD-shapes. Validation and calibration: `docs/results/shapes-checker.md`.

Limits: it was trained on renders, and on blobs and textures without objects, so that the shapeless output of a weak
generator does not count; a generated object between two shapes still gets the nearer one if its confidence exceeds the
threshold.""",
    "shapes-verifier": """`fastgen.models.shapes_verifier.ShapesVerifier`: the probability that a 64x64 picture shows a
ShapesWorld caption. Noise search uses it; the ShapesWorld checker, which scores evaluation sets, is a separate network
trained on another task, so a search does not grade itself.

```python
from fastgen.evaluation.verifiers.names import load_verifier

verifier = load_verifier("shapes-verifier")
scores = verifier.score(images, ["a red circle"])  # images uint8 [1, 3, 64, 64]; scores [1] in [0, 1]
```

Data: ShapesWorld renders from the whole grammar, each with one true caption, false ones that differ from it in one
detail, and another picture's; blurred, noisy, with blobs instead of objects, or two renders overlaid. Auxiliary losses
cover shape and colour at each place, position and number of each named object, and the offset of two named objects. It
saw no generated picture and no verdict of the checker, but both learned the shapes from renders of the same kind.
`thresholds` contains the results of `fastgen train search-calibrate` for the embedded models.

Limits: it knows the 56 words of the ShapesWorld grammar (other words become one unknown token) and nothing about
natural images; pictures of another size are scaled to 64x64. A score is a probability on renders, not on generated
pictures: there it is overconfident, and it often disagrees with the checker about the number of objects if some are
only half drawn.""",
}
_LIBRARIES = {
    "tiny": "diffusers",
    "tiny-janus": "transformers",
    "small": "diffusers",
    "small-dc": "fastgen",
    "shapes-detector": "fastgen",
    "shapes-verifier": "fastgen",
}
_SIZED = ("shapes-verifier",)
_PARTS = {
    "z-image": "RUNS/vae/model/vae",
    "janus": "RUNS/vq/model/vq",
    "small": "tiny",
    "dc-patch": "small",
    "drafter": "tiny-janus",
    "heads": "tiny-janus",
}
_REMARKS = {
    "held_out_psnr": "PSNR on fresh renders (dB)",
    "code_use": "share of the code book in use on 1,024 fresh renders",
    "code_entropy_bits": "entropy of the codes (bits of 9)",
    "next_token_entropy_bits": "mean next-token entropy (bits of 9)",
    "background_entropy_bits": "mean next-token entropy on background tokens (bits of 9)",
    "held_out_cross_entropy_bits": "cross-entropy on fresh renders (bits a token)",
}


def write_record(folder: Path, part: str, record: dict[str, Any]) -> None:
    """Add the record of `part` ("vae", "z-image", …) to `folder/training.json`."""
    path = folder / "training.json"
    records = read_object(path) if path.exists() else {}
    records[part] = record
    _write(path, records)


def write_defaults(folder: Path, **defaults: float) -> None:
    """Write `folder/fastgen.json`: the default settings of `fastgen generate`."""
    _write(folder / "fastgen.json", defaults)


def inherit_records(folder: Path, part: Path) -> None:
    """Copy the records of an earlier trained part (the folder above `part`) into `folder/training.json`."""
    path = part.parent / "training.json"
    if path.exists():
        for name, record in read_object(path).items():
            write_record(folder, name, record)


def forget_paths(folder: Path) -> None:
    """Drop `_name_or_path`, the folder a model was loaded from, from every JSON file below `folder`."""
    for path in folder.rglob("*.json"):
        value = read_json(path)
        if isinstance(value, dict) and value.pop("_name_or_path", None) is not None:
            _write(path, value)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def card(
    name: str,
    records: dict[str, Any],
    scores: dict[str, Any] | None = None,
    calibrations: Sequence[Mapping[str, Any]] = (),
    size: str = "",
) -> str:
    """The model card of an embedded checkpoint as Markdown with Hub front matter.

    Args:
        name: of a checkpoint.
        records: its training.json.
        scores: a result of `fastgen eval shapes --json`, if any.
        calibrations: of a verifier, written by `fastgen train search-calibrate`.
        size: of its weights, as text.
    """
    lines = ["---", "license: apache-2.0", f"library_name: {_LIBRARIES[name]}", "---", f"# {_TITLES[name]}", ""]
    lines += [_TEXTS[name], "", *([size, ""] if size else []), "## Training", ""]
    for part, record in records.items():
        lines += [_training_line(part, record), ""]
    if scores is not None:
        lines += ["## Scores", "", *_score_lines(scores), ""]
    if calibrations:
        lines += ["## Agreement with the checker", ""]
        for calibration in calibrations:
            lines += [*_agreement_lines(calibration), ""]
    return "\n".join(lines)


def _training_line(part: str, record: dict[str, Any]) -> str:
    config = record["config"]
    options = [
        f"--{key.replace('_', '-')} {config[key]}" for key in ("steps", "batch_size", "accumulate", "lr", "seed")
    ]
    options += [f"--set {key}={value}" for key, value in record.get("choices", {}).items()]
    made_from = f" --part {_PARTS[part]}" if part in _PARTS else ""
    remarks = "; ".join(f"{_REMARKS[key]}: {record[key]}" for key in _REMARKS if key in record)
    made_at = "" if record["commit"] is None else f", commit {record['commit']}"
    stages = "".join(f" {text}" for text in record.get("notes", []))
    return (
        f"**{part}**: `fastgen train {part} -o RUNS/{part}{made_from} {' '.join(options)}`. "
        f"{record['steps_done']:,} steps, {record['items_seen']:,} images, {record['seconds'] / 60:.0f} minutes on "
        f"{record['cpu'] if record['device'] == 'cpu' else record['device']} "
        f"({record['threads']} thread{'s' if record['threads'] > 1 else ''}, torch {record['torch']})"
        f"{made_at}.{stages}{f' {remarks}.' if remarks else ''}"
    )


def _score_lines(scores: dict[str, Any]) -> list[str]:
    tasks = ", ".join(f"{tag} {task['score']:.3f}" for tag, task in scores["tasks"].items())
    line = (
        f"{scores['benchmark']}: **{scores['overall']:.3f}** ± {scores['overall_stderr']:.3f} (s.e.) over "
        f"{scores['n_images']} images of {scores['n_prompts']} held-out prompts ({tasks})."
    )
    distance = scores.get("fd_shapes")
    return [line, *([f"{distance['protocol']}: **{distance['value']:.2f}**."] if distance else [])]


def _agreement_lines(calibration: Mapping[str, Any]) -> list[str]:
    """A calibration as text: agreement at the end, at each time, and the thresholds."""
    about, steps = calibration["about"], calibration["report"]["agreement"]
    final = steps[-1]
    tasks = ", ".join(f"{tag} {_shown(task['auroc'])}" for tag, task in final["tasks"].items())
    times = ", ".join(f"{t:.2f}: {_shown(step['auroc'])}" for t, step in zip(calibration["times"], steps, strict=True))
    fixed, level = calibration["fixed"], 100 * about["level"]
    if fixed is None:
        reached = f"There is no threshold above which {level:.0f} % of the pictures are correct"
    else:
        reached = f"Of the pictures above the threshold {fixed:.3g} at least {level:.0f} % are correct"
    return [
        f"On {final['n']:,} pictures of `{calibration['model']}` (sampler {about['settings']['sampler']}, captions "
        f"outside the evaluation set), of which the checker finds {100 * final['correct']:.1f} % correct: AUROC "
        f"**{_shown(final['auroc'])}** ({tasks}), as a verdict at 0.5 right on {100 * final['accuracy']:.1f} %, Brier "
        f"score {final['brier']:.3f}, expected calibration error {final['calibration_error']:.3f}.",
        "",
        f"AUROC of previews by noise level: {times}.",
        "",
        f"{reached} (commit {about['commit']}).",
    ]


def _size(folder: Path) -> str:
    """Parameters and bytes of the weights in a folder."""
    count = bytes_ = 0
    for path in sorted(folder.glob("*.safetensors")):
        bytes_ += path.stat().st_size
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return f"Size: {count:,} parameters, {bytes_ / 1e6:.1f} MB."


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_cards(root: Path = _assets.ROOT, results: Path | None = None) -> list[Path]:
    """Write README.md of every embedded checkpoint, then the checksums; returns the paths of the cards."""
    results = results or root.parent.parent / "docs" / "results"
    written = []
    for name in _assets.names(root):
        forget_paths(root / name)
        records: dict[str, Any] = {}
        for folder in (root / name, root / name / "drafter", root / name / "drafter" / "heads"):
            if (folder / "training.json").is_file():
                records |= read_object(folder / "training.json")
        path = results / f"shapesworld-{name}.json"
        scores = read_object(path) if path.exists() else None
        target = root / name / "README.md"
        paths = sorted((root / name / "thresholds").glob("*.json"))
        calibrations = [read_object(path) for path in paths]
        size = _size(root / name) if name in _SIZED else ""
        target.write_text(card(name, records, scores, calibrations, size), encoding="utf-8")
        written.append(target)
    _assets.write_checksums(root)
    return written


if __name__ == "__main__":
    write_cards()
