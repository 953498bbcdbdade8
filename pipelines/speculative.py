"""Text to image with an autoregressive model and a drafter: the same pictures in fewer passes of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.accounting import add_acceptance, add_tokens, note_path, phase
from fastgen.checks import check_bool, check_callable, check_choice, check_number
from fastgen.contracts import Loss
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.auto import choose_source
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.cascade import Cascade
from fastgen.drafters.choices import fingerprint, load_choice, machine_info, save_choice
from fastgen.drafters.decode import Decoded, decode_plain, decode_speculative
from fastgen.drafters.drafter import Drafter, describe
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import window_source
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule
from fastgen.drafters.names import LOSSLESS, PLAIN, RULES, check_tree_name, tree_widths, window_of
from fastgen.drafters.offload import onloaded
from fastgen.drafters.pace import machine_of
from fastgen.drafters.sources import DraftSource, TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import DynamicShape, Tree, named_tree
from fastgen.errors import FastgenError
from fastgen.pipelines.pickling import PickledMixin
from fastgen.pipelines.summary import reported
from fastgen.pipelines.token_images import (
    NetworksMixin,
    OutputType,
    TokenImageOutput,
    as_output,
    one_per_image,
    one_prompt_per_image,
)
from fastgen.pretrained import load_pretrained

__all__ = ["SpeculativeImagePipeline"]

#: What `sampled` without a tree asks for.
DEFAULT_TREE = "4-4-2-2-1-1"
DEFAULT_QUALITY = 0.5


class SpeculativeImagePipeline(NetworksMixin, PickledMixin, DiffusionPipeline):
    """Wraps a transformers image model that the user has loaded.

    Loss contract: `distribution` with acceptance "exact" or "block" (at temperature 0 `exact`: the plain loop's
    tokens, up to rounding); `lossy` with any other.

    Args:
        model: e.g. `transformers.JanusForConditionalGeneration`; see `fastgen.drafters.targets`.
        tokenizer: its tokenizer or processor.
        drafter: made for this model, e.g. a `fastgen.drafters.eagle.EagleDrafter`. None drafts without one: the
            target's own guesses of the round before (Jacobi), which need no training.
        calibration: thresholds of CASCADE-R for this model and drafter, for the `quality` knob.
        heads: made for this model; they correct the windows "heads-12".
        options: of the model's adapter: `size` (tokens of a picture's height and width) of Emu3 and Chameleon,
            `negative` of Emu3; `line_end`, `begin` and `decode` (a function of codes [B, height, width] to pictures in
            [0, 1]) of Chameleon, Anole and Lumina-mGPT. `decode` is not saved with the pipeline.

    Every call uses the parts that the pipeline has then: a part may be replaced, moved, or changed in place.

    Raises:
        FastgenError: a model that we do not know, a part of another kind, a drafter of another model or dtype, or a
            calibration for other weights.
    """

    loss: Loss = "distribution"
    model_cpu_offload_seq = "model->drafter->heads"
    _optional_components = ["drafter", "heads"]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        drafter: Any = None,
        calibration: Calibration | Mapping[str, Any] | None = None,
        heads: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.options = dict(options or {})
        if isinstance(calibration, Mapping):
            calibration = Calibration.of_dict(calibration)
        _check_parts(model, tokenizer, drafter, calibration, heads, self.options)
        if calibration is not None:
            calibration.check_weights(model=model, drafter=drafter)
        self.calibration = calibration
        self._compile = False
        self._chosen: dict[Any, tuple[str | Tree, str]] = {}
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.register_modules(model=model, tokenizer=tokenizer, drafter=drafter, heads=heads)

    # ---- loading and saving ----

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote: model, tokenizer, drafter and calibration.

        Raises:
            FastgenError: a folder that holds a model alone, or a LlamaGen in a variant; says how to load it.
        """
        folder = Path(pretrained_model_name_or_path)
        if kwargs.get("variant") and (folder / "model" / "model_index.json").is_file():
            raise FastgenError(  # diffusers looks for variants in files only, and this model lies in folders
                f"variant: {folder} holds a LlamaGen; call "
                f"fastgen.load_pipeline({str(folder)!r}, variant={kwargs['variant']!r})"
            )
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise FastgenError(
                f"{folder} holds no saved pipeline (model_index.json); for a model alone call "
                f'fastgen.load_pipeline({str(folder)!r}, method="speculative")'
            )
        return load_pretrained(super(), os.fspath(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained`, `fastgen.load_pipeline` and `--model` load.

        Arguments as of `DiffusionPipeline.save_pretrained`.
        """
        self.check_saves()
        self.register_to_config(calibration=None if self.calibration is None else self.calibration.as_dict())
        self.register_to_config(options={name: value for name, value in self.options.items() if not callable(value)})
        super().save_pretrained(save_directory, *args, **kwargs)

    # ---- properties, of the parts that the pipeline has now ----

    @property
    def target(self) -> Target:
        """The model as speculative decoding sees it, made of the present parts; keep it no longer than they stay."""
        return _check_parts(self.model, self.tokenizer, self.drafter, self.calibration, self.heads, self.options)

    @property
    def image_size(self) -> int | None:
        """Height and width in pixels, where the model draws one size only."""
        return self.target.image_size

    @property
    def num_timesteps(self) -> int:
        """Tokens of a picture."""
        return self.target.num_tokens

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that leave no position for the picture.

        Raises:
            FastgenError: names the first such prompt, its length and the limit.
        """
        self.target.check_prompts(prompts)

    def compile(self, enabled: bool = True) -> None:
        """Run every round as one compiled graph (or, with False, no longer): see `fastgen.drafters.compiled`.

        The first picture waits for the compiler, up to a minute. Rounding differs from the rounds that are not
        compiled, so that a picture may.
        """
        self._compile = check_bool("enabled", enabled)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        tree: str | Tree | DynamicShape | None = None,
        sampled: bool | None = None,
        acceptance: str | AcceptanceRule = "exact",
        quality: float | None = None,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_invariant: bool = False,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[SpeculativeImagePipeline, int, int, dict[str, Any]], Any] | None = None,
    ) -> TokenImageOutput | tuple[Any]:
        """Draw images.

        Args:
            prompt: text or list of texts.
            num_images_per_prompt: images of each prompt; they follow each other in the output.
            guidance_scale: s of ``u + s * (c - u)`` on the logits; 1 or less turns guidance off. None takes what the
                model's authors use.
            temperature: divisor of the guided logits; 0 takes the most likely token.
            top_k, top_p: keep the k most likely tokens, then the smallest set of mass p; None keeps all.
            tree: what is drafted in a round: a name ("chain-4", "4-2-1" nodes at each depth, "lantern-25"), a `Tree`,
                or the size of a dynamic one; without a drafter "jacobi-12", a window of that many tokens, or
                "heads-12", one that heads correct; "plain" is the plain loop, which drafts nothing. "auto" measures
                which is fastest here, once per acceptance rule, sampling settings and batch size (that takes a dozen
                batches or more), and caches the result. None takes the source that the calibration's measurements
                predict to be fastest for such a batch; the plain loop, whatever the rule, if none is faster or nothing
                was measured. So the pictures of a seed may depend on the batch.
            sampled: draw the tree's children from the drafter without replacement; False takes its most likely
                tokens. None draws where that is possible (not in dynamic trees and at temperature 0).
            acceptance: "exact", "block", "lantern", "lantern++", "gsd", "cool-sd", "cascade", or a rule.
            quality: of "cascade": 0 (exact) to 1 (fastest), by the calibration. None takes 0.5, or default
                settings where there is no calibration.
            negative_prompt: not possible; the row without a prompt is the prompt blanked out, as in training.
            generator: one per image, or a single one; see `JanusImagePipeline`.
            batch_invariant: images are drawn one after the other, so that not even rounding depends on the batch;
                False draws them together.
            output_type: "pil", "np", "pt", or "tokens" (the pictures are not decoded).
            return_dict: False gives ``(images,)``.
            callback_on_step_end: called as ``callback(pipeline, token_index, token_index, {})`` after each round with
                the last token that all images of the batch have. What it returns is not used.

        Raises:
            ValueError, TypeError: an argument outside its range, or a part that does not fit the model.
            NotFiniteError: logits or pixels were NaN or infinite.
        """
        target = self.target
        prompts = one_prompt_per_image(prompt, num_images_per_prompt, negative_prompt, output_type)
        scale = target.default_law.guidance_scale if guidance_scale is None else guidance_scale
        law = TokenLaw(scale, temperature, top_k, top_p)
        generators = one_per_image(generator, len(prompts))
        shape = (
            None if tree is None and sampled is None else self._shape(DEFAULT_TREE if tree is None else tree, sampled)
        )
        check_bool("batch_invariant", batch_invariant)
        check_bool("return_dict", return_dict)
        check_callable("callback_on_step_end", callback_on_step_end)
        target.check_prompts(prompts)
        groups = [[i] for i in range(len(prompts))] if batch_invariant else [list(range(len(prompts)))]
        with reported(self) as stats, onloaded(self.model, self.drafter, self.heads):
            rule = self._rule(target, acceptance, quality)
            rule.check(target)
            reason: str | None = None
            if shape == PLAIN and rule.name not in LOSSLESS:
                raise FastgenError(f"acceptance: {rule.name!r} judges what is drafted, tree 'plain' drafts nothing")
            if shape is None:
                shape, reason = self.fastest(target, rule, len(groups[0]))
            source = None if shape in ("auto", PLAIN) else self._source(shape, sampled, law, rule)
            if source is not None:
                source.check(target, law, rule)
            if shape == "auto":
                shape, name = self._choose(target, [prompts[i] for i in groups[0]], rule, law)
                source, reason = self._source(shape, None, law, rule), "measured here"
            else:
                name = shape if isinstance(shape, str) else type(shape).__name__
            note_path("acceptance", rule.name)
            note_path("draft", "plain loop" if source is None else type(source).__name__)
            note_path("tree", name, reason)
            decoded = list[Decoded]()
            for number, group in enumerate(groups):
                with phase("text"):
                    prefix = target.prefix([prompts[i] for i in group], law.guided)
                reporter = self._reporter(callback_on_step_end, target, number, len(groups))
                given = (prefix, law, [generators[i] for i in group], reporter, self._compile)
                with phase("tokens"):
                    if source is None:
                        decoded.append(decode_plain(target, *given))
                    else:
                        decoded.append(decode_speculative(target, source, rule, *given))
            counted = {name: float(sum(part.counts[name].sum() for part in decoded)) for name in decoded[0].counts}
            add_acceptance(rule.name, counted)
            tokens = torch.cat([part.tokens for part in decoded])
            add_tokens(kept=tokens.numel(), total=tokens.numel())
            images: Any = tokens
            if output_type != "tokens":
                with phase("decode"):
                    chunks = tokens.split(1 if batch_invariant else len(tokens))
                    images = as_output(torch.cat([target.pixels(chunk) for chunk in chunks]), output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return TokenImageOutput(images=images, tokens=tokens, stats=stats)

    def _rule(self, target: Target, acceptance: str | AcceptanceRule, quality: float | None) -> AcceptanceRule:
        if not isinstance(acceptance, AcceptanceRule):
            check_choice("acceptance", acceptance, RULES)
        if quality is None and acceptance == "cascade" and self.calibration is not None:
            quality = DEFAULT_QUALITY
        if quality is None:
            return build_rule(acceptance, target) if isinstance(acceptance, str) else acceptance
        check_number("quality", quality, 0, 1)
        if acceptance != "cascade":
            raise FastgenError('quality: is a knob of acceptance "cascade"')
        if self.calibration is None:
            raise FastgenError("quality: needs a calibration; make it with `fastgen train cascade-calibrate`")
        self.calibration.check_weights(model=self.model, drafter=self.drafter)
        return build_rule("cascade", target, **asdict(self.calibration.config(quality)))

    def fastest(self, target: Target, rule: AcceptanceRule, batch: int) -> tuple[str, str]:
        """The source of the least expected time, without measuring, and why. What was not measured is not taken: the
        plain loop draws, whatever the rule."""

        def usable(name: str) -> bool:
            if tree_widths(name) is not None:
                return self.drafter is not None and rule.name != "block"
            places, width, _ = window_of(name)
            if places > target.num_tokens or (width > 1 and rule.name == "block"):
                return False
            return not name.startswith("heads-") or (self.heads is not None and places <= self.heads.config.window)

        if self.calibration is None or self.calibration.pace is None:
            return PLAIN, 'no speed was measured for this model; tree="auto" measures it'
        name = "exact" if isinstance(rule, Cascade) and not rule.config.relaxes else rule.name
        machine = machine_of(target.device.type, self._compile)
        return self.calibration.pace.fastest(name, machine, batch, len(target.layers), usable)

    def _choose(
        self, target: Target, prompts: list[str], rule: AcceptanceRule, law: TokenLaw
    ) -> tuple[str | Tree, str]:
        """The fastest source for the present parts and a batch like this, measured once, and its name."""
        # By their numbers: a model that is gone must not be kept, and the worst that a mistake costs is speed.
        numbers = (id(self.model), id(self.drafter), id(self.heads), str(target.device), target.dtype)
        knobs = {name: value for name, value in vars(rule).items() if isinstance(value, str | int | float)}
        settings = {"config": getattr(rule, "config", None), **knobs}
        key = (rule.name, str(settings), law, *numbers, self._compile, len(prompts))
        if key not in self._chosen:
            drafter = None if rule.name == "block" else self.drafter  # block verification takes chains only
            about = {"rule": [type(rule).__qualname__, str(settings)], "law": asdict(law), "compile": self._compile}
            about |= {name: fingerprint(getattr(self, name)) for name in ("model", "drafter", "heads")}
            about |= {"dtype": str(target.dtype), "batch": len(prompts), **machine_info(target.device)}
            if (found := load_choice(about)) is None:
                with phase("auto"):
                    prefix = target.prefix(prompts, law.guided)
                    source, name = choose_source(
                        target, drafter, rule, prefix, law, compile=self._compile, heads=self.heads
                    )
                # What is kept holds no part of the pipeline.
                tree = source.tree if isinstance(source, TreeSource) else None
                found = (tree if isinstance(tree, Tree) else name, name)
                save_choice(about, *found)
            self._chosen[key] = found
        return self._chosen[key]

    def _shape(self, tree: str | Tree | DynamicShape, sampled: bool | None) -> str | Tree | DynamicShape:
        """The tree or window that the arguments of `__call__` ask for."""
        if isinstance(tree, str):
            check_tree_name("tree", tree)
        elif not isinstance(tree, Tree | DynamicShape):
            raise FastgenError(f"tree: {tree!r} is not allowed, needs a name, a Tree or a DynamicShape")
        window = isinstance(tree, str) and tree_widths(tree) is None
        if not window and self.drafter is None:
            raise FastgenError(f"tree: {tree!r} needs a drafter; without one there are windows such as jacobi-12")
        if sampled is not None:
            check_bool("sampled", sampled)
            if window:
                raise FastgenError(f"sampled: is a knob of trees, {tree!r} is none")
        return tree

    def _source(
        self, shape: str | Tree | DynamicShape, sampled: bool | None, law: TokenLaw, rule: AcceptanceRule
    ) -> DraftSource | None:
        """What drafts; None in the plain loop."""
        if shape == PLAIN:
            return None
        if isinstance(shape, str) and tree_widths(shape) is None:
            return window_source(shape, rule, self.heads)
        topology = named_tree(shape) if isinstance(shape, str) else shape
        free = law.temperature > 0 and isinstance(topology, Tree)
        return TreeSource(self.drafter, topology, free if sampled is None else sampled)

    def _reporter(
        self, callback: Callable[..., Any] | None, target: Target, number: int, groups: int
    ) -> Callable[[int], None] | None:
        if callback is None:
            return None

        def report(index: int) -> None:
            place = (number * target.num_tokens + index) // groups
            callback(self, place, place, {})

        return report


def _check_parts(
    model: Any, tokenizer: Any, drafter: Any, calibration: Any, heads: Any, options: Mapping[str, Any]
) -> Target:
    """The model as a target, and whether the other parts fit it."""
    target = target_of(model, tokenizer, **options)
    if drafter is not None:
        if not isinstance(drafter, Drafter):
            raise FastgenError(f"drafter: {type(drafter).__name__} is no drafter")
        drafter.check(target)
    if heads is not None:
        if not isinstance(heads, WindowHeads):
            raise FastgenError(f"heads: {type(heads).__name__} are no heads of a window")
        heads.check(target)
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            raise FastgenError(f"calibration: {type(calibration).__name__} is not a Calibration")
        calibration.check(describe(target))
    return target


# `DiffusionPipeline.from_pretrained` looks a saved pipeline's class up there.
diffusers.SpeculativeImagePipeline = SpeculativeImagePipeline
