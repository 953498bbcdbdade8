"""Text to image with a search: a verifier scores candidates while they are drawn, and the good ones continue."""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from fastgen.accounting import Stats, note_path
from fastgen.checks import check_bool, check_callable, check_choice, check_generator, check_integer
from fastgen.contracts import Loss
from fastgen.errors import FastgenError, NotFiniteError
from fastgen.pipelines.finite import check_output, finite_decoder
from fastgen.pipelines.pickling import restore, without_recorders
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.search.budget import Budget, Pool
from fastgen.pipelines.search.calibration import Calibration, calibration_for
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of
from fastgen.pipelines.search.engine import Chain, Node, Round, SearchStopped, run_chains
from fastgen.pipelines.search.interpolants import Tabulated
from fastgen.pipelines.search.names import POLICIES, named_policy
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.previews import PreviewOption, check_preview, preview_of
from fastgen.pipelines.search.report import SearchReport, reports_of
from fastgen.pipelines.search.samplers import Ancestral, EulerMaruyama, Sampler
from fastgen.pipelines.summary import reported
from fastgen.pipelines.token_images import as_output, one_per_image
from fastgen.pipelines.wrapping import WrappingPipeline
from fastgen.pretrained import load_pretrained

__all__ = ["NoFinitePicture", "NoiseSearchOutput", "NoiseSearchPipeline", "SamplerName", "SearchInterrupted"]

SamplerName = Literal["ancestral", "euler-maruyama", "rollover"]


@dataclass
class NoiseSearchOutput(BaseOutput):
    """Output of the pipeline.

    Attributes:
        images: one for each prompt, as `output_type` says.
        reports: what each prompt's search did.
        stats: what the call cost.
    """

    images: Any
    reports: list[SearchReport]
    stats: Stats


class NoFinitePicture(NotFiniteError):
    """All that was tried for a prompt had latents, pixels or scores that are not numbers.

    Attributes:
        output: of the other prompts; None where there are none.
        found: their numbers in the call.
    """

    def __init__(self, message: str, output: NoiseSearchOutput | None, found: list[int]) -> None:
        super().__init__(message)
        self.output, self.found = output, found


class SearchInterrupted(Exception):
    """The search was cut short; `__cause__` says by what.

    Attributes:
        output: the best of every prompt until then; None where nothing had been evaluated.
    """

    def __init__(self, message: str, output: NoiseSearchOutput | None) -> None:
        super().__init__(message)
        self.output = output


class NoiseSearchPipeline(WrappingPipeline):
    """Wraps a diffusers pipeline that the user has loaded; its attributes are those of the pipeline.

    Loss contract: `exact` with policy None (the stock call); `lossy` else: the pictures are others.

    Args:
        pipe: the pipeline; it is not changed.
        verifier: scores pictures: an object with `score(images, prompts) -> tensor`, or such a function; images are
            [k, 3, H, W] uint8.
        policy: a name ("threshold", "rbf", "svdd", "code", "smc", "best-of-n", "random", "zero-order",
            "search-over-paths"), a `Policy`, or None: no search.
        thresholds: for policy "threshold" without a tau: what `fastgen train search-calibrate` measured, or its file;
            None takes what the verifier has in `thresholds` for this model.

    Raises:
        ValueError: a pipeline that cannot be searched, no verifier, an unknown policy, a tau that is no score of the
            verifier, or thresholds that are of another verifier or model, or not asked for.
    """

    def __init__(
        self,
        pipe: Any,
        verifier: Any = None,
        policy: str | Policy | None = "threshold",
        thresholds: Calibration | str | os.PathLike[str] | None = None,
    ) -> None:
        self.pipe = pipe
        self.policy = named_policy(policy) if isinstance(policy, str) else policy
        if self.policy is None:
            if not callable(pipe):
                raise FastgenError(f"pipe: {type(pipe).__name__} is not a pipeline")
            return
        if not isinstance(self.policy, Policy):
            raise FastgenError(f"policy: {policy!r} is not allowed, needs a name, a Policy or None")
        self._denoiser = denoiser_of(pipe)
        score = getattr(verifier, "score", verifier)
        if not callable(score):
            raise ValueError(f"verifier: {type(verifier).__name__} has no score(images, prompts)")
        self.policy.check_scores(verifier)
        if thresholds is not None and not self.policy.calibrated:
            raise ValueError(f"thresholds: policy {self.policy.description} takes none")
        self.thresholds = calibration_for(pipe, verifier, thresholds) if self.policy.calibrated else None
        self.verifier = verifier
        self._score: Callable[[Tensor, list[str]], Tensor] = score

    @property
    def loss(self) -> Loss:
        """The loss contract."""
        return "exact" if self.policy is None else self.policy.loss

    def __getstate__(self) -> dict[str, Any]:
        pipe = self.pipe
        if isinstance(pipe, DiffusionPipeline):  # a stock one cannot be pickled once it has drawn
            pipe = copy.copy(pipe)
            vars(pipe).update(without_recorders(vars(pipe)))
        return {**vars(self), "pipe": pipe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)
        if isinstance(self.pipe, DiffusionPipeline):
            restore(self.pipe, vars(self.pipe))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        verifier: Any = None,
        policy: str | Policy | None = "threshold",
        thresholds: Calibration | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> NoiseSearchPipeline:
        """Load the pipeline inside, as `save_pretrained` wrote it, and wrap it; `kwargs` are for its loading."""
        pipe = load_pretrained(DiffusionPipeline, os.fspath(pretrained_model_name_or_path), **kwargs)
        return cls(pipe, verifier, policy, thresholds)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        max_nfe: int | None = None,
        max_seconds: float | None = None,
        target_score: float | None = None,
        sampler: SamplerName | Sampler = "ancestral",
        preview: PreviewOption = "full",
        batch_size: int = 32,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        on_round: Callable[[Round], None] | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draw one image of each prompt. Without a policy this is the pipeline's own call.

        Args:
            prompt: text or list of texts.
            height, width, num_inference_steps, guidance_scale: of the pipeline; None takes its own defaults.
            negative_prompt: one for all prompts, or a list with one for each.
            generator: one per prompt, or a single one. The first candidate starts from what the pipeline itself would
                draw with it.
            max_nfe: forward passes of the model on one sample for each prompt; with classifier-free guidance an
                evaluation takes two.
            max_seconds: of the whole call; trajectories that are begun then are still finished.
            target_score: a prompt is done when a finished picture scores so much.
            sampler: of stochastic transitions: "ancestral" (stochastic DDIM on the pipeline's own times),
                "euler-maruyama" (g = 3 t^2 on them), "rollover" (RBF's: variance-preserving, on a grid of its own
                with as many times, at whose last the preview is the picture), or a `Sampler`.
            preview: how candidates that are not at the last time are decoded for the verifier: "full", "pooled", or a
                decoder such as `AutoencoderTiny`; see `fastgen.pipelines.search.previews.PreviewOption`.
            batch_size: samples of a forward pass, at most; fewer where memory does not take them.
            output_type: "pil", "np" or "pt".
            return_dict: False gives ``(images,)``.
            on_round: called after each round of evaluations.
            pipeline_kwargs: arguments of the pipeline's own call by name, such as `image`, `mask_image`, `strength`,
                `max_sequence_length`, or the knobs of a model with dynamic chunking.

        Candidates whose latents, pixels or score are not numbers are dropped.

        Returns:
            `NoiseSearchOutput`; without a policy what the pipeline returns.

        Raises:
            ValueError: an argument out of range, a budget smaller than one picture takes.
            NotFiniteError: all candidates of a prompt were dropped; it has the pictures of the others.
            SearchInterrupted: the model, the verifier or the user ended the search; it has what was found.
        """
        policy = self.policy
        asked: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        asked |= {"height": height, "width": width, "negative_prompt": negative_prompt}
        further = _further(pipeline_kwargs, asked)
        if policy is None:
            own: dict[str, Any] = {"generator": generator, "max_nfe": max_nfe, "max_seconds": max_seconds}
            own |= {"target_score": target_score, **asked}
            own = {name: value for name, value in own.items() if value is not None}
            return self._stock(prompt, output_type=output_type, return_dict=return_dict, **own, **further)
        if not isinstance(prompt, str | list | tuple) or not prompt:
            raise FastgenError(f"prompt: {prompt!r} is not allowed, needs a text or a list of at least one")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_generator(generator, len(prompts))
        batch_size = check_integer("batch_size", batch_size, 1)
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        check_bool("return_dict", return_dict)
        check_callable("on_round", on_round)
        check_preview(preview)
        if not isinstance(sampler, Sampler):
            check_choice("sampler", sampler, get_args(SamplerName))
        budget = Budget(max_nfe, max_seconds, target_score)
        settings = Settings(**asked, extra=further)
        texts = [*prompts, *(settings.checked(len(prompts)).negatives(len(prompts)) or ())]
        check_prompt_lengths(self.pipe, [text for text in texts if isinstance(text, str)])
        generators = one_per_image(generator, len(prompts))
        started = time.perf_counter()
        cause: BaseException | None = None
        with reported(self) as stats:
            denoiser = self._denoiser(self.pipe, prompts, settings)
            path = self._sampler(sampler, denoiser)
            policy = self._resolved(policy, denoiser, path, budget)
            note_path("policy", policy.description)
            name = _note_sampler(policy, sampler, self.pipe)
            shown = preview_of(preview, denoiser)
            chains = self._chains(policy, denoiser, path, budget, generators, started)
            ends: Sequence[Node | None]
            try:
                ends = run_chains(chains, policy.program, self._score, prompts, batch_size, on_round, shown)
            except SearchStopped as error:
                cause = error.__cause__
                kept = [chain.furthest for chain in chains]
                ends = [None if node is None or node.fault is not None else node for node in kept]
                if len({chain.prompt for chain, end in zip(chains, ends, strict=True) if end}) < len(prompts):
                    raise SearchInterrupted(str(error), None) from cause
            reports, winners = reports_of(policy, prompts, chains, ends, started, cause is not None)
            replaced = _replaced(stats)
            reports = [replace(report, sampler=name, replaced=replaced) for report in reports]
            pictures = [_picture(denoiser, node, prompt) for prompt, node in enumerate(winners)]
        if hasattr(self.pipe, "maybe_free_model_hooks"):
            self.pipe.maybe_free_model_hooks()
        output, fault = _output(pictures, reports, output_type, stats)
        if cause is not None:
            raise SearchInterrupted(f"search: {type(cause).__name__}: {cause}", output) from cause
        if fault is not None:
            found = [i for i, picture in enumerate(pictures) if isinstance(picture, Tensor)]
            raise NoFinitePicture(str(fault), output, found)
        assert output is not None
        return output if return_dict else (output.images,)

    def _stock(self, prompt: Any, **arguments: Any) -> Any:
        named = "prompt" in inspect.signature(type(self.pipe).__call__).parameters  # or DiT's class_labels come first
        given = () if named or prompt is None else (prompt,)
        with finite_decoder(self.pipe):
            output = self.pipe(*given, **({"prompt": prompt} if named else {}), **arguments)
        check_output(output[0])
        return output

    def _sampler(self, sampler: SamplerName | Sampler, denoiser: Denoiser) -> Sampler:
        if isinstance(sampler, Sampler):
            return sampler
        if sampler == "rollover":
            return EulerMaruyama.rollover(len(denoiser.times))
        kinds: dict[str, type[Sampler]] = {"ancestral": Ancestral, "euler-maruyama": EulerMaruyama}
        return kinds[sampler](denoiser.interpolant, denoiser.times)

    def _resolved(self, policy: Policy, denoiser: Denoiser, path: Sampler, budget: Budget) -> Policy:
        """The policy with the thresholds for these times and this budget."""
        if self.thresholds is None:
            return policy
        times = [path.model_level(index, denoiser.interpolant)[0] for index in range(len(path.times))]
        limit = math.inf if budget.max_nfe is None else budget.max_nfe / denoiser.forwards
        return policy.resolved(self.thresholds, times, limit)

    @staticmethod
    def _chains(
        policy: Policy,
        denoiser: Denoiser,
        path: Sampler,
        budget: Budget,
        generators: Sequence[torch.Generator],
        started: float,
    ) -> list[Chain]:
        if policy.anywhere and isinstance(denoiser.interpolant, Tabulated):
            scheduler = type(getattr(denoiser.pipe, "scheduler", None)).__name__
            others = ", ".join(name for name, kind in POLICIES.items() if not kind.anywhere)
            raise FastgenError(
                f"policy: {policy.name} adds noise up to levels between timesteps, which a model with {scheduler} "
                f"does not know; {others} can search it"
            )
        if policy.stochastic:
            for index in range(len(path.times)):
                path.model_level(index, denoiser.interpolant)  # raises where the model has no such level
        transitions = (path if policy.stochastic else Sampler(denoiser.interpolant, denoiser.times)).transitions
        policy.check(budget, transitions, denoiser.forwards)
        chains = []
        for prompt, generator in enumerate(generators):
            start = denoiser.begin(generator, prompt)
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
            pool = Pool(budget, denoiser.forwards, started)
            chains += [Chain(denoiser, path, prompt, number, seed, start, pool) for number in range(policy.chains)]
        return chains


def _further(given: Mapping[str, Any] | None, asked: dict[str, Any]) -> dict[str, Any]:
    """The part of `pipeline_kwargs` without an argument of the search; the others go to `asked`, where they are None.

    Raises:
        FastgenError: no mapping of names, or an argument that is given twice.
    """
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        raise FastgenError(f"pipeline_kwargs: {given!r} is not allowed, needs arguments of the pipeline by name")
    further = dict(given or {})
    own = inspect.signature(NoiseSearchPipeline.__call__).parameters.keys() - asked.keys()
    for name in given or {}:
        if name in own or asked.get(name) is not None:
            raise FastgenError(f"pipeline_kwargs: {name} is an argument of the search itself, give it once, there")
        if name in asked:
            asked[name] = further.pop(name)
    return further


def _note_sampler(policy: Policy, sampler: SamplerName | Sampler, pipe: Any) -> str | None:
    """Name of the sampler of stochastic transitions; what it takes the place of is reported."""
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    if policy.stochastic:
        name = sampler if isinstance(sampler, str) else type(sampler).__name__
        reason = f"policy {policy.name} adds noise between the steps, in place of the steps of {scheduler}"
        note_path("sampler", name, reason)
        return name
    noisy = isinstance(getattr(pipe, "scheduler", None), DDPMScheduler)
    note_path("sampler", "ode", f"policy {policy.name} adds no noise, {scheduler} does" if noisy else None)
    return None


def _replaced(stats: Stats) -> dict[str, str]:
    """What the search took in place of the pipeline's own, and why."""
    found = {}
    for name in ("scheduler", "sampler"):
        for used, reason in stats.paths.get(name, {}).items():
            if reason is not None:
                found[name] = f"{used}: {reason}"
    return found


def _picture(denoiser: Denoiser, node: Node, prompt: int) -> Tensor | NotFiniteError:
    """[1, 3, H, W] uint8, or why there is none; what was scored at the end of a trajectory is kept."""
    if node.fault is not None:
        return node.fault
    if node.picture is not None:
        return node.picture
    try:
        return denoiser.pictures(node.prediction, torch.tensor([prompt]))
    except NotFiniteError as error:
        return error


def _output(
    pictures: Sequence[Tensor | NotFiniteError],
    reports: Sequence[SearchReport],
    output_type: str,
    stats: Stats,
) -> tuple[NoiseSearchOutput | None, NotFiniteError | None]:
    """Results of the prompts with a picture, None where there is none, and the reason."""
    fault = next((picture for picture in pictures if isinstance(picture, NotFiniteError)), None)
    made = [picture for picture in pictures if isinstance(picture, Tensor)]
    if not made:
        return None, fault
    kept = [report for report, picture in zip(reports, pictures, strict=True) if isinstance(picture, Tensor)]
    images = as_output(torch.cat(made).float().div(255).permute(0, 2, 3, 1), output_type)
    return NoiseSearchOutput(images=images, reports=kept, stats=stats), fault
