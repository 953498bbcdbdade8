"""Chat templates come with a model. They run in a sandbox; here their work is bounded as well."""

from __future__ import annotations

import sys
from typing import Any

from fastgen.errors import FastgenError

__all__ = ["check_chat_template"]

_MAX_CHARACTERS = 1 << 20
_MAX_INTEGER = 1 << 20
_MAX_LINES = 500_000  # of compiled template code and of what it calls; a chat format takes a few hundred


class _TooLong(Exception):
    pass


def check_chat_template(tokenizer: Any, label: object) -> None:
    """Refuse a template that does not end, or that multiplies or pads texts to any size.

    Args:
        tokenizer: any object; one without a template is fine.
        label: what to call the model in a message.

    Raises:
        FastgenError: says what the template does.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if not templates or not hasattr(tokenizer, "apply_chat_template"):
        return
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str):
            raise FastgenError(f"{label}: the chat template is no text")
        _check_source(template, label)
    message = [{"role": "user", "content": "a red circle"}]
    before, lines = sys.gettrace(), 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > _MAX_LINES:
            raise _TooLong
        return count

    try:
        sys.settrace(count)
        tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except (_TooLong, RecursionError, MemoryError) as error:
        raise FastgenError(f"{label}: the chat template does not end") from error
    except Exception:  # e.g. it takes the content in another form; what counts is that it ended
        pass
    finally:
        sys.settrace(before)


def _check_source(template: str, label: object) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    if len(template) > _MAX_CHARACTERS:
        raise FastgenError(f"{label}: the chat template has {len(template)} characters")
    try:
        for _, kind, value in Environment().lex(template):
            if kind == "operator" and value in ("*", "**"):
                raise FastgenError(f"{label}: the chat template multiplies, which none needs")
            if kind == "integer" and (len(value) > 10 or int(value.replace("_", ""), 0) > _MAX_INTEGER):
                raise FastgenError(f"{label}: the chat template holds the number {value[:20]}")
    except (TemplateSyntaxError, ValueError) as error:
        if isinstance(error, FastgenError):
            raise
        raise FastgenError(f"{label}: the chat template cannot be read: {error}") from error
