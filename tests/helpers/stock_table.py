"""What a search of each family of pipelines is tried with; `python stock_table.py` writes the table in the docs."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
from stock_families import FAMILIES, family

from fastgen.pipelines.search.denoisers.base import Settings
from fastgen.pipelines.search.denoisers.stock import StockDenoiser
from fastgen.pipelines.search.interpolants import Tabulated
from fastgen.pipelines.search.names import POLICIES
from fastgen.pipelines.search.samplers import Sampler

STEPS = 4
PROMPTS = ["a red circle", "two blue squares and one green star"]
SEEDS = [3, 4]
DIMENSIONS = ("plain", "prompts", "unguided", "wide", "candidates", "embeddings", "bf16", "callback")
DOCUMENT = Path(__file__).parents[2] / "docs/search-pipelines.md"

#: Classes that a search refuses, and what it does not find.
REFUSED = {
    "IFPipeline": "start noise (no prepare_latents)",
    "StableCascadeCombinedPipeline": "start noise (no prepare_latents)",
    "KandinskyCombinedPipeline": "start noise (no prepare_latents)",
    "WuerstchenCombinedPipeline": "start noise (no prepare_latents)",
    "VisualClozePipeline": "start noise (no prepare_latents)",
}


def call_of(name: str, dimension: str) -> dict[str, Any] | None:
    """Arguments of the family's call in this dimension; None: it has no such argument."""
    pipe, call = family(name), dict(FAMILIES[name][1])
    accepted = inspect.signature(type(pipe).__call__).parameters
    if dimension == "unguided":
        if "true_cfg_scale" in accepted:
            return {**call, "true_cfg_scale": 1.0}
        off = 0.0 if name.startswith(("z-image", "krea2")) else 1.0
        return {**call, "guidance_scale": off} if "guidance_scale" in accepted else None
    if dimension == "wide":
        # The tokens that GLM-Image is given are counted for one size.
        fixed = "width" not in call or "prior_token_ids" in call
        return None if fixed else {**call, "width": call["width"] + call["width"] // 2}
    if dimension == "prompts" and "negative_prompt" in accepted and not name.startswith("prx"):
        return {**call, "negative_prompt": ["bad", "a yellow triangle"]}
    if dimension == "embeddings":
        return embedded(pipe, call)
    if dimension == "callback" and "callback_on_step_end" not in accepted:
        return None
    return call


def embedded(pipe: Any, call: dict[str, Any]) -> dict[str, Any] | None:
    """The call with what `encode_prompt` says of the first prompt in place of texts."""
    if not hasattr(pipe, "encode_prompt"):
        return None
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(pipe).encode_prompt))))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)][-1]
    parts = returned.elts if isinstance(returned, ast.Tuple) else [returned]
    names = [part.id if isinstance(part, ast.Name) else "" for part in parts]
    found: list[Any] = []
    original = pipe.encode_prompt

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    vars(pipe)["encode_prompt"] = spy
    try:
        stock(pipe, PROMPTS[0], 0, call)
    finally:
        del vars(pipe)["encode_prompt"]
    accepted = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {}
    for prefix, values in zip(("", "negative_"), found, strict=False):
        values = values if isinstance(values, tuple) else (values,)
        given |= {prefix + name: value for name, value in zip(names, values, strict=True) if value is not None}
    given = {name: value for name, value in given.items() if name in accepted}
    if not any(name.startswith("prompt_embeds") for name in given):
        return None
    if "negative_prompt" in accepted and "negative_prompt_embeds" in given:
        given["negative_prompt"] = None  # some have a text as its default, and take one of the two
    return {**{name: value for name, value in call.items() if name != "negative_prompt"}, **given}


def made(pipe: Any, prompts: list[str], call: dict[str, Any], steps: int = STEPS) -> StockDenoiser:
    return StockDenoiser(pipe, prompts, Settings(steps, extra=call))


def drawn(denoiser: StockDenoiser, seeds: list[int], which: list[int] | None = None) -> torch.Tensor:
    """Pictures [B, 3, H, W] of the deterministic path, of prompts `which` (one each) together."""
    sampler = Sampler(denoiser.interpolant, denoiser.times)
    rows = torch.arange(len(seeds)) if which is None else torch.tensor(which)
    starts = [
        denoiser.begin(torch.Generator().manual_seed(seed), row)
        for row, seed in zip(rows.tolist(), seeds, strict=True)
    ]
    latents = torch.cat(starts)
    for index, time in enumerate(denoiser.times):
        said = denoiser.predict(latents, torch.full((len(seeds),), time, dtype=torch.float64), rows)
        if index < sampler.transitions:
            latents = sampler.step(latents, said, index, None)
    with torch.no_grad():
        return denoiser.decode_of(said.at(denoiser.final), rows)


def stock(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    names = {**call, **call.get("pipeline_kwargs", {})}
    text = {} if any(name.startswith("prompt_embeds") for name in names) else {"prompt": prompt}
    images: torch.Tensor = pipe(num_inference_steps=STEPS, generator=generator, output_type="pt", **text, **call)[0]
    return images[0].float()


def errors(name: str, dimension: str) -> list[tuple[float, float]]:
    """Of each picture its greatest difference from the stock one, and what rounding may make of it; empty: the
    dimension is not the family's."""
    pipe, call = family(name), call_of(name, dimension)
    if call is None:
        return []
    half = dimension == "bf16"
    texts = PROMPTS if dimension == "prompts" else PROMPTS[:1]
    rows, seeds = ([0, 0], SEEDS) if dimension == "candidates" else (list(range(len(texts))), SEEDS[: len(texts)])
    if half:
        whole, pipe = stock(pipe, PROMPTS[0], SEEDS[0], call), halved(pipe)
        try:
            stock(pipe, PROMPTS[0], SEEDS[0], call)
        except (AssertionError, RuntimeError):  # Kandinsky 5, inpainting with Z-Image
            return []
    elif dimension in ("wide", "embeddings"):
        try:
            stock(pipe, PROMPTS[0], SEEDS[0], call)
        except (ValueError, RuntimeError):  # the stock call does not take this size, or asks for more embeddings
            return []
    torch.manual_seed(0)  # some pipelines draw without a generator
    denoiser = made(pipe, texts, call)
    if dimension == "candidates" and not (denoiser.entries[0].batches and not denoiser.entries[0].masked):
        rows, seeds = rows[:1], seeds[:1]  # what its conditions need is drawn once, for the first candidate
    ours = drawn(denoiser, seeds, rows)
    found = []
    for place, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        one = {
            key: value[row] if key == "negative_prompt" and len(texts) > 1 else value for key, value in call.items()
        }
        torch.manual_seed(0)
        theirs = stock(pipe, texts[row], seed, one)
        spread = float(theirs.std())
        assert spread > 0.04, "a picture of one colour would show nothing"
        assert theirs.shape == ours[place].shape
        # In half precision the pipeline rounds its latents at each step, and a search keeps them whole.
        # The random network of Kandinsky 3 amplifies rounding.
        bound = 1e-3 if name == "kandinsky3" else 5e-5
        allowed = 2 * float((whole - theirs).abs().mean()) if half else bound * max(1.0, spread)
        difference = (ours[place] - theirs).abs()
        found.append((float(difference.mean() if half else difference.max()), allowed))
    return found


def halved(pipe: Any) -> Any:
    """The pipeline in bfloat16, with models of its own."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    config = {name: value for name, value in pipe.config.items() if not name.startswith("_") and name not in parts}
    takes = inspect.signature(type(pipe).__init__).parameters
    twin = type(pipe)(**parts, **{name: value for name, value in config.items() if name in takes})
    vars(twin).update({name: value for name, value in vars(pipe).items() if name.startswith(("prompt_", "default_"))})
    vars(twin).update(
        {name: value for name, value in vars(pipe).items() if name in ("resolutions", "tokenizer_max_length")}
    )
    twin.set_progress_bar_config(disable=True)
    return twin.to(torch.bfloat16)


def line(name: str) -> str:
    """Of the table."""
    pipe = family(name)
    denoiser = made(pipe, PROMPTS[:1], FAMILIES[name][1], 2)
    flow = not isinstance(denoiser.interpolant, Tabulated)
    missing = [policy for policy, kind in POLICIES.items() if kind.anywhere and not flow]
    policies = "all" if not missing else f"all but {', '.join(missing)}"
    start = denoiser.begin(torch.Generator().manual_seed(0), 0)
    with torch.no_grad():
        denoiser.predict(
            torch.cat([start, start]), torch.full((2,), denoiser.times[0]), torch.zeros(2, dtype=torch.int64)
        )
    together = "yes" if denoiser.entries[0].batches and not denoiser.entries[0].masked else "no"
    return f"| {name} | `{type(pipe).__name__}` | yes | yes | {together} | {policies} |"


def table() -> str:
    refused = [f"| `{name}` | {what} |" for name, what in REFUSED.items()]
    return "\n".join([HEAD, *map(line, FAMILIES), BETWEEN, *refused, ""])


HEAD = """# Pipelines that can be searched

Each line is a tiny pipeline with random weights that the tests search: single evaluations of its model, put together
by the search, give the picture of the stock call up to float32 rounding (5e-5; Kandinsky 3: 1e-3), with guidance on
and off, lists of prompts and negative prompts, sizes that are not square, several candidates together, and embeddings
instead of texts, as far as the stock call takes them; in bfloat16 up to the rounding of bfloat16. "Together":
candidates of one prompt share forward passes.

| family | pipeline | accepted | equal to stock | together | policies |
| --- | --- | --- | --- | --- | --- |"""
BETWEEN = """
DiT has its own adapter, Z-Image one that this table does not use. `callback_on_step_end` is refused in a search,
which has no steps that follow each other; without a policy it is the stock call's. OmniGen is not in the table: its
scheduler inverts the noise levels (`invert_sigmas`), which a search refuses by name. Refused as well:

| pipeline | not found |
| --- | --- |"""

if __name__ == "__main__":
    DOCUMENT.write_text(table())
