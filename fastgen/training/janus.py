"""Recipe `janus`: language model and image heads of the tiny Janus, by next-token prediction on VQ codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration

from fastgen.data.shapes import ShapesWorld
from fastgen.models.layers import fused_backward_is_slow
from fastgen.models.tiny_janus import build_janus
from fastgen.models.tokenizers import build_janus_tokenizer
from fastgen.pretrained import load_pretrained
from fastgen.training.caption_state import CaptionHead, CaptionReader
from fastgen.training.cards import inherit_records, write_defaults, write_record
from fastgen.training.layout import LayoutHead, patch_labels
from fastgen.training.vq import image_tokens

# Unconditional pictures should have about one object: if they had as many as the average picture, guidance would
# remove the object from single-object pictures. In all, one caption in ten is dropped.
_CAPTION_DROPOUT = {"single_object": 0.25, "colors": 0.25}
_OTHER_DROPOUT = 0.05
_LAYOUT_WEIGHT = 0.7  # the token loss is mostly unpredictable texture, whose gradient is large and uninformative
_CAPTION_WEIGHT = 0.3
_CAPTION_LAYER = 2  # of four: later layers read the bound caption
_PATCH_LABELS = ("patch_shapes", "patch_colors")
_NEXT_LABELS = ("next_shapes", "next_colors")
# More weight for the few tokens that decide which object begins where: a caption explains 1 nat of the 1,100 in all.
_EARLY_WEIGHT = 7.0


class JanusModule(torch.nn.Module):
    """The parts of Janus that generate images."""

    adamw_names = ("vision_head", "layout", "plan", "caption")
    compiled_parts = ("language_model",)

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        super().__init__()
        inner = model.model
        self.language_model = inner.language_model
        self.generation_embeddings = inner.generation_embeddings
        self.generation_aligner = inner.generation_aligner
        self.generation_head = inner.generation_head
        self.layout = LayoutHead(inner.language_model.config.hidden_size)
        self.plan = LayoutHead(inner.language_model.config.hidden_size)
        self.caption = CaptionHead(inner.language_model.config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        tokens: torch.Tensor,
        labels: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [n, 256, codes] of every image token given the prompt and earlier tokens, and the layout and caption
        losses.

        Args:
            input_ids: [n, L] left-padded prompts that end with the begin-of-image token.
            attention_mask: [n, L].
            tokens: [n, 256] image tokens in raster order.
            labels: [n, 256] each, of the tokens' patches (`patch_labels` with `upcoming`), and "caption" [n, L, 6].
        """
        attention = "eager" if fused_backward_is_slow(tokens.device) else "sdpa"
        if self.language_model.config._attn_implementation != attention:
            self.language_model.set_attn_implementation(attention)
        prompt = self.language_model.embed_tokens(input_ids)
        image = self.generation_aligner(self.generation_embeddings(tokens[:, :-1]))
        mask = F.pad(attention_mask, (0, tokens.shape[1] - 1), value=1)
        output = self.language_model(
            inputs_embeds=torch.cat([prompt, image], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        )
        hidden = output.last_hidden_state[:, input_ids.shape[1] - 1 :]
        # The hidden state that predicts a token also predicts what covers its patch, and which object begins next,
        # which only the caption determines.
        layout = self.layout(hidden, *(labels[name] for name in _PATCH_LABELS), 1 + _EARLY_WEIGHT * labels["early"])
        layout = layout + self.plan(hidden, *(labels[name] for name in _NEXT_LABELS))
        words = output.hidden_states[_CAPTION_LAYER][:, : input_ids.shape[1]]
        return self.generation_head(hidden), layout, self.caption(words, labels["caption"], attention_mask)


class JanusRecipe:
    """Cross-entropy on image tokens, with caption dropout in Janus' form of an unconditional prompt.

    Args:
        seed: seed of weights and data.
        vq: folder of a trained VQ tokenizer (recipe `vq`); not used with `init`.
        init: folder of a Janus to continue from; `None` starts from random weights.
    """

    name = "janus"

    def __init__(self, seed: int, vq: Path | None, init: Path | None = None) -> None:
        from transformers.models.janus.modeling_janus import JanusVQVAE

        self.part = vq if init is None else init / "config.json"
        if init is None:
            if vq is None:
                raise ValueError("a new Janus needs vq, the folder of a trained VQ tokenizer")
            self.model = build_janus(seed)
            # A new model embeds image tokens by their codes, so that similar codes start with similar embeddings.
            trained = load_pretrained(JanusVQVAE, vq)
            self.model.model.vqmodel.load_state_dict(trained.state_dict())
            with torch.no_grad():
                self.model.model.generation_embeddings.weight.copy_(trained.quantize.embedding.weight)
        else:
            self.model = load_pretrained(JanusForConditionalGeneration, init, dtype=torch.float32)
        self.tokenizer = build_janus_tokenizer()
        self.reader = CaptionReader(self.tokenizer)
        self.data = ShapesWorld(seed + 404, crossed=False)

    def build(self) -> JanusModule:
        """The trained parts; the VQ tokenizer stays frozen."""
        self.model.model.vqmodel.eval().requires_grad_(False)
        return JanusModule(self.model).train()

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders and tokenised captions. A dropped caption keeps only its begin tokens; the rest becomes padding that
        is attended to, as in the unconditional row of `generate`."""
        data = self.data.batch(size, start)
        texts = [text + self.tokenizer.boi_token for text in data.texts]
        # One length for every batch (the longest caption of the grammar has 16 tokens): no recompilation.
        tokens = self.tokenizer(texts, padding=True, pad_to_multiple_of=16, return_tensors="pt")
        ids = tokens.input_ids
        rates = torch.tensor([_CAPTION_DROPOUT.get(caption.tag, _OTHER_DROPOUT) for caption in data.captions])
        dropped = torch.rand(size, generator=generator) < rates
        boi = self.tokenizer.convert_tokens_to_ids("<begin_of_image>")
        body = (ids != self.tokenizer.bos_token_id) & (ids != boi)
        ids = ids.masked_fill(dropped[:, None] & body, self.tokenizer.pad_token_id)
        return {
            "images": torch.from_numpy(data.images),
            "input_ids": ids,
            "attention_mask": tokens.attention_mask,
            "caption": self.reader.labels(ids),
            **patch_labels(data, 4, upcoming=True),
        }

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean cross-entropy in nats per token, plus the layout and caption losses."""
        tokens = image_tokens(self.model.model.vqmodel, batch["images"])
        labels = {name: batch[name] for name in (*_PATCH_LABELS, *_NEXT_LABELS, "early", "caption")}
        logits, layout, caption = module(batch["input_ids"], batch["attention_mask"], tokens, labels)
        cross = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
        early = batch["early"].flatten()
        loss = (cross * (1 + _EARLY_WEIGHT * early)).mean() + _LAYOUT_WEIGHT * layout + _CAPTION_WEIGHT * caption
        settling = (cross * early).sum() / early.sum().clamp(min=1)
        numbers = {"token": cross.mean(), "early": settling, "layout": layout, "caption": caption}
        return loss, {name: float(value.detach()) for name, value in numbers.items()}

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the whole model in half precision with its tokenizer and processor, loadable by stock transformers."""
        import copy

        from fastgen.models.tiny_janus import build_processor

        entropy = self.entropy(module)
        record = {**record, **entropy}
        # The exported module shares its weights with self.model.
        model = copy.deepcopy(self.model).to(torch.float16)
        model.save_pretrained(folder)
        build_processor().save_pretrained(folder)
        write_defaults(folder, height=64, width=64, guidance_scale=model.generation_config.guidance_scale)
        if self.part is not None:
            inherit_records(folder, self.part)
        write_record(folder, "janus", record)

    @torch.no_grad()
    def entropy(self, module: torch.nn.Module, images: int = 64) -> dict[str, float]:
        """Next-token entropy and cross-entropy (bits) on new renders, over all tokens and over background tokens."""
        device = next(module.parameters()).device
        data = self.data.batch(images, 20_000_000)
        texts = [text + self.tokenizer.boi_token for text in data.texts]
        prompt = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        tokens = image_tokens(self.model.model.vqmodel, torch.from_numpy(data.images).to(device))
        labels = {"caption": self.reader.labels(prompt.input_ids.cpu()), **patch_labels(data, 4, upcoming=True)}
        labels = {name: value.to(device) for name, value in labels.items()}
        module.eval()
        logits = module(prompt.input_ids, prompt.attention_mask, tokens, labels)[0]
        logits = logits.float().log_softmax(dim=-1)
        module.train()
        entropy = -(logits.exp() * logits).sum(dim=-1) / torch.log(torch.tensor(2.0))
        cross = F.nll_loss(logits.flatten(0, 1), tokens.flatten()) / torch.log(torch.tensor(2.0))
        grid = int(tokens.shape[1] ** 0.5)
        blocks = (
            torch.from_numpy(data.instances).to(device).view(images, grid, -1, grid, data.instances.shape[2] // grid)
        )
        background = (blocks.amax(dim=(2, 4)) == 0).flatten(1)
        return {
            "next_token_entropy_bits": round(float(entropy.mean()), 3),
            "background_entropy_bits": round(float(entropy[background].mean()), 3),
            "held_out_cross_entropy_bits": round(float(cross), 3),
        }
