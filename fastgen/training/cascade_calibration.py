"""`fastgen train cascade-calibrate`: thresholds of CASCADE-R for a target with its drafter.

Pictures are drawn with the exact rule. At every node of their trees, the similarity of siblings to the target and the
distance of the distributions after them are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgen.data.shapes import ShapesWorld
from fastgen.drafters.calibration import Calibration, PairRecorder, calibrate_levels, sampled_weights
from fastgen.drafters.cascade import CascadeConfig
from fastgen.drafters.decode import decode_speculative
from fastgen.drafters.drafter import describe
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import load_drafter
from fastgen.drafters.sources import TreeSource
from fastgen.drafters.targets import target_of
from fastgen.drafters.tree import named_tree
from fastgen.environment import commit, environment
from fastgen.errors import FastgenError
from fastgen.pipelines.loading import load_pipeline

__all__ = ["calibrate_cascade"]

TREE = "lantern-25"  # wide: the calibration needs siblings


@torch.no_grad()
def calibrate_cascade(
    model: str,
    drafter: Path,
    output: Path,
    *,
    pictures: int = 50,
    prompts: Sequence[str] | None = None,
    tree: str = TREE,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Calibrate and write `output/calibration.json`.

    Args:
        model: name, folder or Hub id of a model that draws tokens.
        drafter: folder of its drafter.
        output: folder to write to; in the drafter's folder it becomes the drafter's default.
        pictures: number of pictures to draw.
        prompts: used in turn; None takes ShapesWorld captions.
        tree: static tree to draft.
        seed: of prompts and pictures.
        device: to run on.
        report: called after every picture.

    Raises:
        FastgenError: fewer pictures than 1, or no prompt.
        ValueError: a drafter that does not fit, or too few sibling pairs.
    """
    if pictures < 1:
        raise FastgenError(f"pictures: {pictures} is not allowed, needs an integer >= 1")
    texts = list(ShapesWorld(seed + 909).batch(pictures).texts) if prompts is None else list(prompts)
    if not texts:
        raise FastgenError("prompts: needs at least one")
    made = load_drafter(drafter)  # before the model: the folder may not hold a drafter
    pipe: Any = load_pipeline(model, device=device, dtype="float32" if device == "cpu" else "auto")
    target = target_of(pipe.model, pipe.tokenizer)
    source = TreeSource(made.to(target.device, target.dtype), named_tree(tree), sampled=True)
    scale = float(pipe.model.generation_config.guidance_scale or target.default_law.guidance_scale)
    law = TokenLaw(guidance_scale=scale)
    recorder = PairRecorder(CascadeConfig().horizon, target.codebook)
    for number in range(pictures):
        prefix = target.prefix([texts[number % len(texts)]], law.guided)
        generator = torch.Generator().manual_seed(seed + number)
        decode_speculative(target, source, recorder, prefix, law, [generator])
        report(number + 1, pictures)
    found = calibrate_levels(recorder.pairs)
    about = {"model": model, "drafter": Path(drafter).name, "tree": tree, "pictures": pictures, "seed": seed}
    about |= {"guidance_scale": scale, "pairs": len(recorder.pairs), "commit": commit(), "environment": environment()}
    about["target"] = describe(target)
    about["weights"] = {"model": sampled_weights(pipe.model), "drafter": sampled_weights(made)}
    calibration = replace(found, about=about)
    calibration.save(output)
    return calibration
