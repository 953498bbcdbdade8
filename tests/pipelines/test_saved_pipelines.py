"""A speculative pipeline that is saved and loaded draws the same tokens, whatever model and parts it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from micro_models import save_micro_janus
from tiny_tokens import chameleon, emu3, llamagen

import fastgen
from fastgen.drafters.calibration import Calibration, Level
from fastgen.drafters.drafter import describe
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.targets import Target, registry, target_of
from fastgen.errors import FastgenError
from fastgen.models.llamagen import LlamaGen
from fastgen.pipelines.speculative import SpeculativeImagePipeline

OPTIONS: dict[str, dict[str, Any]] = {"emu3": {"size": [3, 4], "negative": "a"}, "chameleon": {"size": [2, 3]}}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    janus: Any = fastgen.load_pipeline(str(save_micro_janus(tmp_path_factory.mktemp("janus"))))
    models = {"chameleon": chameleon(), "emu3": emu3(), "llamagen": llamagen()}
    made = {name: target_of(each.model, each.tokenizer, **OPTIONS.get(name, {})) for name, each in models.items()}  # type: ignore[attr-defined]
    return {**made, "janus": target_of(janus.model, janus.tokenizer)}


def eagle(target: Target) -> dict[str, Any]:
    levels = (Level(1.0, 0.1, 3.0, 2.0, 0.5, (1, 1, 1)),)
    return {
        "drafter": EagleDrafter.for_target(target, heads=2),
        "heads": WindowHeads.for_target(target, window=4, width=16),
        "calibration": Calibration(levels, {"target": describe(target)}),
    }


PARTS: dict[str, Callable[[Target], dict[str, Any]]] = {
    "model": lambda _: {},
    "eagle": eagle,
    "medusa": lambda target: {"drafter": MedusaDrafter.for_target(target)},
    "heads": lambda target: {"heads": WindowHeads.for_target(target, window=4, width=16)},
}
TREES = {"model": "jacobi-3", "eagle": "2-1", "medusa": "chain-2", "heads": "heads-3"}


def from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded by a Hub id whose snapshot is the folder."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    return fastgen.load_pipeline("owner/name", method="speculative")


LOADERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "from_pretrained": lambda folder, _: SpeculativeImagePipeline.from_pretrained(folder),
    "load_pipeline": lambda folder, _: fastgen.load_pipeline(str(folder), method="speculative"),
    "hub": from_the_hub,
}


#: What the default run takes of all.
QUICK = [("chameleon", "medusa"), ("emu3", "heads"), ("janus", "eagle"), ("llamagen", "model"), ("llamagen", "eagle")]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        pytest.param(name, parts, marks=[] if (name, parts) in QUICK else pytest.mark.slow)
        for name in ("chameleon", "emu3", "janus", "llamagen")
        for parts in PARTS
    ],
)
def test_a_saved_pipeline_draws_the_same_tokens(
    name: str, parts: str, targets: dict[str, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: Any = targets[name]
    torch.manual_seed(0)
    made = PARTS[parts](target)
    pipe = SpeculativeImagePipeline(target.model, target.tokenizer, options=OPTIONS.get(name), **made)
    pipe.save_pretrained(tmp_path)

    def drawn(each: Any) -> torch.Tensor:
        given = {"guidance_scale": 2.0, "tree": TREES[parts], "output_type": "tokens"}
        tokens: torch.Tensor = each("a red ring", generator=torch.Generator().manual_seed(0), **given).tokens
        return tokens

    expected = drawn(pipe)
    for loader, load in LOADERS.items():
        loaded = load(tmp_path, monkeypatch)
        assert loaded.options == OPTIONS.get(name, {}), loader
        assert {part for part, held in loaded.components.items() if held is not None} >= set(made) - {"calibration"}
        assert loaded.calibration == pipe.calibration, loader
        assert torch.equal(drawn(loaded), expected), loader


@pytest.mark.parametrize("name", ["chameleon", "emu3", "janus", "llamagen"])
def test_weights_in_16_bits_are_saved_with_their_variant(
    name: str, targets: dict[str, Target], tmp_path: Path
) -> None:
    target: Any = targets[name]
    options = OPTIONS.get(name)
    SpeculativeImagePipeline(target.model, target.tokenizer, options=options).save_pretrained(tmp_path, variant="fp16")
    assert all(".fp16." in file.name for file in tmp_path.rglob("*.safetensors"))
    given: dict[str, Any] = {"variant": "fp16", "torch_dtype": torch.bfloat16}
    loaded: list[Any] = [fastgen.load_pipeline(str(tmp_path), variant="fp16", dtype="bfloat16", method="speculative")]
    if name == "llamagen":
        with pytest.raises(FastgenError, match="variant: .* holds a LlamaGen; call fastgen.load_pipeline"):
            SpeculativeImagePipeline.from_pretrained(tmp_path, **given)
        loaded.append(
            SpeculativeImagePipeline(
                LlamaGen.from_pretrained(tmp_path / "model", torch.bfloat16, "fp16"), target.tokenizer
            )
        )
    else:
        loaded.append(SpeculativeImagePipeline.from_pretrained(tmp_path, **given))
    for each in loaded:
        assert each.target.dtype == torch.bfloat16
        for key, value in target.model.state_dict().items():
            assert torch.allclose(each.model.state_dict()[key].float(), value.float(), rtol=2**-7), key


def test_a_model_that_cannot_be_saved_is_refused_before_anything_is_written(
    targets: dict[str, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that the user registered; diffusers would write a folder without it."""

    class Own(torch.nn.Module):
        pass

    monkeypatch.setitem(registry._FACTORIES, "Own", lambda model, tokenizer: targets["emu3"])
    pipe = SpeculativeImagePipeline(Own(), targets["emu3"].tokenizer)  # type: ignore[attr-defined]
    with pytest.raises(FastgenError, match="model: Own is no ModelMixin"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
