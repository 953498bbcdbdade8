"""Recipe `drafter`: an EAGLE drafter learns its target's predictions, for both guidance rows.

The target reads prompts and whole pictures once; the drafter is unrolled over several steps on its own output. The
loss compares guided logits, because acceptance is decided after guidance. Terms of the target's redundancy
(`fastgen.training.redundancy_terms`) are optional.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.data.shapes import IMAGE_SIZE, ShapesWorld
from fastgen.drafters.cache import KVCache
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import load_drafter
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.targets import Prefix, target_of
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import write_record
from fastgen.training.eagle_unroll import unroll
from fastgen.training.redundancy_terms import (
    at_places,
    class_cross_entropy,
    convergence_along,
    probe_siblings,
    soft_targets,
)
from fastgen.training.samples import Samples
from fastgen.training.vq import image_tokens

__all__ = ["DrafterRecipe", "DrafterTerms"]

_STEP_DECAY = 0.8  # of the loss weight, per step (EAGLE-3)


@dataclass(frozen=True, slots=True)
class DrafterTerms:
    """Terms of the loss.

    Attributes:
        steps: steps of drafting on its own output; 1 is teacher forcing.
        feature: weight of the smooth L1 loss of the predicted feature (variant 1).
        feature_noise: width of the uniform noise on the input features.
        redundancy: "none", "class" (class cross-entropy, and a token cross-entropy with less weight where siblings are
            similar) or "soft" (soft targets).
        strength: weight of the redundancy term.
        probes: places per picture where siblings are evaluated.
        convergence: later steps have less weight in flat regions.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = 4
    feature: float = 0.1
    feature_noise: float = 0.1
    redundancy: Literal["none", "class", "soft"] = "none"
    strength: float = 0.3
    probes: int = 16
    convergence: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.probes < 1:
            raise ValueError(f"steps and probes must be at least 1, got {self.steps} and {self.probes}")
        if min(self.feature, self.feature_noise, self.strength) < 0:
            raise ValueError("feature, feature_noise and strength must not be negative")
        if self.redundancy not in ("none", "class", "soft"):
            raise ValueError(f"redundancy: {self.redundancy!r} is unknown; there are none, class and soft")


class DrafterModule(torch.nn.Module):
    """The drafter, unrolled over several steps."""

    adamw_names = ("head",)

    def __init__(self, drafter: EagleDrafter | MedusaDrafter, steps: int) -> None:
        super().__init__()
        self.drafter, self.steps = drafter, steps

    def forward(self, features: Tensor, embeds: Tensor, positions: Tensor, mask: Tensor) -> list[Tensor]:
        """States of steps 1 … `steps`, [R, L, D] each; see `unroll`. Medusa heads read their root's place."""
        if isinstance(self.drafter, EagleDrafter):
            return unroll(self.drafter, features, embeds, positions, mask, self.steps)
        guesses = (self.drafter.guess(features, embeds, step) for step in range(self.steps))
        return [F.pad(guess, (0, 0, step, 0))[:, : guess.shape[1]] for step, guess in enumerate(guesses)]


class DrafterRecipe:
    """See the module.

    Args:
        seed: seed of weights, data and noise.
        model: folder of the target (`JanusForConditionalGeneration`).
        init: folder of a drafter to continue from.
        terms: of the loss.
        guidance_scale: of drafter and target in the loss; None takes the model's own.
        samples: tokens drawn by the target, with their prompts; None trains on ShapesWorld renders.
        kind: of a new drafter, "eagle" or "medusa".
        drafter: configuration of a new drafter.

    Raises:
        ValueError: renders for a model with another picture size, or an `init` made for another model.
    """

    name = "drafter"

    def __init__(
        self,
        seed: int,
        model: Path,
        init: Path | None = None,
        terms: DrafterTerms | None = None,
        guidance_scale: float | None = None,
        samples: Samples | None = None,
        kind: Literal["eagle", "medusa"] = "eagle",
        **drafter: Any,
    ) -> None:
        from fastgen.pipelines.janus import JanusImagePipeline

        self.terms = terms or DrafterTerms()
        usual = asdict(DrafterTerms())
        self.choices = {key: value for key, value in asdict(self.terms).items() if value != usual[key]}
        self.choices |= {**drafter, **({} if kind == "eagle" else {"kind": kind})}
        pipe = load_pretrained(JanusImagePipeline, model, torch_dtype=torch.float32)
        pipe.model.requires_grad_(False)
        self.target = target_of(pipe.model, pipe.tokenizer)
        if samples is None and self.target.image_size != IMAGE_SIZE:
            raise ValueError(
                f"model: draws {self.target.image_size} pixels, renders of ShapesWorld have {IMAGE_SIZE}; train the "
                "drafter on the model's own samples (--samples, --prompts-file, --data)"
            )
        scale = guidance_scale or float(pipe.model.generation_config.guidance_scale or 1.0)
        self.law = TokenLaw(guidance_scale=scale)
        self.data, self.samples = ShapesWorld(seed + 808, crossed=False), samples
        torch.manual_seed(seed)
        if init is not None:
            self.drafter: EagleDrafter | MedusaDrafter = load_drafter(init, torch.float32)
            self.drafter.check(self.target)
        elif kind == "medusa":
            self.drafter = MedusaDrafter.for_target(self.target, **{"depth": self.terms.steps, **drafter})
        else:
            self.drafter = EagleDrafter.for_target(self.target, **drafter)

    def build(self) -> torch.nn.Module:
        """The drafter; the target stays frozen."""
        return DrafterModule(self.drafter.train(), self.terms.steps)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders and their captions, or tokens and their prompts."""
        if self.samples is not None:
            tokens, prompts = self.samples.batch(start, size)
            return {"tokens": tokens, "prompts": prompts}
        data = self.data.batch(size, start)
        return {"images": torch.from_numpy(data.images), "prompts": list(data.texts)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the guided distributions over all steps, plus feature error, plus redundancy terms."""
        target, terms, drafter = self.target, self.terms, self.drafter
        given = batch["images"] if self.samples is None else batch["tokens"]
        target.model.to(given.device)
        tokens = given if self.samples is not None else image_tokens(target.model.model.vqmodel, given)
        with torch.no_grad():
            prefix = target.prefix(batch["prompts"], self.law.guided)
            length = prefix.mask.shape[1]
            cache = target.new_cache(prefix, 8 * terms.probes)
            output, embeds = target.read(prefix, tokens, cache, drafter.taps)
            features = drafter.features(output)
            index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
            # The distribution of token i comes from the place before it.
            laws = target.token_law(target.head(output.hidden[:, length - 1 : -1]), prefix, self.law, index)
        noise = (torch.rand(features.shape, generator=generator) - 0.5).to(features) * terms.feature_noise
        whole = prefix.followed_by(embeds[:, length:-1])
        states = module((features + noise)[:, :-1], embeds[:, 1:], whole.positions, whole.mask)
        return self._terms(states, output.hidden, laws, prefix, cache, generator)

    def _terms(
        self,
        states: list[Tensor],
        hidden: Tensor,
        laws: Tensor,
        prefix: Prefix,
        cache: KVCache,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        target, terms, drafter, length = self.target, self.terms, self.drafter, prefix.mask.shape[1]
        wanted, siblings = laws[:, 1:], None
        places = None
        if terms.redundancy != "none":
            places = torch.rand(wanted.shape[:2], generator=generator).argsort(dim=1)[:, : terms.probes]
            places = places.to(laws.device)
            siblings = probe_siblings(target, prefix, self.law, laws, cache, places + 1)
        counts = torch.ones(wanted.shape[:2], device=laws.device)
        if siblings is not None and places is not None and terms.redundancy == "class":
            counts = counts.scatter(1, places, 1 - siblings.redundancy)
        if siblings is not None and places is not None and terms.redundancy == "soft":
            soft = soft_targets(siblings, at_places(wanted, places), terms.strength)
            wanted = wanted.scatter(1, places[..., None].expand_as(soft), soft)
        flat = None
        if terms.convergence:
            features = target.guided(target.redundancy(hidden[:, length:-1]), prefix, self.law)
            flat = convergence_along(features)
        predicts_features = isinstance(drafter, MedusaDrafter) or drafter.config.variant == 1
        total, numbers = laws.new_zeros(()), dict[str, float]()
        index = torch.arange(1, wanted.shape[1] + 1, device=laws.device).expand(len(wanted), -1)
        for step, state in enumerate(states):
            # Place length - 1 reads the first token and predicts the second; step k starts k places later. The last
            # place has no target: nothing follows the picture.
            own = state[:, length - 1 : length - 1 + wanted.shape[1]]
            log_q = self._log_law(own, prefix, index)
            cross = -(wanted * log_q).sum(dim=-1)
            count = counts if flat is None or not step else counts * (1 - flat)
            weight = _STEP_DECAY**step
            total = total + weight * (cross * count)[:, step:].sum() / count[:, step:].sum().clamp_min(1e-6)
            if siblings is not None and places is not None and terms.redundancy == "class" and not step:
                p, log_q_there = at_places(wanted, places), at_places(log_q, places)
                total = total + terms.strength * class_cross_entropy(siblings, p, log_q_there).mean()
            if predicts_features and terms.feature > 0:
                truth = hidden[:, length + step : length + wanted.shape[1]]
                total = total + weight * terms.feature * F.smooth_l1_loss(own[:, step:].float(), truth.float())
            overlap = torch.minimum(laws[:, 1:], log_q.detach().exp()).sum(dim=-1)
            numbers[f"overlap_{step + 1}"] = float(overlap[:, step:].mean())
        numbers["cross"] = float(total.detach())
        return total, numbers

    def _log_law(self, state: Tensor, prefix: Prefix, index: Tensor) -> Tensor:
        """Log-probabilities of the guided drafter, [B, n, V]; finite."""
        drafter, target = self.drafter, self.target
        logits = drafter.logits_of(target, state) if isinstance(drafter, EagleDrafter) else target.head(state)
        mixed = self.target.guided(logits, prefix, self.law)
        return self.target.apply_grammar(mixed, index).log_softmax(dim=-1).clamp_min(-80.0)

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the drafter in half precision."""
        half: Any = copy.deepcopy(self.drafter).to(torch.float16)
        half.save_pretrained(folder)
        write_record(folder, self.name, record | {"choices": self.choices})
