"""Tiny models with towers of every family, and a run folder around one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Aimv2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipVisionConfig,
)

from granvit.model.checkpoint import save
from granvit.model.granvit import GranViT
from granvit.model.prompts import add_special_tokens
from granvit.model.tower import FAMILIES
from tests.model.support import byte_level

SIZE = 24
MEAN, STD = (0.1, 0.25, 0.375), (0.3, 0.2, 0.7)
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": SIZE}
_OTHER = {**_SIZES, "image_size": 40}  # whose position embeddings are interpolated in every call
TOWERS: dict[str, PretrainedConfig] = {
    "siglip": SiglipVisionConfig(**_SIZES, intermediate_size=23, vision_use_head=False),
    "clip": CLIPVisionConfig(**_SIZES, intermediate_size=24),
    "dinov2": Dinov2Config(**_OTHER),
    "dinov2-swiglu": Dinov2Config(**_SIZES, use_swiglu_ffn=True),
    "dinov2-registers": Dinov2WithRegistersConfig(**_OTHER, num_register_tokens=3),
    "dinov3": DINOv3ViTConfig(**_SIZES, intermediate_size=24),
    "dinov3-registers": DINOv3ViTConfig(**_SIZES, intermediate_size=24, num_register_tokens=2),
    "aimv2": Aimv2VisionConfig(**_SIZES, intermediate_size=24, use_head=False),
    "aimv2-native": Aimv2VisionConfig(**_SIZES, intermediate_size=24, use_head=False, is_native=True),
}


def made(
    tower: str | PretrainedConfig = "siglip",
    prompt: str = "text",
    text: str = "qwen2",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[GranViT, PreTrainedTokenizerBase]:
    """A random model and its tokenizer; qwen2 has a tied head, llama one of its own."""
    tokenizer = tokenizer or byte_level()
    add_special_tokens(tokenizer)
    vision = TOWERS[tower] if isinstance(tower, str) else tower
    language = {"llama": LlamaConfig, "qwen2": Qwen2Config}[text](
        vocab_size=len(tokenizer) + 8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=text == "qwen2",
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=language,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default" if FAMILIES[vision.model_type].class_tokens else "full",
            image_seq_length=9 + getattr(vision, "num_register_tokens", 0),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=text == "qwen2",
        )
    )
    model = GranViT(llava, prompt=prompt, mean=MEAN, std=STD).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from zero, or attention hardly matters
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, tokenizer


def saved(folder: Path, *args: Any, **options: Any) -> GranViT:
    """A model in a folder, and the model."""
    model, tokenizer = made(*args, **options)
    save(model, tokenizer, SIZE, folder)
    return model


RECIPE = """
name: a-run
output: {output}
model:
  vision: {{name: someone/a-tower}}
  language: {{name: someone/a-language-model}}
  image_size: 24
  prompt: mixed
  dtype: bfloat16
data:
  train:
    - scenes: {{count: 700, kind: natural, seed: 31}}
    - shards: {shards}
stages:
  - {{name: first, train: [vision, projector], tasks: {{bbox_to_caption: 1}}, steps: 3}}
  - {{name: second, train: [language], tasks: {{caption_to_bbox: 1}}, style: thousandths, steps: 3}}
  - {{name: third, train: [language], tasks: {{caption_to_bbox: 1}}, steps: 3}}
"""


def run_folder(folder: Path, shards: Path) -> Path:
    """A run whose third stage is not finished."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(output=folder, shards=shards))
    lines: list[dict[str, Any]] = [
        {"stage": "first", "step": 0, "heldout/caption": 9.5},
        {"stage": "first", "step": 3, "heldout/caption": 4.25},
        {"stage": "second", "step": 3, "heldout/caption": 2.125, "heldout/wrong_image/caption": 1.75},
        {"stage": "third", "step": 0, "heldout/caption": 7.875},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in ("first", "second"):
        saved(folder / stage / "model", prompt="mixed")
    return folder
