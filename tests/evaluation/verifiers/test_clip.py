"""CLIPScore, PickScore and the aesthetic predictor on a tiny CLIPModel, against calling that model by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_verifiers import PROMPTS, save_clip
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.clip import Aesthetic, CLIPScore, PickScore, aesthetic_head
from fastgen.evaluation.verifiers.pixels import processed


def cosine(folder: Path, image: Tensor, prompt: str) -> float:
    """By the model's own forward pass on one pair, in float64."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folder)(prompt, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels.double(), input_ids=tokens.input_ids)
    return float(torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds))


def counted(module: Any, name: str) -> list[int]:
    """Note the batch size of every call of a sub-module."""
    calls: list[int] = []

    def note(own: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        calls.append(len(next(iter(keywords.values()))))

    getattr(module, name).register_forward_pre_hook(note, with_kwargs=True)
    return calls


def test_pick_score_is_the_cosine(clip_folder: Path, images: Tensor) -> None:
    verifier = PickScore.load(str(clip_folder), batch_size=4)
    wanted = torch.tensor([cosine(clip_folder, *pair) for pair in zip(images, PROMPTS, strict=True)])
    found = verifier.score(images, PROMPTS)
    assert wanted.std() > 0.02
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (verifier.name, verifier.range, verifier.weights) == ("pick-score", (-1.0, 1.0), str(clip_folder))


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(clip_folder: Path, images: Tensor) -> None:
    cosines = PickScore.load(str(clip_folder)).score(images, PROMPTS)
    inverted = PROMPTS[::-1]
    both = torch.cat([cosines, PickScore.load(str(clip_folder)).score(images, inverted)])
    assert both.min() < 0 < both.max()
    found = CLIPScore.load(str(clip_folder)).score(torch.cat([images, images]), PROMPTS + inverted)
    torch.testing.assert_close(found, (100 * both).clamp(min=0), atol=1e-3, rtol=0)


def test_a_long_prompt_is_cut(clip_folder: Path, images: Tensor) -> None:
    verifier = PickScore.load(str(clip_folder))
    long = "abcdefghij " * 10
    assert verifier.score(images[:1], [long]).item() == pytest.approx(cosine(clip_folder, images[0], long), abs=1e-5)


def test_the_text_tower_runs_once_for_a_prompt(clip_folder: Path, images: Tensor) -> None:
    verifier = CLIPScore.load(str(clip_folder), batch_size=6)
    texts, pictures = counted(verifier.clip, "text_model"), counted(verifier.clip, "vision_model")
    for _ in range(3):
        verifier.score(images, PROMPTS)
    verifier.score(images, [*PROMPTS[:5], "new"])
    assert texts == [len(set(PROMPTS)), 1]
    assert pictures == [6, 6, 6, 6]


def test_a_batch_gives_what_one_by_one_gives(clip_folder: Path, images: Tensor) -> None:
    verifier = PickScore.load(str(clip_folder), cache_size=0)
    alone = torch.cat([verifier.score(images[i : i + 1], [PROMPTS[i]]) for i in range(6)])
    torch.testing.assert_close(verifier.score(images, PROMPTS), alone, atol=1e-6, rtol=0)


def test_torchvision_resizes_as_pillow_does_but_for_one_level(images: Tensor) -> None:
    sizes: dict[str, Any] = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    plain: dict[str, Any] = {"do_normalize": False, "do_rescale": False}
    ours = processed(CLIPImageProcessor(**sizes, **plain), images)["pixel_values"]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pillow = CLIPImageProcessorPil(**sizes, **plain)(images=pictures, return_tensors="pt")["pixel_values"]
    assert ours.shape == pillow.shape == (6, 3, 20, 20)
    assert (ours.float() - pillow.float()).abs().max() <= 1
    through = processed(CLIPImageProcessorPil(**sizes, **plain), images)["pixel_values"]
    assert torch.equal(through, pillow)


# --- aesthetic ---------------------------------------------------------------------------------------------------


@pytest.fixture
def head_tensors() -> dict[str, Tensor]:
    """As the published file has them, dropout layers counted; smaller."""
    generator = torch.Generator().manual_seed(1)
    widths = [12, 10, 8, 6, 4, 1]
    tensors = {}
    for number, inner, outer in zip([0, 2, 4, 6, 7], widths, widths[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(outer, inner, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(outer, generator=generator)
    return tensors


def save_pth(tensors: dict[str, Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "sac+logos+ava1-l14-linearMSE.pth")


def save_safetensors(tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "aesthetic-model.safetensors")


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
def test_aesthetic_is_the_layers_on_the_normalised_embedding(
    head_tensors: dict[str, Tensor], save: Callable[..., None], images: Tensor, tmp_path: Path
) -> None:
    clip = save_clip(tmp_path / "clip")
    save(head_tensors, tmp_path)
    verifier = Aesthetic.load(str(tmp_path), batch_size=4)
    model = CLIPModel.from_pretrained(clip).double()
    pixels = CLIPImageProcessor.from_pretrained(clip)(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        values = model.visual_projection(model.vision_model(pixel_values=pixels.double()).pooler_output)
        values = values / values.norm(dim=-1, keepdim=True)
        for number in (0, 2, 4, 6, 7):
            weight, bias = (head_tensors[f"layers.{number}.{kind}"].double() for kind in ("weight", "bias"))
            values = values @ weight.T + bias
    found = verifier.score(images, PROMPTS)
    assert values.std() > 0.1
    torch.testing.assert_close(found, values[:, 0].float(), atol=1e-3, rtol=1e-5)
    assert torch.equal(found, verifier.score(images, [""] * 6))
    assert verifier.range is None


def test_layers_that_do_not_fit_are_refused(head_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    save_pth({**head_tensors, "layers.0.weight": torch.zeros(10, 7)}, tmp_path)
    with pytest.raises(FastgenError, match="takes embeddings of 7 numbers, .*clip gives 12"):
        Aesthetic.load(str(tmp_path))
    save_pth({**head_tensors, "layers.4.weight": torch.zeros(6, 9)}, tmp_path)
    with pytest.raises(FastgenError, match="verifier aesthetic: .*cannot be loaded: .*layers.4: takes 9 values"):
        Aesthetic.load(str(tmp_path))
    with pytest.raises(ValueError, match="do not end in one score"):
        aesthetic_head({})


# --- loading -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_weight_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FastgenError, match=r"verifier pick-score: .* lacks 1 weights, .*text_projection"):
        PickScore.load(str(tmp_path))


def test_a_damaged_checkpoint_is_an_error_in_one_line(clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FastgenError, match="verifier clip-score: .* cannot be loaded") as caught:
        CLIPScore.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_half_precision_weights(clip_folder: Path, images: Tensor) -> None:
    half = PickScore.load(str(clip_folder), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    exact = PickScore.load(str(clip_folder)).score(images, PROMPTS)
    torch.testing.assert_close(half.score(images, PROMPTS), exact, atol=0.1, rtol=0)
