"""Text to image with an autoregressive model and a drafter: the same pictures in fewer passes of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.accounting import account, add_tokens, note_path, phase
from fastgen.contracts import Loss
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.auto import choose_source
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.decode import Decoded, decode_speculative
from fastgen.drafters.drafter import Drafter
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule
from fastgen.drafters.sources import DraftSource, JacobiSource, TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import DynamicShape, Tree, named_tree
from fastgen.pipelines.token_images import OutputType, TokenImageOutput, as_output, one_per_image, one_prompt_per_image

__all__ = ["SpeculativeImagePipeline"]

#: With a drafter, and without one.
DEFAULT_TREE, DEFAULT_WINDOW = "4-4-2-2-1-1", "jacobi-12"
DEFAULT_QUALITY = 0.5


class SpeculativeImagePipeline(DiffusionPipeline):
    """Wraps a transformers image model that the user has loaded.

    Loss contract: `distribution` with acceptance "exact" or "block" (at temperature 0 `exact`: the plain loop's
    tokens, up to rounding); `lossy` with any other.

    Args:
        model: e.g. `transformers.JanusForConditionalGeneration`; see `fastgen.drafters.targets`.
        tokenizer: its tokenizer or processor.
        drafter: made for this model, e.g. a `fastgen.drafters.eagle.EagleDrafter`. None drafts without one: the
            target's own guesses of the round before (Jacobi), which need no training.
        calibration: thresholds of CASCADE-R for this model and drafter, for the `quality` knob.

    Raises:
        ValueError: a model that we do not know, or a drafter of another model.
    """

    loss: Loss = "distribution"
    model_cpu_offload_seq = "model->drafter"
    _optional_components = ["drafter"]

    def __init__(
        self, model: Any, tokenizer: Any, drafter: Any = None, calibration: Calibration | None = None
    ) -> None:
        super().__init__()
        if drafter is not None and not isinstance(drafter, Drafter):
            raise ValueError(f"drafter: {type(drafter).__name__} is no drafter")
        self._target: Target = target_of(model, tokenizer)
        self.calibration = calibration
        self._compile = False
        self._chosen: dict[Any, tuple[DraftSource, str]] = {}
        if drafter is not None:
            drafter.check(self._target)
        self.register_modules(model=model, tokenizer=getattr(tokenizer, "tokenizer", tokenizer), drafter=drafter)

    @property
    def target(self) -> Target:
        """The model as speculative decoding sees it."""
        return self._target

    @property
    def image_size(self) -> int | None:
        """Height and width in pixels, where the model draws one size only."""
        return self._target.image_size

    @property
    def num_timesteps(self) -> int:
        """Tokens of a picture."""
        return self._target.num_tokens

    def compile(self, enabled: bool = True) -> None:
        """Run every round as one compiled graph (or, with False, no longer): see `fastgen.drafters.compiled`.

        The first picture waits for the compiler, up to a minute. Rounding differs from the rounds that are not
        compiled, so that a picture may.
        """
        self._compile = enabled

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
        batch_invariant: bool = True,
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
                or the size of a dynamic one; without a drafter "jacobi-12", a window of so many tokens. "auto"
                measures which is fastest here, once for each acceptance rule and law (that takes a dozen pictures
                or more). None takes "4-4-2-2-1-1" with a drafter and "jacobi-12" without.
            sampled: draw the tree's children from the drafter's law without replacement; False takes its most likely
                tokens. None draws where that is possible (not in dynamic trees and at temperature 0).
            acceptance: "exact", "block", "lantern", "lantern++", "gsd", "cool-sd", "cascade", or a rule.
            quality: of "cascade": 0 (exact) to 1 (fastest), by the calibration. None takes 0.5, or start values that
                nobody calibrated where there is no calibration.
            negative_prompt: not possible; the row without a prompt is the prompt blanked out, as in training.
            generator: one per image, or a single one; see `JanusImagePipeline`.
            batch_invariant: images are drawn one after the other, so that not even rounding depends on the batch;
                False draws them together.
            output_type: "pil", "np", "pt", or "tokens" (the pictures are not decoded).
            return_dict: False gives ``(images,)``.
            callback_on_step_end: called as ``callback(pipeline, token_index, token_index, {})`` after each round with
                the last token that all images of the batch have. What it returns is not used.

        Raises:
            ValueError, TypeError: an argument outside its range.
        """
        prompts = one_prompt_per_image(prompt, num_images_per_prompt, negative_prompt, output_type)
        target = self._target
        scale = target.default_law.guidance_scale if guidance_scale is None else float(guidance_scale)
        law = TokenLaw(scale, float(temperature), top_k, top_p)
        rule = self._rule(acceptance, quality)
        generators = one_per_image(generator, len(prompts))
        source = None if tree == "auto" else self._source(tree, sampled, law, rule)
        if source is not None:
            source.check(target, law, rule)
        groups = [[i] for i in range(len(prompts))] if batch_invariant else [list(range(len(prompts)))]
        with account() as stats:
            if source is None:
                source = self._choose(prompts, rule, law)
            note_path("acceptance", rule.name)
            note_path("draft", type(source).__name__)
            decoded = [
                self._draw(
                    [prompts[i] for i in group],
                    law,
                    source,
                    rule,
                    [generators[i] for i in group],
                    self._reporter(callback_on_step_end, number, len(groups)),
                )
                for number, group in enumerate(groups)
            ]
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
        result = stats.as_dict()
        result["acceptance"] = {
            "rule": rule.name,
            **{name: float(sum(part.counts[name].sum() for part in decoded)) for name in decoded[0].counts},
        }
        return TokenImageOutput(images=images, tokens=tokens, stats=result)

    def _rule(self, acceptance: str | AcceptanceRule, quality: float | None) -> AcceptanceRule:
        if quality is None and acceptance == "cascade" and self.calibration is not None:
            quality = DEFAULT_QUALITY
        if quality is None:
            return build_rule(acceptance, self._target) if isinstance(acceptance, str) else acceptance
        if acceptance != "cascade":
            raise ValueError('quality: is a knob of acceptance "cascade"')
        if self.calibration is None:
            raise ValueError("quality: needs a calibration; make it with `fastgen train cascade-calibrate`")
        return build_rule("cascade", self._target, **asdict(self.calibration.config(quality)))

    def _choose(self, prompts: list[str], rule: AcceptanceRule, law: TokenLaw) -> DraftSource:
        """The fastest source, measured once."""
        device, dtype = str(self._target.device), self._target.dtype
        key = (rule.name, getattr(rule, "config", None), law, device, dtype, self._compile)
        if key not in self._chosen:
            with phase("auto"):
                prefix = self._target.prefix(prompts[:1], law.guided)
                self._chosen[key] = choose_source(self._target, self.drafter, rule, prefix, law, compile=self._compile)
        source, name = self._chosen[key]
        note_path("tree", name)
        return source

    def _source(
        self, tree: str | Tree | DynamicShape | None, sampled: bool | None, law: TokenLaw, rule: AcceptanceRule
    ) -> DraftSource:
        """What drafts, by the arguments of `__call__`."""
        if tree is None:
            tree = DEFAULT_TREE if self.drafter is not None else DEFAULT_WINDOW
        if isinstance(tree, str) and tree.startswith("jacobi-"):
            return JacobiSource.of_name(tree, rule)
        if self.drafter is None:
            raise ValueError(f"tree: {tree!r} needs a drafter; without one there are windows such as jacobi-12")
        topology = named_tree(tree) if isinstance(tree, str) else tree
        free = law.temperature > 0 and isinstance(topology, Tree)
        return TreeSource(self.drafter, topology, free if sampled is None else sampled)

    def _draw(
        self,
        prompts: list[str],
        law: TokenLaw,
        source: DraftSource,
        rule: AcceptanceRule,
        generators: list[torch.Generator],
        on_token: Callable[[int], None] | None,
    ) -> Decoded:
        with phase("text"):
            prefix = self._target.prefix(prompts, law.guided)
        with phase("tokens"):
            return decode_speculative(self._target, source, rule, prefix, law, generators, on_token, self._compile)

    def _reporter(self, callback: Callable[..., Any] | None, number: int, groups: int) -> Callable[[int], None] | None:
        if callback is None:
            return None

        def report(index: int) -> None:
            place = (number * self._target.num_tokens + index) // groups
            callback(self, place, place, {})

        return report
