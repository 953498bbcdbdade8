"""LlamaGen (arXiv 2406.06525): a Llama that draws VQ codes after a caption or a class, with 2-D rotary positions.

The condition takes the first slots of the sequence: 120 features of a T5 encoder, left-padded, or one class token.
Their rotary factors are zero, cosine and sine alike, so their queries and keys are zero vectors: the published weights
were trained so. Image tokens are rotated by row and column. The VQ decoder is that of Janus, which took it from
LlamaGen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastgen.io import atomic_write_json
from fastgen.models.layers import GatedMLP, padded_causal_mask, rotate_pairs
from fastgen.pretrained import load_pretrained

__all__ = ["PRESETS", "LlamaGen", "LlamaGenTransformer", "convert_llamagen", "convert_vq"]

#: Layers, heads and width of the published models.
PRESETS: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "1B": (22, 32, 2048),
    "3B": (24, 32, 3200),
    "7B": (32, 32, 4096),
}


class LlamaGenLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, dim: int, heads: int, kv_heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.input_layernorm = nn.RMSNorm(dim, eps=eps)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=eps)
        self.mlp = GatedMLP(dim, inner)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """hidden [n, T, D], rotary factors [T, head_dim / 2], mask [n, 1, T, T] bool -> [n, T, D]."""
        read = self.input_layernorm(hidden)
        query, key, value = (
            part(read).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_pairs(query, rotary), rotate_pairs(key, rotary)
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
        hidden = hidden + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rotary_table(grid: int, head_dim: int, base: float, condition: int, spare: int = 0) -> Tensor:
    """Cosines and sines [condition + grid^2 + spare, head_dim / 2, 2]: zero for the condition, then row and column.

    `spare` places behind the picture repeat its last: a tree may reach beyond the last token.
    """
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2).float() / half)
    angles = torch.arange(grid).float()[:, None] * frequencies
    both = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)
    both = torch.cat([both, both[-1:].expand(spare, -1)])
    factors = torch.stack([both.cos(), both.sin()], dim=-1)
    return torch.cat([torch.zeros(condition, *factors.shape[1:]), factors])


class LlamaGenTransformer(ModelMixin, ConfigMixin):
    """See the module.

    Args:
        vocab_size: image codes.
        dim, n_layers, n_heads, n_kv_heads: of the Llama; None takes as many key and value heads as heads.
        grid: tokens of a side.
        caption_dim: width of the caption features.
        caption_tokens: slots of the caption.
        num_classes: a class-conditional model of this many classes (and one slot); None for captions.
        multiple_of: the feed-forward's inner width, 8/3 of the width, is rounded up to a multiple of this.
        rope_base, norm_eps: as usual.

    Raises:
        ValueError: sizes that do not divide.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaGenLayer"]
    _repeated_blocks = ["LlamaGenLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        dim: int = 1280,
        n_layers: int = 36,
        n_heads: int = 20,
        n_kv_heads: int | None = None,
        grid: int = 16,
        caption_dim: int = 2048,
        caption_tokens: int = 120,
        num_classes: int | None = None,
        multiple_of: int = 256,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if dim % n_heads or (dim // n_heads) % 4 or n_heads % (n_kv_heads or n_heads):
            raise ValueError(f"dim, n_heads, n_kv_heads: {dim}, {n_heads}, {n_kv_heads} do not divide")
        self.gradient_checkpointing = False
        inner = -(-int(8 * dim / 3) // multiple_of) * multiple_of
        self.condition_tokens = caption_tokens if num_classes is None else 1
        if num_classes is None:
            self.caption_fc1 = nn.Linear(caption_dim, dim, bias=False)
            self.caption_fc2 = nn.Linear(dim, dim, bias=False)
            self.uncond_embedding = nn.Parameter(torch.randn(caption_tokens, caption_dim) / caption_dim**0.5)
        else:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)  # the last is "no class"
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            LlamaGenLayer(dim, n_heads, n_kv_heads or n_heads, inner, norm_eps) for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)

    @classmethod
    def from_preset(cls, name: str, **config: Any) -> LlamaGenTransformer:
        """A published size with random weights.

        Raises:
            ValueError: unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: {name!r} is unknown; there are {', '.join(PRESETS)}")
        layers, heads, dim = PRESETS[name]
        return cls(**{"n_layers": layers, "n_heads": heads, "dim": dim, **config})

    def rotary(self, spare: int = 0) -> Tensor:
        """The table of `rotary_table` for this model, on the CPU."""
        config = self.config
        return rotary_table(config.grid, config.dim // config.n_heads, config.rope_base, self.condition_tokens, spare)

    def embed_caption(self, features: Tensor | None, batch: int = 1) -> Tensor:
        """Condition tokens [n, 120, D] of caption features [n, 120, caption_dim]; None gives the null caption."""
        if features is None:
            features = self().expand(batch, -1, -1)
        hidden = nn.functional.gelu(self.caption_fc1(features.to(self.dtype)), approximate="tanh")
        return self.caption_fc2(hidden)

    def forward(
        self, condition: Tensor | None = None, tokens: Tensor | None = None, condition_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of every token of a picture, all at once.

        Args:
            condition: [n, c, D] from `embed_caption`. Without it and `tokens` the features of the
                null caption are returned: hooks that offload weights bring them in for a forward pass only.
            tokens: [n, m] codes; the last one's successor is predicted too.
            condition_mask: [n, c] bool, real caption features; None takes all.

        Returns:
            [n, m + 1, V].
        """
        if condition is None or tokens is None:
            return self.uncond_embedding.view_as(self.uncond_embedding)
        hidden = torch.cat([condition, self.tok_embeddings(tokens)], dim=1)
        n, length = hidden.shape[:2]
        visible = torch.ones(n, length, dtype=torch.bool, device=hidden.device)
        if condition_mask is not None:
            visible[:, : condition.shape[1]] = condition_mask.bool()
        mask = padded_causal_mask(visible)
        cos, sin = self.rotary()[:length].to(hidden.device, hidden.dtype).unbind(-1)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(layer, hidden, (cos, sin), mask)
            else:
                hidden = layer(hidden, (cos, sin), mask)
        return self.output(self.norm(hidden[:, condition.shape[1] - 1 :]))


def convert_llamagen(weights: dict[str, Tensor], grid: int = 16) -> LlamaGenTransformer:
    """A model from a published LlamaGen checkpoint's state dict (`torch.load(...)["model"]`).

    Sizes are read from the tensors; the number of heads is that of the published model of this width, else one for
    every 64 features.

    Args:
        weights: the state dict.
        grid: tokens of a side: 16 for 256-pixel models, 24 for 384, 32 for 512.

    Raises:
        ValueError: not a LlamaGen checkpoint.
    """
    weights = dict(weights)
    if "layers.0.attention.wqkv.weight" not in weights or "tok_embeddings.weight" not in weights:
        raise ValueError("weights: these are not those of a LlamaGen transformer (no layers.0.attention.wqkv)")
    vocabulary, dim = weights["tok_embeddings.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    heads = next((h for _, h, width in PRESETS.values() if width == dim), max(1, dim // 64))
    config: dict[str, Any] = {"vocab_size": vocabulary, "dim": dim, "n_layers": layers, "n_heads": heads, "grid": grid}
    kv = (weights["layers.0.attention.wqkv.weight"].shape[0] - dim) // 2
    config["n_kv_heads"] = kv * heads // dim
    inner = weights["layers.0.feed_forward.w1.weight"].shape[0]
    config["multiple_of"] = 256 if inner % 256 == 0 else inner
    if "cls_embedding.uncond_embedding" in weights:
        config["caption_tokens"], config["caption_dim"] = weights["cls_embedding.uncond_embedding"].shape
    else:
        config["num_classes"] = weights["cls_embedding.embedding_table.weight"].shape[0] - 1
    names = {
        "cls_embedding.uncond_embedding": "uncond_embedding",
        "cls_embedding.cap_proj.fc1.weight": "caption_fc1.weight",
        "cls_embedding.cap_proj.fc2.weight": "caption_fc2.weight",
        "cls_embedding.embedding_table.weight": "class_embedding.weight",
    }
    parts = {
        "attention.wo": "o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    converted = {}
    for name, value in weights.items():
        if name == "freqs_cis":
            continue
        if name.startswith("layers.") and name.endswith("attention.wqkv.weight"):
            layer = ".".join(name.split(".")[:2])
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), value.split([dim, kv, kv]), strict=True):
                converted[f"{layer}.{part}.weight"] = piece
        elif name.startswith("layers."):
            layer, part = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:-1])
            converted[f"{layer}.{parts[part]}.weight"] = value
        else:
            converted[names.get(name, name)] = value
    model = LlamaGenTransformer(**config)
    model.load_state_dict(converted)
    return model


class LlamaGen(ModelMixin, ConfigMixin):
    """What draws pictures from captions: transformer, VQ tokenizer and text encoder.

    Args:
        transformer: a `LlamaGenTransformer` for captions.
        vq: `transformers.models.janus.modeling_janus.JanusVQVAE` with its weights.
        text_encoder: a `transformers.T5EncoderModel` as wide as the captions.
    """

    def __init__(self, transformer: LlamaGenTransformer, vq: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.transformer, self.vq, self.text_encoder = transformer, vq, text_encoder

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        **_: Any,
    ) -> LlamaGen:
        """Load what `save_pretrained` wrote, without the tokenizer."""
        from transformers import T5EncoderModel
        from transformers.models.janus.modeling_janus import JanusVQVAE

        kinds = {"transformer": LlamaGenTransformer, "vq": JanusVQVAE, "text_encoder": T5EncoderModel}
        given = {"torch_dtype": torch_dtype or torch.float32, "variant": variant}
        return cls(**{name: load_pretrained(kind, Path(folder, name), **given) for name, kind in kinds.items()})

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: Any = None, variant: str | None = None, **_: Any
    ) -> None:
        """Write a folder that `fastgen.load_pipeline` and `fastgen generate --model` read.

        Args:
            folder: made if need be.
            tokenizer: of the text encoder; without one the folder is no whole model, but may be a part of one.
            variant: of the weight files ("fp16").
        """
        index: dict[str, Any] = {"_class_name": "LlamaGen"}
        for name, part in {**self._modules, "tokenizer": tokenizer}.items():
            if part is None:
                continue
            part.save_pretrained(Path(folder, name), **({} if name == "tokenizer" else {"variant": variant}))
            ours = type(part).__module__.startswith("fastgen.")
            index[name] = [type(part).__module__ if ours else "transformers", type(part).__name__]
        atomic_write_json(Path(folder, "model_index.json"), index)


def convert_vq(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a published LlamaGen VQ checkpoint as `transformers`' `JanusVQVAE` has them."""
    converted = {}
    for name, value in weights.items():
        if name.endswith("codebook_used"):
            continue
        name = name.replace(".mid.0.", ".mid.block_1.").replace(".mid.1.", ".mid.attn_1.")
        name = name.replace(".mid.2.", ".mid.block_2.").replace(".res.", ".block.")
        side = "down" if name.startswith("encoder.") else "up"
        converted[name.replace(".conv_blocks.", f".{side}.")] = value
    return converted
