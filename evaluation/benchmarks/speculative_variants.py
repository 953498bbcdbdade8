"""Rows of the benchmark of speculative decoding: an acceptance rule with what it accepts from, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fastgen.drafters.acceptance import AcceptanceRule, Exact
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import HeadsSource, window_source
from fastgen.drafters.loading import build_rule
from fastgen.drafters.names import PLAIN, window_of
from fastgen.drafters.sources import DraftSource, TreeSource
from fastgen.drafters.targets import Target
from fastgen.drafters.tree import named_tree
from fastgen.pipelines.speculative import SpeculativeImagePipeline

__all__ = ["VARIANTS", "Variant", "default_source", "default_variants", "parse_variant"]

#: "RULE DRAFT", the draft a window, a tree ("TREE@DRAFTER" with several drafters) or "auto"; settings behind it.
VARIANTS = (
    "exact heads-20",
    "exact heads-6",
    "exact jacobi-16",
    "cascade heads-20 quality=0.5",
    "cascade heads-20 quality=0.75",
    "cascade heads-8 quality=0.5",
    "cascade heads-8 quality=0.75",
    "lantern++ heads-20",
    "lantern++ heads-20 factor=2",
    "gsd heads-20",
)

_NONE, _HEADS = "none (Jacobi)", "heads"


def default_variants(heads: WindowHeads | None, calibrated: bool) -> tuple[str, ...]:
    """`VARIANTS` for a model: with the longest window of its heads, "jacobi-16" without heads; no quality without a
    calibration."""
    longest = 0 if heads is None else heads.config.window
    window = f"heads-{min(20, longest)}" if longest else "jacobi-16"
    texts = [text.replace("heads-20", window) for text in VARIANTS if calibrated or "quality=" not in text]
    sources = {text: text.split()[1] for text in texts}
    return tuple(
        text for text, name in sources.items() if not name.startswith("heads-") or window_of(name)[0] <= longest
    )


def default_source(pipe: Any, drafter: Any, calibration: Any, heads: WindowHeads | None, compile: bool) -> str:
    """What the pipeline drafts with for the rule "exact" and one picture, where no tree is given."""
    whole = SpeculativeImagePipeline(pipe.model, pipe.tokenizer, drafter, calibration, heads)
    whole.compile(compile)
    return whole.fastest(whole.target, Exact(), 1)[0]


@dataclass(frozen=True)
class Variant:
    """One row: an acceptance rule with what it accepts from.

    Attributes:
        name: as it was written.
        rule: the rule.
        source: makes the draft source of a batch; None is the plain loop.
        drafter, tree: for the table.
    """

    name: str
    rule: AcceptanceRule
    source: Callable[[], DraftSource | None]
    drafter: str
    tree: str


Choose = Callable[[AcceptanceRule, Any], tuple[DraftSource | None, str]]


def parse_variant(
    text: str,
    target: Target,
    drafters: Mapping[str, Any] | None = None,
    choose: Choose | None = None,
    heads: WindowHeads | None = None,
) -> Variant:
    """ "RULE DRAFT [SETTING=VALUE …]", e.g. "lantern jacobi-12 delta=0.2", "exact 4-2-1" or "exact chain-4@medusa".

    Args:
        text: to be read. "quality" is a setting of "cascade", by the calibration of the drafter.
        target: the model.
        drafters: by name, each with its calibration or None; a tree takes the first where none is named.
        choose: what "auto" drafts with, for a rule and a drafter.
        heads: of windows such as "heads-12".

    Raises:
        ValueError: it cannot be read, or needs a drafter that is not there.
    """
    words = text.split()
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise ValueError(f'variant: {text!r} is not of the form "RULE DRAFT [SETTING=VALUE …]"')
    settings: dict[str, Any] = {}
    for word in words[2:]:
        key, _, value = word.partition("=")
        try:
            settings[key] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"variant: {word!r} in {text!r} is no number") from None
    tree, _, name = words[1].partition("@")
    given = drafters or {}
    name = name or next(iter(given), "")
    drafter, calibration = given.get(name, (None, None))
    if "quality" in settings:
        if words[0] != "cascade" or calibration is None:
            raise ValueError(f"variant: {text!r}: quality needs acceptance cascade and a calibrated drafter")
        settings = {**asdict(calibration.config(settings.pop("quality"))), **settings}
    rule = build_rule(words[0], target, **settings)
    if tree == PLAIN:
        return Variant(text, rule, lambda: None, _NONE, PLAIN)
    if tree == "auto" and choose is not None:
        source, found = choose(rule, drafter)
        drafts = name if isinstance(source, TreeSource) else _HEADS if isinstance(source, HeadsSource) else _NONE
        return Variant(text, rule, partial(copy, source), drafts, found)
    if tree.startswith(("jacobi-", "heads-")):
        window_source(tree, rule, heads)  # a name that cannot be read is refused here
        drafts = _HEADS if tree.startswith("heads-") else _NONE
        return Variant(text, rule, partial(window_source, tree, rule, heads), drafts, tree)
    if drafter is None:
        raise ValueError(f"variant: {text!r} needs a drafter, there is {', '.join(given) or 'none'}")
    return Variant(text, rule, partial(TreeSource, drafter, named_tree(tree), True), name, tree)
