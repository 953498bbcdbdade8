"""Chat templates come with a model. They run in a sandbox; here their work is bounded as well.

A template is rendered here first, by an environment of the same language that counts: whatever multiplies, joins,
pads or repeats is asked how large its result will be before it is made, and all results together, and all lines that
run, have a limit. What a chat format needs is far below.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from fastgen.errors import FastgenError

__all__ = ["check_chat_template"]

_MAX_SOURCE = 1 << 17  # characters of a template; published ones have up to 30,000
_MAX_SIZE = 1 << 19  # characters and elements of one result
_MAX_WORK = 1 << 24  # of all results together
_MAX_BITS = 4096  # of an integer
_MAX_LINES = 500_000  # of compiled template code and of what it calls; a chat format takes some thousands

# What makes its result larger than what it is given. The rest is linear.
_GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "join", "translate", "wordwrap", "batch"}
_GROWING |= {"slice", "round", "to_bytes"}
_STARRED = re.compile(r"\*|:[^}]*\{")  # a format that takes a width from its arguments


class _TooMuch(Exception):
    pass


def check_chat_template(tokenizer: Any, label: object, prompts: Sequence[str] = ()) -> None:
    """Refuse a template that does not end, or that multiplies or pads texts to any size.

    Args:
        tokenizer: any object; one without a template is fine.
        label: what to call the model in a message.
        prompts: it is tried on chats with these as well: what it does may depend on them.

    Raises:
        FastgenError: says what the template does.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if not templates or not hasattr(tokenizer, "apply_chat_template"):
        return
    special = getattr(tokenizer, "special_tokens_map", None) or {}
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str):
            raise FastgenError(f"{label}: the chat template is no text")
        if len(template) > _MAX_SOURCE:
            raise FastgenError(f"{label}: the chat template has {len(template)} characters")
        _try(template, dict(special), prompts, label)


def _try(template: str, special: dict[str, Any], prompts: Sequence[str], label: object) -> None:
    """Render all chats, as far as the template takes them."""
    try:
        compiled = _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise FastgenError(f"{label}: the chat template cannot be read: {error}") from error
    except (_TooMuch, RecursionError, MemoryError, OverflowError) as error:
        raise FastgenError(f"{label}: the chat template does not end, or asks for too much: {error}") from error
    except Exception as error:  # of the code that compiles it
        raise FastgenError(f"{label}: the chat template cannot be read: {type(error).__name__}: {error}") from error
    for values in _chats(prompts):
        try:
            _limited(functools.partial(compiled.render, {**special, "tools": None, "documents": None, **values}))
        except (_TooMuch, RecursionError, MemoryError, OverflowError) as error:
            why = "the chat template does not end, or needs too much work"
            raise FastgenError(f"{label}: {why}: {str(error) or type(error).__name__}") from error
        except Exception:  # it takes another form of chat; what counts is that it ended
            pass


def _chats(prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What pipelines give to a template: prompts in the forms that there are, and a longer chat."""
    for prompt in ("a red circle", *prompts):
        for content in (prompt, [{"type": "text", "text": prompt}]):
            yield {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
    chat = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "a red circle")]
    yield {"messages": [{"role": role, "content": text} for role, text in chat], "add_generation_prompt": False}


def _limited(run: Callable[[], Any]) -> Any:
    """What `run` returns, as long as it takes no more than `_MAX_LINES`."""
    before, lines = sys.gettrace(), 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > _MAX_LINES:
            raise _TooMuch(f"more than {_MAX_LINES} steps")
        return count

    try:
        sys.settrace(count)
        return run()
    finally:
        sys.settrace(before)


class _Meter:
    """The work of all renderings of a template."""

    def __init__(self) -> None:
        self.work = 0

    def take(self, size: int) -> None:
        """Count a result before it is made."""
        self.work += max(0, size)
        if size > _MAX_SIZE or self.work > _MAX_WORK:
            raise _TooMuch(f"texts of more than {_MAX_SIZE} characters")

    def size(self, value: object) -> int:
        """Characters and elements that writing a value out takes; what is in it twice counts twice."""
        total, level = 0, [value]
        while level:
            inner: list[object] = []
            for each in level:
                if isinstance(each, (str, bytes, range)):
                    total += len(each)
                elif isinstance(each, Mapping):
                    inner += [*each.keys(), *each.values()]
                elif isinstance(each, (list, tuple, set)):
                    inner += each
                total += 1
            if total + len(inner) > _MAX_SIZE:
                raise _TooMuch(f"texts of more than {_MAX_SIZE} characters")
            level = inner
        return total

    def amount(self, value: object) -> int:
        """How far an argument can make a result grow."""
        return abs(value) if isinstance(value, int) else self.size(value)

    def _integers(self, value: object) -> int:
        values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
        return sum(abs(each) for each in values if isinstance(each, int))

    def before(self, name: str, values: Sequence[object]) -> None:
        """Count what the function of that name makes of `values`, a text or a list first."""
        sizes = [self.amount(value) + 1 for value in values]
        if name == "replace" and len(values) > 2:
            self.take(sizes[0] * sizes[2])
        elif name in ("format", "format_map", "%"):
            form = str(values[0])
            given = sum(map(self._integers, values[1:])) if _STARRED.search(form) else 0
            self.take((sum(map(self.size, values)) + given) * (1 + len(re.findall("[{%]", form))) + _widths(form))
        elif name in _GROWING:
            self.take(functools.reduce(lambda a, b: a * b, sizes))
        else:
            self.take(sum(size for size, value in zip(sizes, values, strict=True) if not isinstance(value, int)))

    def operate(self, sign: str, left: Any, right: Any) -> None:
        """Count what ``left sign right`` makes."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if sign == "**":
            bits = left.bit_length() * abs(right) if numbers else 0
        elif sign == "*":
            bits = left.bit_length() + right.bit_length() if numbers else 0
        else:
            bits = 0
        if bits > _MAX_BITS:
            raise _TooMuch(f"integers of more than {_MAX_BITS} bits")
        if sign == "*" and not numbers:
            self.take(self.amount(left) * self.amount(right))
        elif sign == "+" and not numbers:
            self.take(self.size(left) + self.size(right))
        elif sign == "%" and isinstance(left, str):
            self.before("%", [left, right])

    def join(self, pieces: Iterable[str]) -> str:
        """The pieces of an output."""
        held = []
        for piece in pieces:
            self.take(len(piece) + 1)
            held.append(piece)
        return "".join(held)


def _widths(text: str) -> int:
    """The sum of the numbers in a format."""
    found = re.findall(r"\d+", text)
    return sum(int(digits) if len(digits) < 10 else _MAX_SIZE for digits in found)


class _Generation(Extension):
    """The mark around what an assistant says: transformers counts its tokens."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counted(NodeTransformer):
    """``a ~ b`` as ``a|string + b|string``, which is counted, and so are constants that are folded."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        texts: list[Any] = [nodes.Filter(self.visit(part), "string", [], [], None, None) for part in node.nodes]
        return functools.reduce(nodes.Add, texts).set_lineno(node.lineno)

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        node = self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = nodes.Filter(node.node, "whole", [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Filter(self, node: Any) -> Any:  # noqa: N802
        node = self.generic_visit(node)
        given = [node.node, *node.args, *(each.value for each in node.kwargs)]
        if all(isinstance(each, nodes.Const) for each in given):
            self.environment.meter.before(node.name, [each.value for each in given])
        return node

    def _fold(self, node: Any) -> Any:
        node = self.generic_visit(node)
        if isinstance(node.left, nodes.Const) and isinstance(node.right, nodes.Const):
            left, right = node.left.value, node.right.value
            self.environment.meter.operate(node.operator, left, right)
            try:
                return nodes.Const(self.environment.binop_table[node.operator](left, right), lineno=node.lineno)
            except Exception:  # it ends in this error where it is rendered
                return node
        return node

    visit_Mul = visit_Pow = visit_Add = visit_Mod = _fold  # noqa: N815


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        loops = "jinja2.ext.loopcontrols"
        self.meter = _Meter()
        extensions = [_Generation, loops]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._written)
        self.concat = self.meter.join  # type: ignore[method-assign]
        self.filters["whole"] = lambda value: value
        for name, function in list(self.filters.items()):
            self.filters[name] = self._counted(name, function)

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counted(self).visit(source), *args, **kwargs)

    def _written(self, value: Any) -> Any:
        self.meter.take(self.meter.size(value))
        return value

    def _counted(self, name: str, function: Any) -> Any:
        passed = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            context, values = args[:passed], list(args[passed:])
            if values and hasattr(values[0], "__next__"):  # what another filter yields
                values[0] = list(values[0])
            self.meter.before(name, [*(values or [""]), *kwargs.values()])
            return function(*context, *values, **kwargs)

        return filtered

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int, list, tuple, dict)):
            __self.meter.before(method.__name__, [owner, *args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)


def _environment() -> Any:
    """As transformers makes it for chat templates, with a meter."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = _Environment()
    environment.filters["tojson"] = environment._counted("indent", to_json)

    def lipsum(*args: Any, **kwargs: Any) -> None:
        raise _TooMuch("filler text")

    def strftime_now(form: str) -> str:
        environment.meter.before("format", [form])
        return datetime.now().strftime(form)

    environment.globals |= {"lipsum": lipsum, "raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
