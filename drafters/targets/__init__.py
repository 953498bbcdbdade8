"""Adapters: the parts of an autoregressive image model that speculative decoding needs."""

from __future__ import annotations

from fastgen.drafters.targets.base import Prefix, Target, TargetPass, check_lengths, check_tokenizer, unit_range
from fastgen.drafters.targets.registry import target_of

__all__ = ["Prefix", "Target", "TargetPass", "check_lengths", "check_tokenizer", "target_of", "unit_range"]
