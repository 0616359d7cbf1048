"""What the recipes' checkpoints say of themselves, so that a plan needs no network; copied from their config.json."""

from __future__ import annotations

from typing import Any

_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN_TOKENS = 151665  # of the tokenizer; the embedding has more rows

# name: its config, and the tokens of its tokenizer (None for a vision model)
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "google/siglip2-so400m-patch16-512": (
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 16,
            "image_size": 512,
        },
        None,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        {
            **_QWEN,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        _QWEN_TOKENS,
    ),
    "Qwen/Qwen2.5-3B-Instruct": (
        {
            **_QWEN,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        _QWEN_TOKENS,
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        {
            **_QWEN,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        _QWEN_TOKENS,
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": False,
        },
        128256,
    ),
}
