"""The converter from mmdet: names by its published module structure, values against its own arithmetic.

The published checkpoint is not available here; proven is that every tensor of that structure finds its place and
that the three differing layouts are turned right; not that the published file has exactly this structure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_mask2former import tiny_mask2former
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.convert import (
    convert_checkpoint,
    convert_state_dict,
    main,
    merged_channels,
    swin_s_config,
)
from fastgen.evaluation.geneval.mask2former import Mask2FormerDetector


def pair(*shape: int) -> dict[str, tuple[int, ...]]:
    return {"weight": shape, "bias": shape[:1]}


def mmdet_shapes(
    width: int, depths: list[int], heads: list[int], hidden: int, ffn: tuple[int, int], encoders: int, decoders: int,
    queries: int, offset_heads: int, levels: int = 3, points: int = 4, classes: int = 80,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Names and shapes of mmdet 2.27's Mask2Former with Swin, module by module as its constructors make them."""
    out: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, shapes: dict[str, tuple[int, ...]]) -> None:
        out.update({f"{prefix}.{name}": shape for name, shape in shapes.items()})

    add("backbone.patch_embed.projection", pair(width, 3, 4, 4))
    add("backbone.patch_embed.norm", pair(width))
    sizes = [width * 2**stage for stage in range(4)]
    for stage, (size, depth, count) in enumerate(zip(sizes, depths, heads, strict=True)):
        for block in range(depth):
            home = f"backbone.stages.{stage}.blocks.{block}"
            add(f"{home}.norm1", pair(size))
            add(f"{home}.attn.w_msa", {"relative_position_bias_table": (169, count)})
            add(f"{home}.attn.w_msa", {"relative_position_index": (49, 49)})
            add(f"{home}.attn.w_msa.qkv", pair(3 * size, size))
            add(f"{home}.attn.w_msa.proj", pair(size, size))
            add(f"{home}.norm2", pair(size))
            add(f"{home}.ffn.layers.0.0", pair(4 * size, size))
            add(f"{home}.ffn.layers.1", pair(size, 4 * size))
        if stage < 3:
            add(f"backbone.stages.{stage}.downsample.norm", pair(4 * size))
            add(f"backbone.stages.{stage}.downsample.reduction", {"weight": (2 * size, 4 * size)})
        add(f"backbone.norm{stage}", pair(size))
    decoder = "panoptic_head.pixel_decoder"
    for level, size in enumerate(reversed(sizes[1:])):
        add(f"{decoder}.input_convs.{level}.conv", pair(hidden, size, 1, 1))
        add(f"{decoder}.input_convs.{level}.gn", pair(hidden))
    spots = offset_heads * levels * points
    for layer in range(encoders):
        home = f"{decoder}.encoder.layers.{layer}"
        add(f"{home}.attentions.0.sampling_offsets", pair(2 * spots, hidden))
        add(f"{home}.attentions.0.attention_weights", pair(spots, hidden))
        add(f"{home}.attentions.0.value_proj", pair(hidden, hidden))
        add(f"{home}.attentions.0.output_proj", pair(hidden, hidden))
        add(f"{home}.ffns.0.layers.0.0", pair(ffn[0], hidden))
        add(f"{home}.ffns.0.layers.1", pair(hidden, ffn[0]))
        for norm in range(2):
            add(f"{home}.norms.{norm}", pair(hidden))
    add(decoder, {"level_encoding.weight": (levels, hidden)})
    add(f"{decoder}.lateral_convs.0", {"conv.weight": (hidden, width, 1, 1), "gn.weight": (hidden,)})
    add(f"{decoder}.lateral_convs.0", {"gn.bias": (hidden,)})
    add(f"{decoder}.output_convs.0", {"conv.weight": (hidden, hidden, 3, 3), "gn.weight": (hidden,)})
    add(f"{decoder}.output_convs.0", {"gn.bias": (hidden,)})
    add(f"{decoder}.mask_feature", pair(hidden, hidden, 1, 1))
    for layer in range(decoders):
        home = f"panoptic_head.transformer_decoder.layers.{layer}"
        for attention in range(2):
            inner = {"in_proj_weight": (3 * hidden, hidden), "in_proj_bias": (3 * hidden,)}
            add(f"{home}.attentions.{attention}.attn", inner)
            add(f"{home}.attentions.{attention}.attn.out_proj", pair(hidden, hidden))
        add(f"{home}.ffns.0.layers.0.0", pair(ffn[1], hidden))
        add(f"{home}.ffns.0.layers.1", pair(hidden, ffn[1]))
        for norm in range(3):
            add(f"{home}.norms.{norm}", pair(hidden))
    add("panoptic_head.transformer_decoder.post_norm", pair(hidden))
    for name, rows in (("query_embed", queries), ("query_feat", queries), ("level_embed", levels)):
        add(f"panoptic_head.{name}", {"weight": (rows, hidden)})
    add("panoptic_head.cls_embed", pair(classes + 1, hidden))
    for layer in (0, 2, 4):
        add(f"panoptic_head.mask_embed.{layer}", pair(hidden, hidden))
    return out


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    """Of `tiny_mask2former`."""
    return mmdet_shapes(8, [1, 2, 1, 1], [1, 2, 2, 2], 32, (48, 48), 1, 1, 12, 4)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.zeros(shape, dtype=torch.long) if name.endswith("index")
        else 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmdet") / "mask2former.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": random_tensors(tiny_shapes())}, path)
    return path


def test_every_tensor_of_the_official_network_finds_its_place() -> None:
    """Names and shapes at the real size, against transformers' own network on the meta device."""
    from transformers import Mask2FormerForUniversalSegmentation

    shapes = mmdet_shapes(96, [2, 2, 18, 2], [3, 6, 12, 24], 256, (1024, 2048), 6, 9, 100, 8)
    found = convert_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(swin_s_config())
    own = sum(p.numel() for name, p in model.named_parameters() if ".swin.layernorm." not in name)
    assert sum(tensor.numel() for tensor in found.values()) == own
    assert len(found) == len({*found}) and not any("index" in name for name in found)
    assert found["class_predictor.weight"].shape == (81, 256)
    assert found["model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias"].shape == (256,)


def test_converted_checkpoint_is_a_detector(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_mask2former().config
    folder = convert_checkpoint(checkpoint, tmp_path / "out", config=config)
    detector = Mask2FormerDetector.load(str(folder))
    assert (detector.name, detector.benchmark) == ("mmdet-converted", "GenEval (converted M2F)")
    tensors, state = random_tensors(tiny_shapes()), dict(detector.model.named_parameters())
    home = "panoptic_head.transformer_decoder.layers.0."
    layer = detector.model.model.transformer_module.decoder.layers[0]
    assert torch.equal(layer.cross_attn.in_proj_weight, tensors[home + "attentions.0.attn.in_proj_weight"])
    stacked = torch.cat([layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight])
    assert torch.equal(stacked, tensors[home + "attentions.1.attn.in_proj_weight"])
    for name, norm in (("norms.0", "cross_attn_layer_norm"), ("norms.1", "self_attn_layer_norm")):
        assert torch.equal(getattr(layer, norm).weight, tensors[f"{home}{name}.weight"])
    assert torch.equal(layer.final_layer_norm.bias, tensors[home + "norms.2.bias"])
    used = {tensor.data_ptr() for tensor in state.values()}
    assert len(used) == len(state)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert len(detector.detect([image])[0]) == 100


def test_self_attention_equals_that_of_mmdet(checkpoint: Path, tmp_path: Path) -> None:
    """mmdet's is `nn.MultiheadAttention` with positions added to query and key."""
    tensors = random_tensors(tiny_shapes())
    home = "panoptic_head.transformer_decoder.layers.0.attentions.1.attn."
    theirs = nn.MultiheadAttention(32, 4).eval()
    theirs.load_state_dict({name.removeprefix(home): value for name, value in tensors.items() if home in name})
    model = Mask2FormerDetector.load(str(convert_checkpoint(checkpoint, tmp_path, config=tiny_mask2former().config)))
    ours = model.model.model.transformer_module.decoder.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    x, position = torch.randn(12, 1, 32, generator=generator), torch.randn(12, 1, 32, generator=generator)
    with torch.no_grad():
        wanted = theirs(x + position, x + position, x)[0]
        found = ours(hidden_states=x, position_embeddings=position)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_window_attention_equals_that_of_mmdet(checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(tiny_shapes())
    home = "backbone.stages.1.blocks.0.attn.w_msa."
    model = Mask2FormerDetector.load(str(convert_checkpoint(checkpoint, tmp_path, config=tiny_mask2former().config)))
    ours = model.model.model.pixel_level_module.encoder.swin.encoder.layers[1].blocks[0].attention
    x = torch.randn(3, 49, 16, generator=torch.Generator().manual_seed(1))
    # mmdet: one product for query, key and value; index of the bias table from row and column offsets.
    qkv = (x @ tensors[home + "qkv.weight"].T + tensors[home + "qkv.bias"]).reshape(3, 49, 3, 2, 8)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    place = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None] + 6
    bias = tensors[home + "relative_position_bias_table"][offset[0] * 13 + offset[1]].permute(2, 0, 1)
    weights = (query @ key.transpose(-2, -1) / 8**0.5 + bias).softmax(-1)
    wanted = (weights @ value).transpose(1, 2).reshape(3, 49, 16)
    wanted = wanted @ tensors[home + "proj.weight"].T + tensors[home + "proj.bias"]
    with torch.no_grad():
        found = ours(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, wanted, atol=1e-5, rtol=1e-5)


def test_patch_merging_equals_that_of_mmdet(checkpoint: Path, tmp_path: Path) -> None:
    """mmdet: `nn.Unfold` over 2x2 pixels, norm, linear."""
    tensors = random_tensors(tiny_shapes())
    home = "backbone.stages.0.downsample."
    model = Mask2FormerDetector.load(str(convert_checkpoint(checkpoint, tmp_path, config=tiny_mask2former().config)))
    ours = model.model.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    x = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(1))
    unfolded = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    norm = (tensors[home + "norm.weight"], tensors[home + "norm.bias"])
    wanted = nn.functional.layer_norm(unfolded, (32,), *norm) @ tensors[home + "reduction.weight"].T
    with torch.no_grad():
        found = ours(x.flatten(2).transpose(1, 2), (6, 10))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_merged_channels_by_hand() -> None:
    # Two channels, mmdet's order c0(00 01 10 11) c1(00 01 10 11).
    given = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert merged_channels(given).tolist() == [0, 10, 2, 12, 1, 11, 3, 13]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.stages.0.blocks.0.attn.w_msa.extra.weight": torch.zeros(1)}, "is no tensor of mmdet"),
        ({"panoptic_head.cls_embed.weight": torch.zeros(134, 32)}, "wrong shape"),
        ({"panoptic_head.cls_embed.weight": None}, "lacks 1 weights.*class_predictor.weight"),
        ({"backbone.stages.3.blocks.7.norm1.weight": torch.zeros(64)}, "tensors too many"),
    ],
)
def test_other_networks_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    tensors = random_tensors(tiny_shapes()) | change
    torch.save({name: value for name, value in tensors.items() if value is not None}, tmp_path / "m.pth")
    with pytest.raises(FastgenError, match=message):
        convert_checkpoint(tmp_path / "m.pth", tmp_path / "out", config=tiny_mask2former().config)
    assert not (tmp_path / "out" / "fastgen-mmdet.json").exists()


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.pth").write_bytes(b"nonsense")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (("m.pth", "cannot be read"), ("list.pth", "no state dict"), ("none.pth", "cannot be read")):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / name), str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert message in error and name in error and error.count("\n") == 1
