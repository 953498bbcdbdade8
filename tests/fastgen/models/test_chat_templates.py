"""Chat templates of models: bounded in time and size, whatever they do; those of published models pass."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fastgen.errors import FastgenError
from fastgen.models.chat_templates import check_chat_template

GROW = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}%s{% endfor %}{{ ns.x }}"
NEST = "{% set ns = namespace(x=['ab']) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
LONG = "{% set x = 'x' * 400000 %}"

ENDLESS = [
    # loops and recursion
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ lipsum(n=100000000) }}",
    # operators
    "{{ 'x' * 2000000000 }}",
    "{{ 9 ** 999999999 }}",
    "{{ (range(99999)|list) * 99999 }}",
    "{% set x = 1000 %}{{ 'a' * (x * x * x) }}",
    "{{ '%2000000000d' % 5 }}",
    "{{ '%*d' % (2000000000, 5) }}",
    "{{ 'x'.encode() * 2000000000 }}",
    # texts that double
    GROW.replace("%s", "{% set ns.x = ns.x + ns.x %}"),
    GROW.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
    GROW.replace("%s", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    GROW.replace("%s", "{% set ns.x = [ns.x, ns.x]|join %}"),
    NEST + "{{ ns.x }}",
    NEST + "{{ ns.x|tojson }}",
    # filters and methods
    "{{ 'x'.ljust(2000000000) }}",
    "{{ 'x'|center(2000000000) }}",
    "{{ 'x'|indent(2000000000, true) }}",
    "{{ '\t'.expandtabs(2000000000) }}",
    "{{ '%2000000000d'|format(5) }}",
    "{{ '{:2000000000}'.format(5) }}",
    "{{ '{:{}}'.format(5, 2000000000) }}",
    "{{ 'x'|attr('ljust')(2000000000) }}",
    "{{ range(99999)|map('center', 99999)|join }}",
    "{{ range(99999)|join('x' * 9999) }}",
    "{{ 2.5|round(2000000000, 'ceil') }}",
    "{{ 'x'|batch(2000000000, 'y')|list }}",
    "{{ (5).to_bytes(2000000000, 'big') }}",
    "{{ strftime_now('%2000000000d') }}",
    LONG + "{{ x.replace('x', x) }}",
    LONG + "{% for i in range(99999) %}{% set y = x[::-1] %}{% endfor %}",
    # what is worked out while it is compiled, in a branch that never runs
    "{% if false %}{{ 'x' * 2000000000 }}{% endif %}",
    "{% if false %}{{ ('x' * 1000) * 1000 * 1000 * 1000 }}{% endif %}",
    "{% if false %}{{ 'x'|center(2000000000) }}{% endif %}",
    # in one form of chat only
    "{% if messages|length > 2 %}{{ 'x' * (messages|length * 999999999) }}{% endif %}",
    "{% if messages[0].content is not string %}{{ 'x' * (messages|length * 999999999) }}{% endif %}",
    "{% if not add_generation_prompt %}{{ 'x' * (messages|length * 999999999) }}{% endif %}",
    # no template
    "{{ messages",
    "{{" + "(" * 50_000,
    "x" * 200_000,
    5,
]

LEGITIMATE = [
    "",
    "{{ nothing.at.all }}",
    "{{ raise_exception('roles must alternate') }}",
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{{ '=' * 20 }}{% for m in messages %}{{ bos_token ~ m['content'] | trim ~ eos_token }}{% endfor %}",
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
    "{%- endif %}{%- generation %}{{ m.content }}{%- endgeneration %}{%- endfor %}",
    "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}{% set ns.last = loop.index0 * 2 %}{% endfor %}"
    "{{ messages | tojson(indent=2) }}{{ strftime_now('%d %b %Y') }}{{ '%s:%02d' | format('a', ns.last) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | replace('\n', '\\n') }}"
    "{{ m | items | list | length * 3 }}{{ ', '.join(m.keys()) }}{{ '{:>8}'.format(m.role) }}{% endfor %}",
]


class Templated:
    def __init__(self, template: Any) -> None:
        self.chat_template = template
        self.special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([messages], chat_template=self.chat_template, **self.special_tokens_map)[0][0]


@pytest.mark.parametrize("template", ENDLESS, ids=lambda template: str(template)[:40])
def test_a_template_that_takes_any_time_or_memory_is_refused(template: Any) -> None:
    begin = time.monotonic()
    with pytest.raises(FastgenError, match="m: the chat template"):
        check_chat_template(Templated(template), "m")
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("template", LEGITIMATE, ids=lambda template: template[:40])
def test_what_published_templates_use_passes(template: str) -> None:
    check_chat_template(Templated({"default": template}), "m")


@pytest.mark.parametrize("template", LEGITIMATE[3:], ids=lambda template: template[:40])
def test_those_templates_render_in_transformers(template: str) -> None:
    Templated(template).apply_chat_template([{"role": "user", "content": "a red circle"}])


def test_a_template_is_tried_on_the_prompts_that_are_drawn() -> None:
    template = "{% if 'dog' in messages[0].content %}{{ 'x' * (messages|length * 999999999) }}{% endif %}"
    check_chat_template(Templated(template), "m", ["a red circle"])
    with pytest.raises(FastgenError, match="needs too much work"):
        check_chat_template(Templated(template), "m", ["a red circle", "a blue dog"])


def test_the_template_of_an_embedded_model_passes() -> None:
    from fastgen.pipelines.loading import load_pipeline

    tokenizer: Any = load_pipeline("tiny").tokenizer  # type: ignore[attr-defined]
    assert tokenizer.chat_template
    check_chat_template(tokenizer, "tiny")
