"""The network of VQAScore: patches of a CLIP vision tower between two pieces of text in the encoder of a T5.

Loads zhiqiulin/clip-flant5-xxl (and -xl) into stock transformers classes. What its files contain was read off the
published model code, as the files themselves were not at hand: the T5 under transformers' own names, the projector as
`mm_projector.0` and `mm_projector.2`, and perhaps a copy of the frozen vision tower as
`vision_tower.vision_tower.vision_model.*`. Both cases of the latter load; anything else that is missing is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.hub import check_loaded, explained, part, read_tensors
from fastgen.io import read_object
from fastgen.pipelines.loading.weight_files import weight_map
from fastgen.pretrained import load_pretrained

__all__ = ["TOWER_USE", "CLIPFlanT5", "load_network", "vision_source"]

VISION_TOWER = "openai/clip-vit-large-patch14-336"
TOWER_USE = "copy it to vision_tower/ next to the weights"
_PROJECTOR, _TOWER = "mm_projector.", "vision_tower.vision_tower."


class CLIPFlanT5(nn.Module):
    """T5 that sees a picture among its encoder's tokens.

    Args:
        t5: the language model.
        vision: the CLIP tower.
        projector: from the tower's width to the T5's.
        start: token that the T5's decoder begins with.
        layer: which of the tower's hidden states is used; -2: what goes into the last layer.
    """

    def __init__(
        self,
        t5: T5ForConditionalGeneration,
        vision: CLIPVisionModel,
        projector: nn.Sequential,
        layer: int = -2,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.t5, self.vision, self.projector = t5, vision, projector
        self.layer, self.start = layer, start

    def forward(self, pixels: Tensor, before: Tensor, after: list[Tensor], labels: Tensor) -> Tensor:
        """Logits [k, l, vocabulary] of the answer.

        Args:
            pixels: [k, 3, H, W].
            before: int64 [b], tokens before the picture.
            after: k of int64 [a], tokens behind it, of any lengths.
            labels: int64 [l], the answer.
        """
        count = len(pixels)
        states = self.vision(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        patches = self.projector(states[:, 1:])  # without the class token
        ends = nn.utils.rnn.pad_sequence(after, batch_first=True)
        embed = self.t5.get_input_embeddings()
        inputs = torch.cat([embed(before).expand(count, -1, -1), patches, embed(ends)], 1)
        lengths = torch.tensor([inputs.shape[1] - ends.shape[1] + len(end) for end in after], device=inputs.device)
        mask = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        seen = nn.functional.pad(labels[:-1], (1, 0), value=self.start).expand(count, -1)
        return self.t5(
            inputs_embeds=inputs, attention_mask=mask.long(), decoder_input_ids=seen, use_cache=False
        ).logits


class _LanguageModel(T5ForConditionalGeneration):
    """T5 that is silent about the other parts of the checkpoint."""

    _keys_to_ignore_on_load_unexpected = [
        *(T5ForConditionalGeneration._keys_to_ignore_on_load_unexpected or ()),
        r"^mm_projector\.",
        r"^vision_tower\.",
        r"^embed_tokens\.",
    ]


def vision_source(folder: Path) -> str:
    """Where the vision tower and its image processor are: `vision_tower/` in the folder, or a Hub id."""
    return part(
        str(folder), "vision_tower", str(read_object(folder / "config.json").get("mm_vision_tower", VISION_TOWER))
    )


def load_network(verifier: str, folder: Path, device: torch.device, dtype: torch.dtype) -> CLIPFlanT5:
    """The network of a checkpoint folder.

    Raises:
        FastgenError: weights are missing, or it is a variant with another projector or other patches.
    """
    settings = read_object(folder / "config.json")
    projector_type = settings.get("mm_projector_type", "mlp2x_gelu")
    feature = settings.get("mm_vision_select_feature", "patch")
    if (projector_type, feature) != ("mlp2x_gelu", "patch"):
        raise FastgenError(
            f"verifier {verifier}: {folder} has projector {projector_type!r} on {feature!r} features, "
            "only 'mlp2x_gelu' on 'patch' is supported"
        )
    with explained(verifier, folder):
        known = {*T5Config().to_dict(), "tie_word_embeddings"} - {"model_type", "architectures", "dtype"}
        config = T5Config(**{name: value for name, value in settings.items() if name in known})
        t5, info = load_pretrained(_LanguageModel, folder, config=config, dtype=dtype, output_loading_info=True)
        check_loaded(verifier, folder, info)
        projector = _projector(_tensors(folder, lambda name: _PROJECTOR in name))
        tower = _tensors(folder, lambda name: _TOWER in name)
    source = vision_source(folder)
    with explained(verifier, source, TOWER_USE):
        vision, info = load_pretrained(CLIPVisionModel, source, dtype=dtype, output_loading_info=True)
        check_loaded(verifier, source, info)
    if tower:
        with explained(verifier, folder):
            vision.load_state_dict(_same_names(tower, vision))
    layer, start = settings.get("mm_vision_select_layer", -2), settings.get("decoder_start_token_id", 0)
    network = CLIPFlanT5(t5, vision, projector, int(layer), int(start))
    return network.to(device=device, dtype=dtype)


def _projector(tensors: dict[str, Tensor]) -> nn.Sequential:
    named = {name.split(_PROJECTOR)[1]: tensor for name, tensor in tensors.items()}
    if set(named) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
        raise ValueError(f"no projector of two layers among the weights, only {sorted(named)}")
    outer, inner = named["0.weight"].shape
    layers = nn.Sequential(nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, named["2.weight"].shape[0]))
    layers.load_state_dict(named)
    return layers


def _same_names(tower: dict[str, Tensor], vision: nn.Module) -> dict[str, Tensor]:
    """The tower's tensors under the names that this version of transformers has for them."""
    bare = {name.split(_TOWER)[1].removeprefix("vision_model."): tensor for name, tensor in tower.items()}
    bare = {name: tensor for name, tensor in bare.items() if not name.endswith("position_ids")}
    return {name: bare.pop(name.removeprefix("vision_model.")) for name in vision.state_dict()} | bare


def _tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of wanted names, from whichever of the checkpoint's files they are in."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            places = weight_map(folder / index)
            files = sorted({file for name, file in places.items() if wanted(name)})
            break
    else:
        files = [file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).is_file()][:1]
    found: dict[str, Tensor] = {}
    for file in files:
        found |= read_tensors(folder / file, wanted)
    return found
