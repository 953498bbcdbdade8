"""The interface of a policy of a noise search: a program for each chain, and its requirements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from fastgen.checks import check_integer
from fastgen.contracts import Loss
from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.calibration import Calibration
from fastgen.pipelines.search.engine import Chain, Program

__all__ = ["Policy", "check_counts"]


class Policy(ABC):
    """A way to search. One object serves all prompts; what a chain remembers lives in its program.

    Attributes:
        name: of the method.
        chains: of every prompt; the best end of them is returned.
        stochastic: whether transitions need noise.
        anywhere: whether the model is asked at levels that are not on its own schedule.
    """

    name: ClassVar[str]
    loss: ClassVar[Loss] = "lossy"
    stochastic: ClassVar[bool] = True
    anywhere: ClassVar[bool] = False
    chains: int = 1

    @abstractmethod
    def program(self, chain: Chain) -> Program:
        """A chain's search: yields what it wants evaluated, returns the node of the picture that it ends with."""

    def least(self, transitions: int) -> int:
        """Evaluations of one prompt without which there is no picture."""
        return self.chains * (transitions + 1)

    @property
    def endless(self) -> bool:
        """Whether nothing but a budget ends the search."""
        return False

    def check(self, budget: Budget, transitions: int, cost: int) -> None:
        """Refuse a budget before anything is evaluated.

        Args:
            budget: of each prompt.
            transitions: of a trajectory.
            cost: forward passes of an evaluation.

        Raises:
            ValueError: it is smaller than a picture takes, or does not end the search.
        """
        least = self.least(transitions) * cost
        if budget.max_nfe is not None and budget.max_nfe < least:
            raise ValueError(
                f"max_nfe: {budget.max_nfe} is not allowed, policy {self.name} needs at least {least} here"
            )
        if self.endless and budget.max_nfe is None and budget.max_seconds is None:
            raise ValueError(f"max_nfe, max_seconds: policy {self.name} needs one of them, or it would not end")

    @property
    def calibrated(self) -> bool:
        """Whether it takes thresholds that were measured for the verifier."""
        return False

    def check_scores(self, verifier: Any) -> None:  # noqa: B027
        """Refuse numbers that are no scores of this verifier.

        Raises:
            ValueError: names the number and the verifier's range.
        """

    def resolved(self, calibration: Calibration | None, times: Sequence[float], evaluations: float) -> Policy:
        """The policy of a call.

        Args:
            calibration: of the verifier for the model, if there is one.
            times: of stochastic trajectories, as noise levels in the model's own interpolant.
            evaluations: that a prompt may take; infinite without a limit.
        """
        return self

    @property
    def description(self) -> str:
        """Name and settings, for the report."""
        return self.name


def check_counts(policy: Policy, *names: str) -> None:
    """Refuse attributes that are no whole numbers above 0.

    Raises:
        ValueError: names the attribute.
    """
    for name in names:
        check_integer(name, getattr(policy, name), 1)
