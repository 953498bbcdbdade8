"""One training interface for the two kinds of upcycled models: add noise, predict, compute the loss.

A family pairs a frozen original (the teacher) with its upcycled student. Z-Image is trained by flow matching with
captions, DiT by DDPM with learned variance and classes; the recipes for distillation and finetuning serve both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, DiTPipeline, ZImagePipeline
from torch import Tensor

from fastgen.models.chunking import TailDrop, TokenBudget
from fastgen.models.dc_dit import DCTransformerOutput
from fastgen.models.upcycle import DCModel
from fastgen.training.ddpm import GaussianDiffusion
from fastgen.training.flow_matching import LOGIT_MEAN, encode_latents, flow_matching_batch


@dataclass(frozen=True, slots=True)
class Noisy:
    """Corrupted latents.

    Attributes:
        latents: x_t [n, C, h, w].
        level: the transformer's time input: 1 - sigma (flow matching) or the step (DDPM), [n].
        start, noise: the clean latents and the noise.
    """

    latents: Tensor
    level: Tensor
    start: Tensor
    noise: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Noisy]) -> Noisy:
        """Concatenate several batches."""
        names = ("latents", "level", "start", "noise")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations of the teacher's first and last layers at every patch of 2 x 2 positions.

    Attributes:
        prediction: [n, C', h, w].
        embedded: tokens before the first block, without position embedding, [n, h w / 4, D].
        final: input of the last projection, [n, h w / 4, D].
    """

    prediction: Tensor
    embedded: Tensor
    final: Tensor


_MOST_TOKENS = 512  # of a prompt; Z-Image truncates longer ones


class Family(Protocol):
    """Teacher, conditioning and loss of one kind of model."""

    pipe: Any
    teacher: Any
    frozen: tuple[str, ...]
    """Names of the student's timestep and condition embeddings, frozen in finetuning (section 10)."""

    def draw(self, labels: list[Any], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        """Samples of the original: latents as its transformer reads them, float32 on the CPU."""

    def conditions(self, labels: list[Any], dropped: list[bool], device: torch.device | None = None) -> dict[str, Any]:
        """Inputs of teacher and student for prompts or classes; dropped ones are unconditional."""

    def encode(self, pictures: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Latents of pictures uint8 [n, H, W, 3], float32."""

    def corrupt(self, latents: Tensor, generator: torch.Generator) -> Noisy:
        """Noise at random levels."""

    def teach(self, noisy: Noisy, conditions: dict[str, Any]) -> Activations:
        """The teacher's forward pass."""

    def predict(
        self,
        student: DCModel,
        noisy: Noisy,
        conditions: dict[str, Any],
        tail_drop: TailDrop | None = None,
        token_budget: TokenBudget | None = None,
    ) -> tuple[Tensor, DCTransformerOutput]:
        """The student's prediction [n, C', h, w] and its full output."""

    def loss(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        """The diffusion loss, [n]."""


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a trained pipeline.

    Raises:
        ValueError: the pipeline cannot be upcycled.
    """
    if isinstance(pipe, ZImagePipeline):
        return ZImageFamily(pipe)
    if isinstance(pipe, DiTPipeline):
        return DiTFamily(pipe)
    raise ValueError(f"pipeline: {type(pipe).__name__} cannot be upcycled; needs a ZImagePipeline or a DiTPipeline")


class _Ends:
    """Captures the first layer's output and the last layer's input in a forward pass of a transformer."""

    def __init__(self, first: torch.nn.Module, last: torch.nn.Module) -> None:
        self.first, self.last = first, last

    def __enter__(self) -> _Ends:
        def embedded(module: Any, inputs: Any, output: Tensor) -> None:
            self.embedded = output

        def final(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.final = inputs[0]

        self.hooks = self.first.register_forward_hook(embedded), self.last.register_forward_pre_hook(final)
        return self

    def __exit__(self, *arguments: object) -> None:
        for hook in self.hooks:
            hook.remove()


class _Encodes:
    """Encodes pictures with the pipeline's VAE."""

    pipe: Any

    def encode(self, pictures: Tensor, generators: list[torch.Generator]) -> Tensor:
        return encode_latents(self.pipe.vae, pictures, generators)


class ZImageFamily(_Encodes):
    """Z-Image: captions, flow matching."""

    frozen: tuple[str, ...] = ("t_embedder", "cap_embedder", "cap_pad_token")

    def __init__(self, pipe: ZImagePipeline) -> None:
        self.pipe, self.teacher = pipe, pipe.transformer
        self.logit_mean = LOGIT_MEAN

    def draw(self, labels: list[Any], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        latents: Tensor = self.pipe(labels, generator=generators, output_type="latent", **settings).images
        return latents.float().cpu()

    def conditions(self, labels: list[Any], dropped: list[bool], device: torch.device | None = None) -> dict[str, Any]:
        prompts = ["" if drop else text for text, drop in zip(labels, dropped, strict=True)]
        device = device or self.pipe.text_encoder.device
        self.pipe.text_encoder.to(device)
        embeds, _ = self.pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=self._longest(prompts)
        )
        return {"cap_feats": [features.float() for features in embeds]}

    def _longest(self, prompts: list[str]) -> int:
        """Tokens of the longest formatted prompt, so that the encoder does not read padding up to 512."""
        chats = [
            self.pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return min(_MOST_TOKENS, max(len(ids) for ids in self.pipe.tokenizer(chats).input_ids))

    def corrupt(self, latents: Tensor, generator: torch.Generator) -> Noisy:
        noisy, sigma, target = flow_matching_batch(latents, generator, self.logit_mean)
        return Noisy(noisy, 1 - sigma, latents, latents - target)

    def teach(self, noisy: Noisy, conditions: dict[str, Any]) -> Activations:
        n, _, height, width = noisy.latents.shape
        tokens, last = height * width // 4, self.teacher.all_final_layer["2-1"].linear
        captions = [features.to(self.teacher.dtype) for features in conditions["cap_feats"]]
        images = list(noisy.latents[:, :, None].to(self.teacher.dtype).unbind(0))
        with torch.no_grad(), _Ends(self.teacher.all_x_embedder["2-1"], last) as ends:
            sample = self.teacher(images, noisy.level, captions).sample
        # All images' patches are in one sequence, each image padded; the last layer also reads the padded caption.
        padded = ends.embedded.view(n, -1, ends.embedded.shape[-1])
        return Activations(torch.stack(sample).squeeze(2), padded[:, :tokens], ends.final[:, :tokens])

    def predict(
        self,
        student: DCModel,
        noisy: Noisy,
        conditions: dict[str, Any],
        tail_drop: TailDrop | None = None,
        token_budget: TokenBudget | None = None,
    ) -> tuple[Tensor, DCTransformerOutput]:
        images = list(noisy.latents[:, :, None].unbind(0))
        budget = {"tail_drop": tail_drop, "token_budget": token_budget}
        output = student(images, noisy.level, **conditions, **budget, output_chunks=True)
        return torch.stack(list(output.sample)).squeeze(2), output

    def loss(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        target = noisy.start - noisy.noise
        return (prediction.float() - target).square().mean(dim=(1, 2, 3))


class DiTFamily(_Encodes):
    """DiT: classes, DDPM with learned variance."""

    frozen: tuple[str, ...] = ("embedder",)

    def __init__(self, pipe: DiTPipeline) -> None:
        self.pipe, self.teacher = pipe, pipe.transformer
        self.diffusion = GaussianDiffusion(pipe.scheduler.betas)

    @torch.no_grad()
    def draw(self, labels: list[Any], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        """The stock pipeline returns pictures only, so they are encoded again."""
        vae = self.pipe.vae
        pictures = self.pipe(list(labels), generator=generators, output_type="np", **settings).images
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) * 2 - 1
        mean: Tensor = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        return mean.float().cpu()

    def conditions(self, labels: list[Any], dropped: list[bool], device: torch.device | None = None) -> dict[str, Any]:
        none = self.teacher.config.num_embeds_ada_norm
        classes = [none if drop else int(label) for label, drop in zip(labels, dropped, strict=True)]
        return {"class_labels": torch.tensor(classes, device=device or self.teacher.device)}

    def corrupt(self, latents: Tensor, generator: torch.Generator) -> Noisy:
        step = torch.randint(self.diffusion.steps, (len(latents),), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        return Noisy(self.diffusion.corrupt(latents, noise, step), step, latents, noise)

    def teach(self, noisy: Noisy, conditions: dict[str, Any]) -> Activations:
        embed = self.teacher.pos_embed
        with torch.no_grad(), _Ends(embed, self.teacher.proj_out_2) as ends:
            latents = noisy.latents.to(self.teacher.dtype)
            sample = self.teacher(latents, timestep=noisy.level, **conditions).sample
        return Activations(sample, ends.embedded - embed.pos_embed.to(ends.embedded.dtype), ends.final)

    def predict(
        self,
        student: DCModel,
        noisy: Noisy,
        conditions: dict[str, Any],
        tail_drop: TailDrop | None = None,
        token_budget: TokenBudget | None = None,
    ) -> tuple[Tensor, DCTransformerOutput]:
        budget = {"tail_drop": tail_drop, "token_budget": token_budget}
        output = student(noisy.latents, noisy.level, **conditions, **budget, output_chunks=True)
        return output.sample, output

    def loss(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        return self.diffusion.loss(prediction, noisy.start, noisy.noise, noisy.level)
