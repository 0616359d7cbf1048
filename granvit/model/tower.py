"""Vision towers of Hugging Face transformers: the patch tokens that a LLaVA projector reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from granvit.errors import MissingDependencyError

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise MissingDependencyError("granvit.model needs transformers: pip install granvit[train]") from error


class Family(NamedTuple):
    """What the towers of one model_type have in common.

    Attributes:
        name: of the class, for messages.
        blocks: where the transformer blocks are.
        convolution: where the patch embedding is.
        class_tokens: in front of the patches, not counting registers.
        prefix: parameters of the embeddings that are tokens in front of the patches.
    """

    name: str
    blocks: str
    convolution: str
    class_tokens: int
    prefix: tuple[str, ...] = ()


_CLS = ("embeddings.cls_token",)
_CLS_AND_REGISTERS = ("embeddings.cls_token", "embeddings.register_tokens")
FAMILIES = {
    "siglip_vision_model": Family("SiglipVisionModel", "encoder.layers", "embeddings.patch_embedding", 0),
    "clip_vision_model": Family(
        "CLIPVisionModel", "encoder.layers", "embeddings.patch_embedding", 1, ("embeddings.class_embedding",)
    ),
    "dinov2": Family("Dinov2Model", "encoder.layer", "embeddings.patch_embeddings.projection", 1, _CLS),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "encoder.layer", "embeddings.patch_embeddings.projection", 1, _CLS_AND_REGISTERS
    ),
    "dinov3_vit": Family("DINOv3ViTModel", "model.layer", "embeddings.patch_embeddings", 1, _CLS_AND_REGISTERS),
    "aimv2_vision_model": Family("Aimv2VisionModel", "encoder.layers", "embeddings.patch_embed", 0),
}


def vision_tokens(tower: PreTrainedModel, pixels: Tensor, layer: int = -1) -> Tensor:
    """Patch tokens of one layer: the tensor that a LLaVA projector reads, without class and register tokens.

    The same bits as ``hidden_states[layer]`` in ``LlavaModel.get_image_features``. That keeps every layer's output
    until it returns; here the blocks run one by one up to the layer asked for, so without gradients no output outlives
    the next block, and later blocks, the final norm and a pooling head are not run at all.

    The tower's own modules do the work, so autocast, gradient checkpointing and hooks on blocks hold. The tower's own
    ``forward`` is not called: compile this function (``torch.compile(vision_tokens, fullgraph=True)``), a module that
    calls it, or the tower's blocks one by one (``block.compile()``); and under FSDP shard the blocks, and not the tower
    as a unit of its own. (DINOv2 with registers at another size compiles without gradients only: torch 2.14 cannot
    trace the gradient of its antialiased interpolation.)

    For another image size than the configured one, position embeddings are interpolated by the model's own method (for
    SigLIP and CLIP what ``interpolate_pos_encoding=True`` gives).

    Args:
        tower: SiglipVisionModel (SigLIP 2 of fixed resolution loads as one), CLIPVisionModel, Dinov2Model,
            Dinov2WithRegistersModel, DINOv3ViTModel or Aimv2VisionModel.
        pixels: ``(F, 3, H, W)``, floating, normalised as the tower wants them.
        layer: index into hidden_states, which begin with the embeddings: -1 is the last block, before the final norm.

    Returns:
        ``(F, n, C)``, row-major over :func:`grid_of` of the frame.

    Raises:
        TypeError: the tower is none of these, or was compiled as a whole; a layer that is no integer.
        ValueError: pixels of wrong shape or dtype, a frame smaller than a patch, a layer that the tower lacks, or
            another frame size than an AIMv2 tower with a learned position table was made for.
    """
    family = family_of(tower)
    count = depth(tower, layer)
    if getattr(tower, "_compiled_call_impl", None) is not None:
        raise TypeError(
            f"vision_tokens: tower: {family.name}.compile() compiles a forward that is not called here; compile its "
            "blocks, or vision_tokens itself"
        )
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(
            f"vision_tokens: pixels: expected floating (F, 3, H, W), got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    grid = grid_of(tower, (pixels.shape[-2], pixels.shape[-1]))
    hidden, options = _embed(tower, pixels, grid)
    for block in blocks_of(tower)[:count]:
        hidden = block(hidden, **options)
    return hidden[:, prefix_tokens(tower) :]


def grid_of(tower: PreTrainedModel, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that the tower lays over a frame of (height, width) pixels.

    Raises:
        TypeError: the tower is none that :func:`vision_tokens` takes.
        ValueError: the frame is smaller than a patch.
    """
    height, width = patch_of(tower)
    grid = (size[0] // height, size[1] // width)
    if min(grid) < 1:
        raise ValueError(f"grid_of: size: expected at least one patch of {height} x {width} pixels, got {tuple(size)}")
    return grid


def patch_of(tower: PreTrainedModel) -> tuple[int, int]:
    """Height and width in pixels of the tower's patches."""
    family_of(tower)
    return _pair(tower.config.patch_size)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``(pixels / 255 - mean) / std`` for each channel, as transformers' image processors do it.

    Computed in float32 or wider and rounded once; mean and std travel as kernel arguments, so nothing waits.

    Args:
        pixels: uint8 ``(F, C, H, W)``.
        mean: of each of the C channels, for pixels of 0 to 1: the processor's ``image_mean``.
        std: the processor's ``image_std``.
        dtype: floating, of the result.

    Returns:
        ``(F, C, H, W)``.

    Raises:
        ValueError: an argument of wrong dtype, shape or length, or a std that is not positive.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise ValueError(
            f"normalise: pixels: expected uint8 (F, C, H, W), got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"normalise: dtype: expected a floating dtype, got {dtype}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != pixels.shape[1]:
            raise ValueError(f"normalise: {name}: expected {pixels.shape[1]} values, one a channel, got {list(values)}")
    if min(std) <= 0:
        raise ValueError(f"normalise: std: expected positive values, got {list(std)}")
    compute = torch.promote_types(dtype, torch.float32)
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    for channel, (centre, scale) in enumerate(zip(mean, std, strict=True)):
        out[:, channel] = (pixels[:, channel].to(compute) - 255 * centre) * (1 / (255 * scale))
    return out


def unused_parameters(tower: PreTrainedModel, layer: int = -1) -> set[str]:
    """Names of the tower's parameters that get no gradient from :func:`vision_tokens` at a layer.

    Freeze them: otherwise DDP waits for their gradients, and weight decay moves them. They are the blocks behind the
    layer, the final norm, a pooling head, a mask token; and before any block also class and register tokens, which
    reach the patches only by attention.

    Raises:
        TypeError, ValueError: as :func:`vision_tokens` for the tower and the layer.
    """
    family = family_of(tower)
    count = depth(tower, layer)
    used = ("embeddings.", "pre_layrnorm.", *(f"{family.blocks}.{i}." for i in range(count)))
    apart = {"embeddings.mask_token", *(family.prefix if count == 0 else ())}
    return {name for name, _ in tower.named_parameters() if not name.startswith(used) or name in apart}


def family_of(tower: Any) -> Family:
    """What is known of the tower's kind.

    Raises:
        TypeError: the tower is none that :func:`vision_tokens` takes.
    """
    config = tower.config if isinstance(tower, PreTrainedModel) else None
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or not isinstance(getattr(tower, "embeddings", None), nn.Module):
        names = ", ".join(known.name for known in FAMILIES.values())
        raise TypeError(f"tower: expected one of {names} of transformers, not wrapped, got {type(tower).__name__}")
    return family


def depth(tower: PreTrainedModel, layer: int) -> int:
    """How many blocks run for hidden_states[layer].

    Raises:
        TypeError, ValueError: the tower has no such layer.
    """
    if not isinstance(layer, int):
        raise TypeError(f"layer: expected one integer (lists of layers are not supported), got {layer!r}")
    count = len(blocks_of(tower))
    if not -count - 1 <= layer <= count:
        raise ValueError(f"layer: expected -{count + 1} to {count} for a tower of {count} blocks, got {layer}")
    return layer if layer >= 0 else count + 1 + layer


def blocks_of(tower: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks."""
    blocks = tower.get_submodule(family_of(tower).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def convolution_of(tower: PreTrainedModel) -> nn.Conv2d:
    """The patch embedding."""
    convolution = tower.get_submodule(family_of(tower).convolution)
    assert isinstance(convolution, nn.Conv2d)
    return convolution


def prefix_tokens(tower: PreTrainedModel) -> int:
    """Class and register tokens in front of the patches."""
    family = family_of(tower)
    if "embeddings.register_tokens" not in family.prefix:
        return family.class_tokens
    return family.class_tokens + int(tower.config.num_register_tokens)


def _embed(tower: PreTrainedModel, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
    """The first block's input, and what else its blocks take, as the tower's own forward makes them."""
    config = tower.config
    size = (pixels.shape[-2], pixels.shape[-1])
    if config.model_type in ("siglip_vision_model", "clip_vision_model"):
        # These interpolate only when asked to; the others always do.
        hidden = tower.embeddings(pixels, interpolate_pos_encoding=size != _pair(config.image_size))
        if config.model_type == "clip_vision_model":
            hidden = tower.pre_layrnorm(hidden)
        return hidden, {"attention_mask": None}
    pixels = pixels.to(convolution_of(tower).weight.dtype)
    if config.model_type == "dinov3_vit":
        return tower.embeddings(pixels), {"position_embeddings": tower.rope_embeddings(pixels)}
    if config.model_type == "aimv2_vision_model" and not config.is_native:
        configured = grid_of(tower, _pair(config.image_size))
        if grid != configured:
            raise ValueError(
                f"vision_tokens: pixels: this Aimv2VisionModel has a learned position for each of {configured[0]} x "
                f"{configured[1]} patches and cannot interpolate them, got frames of {size[0]} x {size[1]} pixels"
            )
    return tower.embeddings(pixels), {}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
