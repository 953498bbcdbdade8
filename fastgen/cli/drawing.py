"""How `fastgen generate` draws: checks of what needs the model's configuration, but not its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgen.cli import search as searching
from fastgen.cli.methods import METHODS, best_device, check_method, find_model, read_plan
from fastgen.cli.options import load_options
from fastgen.errors import FastgenError
from fastgen.pipelines.schema import SETTINGS, SearchSettings

if TYPE_CHECKING:
    from fastgen.pipelines.accelerate import Plan
    from fastgen.pipelines.beginnings import Beginning
    from fastgen.pipelines.loading.checkpoint import Checkpoint

__all__ = ["Drawing", "prepare"]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, checked.

    Attributes:
        checkpoint: of the model.
        loading: arguments of `load_checkpoint`.
        call: settings of `generate_images`.
        settings: what the pixels depend on, for sidecars.
        compile, save_map: as on the command line.
        search: for the noise, if there is one.
        faster: a plan, "exact", or None.
    """

    checkpoint: Checkpoint
    loading: dict[str, Any]
    call: dict[str, Any]
    settings: dict[str, Any]
    compile: bool
    save_map: bool
    search: searching.Search | None
    faster: Plan | str | None


def prepare(
    given: Any, prompts: list[str], beginning: Beginning | None, own_device: Callable[[str], str] = str
) -> Drawing:
    """Check what needs the model's configuration, but not its weights.

    Args:
        own_device: maps a device to the one of this process.
    """
    from fastgen.cli.plan import model_digest
    from fastgen.pipelines.loading.checkpoint import find_drafter

    model = given.model if given.model is not None else METHODS[given.method or "base"]
    options = load_options(given)
    checkpoint = find_model(model, given.variant, given.revision)
    if given.method is None and checkpoint.speculative_only:
        given.method = "speculative"
    method = given.method
    _check_with_model(given, model, checkpoint)
    drafts = find_drafter(checkpoint, given.drafter) if method == "speculative" else None

    from fastgen.pipelines.loading import resolve_device
    from fastgen.pipelines.settings import check_classes, pipeline_class, resolve_settings

    begins = None if beginning is None else beginning.begins
    kind = pipeline_class(checkpoint, method, begins)
    call = resolve_settings(kind, checkpoint, {name: getattr(given, name) for name in SETTINGS})
    if begins is None:  # one that begins with a picture draws from a text
        check_classes(checkpoint, prompts)
    search = None
    if method == "search":
        asked = SearchSettings.of(vars(given))
        search = searching.plan_search(checkpoint, kind, call, asked, given.save_tree, beginning)
    if method == "speculative":
        from fastgen.pipelines.speculative_files import check_speculative_files

        check_speculative_files(checkpoint, drafts, call.get("tree"), given.quality)
    device = own_device(best_device() if given.device == "auto" else given.device)
    where, weights = resolve_device(device, given.dtype)
    options.check(kind, checkpoint.index, where, checkpoint.target_options)
    if "decode" in checkpoint.target_options and "decode" not in options.target:
        raise FastgenError(
            f"options: model {model!r} has no decoder of its codes; give a VQModel of diffusers: "
            "--model-option decode=FOLDER"
        )
    faster = _faster(given, kind, checkpoint)
    weight_type = str(weights).removeprefix("torch.")
    settings: dict[str, Any] = {
        "model": model,
        "weights": model_digest(checkpoint, drafts),
        **({} if given.variant is None else {"variant": given.variant}),
        **options.recorded,
        "method": method or ("dc" if checkpoint.has_dynamic_chunking else "base"),
        **{name: call.get(name) for name in SETTINGS},
        **({"drafter": given.drafter or ("none" if drafts is None else "own")} if method == "speculative" else {}),
        **({"compile": True} if given.compile else {}),
        **_recorded(faster),
        **({} if search is None else search.settings),
        "device": where.type,
        "dtype": weight_type,
        "batch_invariant": given.batch_invariant,
    }
    loading = {"device": str(where), "dtype": weight_type, "method": method, "drafter": given.drafter}
    loading |= {"options": options, "begins": begins}
    call |= {"batch_size": given.batch_size, "batch_invariant": given.batch_invariant}
    return Drawing(checkpoint, loading, call, settings, given.compile, given.save_map, search, faster)


def _check_with_model(given: Any, model: str, checkpoint: Checkpoint) -> None:
    """Refuse options that do not go with the model or the method."""
    method = given.method
    check_method(method, checkpoint)
    if given.save_map and method == "search":
        raise FastgenError("--save-map: not with --method search")
    if given.save_map and not checkpoint.has_dynamic_chunking:
        raise FastgenError(f"--save-map: model {model!r} has no dynamic chunking, there is no map")
    if checkpoint.fixed_size is None:
        checkpoint.check_size(given.height, given.width)
    if method != "speculative" and (given.drafter is not None or given.compile):
        raise FastgenError(f"--{'compile' if given.drafter is None else 'drafter'}: needs --method speculative")


def _faster(given: Any, kind: type, checkpoint: Checkpoint) -> Plan | str | None:
    """The plan to follow, "exact" for the exact parts that pay off, or None for searches, for speculative decoding and
    for models that draw tokens, which have no denoiser.

    Raises:
        FastgenError: a plan of another pipeline, model or version, or a broken one.
    """
    if given.plan is not None:
        return read_plan(given.plan, kind, given.method, checkpoint)
    from fastgen.pipelines.accelerate.part import DENOISERS

    off = given.accelerate == "off" or given.method in ("search", "speculative")
    return None if off or not set(DENOISERS) & set(checkpoint.index) else "exact"


def _recorded(faster: Plan | str | None) -> dict[str, Any]:
    """What of it the pixels depend on."""
    if faster is None:
        return {}
    if isinstance(faster, str):
        return {"accelerate": faster}
    return {"plan": [[part.name, part.settings] for part in faster.parts]}
