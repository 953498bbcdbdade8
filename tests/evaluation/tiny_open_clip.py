"""An open_clip model, tiny, saved as the folder that open_clip's local-dir takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def save_open_clip(folder: Path, quick_gelu: bool = True, seed: int = 0, **vision: Any) -> str:
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **vision},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    text = {"model_cfg": config, "preprocess_cfg": {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.26, 0.27]}}
    (folder / "open_clip_config.json").write_text(json.dumps(text))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:
            parameter.data *= 6  # so that different crops and texts differ by more than rounding
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)
