"""The networks of a model: built without memory first, compared with the headers of their weight files, then loaded.

A configuration can ask for anything. What is built of it is limited by what the weight files hold, so that a wrong
one ends before weights are read, in bounded time and memory.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, Checkpoint
from fastgen.pipelines.loading.config_schema import check_arguments
from fastgen.pipelines.loading.faults import explained, fault, is_out_of_memory
from fastgen.pipelines.loading.weight_files import check_safetensors, read_files, variant_of
from fastgen.pipelines.quantization import config_while_loading
from fastgen.pretrained import load_pretrained

__all__ = [
    "DTYPES",
    "check_keys",
    "component_class",
    "drawing_fault",
    "empty_network",
    "explained_drawing",
    "load_network",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Share of a checkpoint's weights that its network may have no place for.
_MOST_UNUSED = 0.03
# Parts of a network (layers, parameters, buffers) for each of its weights, and some more.
_PARTS_PER_WEIGHT, _MORE_PARTS = 16, 4096
# Elements of a tensor for each that the weight files hold, and some more (tables that are computed).
_SIZE_PER_WEIGHT, _MORE_SIZE = 4, 2**27
#: Types of tensors, by their names in weight files.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


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
    and of shapes that needs none. None where its weights have no headers or are not as the network holds them.

    Args:
        kind: its class, of diffusers or transformers.
        folder: of its configuration and weight files.
        variant: of the weight files that are read.
    """
    file = folder / "config.json"
    config = read_object(file)
    config_kind = getattr(kind, "config_class", None)
    if config_kind is None:
        check_arguments(config, kind, file)
        if not isinstance(config.get("_class_name", ""), str):
            raise FastgenError(f"{file}: _class_name is no text")
    if config.get("quantization_config") is not None:
        return None
    headers: dict[str, Any] = {}
    for weights in read_files(folder, variant):
        if weights.suffix != ".safetensors":
            return None
        headers |= check_safetensors(weights)
    weights_held = {
        name: torch.empty(shape, dtype=DTYPES.get(stored, torch.uint8), device="meta")
        for name, (stored, shape) in headers.items()
    }

    with explained(f"checkpoint {folder}"), _silent(), _limited(folder, weights_held):
        if config_kind is not None:
            network, info = _of_transformers(kind, load_pretrained(config_kind, folder), weights_held)
        else:
            network, info = _of_diffusers(kind, config, weights_held)
    check_keys(folder, info, {name: tensor.numel() for name, tensor in weights_held.items()})
    return network


def load_network(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    variant: str | None,
    device: torch.device,
    quantize: str | None = None,
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
        check_keys(folder, info)
        if quantize is not None and all(type(weight.data) is torch.Tensor for weight in network.parameters()):
            raise FastgenError(f"quantize: no layer of {kind.__name__} could be kept in fewer bits")
        return network.to(device).eval()


def check_keys(folder: Path, info: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> None:
    """Refuse a checkpoint that leaves a weight unset, or that the network has no place for in a large part.

    Args:
        folder: for the message.
        info: missing, mismatched and unexpected keys, as the libraries' loaders return them.
        sizes: elements of each weight in the files; None leaves unexpected ones unjudged.
    """
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


@contextmanager
def explained_drawing(checkpoint: Checkpoint | None) -> Iterator[None]:
    """What a model of the user's cannot compute becomes one line that names it.

    The first call shows what its configuration hides: shapes that do not fit, a missing token. A model that comes
    with the package has no such faults; there an error is a bug and keeps its traceback, and so it does without a
    checkpoint, in a pipeline that the user loaded.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or (found := drawing_fault(checkpoint, error)) is None:
            raise
        raise found from error


def of_caller(function: T) -> T:
    """A function that the caller gave: what it raises is the caller's, and no fault of the model."""

    @functools.wraps(function)  # type: ignore[arg-type]
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            error.of_caller = True  # type: ignore[attr-defined]
            raise

    return called  # type: ignore[return-value]


def drawing_fault(checkpoint: Checkpoint, error: Exception) -> FastgenError | None:
    """The line for an error of drawing with a model; None where the error says enough, or is a bug of ours."""
    if isinstance(error, (FastgenError, OSError)) or getattr(error, "of_caller", False):
        return None
    if is_out_of_memory(error):
        return FastgenError(f"model {checkpoint.model!r}: drawing does not fit into memory")
    if checkpoint.model in EMBEDDED_MODELS:
        return None
    return FastgenError(
        f"{fault(f'model {checkpoint.model!r}', error, 'cannot draw')} (FASTGEN_DEBUG=1 shows the traceback)"
    )


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


def _of_transformers(kind: Any, config: Any, held: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """By the library's own loader, which knows under which names older versions saved a weight."""
    loading: dict[str, Any] = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
    network, info = load_pretrained(kind, None, config=config, state_dict=dict(held), **loading)
    return network, info


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


@contextmanager
def _limited(folder: Path, held: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, no network of more parts and no tensor larger than the weight files account for can be built."""
    left = _PARTS_PER_WEIGHT * len(held) + _MORE_PARTS
    thread = threading.get_ident()
    many = f"checkpoint {folder}: its configuration asks for a larger network than its {len(held)} weights make"

    def count(module: Any, name: str, part: Any) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise FastgenError(many)

    with ExitStack() as hooks:
        for register in (
            torch_module.register_module_module_registration_hook,
            torch_module.register_module_parameter_registration_hook,
            torch_module.register_module_buffer_registration_hook,
        ):
            hooks.callback(register(count).remove)
        elements = sum(tensor.numel() for tensor in held.values())
        hooks.enter_context(_LargestTensor(_SIZE_PER_WEIGHT * elements + _MORE_SIZE, many))
        yield


class _LargestTensor(TorchDispatchMode):
    """Refuses operations that ask for a tensor of more elements."""

    def __init__(self, limit: int, message: str) -> None:
        super().__init__()
        self._limit, self._message = limit, message

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func.__name__.startswith(("arange", "linspace", "logspace"))
        for value in args:
            sizes = value if isinstance(value, (list, tuple)) else [value] if counts else []
            if all(type(size) in (int, float) for size in sizes) and math.prod(sizes) > self._limit:
                raise FastgenError(self._message)
        return func(*args, **(kwargs or {}))
