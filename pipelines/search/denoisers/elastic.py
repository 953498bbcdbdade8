"""The knobs of dynamic chunking in a search (arXiv 2603.06351): how many tokens an evaluation computes."""

from __future__ import annotations

from typing import Any

from fastgen.accounting import note_path
from fastgen.models.chunking import check_budget
from fastgen.models.elastic import ElasticBudget, ElasticModelMixin
from fastgen.pipelines.elastic import budget_of
from fastgen.pipelines.search.denoisers.base import Denoiser

__all__ = ["ElasticDenoiser"]

_KNOBS: dict[str, Any] = {"tail_drop": 0.0, "uncond_tail_drop": None, "token_budget": None}


class ElasticDenoiser(Denoiser):
    """Shared by adapters with a transformer that may have dynamic chunking.

    The knobs are those of `DCZImagePipeline.__call__`, as numbers: candidates of different times share a forward pass,
    so that they cannot depend on the step.
    """

    _knobs: dict[str, Any] | None = None

    def prepare_knobs(self, tokens: int, overrides: bool) -> None:
        """Take the knobs from `settings.extra`, which may contain nothing else.

        Args:
            tokens: of one sample, when all are kept.
            overrides: the pipeline sets its own knobs, so that what `enable_dc` has set does not count.

        Raises:
            ValueError: another argument, a knob out of range, or a transformer that cannot take it.
        """
        extra, transformer = self.settings.extra, self.pipe.transformer
        unknown = [name for name in extra if name not in _KNOBS]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: a search of {type(self.pipe).__name__} takes no such argument")
        if not isinstance(transformer, ElasticModelMixin):
            if extra or overrides:
                raise ValueError(
                    f"{', '.join(extra) or 'transformer'}: {type(transformer).__name__} has no dynamic chunking"
                )
            return
        if transformer._hold not in (None, 1) or transformer.is_caching:
            raise ValueError("transformer: a search cannot use kept tokens or cache over steps; disable that first")
        note_path("transformer", "dynamic chunking")
        knobs, budget = dict(_KNOBS), budget_of(self.pipe)
        if budget is not None and not overrides:
            knobs = {name: getattr(budget, name) for name in _KNOBS}
        # Drops and a budget exclude each other: the kind that is given takes the place of the other.
        if "tail_drop" in extra or "uncond_tail_drop" in extra:
            knobs["token_budget"] = None
        if extra.get("token_budget") is not None:
            knobs |= {"tail_drop": 0.0, "uncond_tail_drop": None}
        merged = self._knobs = knobs | extra
        for name, value in merged.items():
            missing = value is None and name != "tail_drop"
            if not missing and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(
                    f"{name}: {value!r} is not allowed in a search, needs one number: candidates of different times "
                    "share a forward pass"
                )
        ElasticBudget(**merged)
        check_budget(None, merged["token_budget"], 1, tokens)

    def budget(self, samples: int) -> dict[str, Any]:
        """Arguments of the transformer's forward pass for this many candidates, the conditional half first."""
        if self._knobs is None:
            return {}
        if self._knobs["token_budget"] is not None:
            return {"token_budget": self._knobs["token_budget"]}
        conditional, unconditional = self._knobs["tail_drop"], self._knobs["uncond_tail_drop"]
        halves = [conditional, conditional if unconditional is None else unconditional]
        return {"tail_drop": [float(drop) for drop in halves[: self.forwards] for _ in range(samples)]}
