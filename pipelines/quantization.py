"""Layers whose weights are kept in 8 or 4 bits, and how torchao is asked for them.

For weights of a pipeline that is loaded (`fastgen.pipelines.accelerate.quantize`), and while one is loaded. Imports
neither torch nor torchao by itself.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["BITS", "config_while_loading", "layer_pattern", "torchao_config", "why_not_here"]

#: Kind -> bits of a weight; "int8-dynamic" computes in 8 bits too.
BITS = {"int8": 8, "int8-dynamic": 8, "fp8": 8, "int4": 4}
_CONFIGS = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
    "int4": "Int4WeightOnlyConfig",
}


def why_not_here(kind: str, device: torch.device) -> str | None:
    """Why weights of this kind cannot be had on this machine, in a few words; None if they can."""
    import torch

    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (python -m pip install torchao)"
    if kind == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        return "fp8 needs a GPU of compute capability 8.9 or newer"
    return "int4 needs a GPU" if kind == "int4" and device.type != "cuda" else None


def layer_pattern(network: Any) -> re.Pattern[str]:
    """What the whole name of a layer matches whose weights may be kept in fewer bits: one inside a list of blocks, and
    none that diffusers names as sensitive (norms, embeddings of time …).

    Args:
        network: of diffusers, or its class.
    """
    skipped = getattr(network, "_skip_layerwise_casting_patterns", None) or ()
    sensitive = "|".join([*skipped, *(getattr(network, "_keep_in_fp32_modules", None) or ()), "lora_"])
    # Parameters are matched too: the number in "modulation.1.weight" is no block.
    return re.compile(rf"(?!.*(?:{sensitive}))(?!.*\.weight$).*\.\d+\..*")


def torchao_config(kind: str) -> Any:
    """Of torchao, for a kind of `BITS`."""
    from torchao import quantization

    return getattr(quantization, _CONFIGS[kind])()


def config_while_loading(kind: str, network: Any) -> Any:
    """The `quantization_config` of a network's `from_pretrained` in diffusers."""
    from diffusers import TorchAoConfig
    from torchao.quantization import FqnToConfig

    return TorchAoConfig(FqnToConfig({f"re:{layer_pattern(network).pattern}": torchao_config(kind)}))
