"""VQAScore: how probable "Yes" is when a network that sees the picture is asked whether it shows the prompt.

arXiv 2404.01291. The texts and the order of the parts are those of the package t2v-metrics 3.0, read in its public
repository; its scores were not available for comparison. Its habits are kept: the text before and the text behind the
picture are tokenised on their own, so each ends in `</s>`; the answer is `Yes` and `</s>`; and the logits beyond the
tokenizer's vocabulary, which it cuts off the network, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from fastgen.evaluation.verifiers.base import ModelVerifier
from fastgen.evaluation.verifiers.clip_flan_t5 import TOWER_USE, CLIPFlanT5, load_network, vision_source
from fastgen.evaluation.verifiers.hub import explained, find_file, part, place, snapshot
from fastgen.evaluation.verifiers.pixels import pad_to_square, processed
from fastgen.io import read_object
from fastgen.pretrained import load_pretrained

__all__ = ["VQAScore"]

#: As t2v-metrics 3.0 has it in its constants, which took it from LLaVA 1.5.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
BEFORE = SYSTEM + " USER: "
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
AFTER = "\n{} ASSISTANT: "
ANSWER = "Yes"
LONGEST = 2048  # tokens, the picture counted as one

_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "vision_tower/*", "tokenizer/*")


class VQAScore(ModelVerifier):
    """sqrt(p(Yes) * p(end | Yes)), in (0, 1].

    With bfloat16 weights it computes under autocast, as t2v-metrics does. Pictures that are not square are padded
    with CLIP's mean colour.

    Args:
        model: the network.
        image_processor: of its vision tower.
        tokenizer: of its T5.
        kwargs: `batch_size` and `cache_size` of `ModelVerifier`.
    """

    name = "vqa-score"
    range = (0.0, 1.0)
    hub_id = "zhiqiulin/clip-flant5-xxl"

    def __init__(self, model: CLIPFlanT5, image_processor: Any, tokenizer: Any, **kwargs: int) -> None:
        super().__init__(model, **kwargs)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self._before = self._tokens(BEFORE)
        self._labels = self._tokens(ANSWER)

    @classmethod
    def load(cls, weights: str | None = None, *, device: str = "cpu", dtype: str = "auto", **kwargs: int) -> VQAScore:
        """From a Hub id or a folder.

        A folder may contain the vision tower in `vision_tower/` and the tokenizer in `tokenizer/`; else they are those
        of openai/clip-vit-large-patch14-336 and of the FlanT5 of that size.

        Raises:
            FastgenError: something is missing or broken; the line names it and how to get it.
        """
        weights = weights or cls.hub_id
        where, kind = place(device, dtype)
        folder = snapshot(cls.name, weights, _FILES)
        with explained(cls.name, folder):
            eyes = vision_source(folder)
        words = part(str(folder), "tokenizer", _tokenizer_id(folder))
        use = "copy its tokenizer files to tokenizer/ next to the weights"
        find_file(cls.name, words, ("tokenizer_config.json",), use)
        with explained(cls.name, words, use):
            tokenizer = load_pretrained(AutoTokenizer, words)
        find_file(cls.name, eyes, ("preprocessor_config.json",), TOWER_USE)
        with explained(cls.name, eyes, TOWER_USE):
            processor = load_pretrained(AutoImageProcessor, eyes)
        made = cls(load_network(cls.name, folder, where, kind), processor, tokenizer, **kwargs)
        made.weights = weights
        return made

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text).input_ids, dtype=torch.int64)

    def _encode(self, prompts: list[str]) -> Sequence[Tensor]:
        room = LONGEST - len(self._before) - 1
        texts = [AFTER.format(QUESTION.format(prompt)) for prompt in prompts]
        return [self._tokens(text)[:room].to(self.device) for text in texts]

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        square = pad_to_square(images, self.image_processor.image_mean)
        pixels = processed(self.image_processor, square)["pixel_values"].to(self.device, self.dtype)
        before, labels = self._before.to(self.device), self._labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(pixels, before, sides, labels)
        words = logits[..., : len(self.tokenizer)].float().log_softmax(-1)
        answer = words.gather(-1, labels.expand(len(images), -1)[..., None])
        return answer.squeeze(-1).mean(-1).exp()


def _tokenizer_id(folder: Path) -> str:
    wide = read_object(folder / "config.json").get("d_model") == 4096
    return "google/flan-t5-xxl" if wide else "google/flan-t5-xl"
