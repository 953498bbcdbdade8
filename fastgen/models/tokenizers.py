"""Word-level tokenizers of the embedded models, built from the ShapesWorld vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgen.data.captions import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The prompt between a start and an end mark, as Qwen3's own template has it, without its system text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def _word_level(special_tokens: list[str]) -> object:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = [*special_tokens, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    return tokenizer


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny `ZImagePipeline`: lower-cased words, padded on the right, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "<|assistant|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_level(special),
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|assistant|>"],
        model_max_length=512,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_janus_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny Janus: begin-of-sentence in front, padded on the left, image marks as attributes."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>"]
    backend = _word_level(special)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        model_max_length=512,
        padding_side="left",
    )
