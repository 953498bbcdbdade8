"""What each method does for each family of models, tried on a tiny pipeline of it; `python support_table.py` writes
the table that `fastgen models` prints and docs/models.md shows."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
from micro_models import save_micro_janus
from stock_families import FAMILIES
from stock_table import made
from tiny_glm_image import tiny_whole_glm_image
from tiny_pipelines import quiet
from tiny_tokens import chameleon_pipeline, emu3_pipeline, llamagen_pipeline
from tiny_unets import ddim, tiny_dit

import fastgen
from fastgen.cli.models import FILE, METHODS, markdown
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.part import denoising_network
from fastgen.pipelines.accelerate.step_cache import StepCache
from fastgen.pipelines.accelerate.token_stage import TokenStage
from fastgen.pipelines.loading.load_options import LoRA
from fastgen.pipelines.search.denoisers.base import Settings, denoiser_of
from fastgen.pipelines.speculative import SpeculativeImagePipeline

DOCUMENT = Path(__file__).parents[2] / "docs/models.md"
CPU = torch.device("cpu")
#: Of the families that a search is tried on, those that are not variants of another one.
_VARIANTS = ("euler", "img2img", "inpaint", "pag", "controlnet", "true-guidance", "control", "fill", "kontext", "edit")
_VARIANTS += ("skipped-layers", "truncated-guidance", "meanflow")
DIFFUSION = [name for name in FAMILIES if not name.endswith(_VARIANTS)]
TOKENS: dict[str, Any] = {
    "janus": None,
    "emu3": emu3_pipeline,
    "chameleon": chameleon_pipeline,
    "llamagen": llamagen_pipeline,
}
NAMES = ["dit", *DIFFUSION, *TOKENS]


@cache
def _built(name: str) -> Any:
    """Built once: some builders draw their weights without a seed."""
    if name == "dit":
        pipe = tiny_dit(ddim())
        blocks = pipe.transformer.transformer_blocks
        for block in blocks[1:]:  # as in the published checkpoints
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
        return pipe
    if name == "janus":
        with tempfile.TemporaryDirectory() as folder:
            return quiet(fastgen.load_pipeline(str(save_micro_janus(Path(folder) / "janus")), method="speculative"))
    return quiet(TOKENS[name]()) if name in TOKENS else FAMILIES[name][0]()


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of the family that nothing was done to, and the arguments of a call of it."""
    call = {"prompt": "a red ring"} if name in TOKENS else {"class_labels": [1]}
    if name in FAMILIES:
        call = {"prompt": "a red circle", **FAMILIES[name][1]}
    return copy.deepcopy(_built(name)), call


def draw(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    steps = {} if isinstance(pipe, SpeculativeImagePipeline) else {"num_inference_steps": 2}
    torch.manual_seed(0)  # some pipelines draw without a generator
    images: torch.Tensor = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **steps, **call)[0]
    return torch.as_tensor(images).float()


def _same(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> None:
    assert torch.allclose(draw(pipe, call), stock, atol=2e-3)


def kernels(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    counts = fastgen.enable_kernels(pipe)
    _same(pipe, call, stock)
    fastgen.disable_kernels(pipe)
    _same(pipe, call, stock)
    return "yes" if counts.get("blocks") or counts.get("attention") else "decoder"


def search(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    given = {name: value for name, value in call.items() if name not in ("prompt", "class_labels")}
    if "class_labels" in call:
        denoiser: Any = denoiser_of(pipe)(pipe, call["class_labels"], Settings(2))
    else:
        denoiser = made(pipe, [call["prompt"]], given, 2)
    latents = denoiser.begin(torch.Generator().manual_seed(0), 0)
    with torch.no_grad():
        time, row = torch.full((1,), denoiser.times[0]), torch.zeros(1, dtype=torch.int64)
        assert denoiser.predict(latents, time, row).at(denoiser.final).isfinite().all()
    return "yes"


def chunking(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    chunked = fastgen.upcycle(pipe.transformer)
    fastgen.enable_dc(pipe, chunked, tail_drop=0.3)
    assert draw(pipe, call).isfinite().all()
    fastgen.disable_dc(pipe)
    _same(pipe, call, stock)
    return "trained"


def speculative(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    if type(pipe).__name__ == "GlmImagePipeline":
        pipe = tiny_whole_glm_image()  # its language model too

        def tokens() -> torch.Tensor:
            drawn: torch.Tensor = pipe.generate_prior_tokens(
                "ring", 64, 64, generator=torch.Generator().manual_seed(0)
            )[0]
            return drawn

        plain = tokens()
        with fastgen.accelerated(pipe, plan=[TokenStage()]):
            assert torch.equal(tokens(), plain)
        return "yes"
    if not isinstance(pipe, SpeculativeImagePipeline):
        pipe = SpeculativeImagePipeline(pipe, pipe.tokenizer)
    plain = draw(pipe, {**call, "temperature": 0.0, "tree": "plain"})
    assert torch.equal(draw(pipe, {**call, "temperature": 0.0, "tree": "jacobi-12"}), plain)
    return "yes"


def step_cache(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    part = StepCache()
    if (why := part.why_not(pipe)) is not None:
        raise FastgenError(why)
    undo = part.enable(pipe)
    assert draw(pipe, call).isfinite().all()
    undo()
    _same(pipe, call, stock)
    return "yes"


def offload(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if all(getattr(part, "_supports_group_offloading", True) for part in parts):
        pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
        found = "yes"
    else:
        found = "sequential"
        for part in parts:
            accelerate.cpu_offload(part, CPU)
        try:
            draw(pipe, call)
        except RuntimeError as error:  # weights that are used outside their layer's forward
            raise FastgenError("weights are used where they are not") from error
    _same(pipe, call, stock)
    return found


def lora(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    if not hasattr(pipe, "load_lora_weights"):
        raise FastgenError("diffusers loads no LoRA weights into it")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    model = denoising_network(pipe)
    linear = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "to_q" in name]
    twin = copy.deepcopy(model)
    twin.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=linear))
    layers = get_peft_model_state_dict(twin)
    unet = hasattr(pipe, "unet")
    with tempfile.TemporaryDirectory() as folder:
        kept = {"unet_lora_layers": convert_state_dict_to_diffusers(layers)} if unet else {}
        type(pipe).save_lora_weights(folder, **(kept or {"transformer_lora_layers": layers}))
        LoRA.parse(str(Path(folder) / "pytorch_lora_weights.safetensors")).load(pipe, "style")
        changed = draw(pipe, call)
    assert changed.isfinite().all() and not torch.equal(changed, stock)
    return "yes"


def compiling(pipe: Any, call: dict[str, Any], stock: torch.Tensor) -> str:
    if isinstance(pipe, SpeculativeImagePipeline):
        pipe.compile()
        with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
            _same(pipe, call, stock)
        return "yes"
    model = denoising_network(pipe)
    if not getattr(model, "_repeated_blocks", None):
        raise FastgenError("its denoiser names no repeated blocks")
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")  # traced as for any backend, without machine code
    _same(pipe, call, stock)
    return "yes"


TRIES: dict[str, Callable[[Any, dict[str, Any], torch.Tensor], str]] = {
    "kernels": kernels,
    "search": search,
    "chunking": chunking,
    "speculative": speculative,
    "step cache": step_cache,
    "offload": offload,
    "lora": lora,
    "compile": compiling,
}
#: What says that a method is not for a family; anything else is a fault.
_REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError)


def row(name: str, reasons: bool = False) -> dict[str, str]:
    """The line of a family, every method tried on a pipeline of its own."""
    pipe, call = pipeline(name)
    stock = draw(pipe, call)
    assert stock.isfinite().all() and float(stock.std()) > 0
    found = {"pipeline": type(pipe).__name__}
    if isinstance(pipe, SpeculativeImagePipeline):
        found["pipeline"] = type(pipe.model).__name__
    assert list(TRIES) == list(METHODS)
    for method, attempt in TRIES.items():
        pipe, call = pipeline(name)
        try:
            found[method] = attempt(pipe, call, stock)
        except _REFUSALS as error:
            found[method] = "no"
            if reasons:
                print(f"{name}: {method}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr, flush=True)
    return found


def write(rows: dict[str, dict[str, str]]) -> None:
    """The package's file, and the table of the page."""
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    before, _, after = DOCUMENT.read_text().split("<!-- table -->\n")
    DOCUMENT.write_text("<!-- table -->\n".join([before, markdown(rows), after]))


if __name__ == "__main__":
    write({each: row(each, reasons=True) for each in NAMES})
