"""Options that commands share: those of the methods (`fastgen.pipelines.schema`), and what a model is loaded with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.errors import FastgenError
from fastgen.pipelines.schema import Rule

if TYPE_CHECKING:
    from fastgen.pipelines.loading.load_options import LoadOptions

__all__ = ["given_loading", "load_options", "option_name", "with_common", "with_loading", "with_options"]


def option_name(setting: str) -> str:
    """``--tail-drop`` of ``tail_drop``."""
    return f"--{setting.replace('_', '-')}"


def with_options(*methods: Any, without: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Give a command the options of these methods, in a panel each; it takes them as ``**settings``.

    Args:
        without: settings that the command does not have.
    """

    return lambda command: _with_parameters(
        command,
        [
            _option(name, rule, method.panel)
            for method in methods
            for name, rule in method.rules().items()
            if name not in without
        ],
    )


def with_common(options: Mapping[str, tuple[Any, Any]]) -> Callable[[Any], Any]:
    """Give a command these options, name -> annotation and default, after its own; it takes them as ``**settings``."""
    last = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in options.items()
    ]
    return lambda command: _with_parameters(command, last=last)


def _with_parameters(
    command: Any, first: Sequence[inspect.Parameter] = (), last: Sequence[inspect.Parameter] = ()
) -> Any:
    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(command)
    def with_settings(**values: Any) -> Any:
        return command(**values)

    every = [*first, *own, *last]  # panels are shown in this order
    described: Any = with_settings
    del described.__wrapped__  # typer reads the signature below
    described.__signature__ = inspect.Signature(every)
    described.__annotations__ = {p.name: p.annotation for p in every}
    return described


def _loading(kind: Any, help: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel="Loading", **more)]


#: What a model is loaded with, for every command that draws with one: name -> annotation, default.
LOADING: dict[str, tuple[Any, Any]] = {
    "variant": (_loading(str | None, "Variant of the weight files, e.g. fp16.", show_default=False), None),
    "revision": (_loading(str | None, "Branch, tag or commit of a Hub id.", show_default=False), None),
    "scheduler": (
        _loading(
            str | None,
            "A scheduler class of diffusers that replaces the model's, e.g. DPMSolverMultistep.",
            show_default=False,
        ),
        None,
    ),
    "lora": (
        _loading(
            list[str] | None,
            "PATH or PATH:WEIGHT: a .safetensors file, a folder or a Hub id; repeat.",
            show_default=False,
        ),
        None,
    ),
    "offload": (
        _loading(
            str,
            "none; model, group or sequential keep weights in main memory until a GPU needs them; auto takes the "
            "first that fits.",
        ),
        "none",
    ),
    "quantize": (
        _loading(
            str | None,
            "Weights of the denoiser in fewer bits: int8, int8-dynamic, fp8 or int4; lossy, needs torchao.",
            show_default=False,
        ),
        None,
    ),
    "model_option": (
        _loading(
            list[str] | None,
            "NAME=VALUE of a model that draws tokens: size=64x64 (tokens), negative=TEXT, line_end=8803, "
            "begin=8197,8828, decode=FOLDER; repeat.",
            show_default=False,
        ),
        None,
    ),
    "vae_tiling": (_loading(bool, "Decode in tiles, for large pictures in little memory.", "--vae-tiling"), False),
}

with_loading = with_common(LOADING)


def load_options(given: Any) -> LoadOptions:
    """What the options of `LOADING` ask for, checked.

    Raises:
        FastgenError: a value that is not allowed, or files that are not there.
    """
    from fastgen.pipelines.loading.load_options import LoadOptions

    target = model_options(given.model_option or ())
    return LoadOptions(given.scheduler, given.lora, given.offload, given.vae_tiling, given.quantize, target)


def model_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a model that draws tokens, from texts NAME=VALUE.

    Raises:
        FastgenError: a value that is not allowed.
    """
    found: dict[str, Any] = {}
    for name, _, value in (text.partition("=") for text in texts):
        try:
            if name == "size":
                height, _, width = value.partition("x")
                found[name] = [int(height), int(width)]
            elif name == "begin":
                found[name] = [int(each) for each in value.split(",")]
            else:
                found[name] = int(value) if name == "line_end" else value
        except ValueError as error:
            needed = "HEIGHTxWIDTH in tokens" if name == "size" else "a number, or numbers with commas"
            raise FastgenError(f"options: {name}={value!r} is not allowed, needs {needed}") from error
    return found


def given_loading(given: Any) -> dict[str, Any]:
    """Those of `LOADING` that the user set."""
    values = {name: getattr(given, name) or default for name, (_, default) in LOADING.items()}
    return {name: value for name, value in values.items() if value != LOADING[name][1]}


def _option(name: str, rule: Rule, panel: str) -> inspect.Parameter:
    option = typer.Option(option_name(name), help=rule.help, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[rule.kind | None, option],
    )
