"""Every setting of every method, once: its type, range, help and panel. Imports neither torch nor diffusers.

A class has the settings of one method. From its fields come the checks of Python arguments, the options of the
command line (`fastgen.cli.options`), what sidecars record, and a JSON schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from fastgen.checks import TAIL_DROP, check_choice, check_integer, check_number, check_one_budget
from fastgen.drafters.names import RULES, check_temperature, check_tree_name
from fastgen.errors import FastgenError

__all__ = [
    "DRAWING",
    "METHODS",
    "SCHEMA",
    "SETTINGS",
    "ChunkingSettings",
    "DrawSettings",
    "Rule",
    "SamplingSettings",
    "SearchSettings",
    "Settings",
    "SpeculativeSettings",
    "check_prompt",
    "json_schema",
    "setting",
]

_LARGEST = 2**31 - 1
_Method = TypeVar("_Method", bound="Settings")


def check_prompt(prompt: object, label: str = "prompt", blank: bool = False) -> str:
    """Refuse what is not a text that a model can be given.

    Raises:
        FastgenError: says what is wrong.
    """
    if not isinstance(prompt, str):
        raise FastgenError(f"{label}: needs a text, got {type(prompt).__name__}")
    if not prompt.strip() and not blank:
        raise FastgenError(f"{label}: an empty text is not allowed")
    # Lone surrogates are what Python makes of bytes that are not UTF-8.
    if any(0xD800 <= ord(char) <= 0xDFFF or (ord(char) < 32 and char not in "\t\n\r") for char in prompt):
        raise FastgenError(f"{label}: {ascii(prompt)} is not text: it has control characters or undecodable bytes")
    return prompt


@dataclass(frozen=True)
class Rule:
    """The allowed values of a setting.

    Attributes:
        kind: its type on the command line.
        help: of its option.
        minimum, maximum, above, below: of a number; None: no such bound.
        choices: of a text; empty: any text.
        blank: whether a text may be blank.
        special: checks (label, value) in place of the bounds.
        richer: values of other types pass; the pipeline checks them.
    """

    kind: type
    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    blank: bool = False
    special: Callable[[str, object], object] | None = None
    richer: bool = False

    def check(self, label: str, value: object) -> None:
        """Raises:
        FastgenError: names `label`, the value and what is allowed.
        """
        if self.richer and not isinstance(value, str if self.kind is str else str | bool | int | float):
            return
        if self.special is not None:
            self.special(label, value)
        elif self.kind is int:
            check_integer(label, value, int(self.minimum or 0), _LARGEST)
        elif self.kind is float:
            check_number(label, value, **self._bounds())
        elif self.choices:
            check_choice(label, value, self.choices)
        else:
            check_prompt(value, label, self.blank)

    def json_schema(self) -> dict[str, Any]:
        """As JSON Schema spells it."""
        names = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
        schema: dict[str, Any] = {"type": {int: "integer", float: "number", str: "string"}[self.kind]}
        schema |= {names[name]: value for name, value in self._bounds().items()}
        return schema | ({"enum": list(self.choices)} if self.choices else {}) | {"description": self.help}

    def _bounds(self) -> dict[str, float]:
        every = {name: getattr(self, name) for name in ("minimum", "maximum", "above", "below")}
        return {name: value for name, value in every.items() if value is not None}


def _count(help: str) -> Any:
    return setting(int, help, minimum=1, maximum=_LARGEST)


def _share(help: str, **more: Any) -> Any:
    return setting(float, help, **TAIL_DROP, **more)


def setting(kind: type, help: str, **rule: Any) -> Any:
    """A field of a class of settings; see `Rule`."""
    return field(default=None, metadata={"rule": Rule(kind, help, **rule)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one method; None where the user gave none."""

    panel: ClassVar[str]

    def __post_init__(self) -> None:
        self._check(self.given(), str)

    @classmethod
    def of(cls: type[_Method], values: Mapping[str, Any], label: Callable[[str], str] = str) -> _Method:
        """Those of `values` that belong to this method, checked.

        Args:
            label: maps an argument's name to its name in the message.

        Raises:
            FastgenError: a value out of its range.
        """
        own = {name: values[name] for name in cls.rules() if values.get(name) is not None}
        cls._check(own, label)
        return cls(**own)

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """Name -> what it may be."""
        return {each.name: each.metadata["rule"] for each in fields(cls)}

    @classmethod
    def _check(cls, values: Mapping[str, Any], label: Callable[[str], str]) -> None:
        rules = cls.rules()
        for name, value in values.items():
            rules[name].check(label(name), value)

    def given(self) -> dict[str, Any]:
        """Those that are set."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def check_together(self) -> None:
        """FastgenError where settings exclude each other; called when the model's own are filled in."""


@dataclass(frozen=True, kw_only=True)
class DrawSettings(Settings):
    """Settings of every picture."""

    panel: ClassVar[str] = "Picture"
    steps: int | None = _count("Denoising steps. Default: the model's.")
    guidance_scale: float | None = setting(
        float, "Classifier-free guidance. Default: the model's.", minimum=-_LARGEST, maximum=_LARGEST
    )
    height: int | None = _count("Pixels. Default: the model's.")
    width: int | None = _count("Pixels. Default: the model's.")
    negative_prompt: str | None = setting(
        str, "What not to draw; blank where guidance needs one (Qwen-Image).", blank=True
    )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """How an autoregressive model samples tokens."""

    panel: ClassVar[str] = "Autoregressive models"
    temperature: float | None = setting(
        float, "Temperature of token sampling; 0 takes the most likely token.", special=check_temperature, minimum=0
    )
    top_k: int | None = _count("Sample from the k likeliest tokens.")
    top_p: float | None = setting(
        float, "Nucleus sampling: total probability of the tokens to sample from.", above=0, maximum=1
    )


@dataclass(frozen=True, kw_only=True)
class ChunkingSettings(Settings):
    """How many tokens a model with dynamic chunking keeps."""

    panel: ClassVar[str] = "Dynamic chunking"
    tail_drop: Any = _share("Share of the natural tokens to drop, 0 to below 1.", richer=True)
    uncond_tail_drop: Any = _share("The same for the unconditional branch (Lite-CFG).", richer=True)
    token_budget: int | None = _count("Exact number of image tokens, in place of tail drops.")

    def check_together(self) -> None:
        check_one_budget(self.token_budget, self.tail_drop, self.uncond_tail_drop)


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings(Settings):
    """What speculative decoding drafts and accepts."""

    panel: ClassVar[str] = "Speculative decoding (--method speculative)"
    tree: Any = setting(
        str,
        "What a round drafts: chain-4 or 4-2-1, a tree; jacobi-12, a window of 12 tokens; heads-12, one that heads "
        "correct; heads-12x2-4, with two candidates at its first 4 places; plain, nothing; auto measures and "
        "remembers. Default: what is fastest here by the model's calibration.",
        special=check_tree_name,
        richer=True,
    )
    acceptance: str | None = setting(
        str, f"Acceptance rule: {', '.join(RULES)}. Default: the pipeline's, exact.", choices=RULES
    )
    quality: float | None = setting(
        float, "For acceptance rule cascade: 0 (exact) to 1 (fastest), as calibrated.", minimum=0, maximum=1
    )

    def check_together(self) -> None:
        if self.quality is not None and self.acceptance != "cascade":
            raise FastgenError("quality: is a knob of acceptance cascade")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Settings):
    """Settings of the search for the noise with the best-scored picture."""

    panel: ClassVar[str] = "Noise search (--method search)"
    policy: str | None = setting(
        str,
        "threshold, rbf, svdd, code, smc, best-of-n, random, zero-order or search-over-paths. Default: threshold.",
    )
    verifier: str | None = setting(
        str,
        "Scoring model: shapes-verifier, pick-score, clip-score, vqa-score …, NAME:WEIGHTS, or a folder. Default: "
        "shapes-verifier, for the models that come with fastgen.",
    )
    max_nfe: int | None = _count("Most forward passes per picture; guidance needs two per evaluation.")
    max_seconds: float | None = setting(float, "Time limit per picture in seconds.", above=0)
    target_score: float | None = setting(float, "Stop at this score.", minimum=-_LARGEST, maximum=_LARGEST)
    sampler: str | None = setting(
        str,
        "Sampler of noisy steps: ancestral, euler-maruyama or rollover. Default: ancestral.",
        choices=("ancestral", "euler-maruyama", "rollover"),
    )
    tau: float | None = setting(
        float, "Score that a candidate must exceed, for policy threshold.", minimum=-_LARGEST, maximum=_LARGEST
    )
    starts: int | None = _count("Starting noises per trajectory.")
    chains: int | None = _count("Trajectories per picture; the best is kept.")
    preview: str | None = setting(
        str,
        "Previews that the verifier scores during the search: full, or pooled at a quarter of the decoder's cost. "
        "Default: full.",
        choices=("full", "pooled"),
    )


#: Methods whose settings go into a pipeline's call.
DRAWING: tuple[type[Settings], ...] = (DrawSettings, SamplingSettings, ChunkingSettings, SpeculativeSettings)
METHODS: tuple[type[Settings], ...] = (*DRAWING, SearchSettings)
#: Every setting -> what it may be.
SCHEMA = {name: rule for method in METHODS for name, rule in method.rules().items()}
#: What a picture depends on besides prompt, seed and model, by the names of `generate_images` and the command line.
SETTINGS = tuple(name for method in DRAWING for name in method.rules())


def json_schema(*methods: type[Settings]) -> dict[str, Any]:
    """JSON Schema of an object with the settings of these methods; of all methods where none is named."""
    chosen = methods or METHODS
    rules = {name: rule.json_schema() for method in chosen for name, rule in method.rules().items()}
    return {"type": "object", "properties": rules, "additionalProperties": False}
