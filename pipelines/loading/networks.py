"""The networks of a model: built without memory, compared with the headers of their weight files, then loaded."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pipelines.loading.faults import explained
from fastgen.pipelines.loading.weight_files import check_safetensors, read_files, variant_of
from fastgen.pipelines.quantization import config_while_loading
from fastgen.pretrained import load_pretrained

__all__ = ["component_class", "empty_network", "load_network"]

logger = logging.getLogger(__name__)

# Share of a checkpoint's weights that its network may have no place for.
_MOST_UNUSED = 0.03


def component_class(library: str | None, name: str | None) -> Any:
    """The class of a component; None for what only the pipeline knows. Other libraries than those components come from
    are refused: importing a module runs its code."""
    if library is None or name is None:
        return None
    # Of our classes diffusers writes the whole module's name.
    if library not in ("diffusers", "transformers") and not library.startswith("fastgen.models."):
        from diffusers import pipelines

        module = getattr(pipelines, library, None)
        if getattr(module, "__name__", None) != f"{pipelines.__name__}.{library}":
            raise FastgenError(
                f"the model needs {name} of {library!r}, which is no part of diffusers, transformers or fastgen; "
                "fastgen runs no other code"
            )
        return None
    try:
        found = getattr(importlib.import_module(library), name, None)
    except ImportError:
        found = None
    if found is None:
        raise FastgenError(f"the model needs {library}.{name}, which the installed {library} does not have; update it")
    return found if isinstance(found, type) else None


def empty_network(kind: Any, folder: Path, variant: str | None = None) -> Any:
    """The network of a folder on the meta device: without weights, and with every check of the configuration, of names
    and of shapes that needs none. None where its weights have no headers or are stored in another form."""
    config, files = read_object(folder / "config.json"), read_files(folder, variant)
    if config.get("quantization_config") is not None or any(file.suffix != ".safetensors" for file in files):
        return None
    headers = {name: shape for file in files for name, (_, shape) in check_safetensors(file).items()}
    held = {name: torch.empty(shape, device="meta") for name, shape in headers.items()}
    with explained(f"checkpoint {folder}"), _silent():
        if (config_kind := getattr(kind, "config_class", None)) is None:
            network, info = _of_diffusers(kind, config, held)
        else:  # by the library's own loader, which knows under which names older versions saved a weight
            loading: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            loading |= {"config": load_pretrained(config_kind, folder), "state_dict": dict(held)}
            network, info = load_pretrained(kind, None, device_map="meta", **loading)
    _check_keys(folder, info, {name: tensor.numel() for name, tensor in held.items()})
    return network


def load_network(
    kind: Any, folder: Path, dtype: torch.dtype, variant: str | None, device: torch.device, quantize: str | None = None
) -> Any:
    """The network of a folder with its weights, on a device; with `quantize` in fewer bits (`BITS`)."""
    keyword = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    if not any(variant_of(file) == variant for file in folder.iterdir()):
        variant = None
    more: dict[str, Any] = {keyword: dtype}
    if quantize is not None:
        more |= {"quantization_config": config_while_loading(quantize, kind)}
        more |= {} if device.type == "cpu" else {"device_map": {"": str(device)}}
    with explained(f"checkpoint {folder}"):
        network, info = load_pretrained(kind, folder, output_loading_info=True, variant=variant, **more)
        _check_keys(folder, info)
        if quantize is not None and all(type(weight.data) is torch.Tensor for weight in network.parameters()):
            raise FastgenError(f"quantize: no layer of {kind.__name__} could be kept in fewer bits")
        return network.to(device).eval()


def _check_keys(folder: Path, info: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> None:
    """Refuse a checkpoint that leaves a weight unset, or that the network has no place for in a large part: by the
    keys that the libraries' loaders return in `info`, and by the elements of each weight in the files, if known."""
    unexpected = sorted(info.get("unexpected_keys") or ())
    faults = []
    if missing := sorted(info.get("missing_keys") or ()):
        faults.append(f"lacks {len(missing)} weights, e.g. {missing[0]!r}")
    if mismatched := sorted(info.get("mismatched_keys") or (), key=str):
        name, held, built = mismatched[0]
        shapes = f"{name!r} is {list(held)}, its configuration needs {list(built)}"
        faults.append(f"has {len(mismatched)} weights of a wrong shape, e.g. {shapes}")
    if unexpected:
        unused = f"has {len(unexpected)} weights without use, e.g. {unexpected[0]!r}"
        share = 0.0 if sizes is None else sum(sizes.get(name, 0) for name in unexpected) / max(1, sum(sizes.values()))
        if share > _MOST_UNUSED:
            faults.append(f"{unused} ({share:.1%} of all)")
        elif not faults and sizes is not None:
            logger.warning("checkpoint %s %s", folder, unused)
    if faults:
        raise FastgenError(f"checkpoint {folder} does not fit its configuration: it {', it '.join(faults)}")


def _of_diffusers(kind: Any, config: dict[str, Any], held: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = kind.from_config(config)
    names = dict(held)
    network._fix_state_dict_keys_on_load(names)
    built = network.state_dict()
    ignored = type(network)._keys_to_ignore_on_load_unexpected or ()
    unknown = names.keys() - built.keys()
    return network, {
        "missing_keys": built.keys() - names.keys(),
        "unexpected_keys": {name for name in unknown if not any(re.search(each, name) for each in ignored)},
        "mismatched_keys": [
            (name, names[name].shape, built[name].shape)
            for name in names.keys() & built.keys()
            if names[name].shape != built[name].shape
        ],
    }


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, the libraries log no warnings: what they say of an empty network, they say again when it is loaded."""
    import diffusers
    import transformers

    with ExitStack() as restore:
        for library in (diffusers, transformers):
            logs: Any = library.utils.logging
            restore.callback(logs.set_verbosity, logs.get_verbosity())
            logs.set_verbosity_error()
            if logs.is_progress_bar_enabled():
                restore.callback(logs.enable_progress_bar)
                logs.disable_progress_bar()
        yield
