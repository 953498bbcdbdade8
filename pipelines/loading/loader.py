"""Loading a model by name, folder or Hub id, with every check that can be made before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import AutoTokenizer

from fastgen.accounting import phase
from fastgen.checks import check_choice
from fastgen.errors import FastgenError, one_line
from fastgen.models.chat_templates import check_chat_template
from fastgen.pipelines.generation import set_checkpoint
from fastgen.pipelines.loading.checkpoint import Checkpoint, denoiser_name, download, find_checkpoint, find_drafter
from fastgen.pipelines.loading.faults import explained
from fastgen.pipelines.loading.load_options import LoadOptions, LoRA
from fastgen.pipelines.loading.memory import check_memory, free_memory, weight_sizes
from fastgen.pipelines.loading.networks import component_class, empty_network, load_network
from fastgen.pipelines.schema import SETTINGS
from fastgen.pipelines.settings import pipeline_class, resolve_settings
from fastgen.pretrained import load_pretrained

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["load_checkpoint", "load_pipeline", "resolve_device"]

#: Weight types that a user may ask for.
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_pipeline(
    model: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    method: str | None = None,
    drafter: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    scheduler: str | None = None,
    loras: Iterable[str | LoRA] | str | None = None,
    offload: str = "none",
    vae_tiling: bool = False,
    quantize: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, ready to be called.

    Args:
        model: "tiny", "tiny-janus", "small-dc" … (embedded), a folder of a diffusers pipeline or of a model of
            transformers that draws tokens (Janus, Emu3, Chameleon), or the Hub id of one.
        device: "cpu", "cuda", "cuda:1", "mps" …
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, bfloat16 on a GPU that has it, else
            float16.
        method: "speculative" for a `SpeculativeImagePipeline` around a model that draws tokens.
        drafter: of that pipeline: a folder or a Hub id, "none", or None for the one that comes with the model.
        variant: of the weight files, as in diffusers: "fp16" reads NAME.fp16.safetensors where there is one.
        revision: branch, tag or commit of a Hub id.
        scheduler: class of diffusers in place of the model's own, e.g. "DPMSolverMultistepScheduler".
        loras: LoRA weights, each PATH or PATH:WEIGHT: a .safetensors file, a folder or a Hub id.
        offload: "none"; "model", "group" or "sequential" keep weights in main memory until a GPU needs them; "auto"
            takes the first of these that fits.
        vae_tiling: decode in tiles, for large pictures in little memory.
        quantize: "int8", "int8-dynamic" (computes in 8 bits too), "fp8" or "int4" weights of the denoiser, by torchao.
            Loss contract: lossy.
        options: of a model that draws tokens, as `SpeculativeImagePipeline` has them: `size` and `negative` of Emu3,
            `size`, `line_end`, `begin` and `decode` of Chameleon. `decode` may be the folder of a `VQModel` of
            diffusers.

    Returns:
        the pipeline class that the model names, a `JanusImagePipeline`, or for other models that draw tokens a
        `SpeculativeImagePipeline`.

    Raises:
        FastgenError: there is no such model, a file of it is missing or broken, or the device or the type cannot be
            had; the message is one line.
    """
    asked = LoadOptions(scheduler, loras, offload, vae_tiling, quantize, options)
    checkpoint = find_checkpoint(model, variant, revision)
    return load_checkpoint(checkpoint, device=device, dtype=dtype, method=method, drafter=drafter, options=asked)


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    method: str | None = None,
    drafter: str | None = None,
    options: LoadOptions | None = None,
    begins: str | None = None,
) -> DiffusionPipeline:
    """`load_pipeline` for a model that was found before; `begins` as `pipeline_class` takes it."""
    options = options or LoadOptions()
    if method is not None:
        check_choice("method", method, ("base", "dc", "speculative", "search"))
    kind_of_pipeline: Any = pipeline_class(checkpoint, method, begins)
    method = "speculative" if checkpoint.speculative_only else method
    resolve_settings(kind_of_pipeline, checkpoint, dict.fromkeys(SETTINGS))  # the model's own
    if drafter is not None and method != "speculative":
        raise FastgenError("drafter: needs method speculative")
    where, kind = resolve_device(device, dtype)
    options.check(kind_of_pipeline, checkpoint.index, where, checkpoint.target_options)
    with phase("load"):
        if checkpoint.hub_id is not None:
            checkpoint = _with_weights(checkpoint, checkpoint.hub_id)
        sizes = weight_sizes(checkpoint, kind, options.quantize)
        way = options.resolve_offload(sizes, None if where.type == "cpu" else free_memory(where))
        check_memory(checkpoint.model, sizes, where, way, kind)
        drafts = find_drafter(checkpoint, drafter) if method == "speculative" else None
        target = {**checkpoint.options, **options.target}
        if checkpoint.kind != "diffusers":
            _check_tokens(checkpoint, kind_of_pipeline, drafts, target)
            pipe = _load_tokens(checkpoint, kind, target)
        else:
            straight = where if way == "none" else torch.device("cpu")
            pipe = _load_diffusers(checkpoint, kind, _checked_components(checkpoint), straight, options.quantize)
        if begins is not None and not isinstance(pipe, kind_of_pipeline):
            pipe = kind_of_pipeline.from_pipe(pipe)
        if method == "speculative":
            from fastgen.drafters.loading import load_drafter

            with explained(f"checkpoint {drafts or checkpoint.folder}"):
                parts = _speculative_parts(checkpoint, drafts, lambda place: load_drafter(place, kind))
            pipe = kind_of_pipeline(pipe.model, pipe.tokenizer, options=target, **parts)
        for part in pipe.components.values():
            check_chat_template(part, f"model {checkpoint.model!r}")
        options.apply(pipe)
        if options.quantize is not None:
            pipe.loss = "lossy"
        options.place(pipe, where, way)
    set_checkpoint(pipe, checkpoint)
    return pipe


def resolve_device(device: str = "cpu", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and weight type for `load_pipeline`'s arguments; refuses what this machine does not have, after trying
    the three kinds of operation that every model here needs."""
    check_choice("dtype", dtype, DTYPES)
    try:
        where = torch.device(device)
        if dtype == "auto":
            has_bfloat16 = where.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            own = "float32" if where.type == "cpu" else "bfloat16" if has_bfloat16 else "float16"
        kind: torch.dtype = getattr(torch, own if dtype == "auto" else dtype)
        x = torch.ones(1, 4, 4, 4, dtype=kind, device=where)
        torch.nn.functional.conv2d(x, torch.ones(4, 4, 3, 3, dtype=kind, device=where))
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        float(torch.nn.functional.layer_norm(x @ x, (4,)).sum())  # the meta device has no values
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise FastgenError(f"device: {device!r} cannot be used with dtype {dtype}: {one_line(error)}") from error
    return where, kind


def _with_weights(checkpoint: Checkpoint, hub_id: str) -> Checkpoint:
    """Download the weights of a Hub model, or find them in the local cache."""
    if checkpoint.draws_tokens:
        snapshot = download(hub_id, checkpoint.revision)
        return replace(checkpoint, folder=snapshot / checkpoint.folder.relative_to(checkpoint.root))
    which = {"variant": checkpoint.variant, "revision": checkpoint.revision}
    with explained(f"model {hub_id!r}", hub_id=hub_id):
        folder = DiffusionPipeline.download(hub_id, **which, trust_remote_code=False)
    return replace(checkpoint, folder=Path(folder))


def _token_class(checkpoint: Checkpoint) -> Any:
    import transformers

    janus = checkpoint.kind == "janus"
    return getattr(transformers, "JanusForConditionalGeneration" if janus else checkpoint.pipeline_class)


def _load_tokens(checkpoint: Checkpoint, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Load a `JanusImagePipeline`, or model and tokenizer; a decoder's folder in `options` becomes the decoder."""
    folder, cpu = checkpoint.folder, torch.device("cpu")
    with explained(f"checkpoint {folder}"):
        tokenizer = load_pretrained(AutoTokenizer, checkpoint.tokenizer or folder)
        model = load_network(_token_class(checkpoint), folder, dtype, checkpoint.variant, cpu)
        if checkpoint.kind == "janus":
            from fastgen.pipelines.janus import JanusImagePipeline

            return load_pretrained(JanusImagePipeline, folder, model=model, tokenizer=tokenizer)
    if isinstance(options.get("decode"), str):
        options["decode"] = load_network(VQModel, Path(options["decode"]), dtype, None, cpu)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def _speculative_parts(checkpoint: Checkpoint, folder: Path | None, load: Callable[[Path], Any]) -> dict[str, Any]:
    """Calibration, drafter and heads of a `SpeculativeImagePipeline`; `load` makes the last two of their folders."""
    from fastgen.drafters.calibration import Calibration
    from fastgen.drafters.heads import WindowHeads
    from fastgen.drafters.loading import drafter_class, heads_folder

    beside = folder or (checkpoint.tokenizer if checkpoint.drafter is None else None)
    parts = {"calibration": None if beside is None else Calibration.for_drafter(beside)}
    if folder is not None:
        alone = drafter_class(folder) is WindowHeads
        parts["heads" if alone else "drafter"] = load(folder)
        if not alone and (heads := heads_folder(folder)) is not None:
            parts["heads"] = load(heads)
    return parts


def _check_tokens(checkpoint: Checkpoint, kind: Any, drafter: Path | None, options: dict[str, Any]) -> None:
    """Refuse a model that does not fit its files, and options, a drafter, heads or a calibration that do not fit the
    model, before weights are read: by making the pipeline of networks without weights."""
    from fastgen.drafters.loading import drafter_class

    def empty(folder: Path) -> Any:
        network = empty_network(drafter_class(folder), folder)
        return None if network is None else network.float()

    model = empty_network(_token_class(checkpoint), checkpoint.folder, checkpoint.variant)
    if isinstance(options.get("decode"), str):
        empty_network(VQModel, Path(options["decode"]))
    if kind.__name__ != "SpeculativeImagePipeline":
        return
    parts = _speculative_parts(checkpoint, drafter, empty)
    if model is not None:
        given = {name: value for name, value in options.items() if name != "decode"}
        with explained(f"checkpoint {checkpoint.folder}"):
            words = load_pretrained(AutoTokenizer, checkpoint.tokenizer or checkpoint.folder)
            kind(model.float(), words, options=given, **parts)


def _checked_components(checkpoint: Checkpoint) -> dict[str, Any]:
    """Parts of a pipeline, after every check that needs no weights: the classes of its networks, its scheduler, and
    None for those left out."""
    parts: dict[str, Any] = {}
    for name, entry in checkpoint.index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            continue
        kind, folder = component_class(*entry), checkpoint.component(name)
        if entry[0] is None:
            parts[name] = None  # some pipelines require it to be passed
        elif kind is not None and issubclass(kind, torch.nn.Module):
            parts[name] = kind
            empty_network(kind, folder, checkpoint.variant)
        elif kind is not None and (folder / "scheduler_config.json").is_file():
            with explained(f"checkpoint {folder}"):
                parts[name] = load_pretrained(kind, folder)
        elif checkpoint.base is not None and (checkpoint.folder / name).is_dir():
            raise FastgenError(f"{folder}: only networks and the scheduler may differ from the base, this is neither")
    return parts


def _load_diffusers(
    checkpoint: Checkpoint, dtype: torch.dtype, parts: dict[str, Any], device: torch.device, quantize: str | None
) -> Any:
    """Load the networks one by one, each straight to its device, then the rest through the stock loader, which would
    fill missing weights with random numbers."""
    bits = {denoiser_name(checkpoint.index): quantize}
    loaded = dict(parts)
    for name, kind in parts.items():
        if isinstance(kind, type):
            place = checkpoint.component(name)
            loaded[name] = load_network(kind, place, dtype, checkpoint.variant, device, bits.get(name))
    if checkpoint.pipeline_class == "LlamaGen":
        from fastgen.models.llamagen import LlamaGen

        words = checkpoint.tokenizer or checkpoint.component("tokenizer")
        with explained(f"checkpoint {words}"):
            return SimpleNamespace(model=LlamaGen(**loaded), tokenizer=load_pretrained(AutoTokenizer, words))
    loader: Any = pipeline_class(checkpoint) if checkpoint.has_dynamic_chunking else DiffusionPipeline
    rest = checkpoint.base or checkpoint.folder
    with explained(f"checkpoint {rest}"):
        return load_pretrained(loader, rest, **loaded)
