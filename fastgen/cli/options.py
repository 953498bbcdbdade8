"""Command-line options made from the settings of the methods (`fastgen.pipelines.schema`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastgen.pipelines.schema import Rule

__all__ = ["option_name", "with_options"]


def option_name(setting: str) -> str:
    """``--tail-drop`` of ``tail_drop``."""
    return f"--{setting.replace('_', '-')}"


def with_options(*methods: Any, without: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Give a command the options of these methods, in a panel each; it takes them as ``**settings``.

    Args:
        without: settings that the command does not have.
    """

    def decorate(command: Any) -> Any:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            _option(name, rule, method.panel)
            for method in methods
            for name, rule in method.rules().items()
            if name not in without
        ]

        @functools.wraps(command)
        def with_settings(**values: Any) -> Any:
            return command(**values)

        every = added + [p.replace(kind=p.KEYWORD_ONLY) for p in own]  # panels stand in this order
        described: Any = with_settings
        del described.__wrapped__  # typer reads the signature below
        described.__signature__ = inspect.Signature(every)
        described.__annotations__ = {p.name: p.annotation for p in every}
        return described

    return decorate


def _option(name: str, rule: Rule, panel: str) -> inspect.Parameter:
    option = typer.Option(option_name(name), help=rule.help, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[rule.kind | None, option],
    )
