"""OpenMMLab's Mask2Former checkpoint, the detector of the official GenEval scorer, as a folder of transformers.

    python -m fastgen.evaluation.geneval.convert mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_*.pth FOLDER

Both libraries have the same architecture under other names. Three things differ beyond names: mmdet fuses query, key
and value where transformers has three layers; its patch merging orders the 4C input channels by channel and then by
pixel, transformers' by pixel (columns first) and then by channel; and its level embedding of the pixel decoder is an
`Embedding`. Written against the published module structure of mmdet 2.27 and tested on networks with those names; not
yet against the published file, whose every tensor must find its place here or the conversion stops.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.mask2former import CONVERTED_FILE, UNUSED
from fastgen.evaluation.geneval.prompts import CLASSES
from fastgen.io import atomic_write_json, check_writable, file_sha256
from fastgen.pretrained import load_pretrained

OFFICIAL_FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
_SWIN = "model.pixel_level_module.encoder."
_PIXEL = "model.pixel_level_module.decoder."
_DECODER = "model.transformer_module."

# Names of modules in mmdet, and in a published checkpoint of transformers. A name that ends in a point begins those of
# the lines below it. "*" is a number, which "{n}" repeats; the ending, weight or bias, stays. One level lies above the
# pixel decoder's encoder: transformers numbers it from 1. Fused and reordered tensors follow in `_convert`.
_TABLE = f"""
panoptic_head.cls_embed class_predictor
backbone. {_SWIN}
    patch_embed.projection embeddings.patch_embeddings.projection
    patch_embed.norm embeddings.norm
    norm* hidden_states_norms.stage{{0+1}}
backbone.stages.*.blocks.*. {_SWIN}encoder.layers.{{0}}.blocks.{{1}}.
    norm1 layernorm_before
    norm2 layernorm_after
    attn.w_msa.proj attention.output.dense
    ffn.layers.0.0 intermediate.dense
    ffn.layers.1 output.dense
panoptic_head.pixel_decoder. {_PIXEL}
    input_convs.*.conv input_projections.{{0}}.0
    input_convs.*.gn input_projections.{{0}}.1
    lateral_convs.*.conv adapter_{{0+1}}.0
    lateral_convs.*.gn adapter_{{0+1}}.1
    output_convs.*.conv layer_{{0+1}}.0
    output_convs.*.gn layer_{{0+1}}.1
    mask_feature mask_projection
panoptic_head.pixel_decoder.encoder.layers.*. {_PIXEL}encoder.layers.{{0}}.
    attentions.0.sampling_offsets self_attn.sampling_offsets
    attentions.0.attention_weights self_attn.attention_weights
    attentions.0.value_proj self_attn.value_proj
    attentions.0.output_proj self_attn.output_proj
    ffns.0.layers.0.0 fc1
    ffns.0.layers.1 fc2
    norms.0 self_attn_layer_norm
    norms.1 final_layer_norm
panoptic_head.transformer_decoder.layers.*. {_DECODER}decoder.layers.{{0}}.
    attentions.0.attn.out_proj cross_attn.out_proj
    attentions.1.attn.out_proj self_attn.out_proj
    ffns.0.layers.0.0 fc1
    ffns.0.layers.1 fc2
    norms.0 cross_attn_layer_norm
    norms.1 self_attn_layer_norm
    norms.2 final_layer_norm
panoptic_head. {_DECODER}
    transformer_decoder.post_norm decoder.layernorm
    query_embed queries_embedder
    query_feat queries_features
    level_embed level_embed
    mask_embed.* decoder.mask_predictor.mask_embedder.{{0/2}}.0
"""


def _patterns() -> Iterator[tuple[str, str]]:
    """Pattern of a module of mmdet, and its name in transformers."""
    home, ours = "", ""
    for line in _TABLE.strip().splitlines():
        name, target = line.split()
        if name.endswith("."):
            home, ours = name, target
        else:
            yield re.escape(home + name).replace(r"\*", r"(\d+)"), ours + target


_NAMES = tuple(_patterns())
_WINDOW = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\."
_ATTENTION = _SWIN + "encoder.layers.{0}.blocks.{1}.attention.self."
_MERGE = r"backbone\.stages\.(\d+)\.downsample\."
_SELF = r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_(weight|bias)"
_CROSS = r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.in_proj_(weight|bias)"


def convert_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of mmdet's Mask2Former with a Swin backbone, under transformers' names.

    Raises:
        FastgenError: a name is not one of that network.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".relative_position_index"):
            continue  # follows from the window size
        for target, value in _convert(name, tensor):
            out[target] = value.contiguous()
    return out


def _convert(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if found := re.fullmatch(_WINDOW + r"qkv\.(weight|bias)", name):
        base = _ATTENTION.format(*found.groups())
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return [(f"{base}{part}.{found[3]}", value) for part, value in parts]
    if found := re.fullmatch(_WINDOW + "relative_position_bias_table", name):
        return [(_ATTENTION.format(*found.groups()) + "relative_position_bias_table", tensor)]
    if found := re.fullmatch(_MERGE + r"(norm|reduction)\.(weight|bias)", name):
        return [(f"{_SWIN}encoder.layers.{found[1]}.downsample.{found[2]}.{found[3]}", merged_channels(tensor))]
    if found := re.fullmatch(_SELF, name):
        base = f"{_DECODER}decoder.layers.{found[1]}.self_attn."
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [(f"{base}{part}_proj.{found[2]}", value) for part, value in parts]
    if found := re.fullmatch(_CROSS, name):
        return [(f"{_DECODER}decoder.layers.{found[1]}.cross_attn.in_proj_{found[2]}", tensor)]
    if name == "panoptic_head.pixel_decoder.level_encoding.weight":
        return [(_PIXEL + "level_embed", tensor)]
    for pattern, target in _NAMES:
        if found := re.fullmatch(pattern + r"\.(weight|bias)", name):
            *groups, ending = found.groups()
            return [(f"{_filled(target, groups)}.{ending}", tensor)]
    raise FastgenError(f"converter: {name!r} {tuple(tensor.shape)} is no tensor of mmdet's Mask2Former with Swin")


def _filled(target: str, groups: list[str]) -> str:
    """`target` with its groups; "{0+1}" is the next number, "{0/2}" half of it (activations count in between)."""
    for place, group in enumerate(groups):
        if f"{{{place}+1}}" in target:
            target = target.replace(f"{{{place}+1}}", str(int(group) + 1))
        elif f"{{{place}/2}}" in target:
            target = target.replace(f"{{{place}/2}}", str(int(group) // 2))
        else:
            target = target.replace(f"{{{place}}}", group)
    return target


def merged_channels(tensor: Tensor) -> Tensor:
    """The last axis, 4C channels of a merged patch, from mmdet's order to transformers'.

    mmdet: channel c of pixel (row, column) at 4c + 2 row + column. transformers: at C (row + 2 column) + c.
    """
    channels = tensor.shape[-1] // 4
    pixels = tensor.unflatten(-1, (channels, 2, 2))  # [..., c, row, column]
    order = [*range(tensor.ndim - 1), tensor.ndim + 1, tensor.ndim, tensor.ndim - 1]  # [..., column, row, c]
    return pixels.permute(order).flatten(-3)


def swin_s_config() -> Any:
    """Configuration of the official detector: Swin-S, 100 queries, 80 classes."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        image_size=224,
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=256,
        mask_feature_size=256,
        hidden_dim=256,
        encoder_feedforward_dim=1024,
        dim_feedforward=2048,
        encoder_layers=6,
        decoder_layers=10,  # transformers counts the prediction before the first layer
        num_attention_heads=8,
        num_queries=100,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )


def convert_checkpoint(source: str | Path, folder: str | Path, *, config: Any = None) -> Path:
    """Writes the checkpoint file `source` of mmdet as a folder that `Mask2FormerDetector.load` takes.

    Args:
        config: of the network; the official one when None.

    Raises:
        FastgenError: the file cannot be read, or its tensors are not those of the network.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    from fastgen.evaluation.verifiers.hub import check_loaded

    source, folder = Path(source), Path(folder)
    check_writable(folder)
    tensors = _read(source)
    renamed = convert_state_dict(tensors)
    model, info = load_pretrained(
        Mask2FormerForUniversalSegmentation,
        None,
        config=config or swin_s_config(),
        state_dict=renamed,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing = [key for key in info["missing_keys"] if not any(part in key for part in UNUSED)]
    check_loaded("converter of mask2former", source, {**info, "missing_keys": missing})
    if unexpected := sorted(info["unexpected_keys"]):
        raise FastgenError(f"{source}: has {len(unexpected)} tensors too many, the first is {unexpected[0]!r}")
    model.save_pretrained(folder)
    atomic_write_json(folder / CONVERTED_FILE, {"source": source.name, "sha256": file_sha256(source)})
    return folder


def _read(source: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint file."""
    try:
        held = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FastgenError(f"{source}: cannot be read as a checkpoint: {reason}") from error
    tensors = held.get("state_dict", held) if isinstance(held, Mapping) else None
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise FastgenError(f"{source}: has no state dict")
    return {str(name): value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m fastgen.evaluation.geneval.convert")
    parser.add_argument("source", help=f"checkpoint of mmdet, {OFFICIAL_FILE}")
    parser.add_argument("folder", help="where the converted detector goes")
    chosen = parser.parse_args(arguments)
    try:
        convert_checkpoint(chosen.source, chosen.folder)
    except FastgenError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
