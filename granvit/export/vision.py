"""The tower alone, as a checkpoint of its own family."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from granvit.export.weights import write_weights
from granvit.model.granvit import GranViT
from granvit.model.processor import image_processor_of

# Published towers of these families have their weights one level down; vLLM knows no other names.
_NESTED = ("siglip_vision_model", "clip_vision_model")


def published_names(tower: PreTrainedModel) -> dict[str, Tensor]:
    """The tower's weights by the names that published checkpoints of its family have."""
    kind = tower.config.model_type
    weights = tower.state_dict()
    if kind in _NESTED:
        return {f"vision_model.{name}": value for name, value in weights.items()}
    if kind == "dinov3_vit":
        return {name.removeprefix("model."): value for name, value in weights.items()}
    return dict(weights)


def write_vision(model: GranViT, image_size: int, dtype: str, folder: Path) -> None:
    """Writes config, weights and image processor of the tower, whose parameters have `dtype` already.

    Args:
        model: whose tower it is.
        image_size: side of the square frame in pixels.
        dtype: ``"float32"`` or ``"bfloat16"``.
        folder: that exists.

    Raises:
        OSError: as the system has it.
    """
    tower = model.llava.model.vision_tower
    config = copy.deepcopy(tower.config)
    config.architectures, config.dtype = [type(tower).__name__], dtype
    config.save_pretrained(folder)
    write_weights(published_names(tower), folder)
    image_processor_of(model, image_size).save_pretrained(folder)
