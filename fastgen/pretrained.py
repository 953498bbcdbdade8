"""The one place where models are loaded: code that lies in a model's folder never runs. A leaf.

``load_pretrained(AutoTokenizer, folder)`` is ``AutoTokenizer.from_pretrained(folder, trust_remote_code=False)``. It
covers the parts that the loader loads itself, for which transformers asks on standard input whether to run code.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import read_object

__all__ = ["load_pretrained", "no_remote_code", "open_clip_folder"]


def load_pretrained(loader: Any, source: str | os.PathLike[str] | None, **arguments: Any) -> Any:
    """``loader.from_pretrained(source, **arguments)``, without the code that the source may hold.

    Args:
        loader: a class of diffusers, transformers or fastgen.
        source: a folder or a Hub id.
        arguments: of that class's `from_pretrained`.

    Raises:
        FastgenError: the source needs code of its own, or `trust_remote_code` asks for it.
    """
    with no_remote_code(source, arguments.pop("trust_remote_code", None)):
        return loader.from_pretrained(source, **arguments, trust_remote_code=False)


@contextmanager
def no_remote_code(source: object, trust_remote_code: bool | None = False) -> Iterator[None]:
    """Inside, transformers refuses code from a model's folder where it would ask the user.

    Raises:
        FastgenError: such code was met, or `trust_remote_code` is true.
    """
    refusal = f"{source} needs Python code that comes with the model; fastgen never runs such code"
    if trust_remote_code:
        raise FastgenError(f"trust_remote_code: {refusal}")
    # Parts of a model are loaded by calls that take no such argument. With a time-out of 0 transformers does not wait
    # for an answer. In other threads it cannot set its alarm and refuses anyway.
    module: Any = sys.modules.get("transformers.dynamic_module_utils")
    asks = module is not None and threading.current_thread() is threading.main_thread()
    before = module.TIME_OUT_REMOTE_CODE if asks else 0
    try:
        if asks:
            module.TIME_OUT_REMOTE_CODE = 0
        yield
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise FastgenError(refusal) from error
        raise
    finally:
        if asks:
            module.TIME_OUT_REMOTE_CODE = before


def open_clip_folder(folder: Path) -> str:
    """The name by which open_clip loads the model in `folder`.

    Raises:
        FastgenError: its configuration asks for a tower or a tokenizer of transformers, which open_clip loads without
            a way to refuse code.
    """
    file = folder / "open_clip_config.json"
    settings: list[Any] = [read_object(file)]
    for value in settings:
        if isinstance(value, dict):
            if asked := sorted(name for name in value if name.startswith("hf_") and value[name]):
                raise FastgenError(f"{file}: {asked[0]} is not supported, only models of open_clip's own classes are")
            settings.extend(value.values())
        elif isinstance(value, list):
            settings.extend(value)
    return f"local-dir:{folder}"
