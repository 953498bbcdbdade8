"""UniPC, a multistep solver of second order, in place of the Euler steps of flow models."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

__all__ = ["unipc_of_flow"]


class _UniPC(diffusers.UniPCMultistepScheduler):
    """With what pipelines of flow models ask of their scheduler: levels as a list, and noise added to a picture."""

    def set_timesteps(self, *args: Any, sigmas: Any = None, **kwargs: Any) -> None:
        levels = None if sigmas is None else np.array(sigmas, dtype=np.float64)
        super().set_timesteps(*args, sigmas=levels, **kwargs)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) sample + sigma noise, as the Euler scheduler of flow models has it."""
        noisy: torch.Tensor = self.add_noise(sample, noise, timestep)
        return noisy

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is not found by its name
        return _restored, (vars(self),)


def _restored(state: dict[str, Any]) -> Any:
    made: Any = _UniPC.__new__(_UniPC)
    vars(made).update(state)
    return made


# Saved as diffusers' own.
_UniPC.__name__ = _UniPC.__qualname__ = diffusers.UniPCMultistepScheduler.__name__
_UniPC.__module__ = diffusers.UniPCMultistepScheduler.__module__


def unipc_of_flow(scheduler: Any) -> diffusers.UniPCMultistepScheduler:
    """UniPC with the noise levels of a flow-matching scheduler."""
    config = scheduler.config
    made: diffusers.UniPCMultistepScheduler = _UniPC.from_config(
        config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.get("shift", 1.0)
    )
    return made
