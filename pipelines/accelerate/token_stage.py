"""GLM-Image draws tokens before it denoises: its language model drafts them in windows (Jacobi).

The noise of every token is drawn first, in the order and with the generator of the stock loop. The next token is then
a function of the tokens before it, and a window of guesses is checked in one pass of the model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, generation
from transformers.generation.utils import GENERATION_MODES_MAPPING

from fastgen.accounting import note_path
from fastgen.checks import check_integer
from fastgen.pipelines.accelerate.part import Part, Undo

__all__ = ["TokenStage"]

#: Processors that look at the logits of one token alone.
_PROCESSORS = (
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.MinPLogitsWarper,
    generation.TypicalLogitsWarper,
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
)
_CRITERIA = (generation.MaxLengthCriteria, generation.EosTokenCriteria)
_MODES = ("sample", "greedy_search")
#: Arguments of `generate` that choose another loop, or that one of ours would not see.
_OTHER_LOOPS = (
    "num_beams",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "streamer",
    "synced_gpus",
    "custom_generate",
)


@dataclass(frozen=True)
class TokenStage(Part):
    """The language model of GLM-Image checks a window of guesses in one pass; the tokens are those of its `generate`
    with the same seed, up to rounding.

    Where rounding turns a token, which is likely in 16 bits only, the tokens behind it are others of the same
    distribution.

    Args:
        window: tokens that a pass checks.
    """

    name = "token_stage"
    loss = "exact"
    window: int = 12

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)

    def why_not(self, pipe: Any) -> str | None:
        model = getattr(pipe, "vision_language_encoder", None)
        if type(model).__name__ != "GlmImageForConditionalGeneration":
            return "it draws no tokens before it denoises"
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return "its language model is spread over several devices"
        return None

    def enable(self, pipe: Any) -> Undo:
        model = pipe.vision_language_encoder
        stock: Any = type(model)
        model.__class__ = _in_windows(stock, self.window)

        def undo() -> None:
            model.__class__ = stock

        return undo


@functools.cache
def _in_windows(stock: Any, window: int) -> Any:
    """The class of the model with another loop in its `generate`; name and module stay."""

    @functools.wraps(stock.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        other = [name for name in _OTHER_LOOPS if kwargs.get(name) not in (None, False, 1)]
        if other:
            note_path("token stage", "stock", f"{other[0]} is given")
            return stock.generate(self, *args, **kwargs)
        return stock.generate(self, *args, **{**kwargs, "custom_generate": loop})

    def loop(
        self: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        reason = _why_stock(self, logits_processor, stopping_criteria, generation_config, kwargs)
        note_path("token stage", "windows" if reason is None else "stock", reason)
        given = (self, input_ids, logits_processor, stopping_criteria, generation_config)
        if reason is not None:
            mode = generation_config.get_generation_mode()
            return getattr(stock, GENERATION_MODES_MAPPING[mode])(*given, **kwargs)
        return _draw(window, *given, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        return object.__new__, (stock,), vars(self)  # a copy is a plain one

    changed = {
        "generate": generate,
        "__reduce_ex__": reduced,
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (stock,), {**changed, "__qualname__": stock.__qualname__})


def _why_stock(model: Any, processors: Any, criteria: Any, config: Any, given: dict[str, Any]) -> str | None:
    """Why the stock loop has to run, or None."""
    if (mode := config.get_generation_mode().value) not in _MODES:
        return f"generation mode {mode}"
    if config.return_dict_in_generate:
        return "more than tokens is asked for"
    for each in (*processors, *criteria):
        if type(each) not in (*_PROCESSORS, *_CRITERIA):
            return f"{type(each).__name__} looks at more than the token's logits"
    if criteria.max_length is None or given.get("image_grid_thw") is None or model.training:
        return "no picture is asked for"
    cache = given.get("cache")
    if given.get("inputs_embeds") is not None or (cache is not None and cache.get_seq_length() > 0):
        return "the prompt is given in parts"
    return None


def _draw(
    window: int,
    model: Any,
    ids: Tensor,
    processors: LogitsProcessorList,
    criteria: Any,
    config: Any,
    attention_mask: Tensor | None = None,
    **given: Any,
) -> Tensor:
    """Prompts and tokens [B, P + n], as the stock loop returns them."""
    from fastgen.drafters.acceptance import Exact
    from fastgen.drafters.decode import decode_speculative
    from fastgen.drafters.law import TokenLaw
    from fastgen.drafters.offload import device_of, onloaded
    from fastgen.drafters.sources import JacobiSource
    from fastgen.drafters.targets.glm_image import GlmImageTarget

    count = criteria.max_length - ids.shape[1]
    device = device_of(model)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    target = GlmImageTarget(model, count, lambda logits: processors(ids, logits))
    noise = None
    if config.do_sample:  # as torch.multinomial draws it, token by token
        shape = (len(ids), target.vocab_size)
        noise = torch.stack(
            [torch.empty(shape, dtype=torch.float32, device=device).exponential_() for _ in range(count)], dim=1
        )
    with torch.no_grad(), onloaded(model):
        prefix = target.begin(ids.to(device), mask.to(device), noise, **given)
        source, unused = JacobiSource(min(window, count)), [torch.Generator()] * len(ids)
        decoded = decode_speculative(target, source, Exact(), prefix, TokenLaw(temperature=0.0), unused)
    return torch.cat([ids, _ended(decoded.tokens.to(ids.device), criteria, config)], dim=1)


def _ended(tokens: Tensor, criteria: Any, config: Any) -> Tensor:
    """Tokens [B, n] with pads behind the end mark of each row, cut where all rows have ended."""
    marks = [each.eos_token_id.to(tokens.device) for each in criteria if hasattr(each, "eos_token_id")]
    if not marks:
        return tokens
    ends = torch.isin(tokens, torch.cat(marks))
    over = ends.cumsum(dim=1) - ends.long() > 0
    pads = tokens.masked_fill(over, int(config._pad_token_tensor))
    return pads[:, : int((~over).sum(dim=1).max())]
