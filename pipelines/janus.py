"""Text to image with a transformers Janus model behind the interface of a diffusers pipeline.

The model is the stock `transformers.JanusForConditionalGeneration` and the tokens are drawn by its own
``generate(generation_mode="image")``; this file adds what a diffusers user expects around it: batches, one generator
per image, classifier-free guidance, callbacks, output types. A folder saved by transformers is loaded as it is.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import LogitsProcessorList

from fastgen.accounting import add_passes, add_tokens, note_path, phase
from fastgen.checks import check_bool, check_callable
from fastgen.contracts import Loss
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.offload import onloaded
from fastgen.drafters.targets import check_lengths, check_tokenizer, unit_range
from fastgen.errors import FastgenError, NotFiniteError
from fastgen.models.janus_prompts import format_prompt, image_size, prompt_ids, prompt_lengths
from fastgen.pipelines.pickling import PickledMixin
from fastgen.pipelines.sampling import GuidedGumbelSampler
from fastgen.pipelines.summary import reported
from fastgen.pipelines.token_images import (
    NetworksMixin,
    OutputType,
    TokenImageOutput,
    as_output,
    one_per_image,
    one_prompt_per_image,
)
from fastgen.pretrained import load_pretrained

__all__ = ["JanusImagePipeline"]

logger = logging.getLogger(__name__)

# Files of a Janus folder that generation does not need and that a saved copy must not lose.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class JanusImagePipeline(NetworksMixin, PickledMixin, DiffusionPipeline):
    """Text-to-image pipeline around a Janus model.

    Loss contract: `exact` with respect to the stock model: the same forward passes, and samples of the same
    distribution; only the random numbers come from the caller's generators instead of the global state.

    Args:
        model: `transformers.JanusForConditionalGeneration`.
        tokenizer: its tokenizer, or a `JanusProcessor`, of which the tokenizer is used.
    """

    loss: Loss = "exact"
    model_cpu_offload_seq = "model"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        _check_parts(model, tokenizer)
        self._processor_files: dict[str, str] = {}
        self.register_modules(model=model, tokenizer=tokenizer)

    # ---- loading and saving: a plain transformers folder ----

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load model and tokenizer of a transformers Janus folder or Hub id.

        Args:
            torch_dtype, dtype: of the weights; default as stored.
            model, tokenizer: in place of those in the folder.
            kwargs: for `JanusForConditionalGeneration.from_pretrained` (`revision`, `token`, `local_files_only` …).
        """
        from transformers import AutoTokenizer, JanusForConditionalGeneration

        path = os.fspath(pretrained_model_name_or_path)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        hub = {key: kwargs[key] for key in (*_HUB_ARGUMENTS, "trust_remote_code") if key in kwargs}
        tokenizer = kwargs.pop("tokenizer", None) or load_pretrained(AutoTokenizer, path, **hub)
        model = kwargs.pop("model", None)
        if model is None:
            model = load_pretrained(JanusForConditionalGeneration, path, dtype=dtype or "auto", **kwargs).eval()
        pipeline = cls(model=model, tokenizer=tokenizer)
        for name in _PROCESSOR_FILES:
            if (file := Path(path, name)).is_file():
                pipeline._processor_files[name] = file.read_text(encoding="utf-8")
        pipeline.register_to_config(_name_or_path=path)
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a folder that stock transformers loads; `kwargs` as for `PreTrainedModel.save_pretrained`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        for name, text in self._processor_files.items():
            Path(save_directory, name).write_text(text, encoding="utf-8")

    # ---- properties ----

    @property
    def image_size(self) -> int:
        """Height and width in pixels; a Janus model draws one size only."""
        return image_size(self.model)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of an image, that is forward passes per image or batch."""
        return int(self.model.config.vision_config.num_image_tokens)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self.num_image_tokens

    # ---- generation ----

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that leave no position for the picture.

        Raises:
            FastgenError: names the first such prompt, its length and the limit.
        """
        positions = int(self.model.config.text_config.max_position_embeddings)
        lengths = prompt_lengths(self.model, self.tokenizer, prompts)
        check_lengths(prompts, lengths, positions - self.num_image_tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_invariant: bool = False,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[JanusImagePipeline, int, int, dict[str, Any]], Any] | None = None,
    ) -> TokenImageOutput | tuple[Any]:
        """Draw images.

        Args:
            prompt: text or list of texts.
            num_images_per_prompt: images of each prompt; they follow each other in the output.
            guidance_scale: s of ``u + s * (c - u)`` on the logits; 1 or less turns guidance off.
            temperature: divisor of the guided logits; 0 takes the most likely token (no randomness).
            top_k, top_p: keep the k most likely tokens, then the smallest set of mass p; None keeps all.
            negative_prompt: not possible; the row without a prompt is the prompt blanked out, as in training.
            generator: one per image, or a single one. A single one drives a single image directly; for several images
                it draws one seed for each of them. None draws the seeds from torch's global state.
            batch_invariant: an image does not depend on what else is in the batch, nor on the batch size. In float32
                the batch runs together, and an image that has a decision too close for rounding is drawn again
                alone; in other types, where rounding is coarse, the images run one after the other. False leaves
                rounding alone: the distribution is the same, an image may differ between batch sizes.
            output_type: "pil", "np", "pt", or "tokens" (the pictures are not decoded).
            return_dict: False gives ``(images,)``.
            callback_on_step_end: called as ``callback(pipeline, token_index, token_index, {})`` after each token of
                the batch. What it returns is not used.

        Raises:
            ValueError, TypeError: an argument outside its range.
            NotFiniteError: logits or pixels were NaN or infinite.
        """
        _check_parts(self.model, self.tokenizer)
        prompts = one_prompt_per_image(prompt, num_images_per_prompt, negative_prompt, output_type)
        law = TokenLaw(guidance_scale, temperature, top_k, top_p)
        self._guidance_scale = law.guidance_scale
        generators = one_per_image(generator, len(prompts))
        check_bool("batch_invariant", batch_invariant)
        check_bool("return_dict", return_dict)
        check_callable("callback_on_step_end", callback_on_step_end)
        self.check_prompts(prompts)
        with reported(self) as stats, onloaded(self.model):
            with phase("text"):
                texts = [format_prompt(self.model, self.tokenizer, text) for text in prompts]
            tokens = self._draw(texts, law, generators, batch_invariant, callback_on_step_end)
            images: Any = tokens
            if output_type != "tokens":
                with phase("decode"):
                    images = self._decode(tokens, output_type, one_by_one=batch_invariant)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return TokenImageOutput(images=images, tokens=tokens, stats=stats)

    def _draw(
        self,
        texts: list[str],
        law: TokenLaw,
        generators: list[torch.Generator],
        batch_invariant: bool,
        callback: Callable[..., Any] | None,
    ) -> torch.Tensor:
        """Tokens [B, N] of the formatted prompts."""
        on_token = None if callback is None else lambda index: callback(self, index, index, {})
        if len(texts) == 1 or not batch_invariant:
            note_path("janus batch", "together")
            return self._generate(texts, law, generators, on_token)[0]
        if self.model.dtype != torch.float32:
            note_path("janus batch", "one image at a time", f"batch_invariant with {self.model.dtype}")
            count = len(texts)

            def scaled(image: int) -> Callable[[int], None] | None:
                # The batch as a whole is `count` times as long; report the share that is done.
                return None if on_token is None else lambda t: on_token((image * self.num_image_tokens + t) // count)

            rows = [self._generate([texts[i]], law, [generators[i]], scaled(i))[0] for i in range(count)]
            return torch.cat(rows)
        note_path("janus batch", "together")
        states = [generator.get_state() for generator in generators]
        tokens, margin = self._generate(texts, law, generators, on_token)
        for i in (margin < 1).nonzero().flatten().tolist():
            logger.debug("image %d of the batch has a decision within rounding; drawn again alone", i)
            generators[i].set_state(states[i])
            tokens[i] = self._generate([texts[i]], law, [generators[i]], None)[0][0]
        return tokens

    def _generate(
        self,
        texts: list[str],
        law: TokenLaw,
        generators: list[torch.Generator],
        on_token: Callable[[int], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stock generation of one batch: tokens [B, N] and the margin [B] of the sampler."""
        model = self.model
        with phase("text"):
            ids, mask = (tensor.to(self._execution_device) for tensor in prompt_ids(self.tokenizer, texts))
        sampler = GuidedGumbelSampler(law, generators, on_token)
        with phase("tokens"):
            tokens = model.generate(
                inputs=ids,
                attention_mask=mask,
                generation_mode="image",
                generation_config=self._generation_config(),
                logits_processor=LogitsProcessorList([sampler]),
            )
        add_passes("target", self.num_image_tokens)
        add_tokens(kept=tokens.numel(), total=tokens.numel())
        margin, broken = sampler.margin, sampler.broken
        if margin is None or broken is None:
            raise RuntimeError("the model did not call the sampler; this transformers version is not supported")
        if broken.any():
            raise NotFiniteError(
                f"the model's logits are not numbers (NaN, infinite) in {model.dtype}; another dtype may help"
            )
        return tokens, margin

    def _generation_config(self) -> Any:
        """The model's own, with every choice left to our sampler; guidance 1 keeps stock from adding its own."""
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
        # The library's values for "not in use"; None would be filled from the model's own configuration again.
        config.temperature, config.top_k, config.top_p = 1.0, 50, 1.0
        config.guidance_scale = 1.0
        return config

    def _decode(self, tokens: torch.Tensor, output_type: str, one_by_one: bool) -> Any:
        """Pictures of tokens [B, N]."""
        # Convolutions round differently for different batch sizes.
        chunks = tokens.split(1 if one_by_one else max(1, len(tokens)))
        decoded = [unit_range(self.model.decode_image_tokens(chunk)) for chunk in chunks]
        return as_output(torch.cat(decoded), output_type)


def _check_parts(model: Any, tokenizer: Any) -> None:
    if all(base.__name__ != "JanusForConditionalGeneration" for base in type(model).__mro__):
        raise FastgenError(f"model: {type(model).__name__} is not transformers' JanusForConditionalGeneration")
    check_tokenizer(tokenizer)


_HUB_ARGUMENTS = ("revision", "token", "local_files_only", "cache_dir", "force_download")
