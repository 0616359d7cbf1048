"""The tower as a checkpoint that timm loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from granvit.export.weights import ExportError, write_weights
from granvit.model.granvit import GranViT

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
Twin = tuple[str, dict[str, Any], dict[str, Tensor]]  # timm's architecture, its arguments, its weights


def write_timm(model: GranViT, image_size: int, folder: Path) -> None:
    """Writes the tower as ``timm.create_model("local-dir:<folder>", pretrained=True)`` reads it.

    The arguments of the model lie in ``config.json`` as timm has it on the hub, so width, depth and patch may be any.
    Position embeddings are those of the frame.

    Args:
        model: whose tower it is.
        image_size: side of the square frame in pixels.
        folder: that exists.

    Raises:
        ExportError: timm has no twin of the tower.
        OSError: as the system has it.
    """
    tower = model.llava.model.vision_tower
    kind = tower.config.model_type
    if kind not in _TWINS:
        raise ExportError(f"--timm: no twin in timm is known for a tower of type {kind}; known are {', '.join(_TWINS)}")
    with torch.no_grad():
        name, args, weights = _TWINS[kind](tower, image_size)
    config = tower.config
    args = {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "global_pool": "",  # tokens, not one vector
        **args,
    }
    described = {
        "architecture": name,
        "num_classes": 0,
        "num_features": config.hidden_size,
        "global_pool": "",
        "pretrained_cfg": {
            "tag": "granvit",
            "custom_load": False,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "border",
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "model_args": args,
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    write_weights(weights, folder)


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of a layer or of the rest: `names` is from timm's to the tower's, less ``.weight`` and ``.bias``."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        for end in ("", ".weight", ".bias"):
            if theirs + end in weights:
                found[ours + end] = weights[theirs + end]
    return found


def _blocks(
    weights: Mapping[str, Tensor], count: int, prefix: str, qkv: tuple[str, str, str], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The transformer blocks, with query, key and value joined as timm has them."""
    found: dict[str, Tensor] = {}
    for i in range(count):
        layer = {
            name.removeprefix(f"{prefix}.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"{prefix}.{i}.")
        }
        own = _renamed(layer, names)
        for end in ("weight", "bias"):
            if f"{qkv[0]}.{end}" in layer:
                own[f"attn.qkv.{end}"] = torch.cat([layer[f"{part}.{end}"] for part in qkv])
        found |= {f"blocks.{i}.{name}": value for name, value in own.items()}
    return found


def _wide(embeddings: Any) -> Any:
    """A copy in float32: positions that are computed are not rounded."""
    return copy.deepcopy(embeddings).float()


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ExportError(f"--timm: timm has no activation {name!r}")
    return _ACTIVATIONS[name]


def _ratio(hidden: int, width: int) -> float:
    return (hidden + 0.5) / width  # of which timm takes the whole part, times the width


def _epsilon(found: float, expected: float) -> None:
    if found != expected:
        raise ExportError(
            f"--timm: the norms of timm's twin have an epsilon of {expected:g}, which its config.json cannot change; "
            f"the tower has {found:g}"
        )


_ENCODER = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ENCODER_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _siglip(tower: PreTrainedModel, size: int) -> Twin:
    config, weights = tower.config, tower.state_dict()
    _epsilon(config.layer_norm_eps, 1e-6)
    rest = _renamed(weights, {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"})
    rest["pos_embed"] = weights["embeddings.position_embedding.weight"][None]
    blocks = _blocks(weights, config.num_hidden_layers, "encoder.layers", _ENCODER_QKV, _ENCODER)
    return "vit_base_patch16_siglip_224", _mlp(config), {**rest, **blocks}


def _clip(tower: PreTrainedModel, size: int) -> Twin:
    config, weights = tower.config, tower.state_dict()
    _epsilon(config.layer_norm_eps, 1e-5)
    names = {"patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    rest = _renamed(weights, names)
    rest["cls_token"] = weights["embeddings.class_embedding"][None, None]
    rest["pos_embed"] = weights["embeddings.position_embedding.weight"][None]
    blocks = _blocks(weights, config.num_hidden_layers, "encoder.layers", _ENCODER_QKV, _ENCODER)
    return "vit_base_patch16_clip_224", _mlp(config), {**rest, **blocks}


def _mlp(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "mlp_ratio": _ratio(config.intermediate_size, config.hidden_size),
        "act_layer": _activation(config.hidden_act),
    }


def _dinov2(tower: PreTrainedModel, size: int) -> Twin:
    config, weights = tower.config, tower.state_dict()
    _epsilon(config.layer_norm_eps, 1e-6)
    grid = size // config.patch_size
    tokens = torch.zeros(1, grid * grid + 1, config.hidden_size)
    positions = _wide(tower.embeddings).interpolate_pos_encoding(tokens, size, size)
    rest = _renamed(weights, {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"})
    rest |= {"cls_token": weights["embeddings.cls_token"], "pos_embed": positions}
    args: dict[str, Any] = {"qkv_bias": config.qkv_bias}
    registers = getattr(config, "num_register_tokens", 0)
    if registers:  # timm's positions are then those of the patches alone
        args["reg_tokens"] = registers
        rest["reg_token"] = weights["embeddings.register_tokens"]
        rest["cls_token"] = rest["cls_token"] + positions[:, :1]
        rest["pos_embed"] = positions[:, 1:].clone()
    names = {
        "norm1": "norm1",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    if config.use_swiglu_ffn:
        names |= {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
        packed = tower.encoder.layer[0].mlp.weights_in.out_features
        args["mlp_ratio"] = _ratio(packed, config.hidden_size)
        name = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    else:
        names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        hidden = tower.encoder.layer[0].mlp.fc1.out_features
        args |= {"mlp_ratio": _ratio(hidden, config.hidden_size), "act_layer": _activation(config.hidden_act)}
        name = "vit_base_patch14_reg4_dinov2" if registers else "vit_base_patch14_dinov2"
    qkv = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    blocks = _blocks(weights, config.num_hidden_layers, "encoder.layer", qkv, names)
    return name, args, {**rest, **blocks}


def _aimv2(tower: PreTrainedModel, size: int) -> Twin:
    config, weights = tower.config, tower.state_dict()
    _epsilon(config.rms_norm_eps, 1e-5)
    if config.qkv_bias or config.mlp_bias:
        raise ExportError("--timm: the linear layers of timm's AIMv2 have no bias, which this tower's have")
    embedded = {"patch_embed.proj": "embeddings.patch_embed", "patch_embed.norm": "embeddings.rms_norm"}
    rest = _renamed(weights, {**embedded, "norm": "rms_norm"})
    # A table, or sines that transformers computes in each call: what is left where the patches are nothing.
    embeddings = _wide(tower.embeddings)
    embeddings.rms_norm.weight.zero_()
    rest["pos_embed"] = embeddings(torch.zeros(1, 3, size, size))
    names = {
        "norm1": "rms_norm1",
        "attn.proj": "attention.out_proj",
        "norm2": "rms_norm2",
        "mlp.fc1_g": "ffn.gate_proj",
        "mlp.fc1_x": "ffn.up_proj",
        "mlp.fc2": "ffn.down_proj",
    }
    qkv = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    blocks = _blocks(weights, config.num_hidden_layers, "encoder.layers", qkv, names)
    return "aimv2_large_patch14_224", _mlp(config), {**rest, **blocks}


_TWINS: dict[str, Callable[[PreTrainedModel, int], Twin]] = {
    "siglip_vision_model": _siglip,
    "clip_vision_model": _clip,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "aimv2_vision_model": _aimv2,
}
