"""Mask2Former of the very class that GenEval's detector loads, tiny."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from fastgen.evaluation.geneval.prompts import CLASSES


def tiny_mask2former(seed: int = 0, queries: int = 12, labels: int = 80) -> Mask2FormerForUniversalSegmentation:
    """Random weights, made strong enough that masks are neither empty nor full."""
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        drop_path_rate=0.3,
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=48,
        num_queries=queries,
        num_labels=labels,
    )
    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    for name, parameter in model.named_parameters():
        if "queries" in name or "level_embed" in name or "mask_embedder" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        if "mask_projection.weight" in name or "class_predictor.weight" in name:
            torch.nn.init.normal_(parameter, std=0.8)
    return model


def sees(name: str, logit: float = 12.0) -> Mask2FormerForUniversalSegmentation:
    """A network that finds one `name` in every picture, all over it, and no other object."""
    model = tiny_mask2former(queries=1)
    embedder = model.get_submodule("model.transformer_module.decoder.mask_predictor.mask_embedder.2.0")
    projection = model.model.pixel_level_module.decoder.mask_projection
    with torch.no_grad():
        for layer in (embedder, projection, model.class_predictor):
            layer.weight.zero_()
            layer.bias.zero_()
        embedder.bias[0], projection.bias[0] = logit, 1.0
        model.class_predictor.bias[CLASSES.index(name)] = logit
    return model


def save(model: Mask2FormerForUniversalSegmentation, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)
