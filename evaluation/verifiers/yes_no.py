"""The probability that Qwen2.5-VL or Qwen3-VL answers "Yes" when it is asked whether a picture shows the prompt.

Not VQAScore: another network, another question and one token only, so thresholds of one mean nothing to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.base import ModelVerifier
from fastgen.evaluation.verifiers.hub import check_loaded, explained, find_file, place
from fastgen.evaluation.verifiers.pixels import processed
from fastgen.pretrained import load_pretrained

__all__ = ["YesNo"]

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
ANSWER = "Yes"
MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


class YesNo(ModelVerifier):
    """p("Yes") among all tokens that the answer may begin with, in [0, 1].

    Args:
        model: the network.
        image_processor, tokenizer: of it; the tokenizer needs its chat template.
        kwargs: `batch_size` and `cache_size` of `ModelVerifier`.

    Raises:
        ValueError: the tokenizer has no chat template, or no single token for "Yes".
    """

    name = "qwen-vl"
    range = (0.0, 1.0)
    hub_id = "Qwen/Qwen2.5-VL-7B-Instruct"

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, **kwargs: int) -> None:
        super().__init__(model, **kwargs)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self._picture: int = model.config.image_token_id
        self._takes_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters
        yes = tokenizer(ANSWER, add_special_tokens=False).input_ids
        if len(yes) != 1 or yes[0] == tokenizer.unk_token_id:
            raise ValueError(f"tokenizer: has no single token for {ANSWER!r}")
        if not tokenizer.chat_template:
            raise ValueError("tokenizer: has no chat template")
        self._yes: int = yes[0]

    @classmethod
    def load(cls, weights: str | None = None, *, device: str = "cpu", dtype: str = "auto", **kwargs: int) -> YesNo:
        """From a Hub id or a folder of a Qwen2.5-VL or Qwen3-VL.

        Raises:
            FastgenError: something is missing or broken, or it is another kind of model.
        """
        weights = weights or cls.hub_id
        where, kind = place(device, dtype)
        find_file(cls.name, weights, ("config.json",))
        with explained(cls.name, weights):
            model_type = load_pretrained(AutoConfig, weights).model_type
            if model_type not in MODEL_TYPES:
                raise FastgenError(
                    f"verifier {cls.name}: {weights} is a model of type {model_type!r}, needs one of "
                    f"{', '.join(MODEL_TYPES)}"
                )
            tokenizer = load_pretrained(AutoTokenizer, weights)
            processor = load_pretrained(AutoImageProcessor, weights)
            model, info = load_pretrained(AutoModelForImageTextToText, weights, dtype=kind, output_loading_info=True)
            check_loaded(cls.name, weights, info)
            made = cls(model.to(where), processor, tokenizer, **kwargs)
        made.weights = weights
        return made

    def _encode(self, prompts: list[str]) -> Sequence[tuple[Tensor, Tensor]]:
        """Tokens before and behind the place of the picture."""
        return [self._around(prompt) for prompt in prompts]

    def _around(self, prompt: str) -> tuple[Tensor, Tensor]:
        question = [{"type": "image"}, {"type": "text", "text": QUESTION.format(prompt)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        tokens = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        # The first one: a prompt may spell the placeholder too, but it comes behind the picture.
        at = int((tokens == self._picture).nonzero()[0])
        behind = tokens[at + 1 :]
        return tokens[:at], behind[behind != self._picture]

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        seen = processed(self.image_processor, images)
        grids = seen["image_grid_thw"]
        patches = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        rows = [
            torch.cat([before, before.new_full((count,), self._picture), behind])
            for (before, behind), count in zip(sides, patches, strict=True)
        ]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, own in enumerate(rows):  # at the end, so that all answers begin at the same place
            tokens[row, longest - len(own) :] = own
            mask[row, longest - len(own) :] = 1
        extra = {"mm_token_type_ids": (tokens == self._picture).int().to(self.device)} if self._takes_types else {}
        logits = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            pixel_values=seen["pixel_values"].to(self.device, self.dtype),
            image_grid_thw=grids.to(self.device),
            use_cache=False,
            logits_to_keep=1,
            **extra,
        ).logits
        return logits[:, -1].float().softmax(-1)[:, self._yes]
