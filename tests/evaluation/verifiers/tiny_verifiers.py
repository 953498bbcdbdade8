"""Random-weight models of the very classes that the verifiers load, saved in the layout of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Of unequal length, so that batches of them are padded.
PROMPTS = ["a red circle", "two blue squares and a star", "ring", "a red circle", "one cross {} above", "ring"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:'?\"{}"

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}


def save_image_processor(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def strengthen(model: torch.nn.Module, factor: float = 8.0) -> None:
    """Make a freshly initialised network's output depend on its input more than by rounding."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name and "shared" not in name:
            parameter.data *= factor


def save_clip(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    vocab = ["<unk>", *LETTERS.lower(), *(f"{letter}</w>" for letter in LETTERS.lower())]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(vocab)}, merges=[])
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": len(vocab) - 2,
        "eos_token_id": len(vocab) - 1,
    }
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))
    strengthen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_image_processor(folder)
    return folder


def save_clip_flan_t5(folder: Path, shards: bool = True, with_tower: bool = True, seed: int = 0) -> Path:
    """A checkpoint as clip-flant5 has it: one state dict of three networks, config.json of type clip_t5."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁Yes", -3.0), ("▁no", -3.0)]
    tokenizer = T5Tokenizer(vocab=pieces + [(letter, -4.0) for letter in LETTERS], extra_ids=0)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 9,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(seed)
    t5 = T5ForConditionalGeneration(T5Config(**settings))
    t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.lm_head.weight))  # untied, as in FlanT5
    tower, other = (CLIPVisionModel(CLIPVisionConfig(**VISION)) for _ in range(2))
    strengthen(tower)
    strengthen(other)
    projector = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    strengthen(projector)
    tensors = {name: tensor.clone() for name, tensor in t5.state_dict().items()}
    tensors["embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"].clone()
    tensors |= {f"mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    if with_tower:
        long = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
        tensors |= {f"vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in long.items()}
        tensors["vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    folder.mkdir(parents=True)
    write_tensors(folder, tensors, shards)
    multimodal = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    multimodal |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_hidden_size": 16}
    config = settings | multimodal | {"model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    # Where the checkpoint holds a tower it must win over this one.
    (other if with_tower else tower).save_pretrained(folder / "vision_tower")
    save_image_processor(folder / "vision_tower")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: bool) -> None:
    if not shards:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return
    names = list(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, own in parts.items():
        torch.save({name: tensors[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_qwen(folder: Path, generation: str, seed: int = 0) -> Path:
    """A Qwen2.5-VL ("2.5") or a Qwen3-VL ("3")."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate([*alphabet, "Ye", "Yes"])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[("Y", "e"), ("Ye", "s")])
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = QWEN_TEMPLATE
    numbers = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": rope,
        "max_position_embeddings": 512,
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
    tokens = {
        "image_token_id": numbers["<|image_pad|>"],
        "video_token_id": numbers["<|video_pad|>"],
        "vision_start_token_id": numbers["<|vision_start|>"],
        "vision_end_token_id": numbers["<|vision_end|>"],
    }
    torch.manual_seed(seed)
    if generation == "2.5":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        config: Any = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        model: Any = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    strengthen(model, 5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"shortest_edge": 64, "longest_edge": 1600}
    transformers.Qwen2VLImageProcessor(size=limits, patch_size=4, merge_size=2).save_pretrained(folder)
    return folder
