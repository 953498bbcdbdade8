"""UniPC, a multistep solver of second order, in place of the Euler steps of flow models."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import torch

__all__ = ["for_pipelines_of_flow", "unipc_of_flow"]


class _UniPC(diffusers.UniPCMultistepScheduler):
    """With what pipelines of flow models ask of their scheduler: levels as a list, and noise added to a picture."""

    def set_timesteps(self, *args: Any, sigmas: Any = None, mu: Any = None, **kwargs: Any) -> None:
        levels = None if sigmas is None else np.array(sigmas, dtype=np.float64)
        if mu is not None:
            mu += math.log(self.config.flow_shift)  # read by no one else where shifting is dynamic
        super().set_timesteps(*args, sigmas=levels, mu=mu, **kwargs)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) sample + sigma noise, as the Euler scheduler of flow models has it."""
        return self.add_noise(sample, noise, timestep)

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is not found by its name
        return _restored, (vars(self),)


def _restored(state: dict[str, Any]) -> Any:
    made: Any = _UniPC.__new__(_UniPC)
    vars(made).update(state)
    return made


# Saved as diffusers' own.
_UniPC.__name__ = _UniPC.__qualname__ = diffusers.UniPCMultistepScheduler.__name__
_UniPC.__module__ = diffusers.UniPCMultistepScheduler.__module__


def unipc_of_flow(scheduler: Any, shift: float = 1.0) -> diffusers.UniPCMultistepScheduler:
    """UniPC with the noise levels of a flow-matching scheduler.

    Args:
        scheduler: with Euler steps.
        shift: what the shift of its noise levels is multiplied by; above 1, more of the steps are at high noise.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):  # those that are dynamic get theirs with every call, as mu
        shift *= config.get("shift", 1.0)
    return _UniPC.from_config(config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def for_pipelines_of_flow(scheduler: Any) -> Any:
    """The UniPC scheduler of a saved flow model, as `unipc_of_flow` made it: diffusers' own refuses the list of noise
    levels that pipelines of flow models pass. Any other scheduler as it is."""
    flow = type(scheduler) is diffusers.UniPCMultistepScheduler and scheduler.config.use_flow_sigmas
    return _UniPC.from_config(scheduler.config) if flow else scheduler
