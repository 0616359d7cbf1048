"""Vision towers to look at: out of a checkpoint of granvit, a folder, or the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granvit.data.images import ImageError, decode
from granvit.model import checkpoint
from granvit.model._sources import PartError, config_of, load_vision, normalisation
from granvit.model.assemble import NORMALISATION
from granvit.model.tower import FAMILIES, blocks_of, normalise
from granvit.recipe import Source


@dataclass(frozen=True)
class Tower:
    """A vision tower and how it wants its images.

    Attributes:
        model: float32, in eval mode.
        mean: of RGB, for pixels of 0 to 1.
        std: likewise.
        image_size: side of the square frame in pixels.
    """

    model: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int

    @property
    def layers(self) -> int:
        """How many blocks it has."""
        return len(blocks_of(self.model))

    def prepare(self, frame: Tensor) -> Tensor:
        """A uint8 frame ``(3, H, W)`` as the tower takes it, ``(1, 3, H, W)``."""
        weight = next(self.model.parameters())
        return normalise(frame[None].to(weight.device), self.mean, self.std, weight.dtype)


def open_tower(name: str | Path) -> Tower:
    """Loads the tower alone, out of a checkpoint that may hold more.

    Args:
        name: folder that :func:`granvit.model.checkpoint.save` wrote, another folder of transformers (SigLIP, CLIP,
            DINOv2, DINOv3, AIMv2, or a LLaVA of these), or a name on the hub.

    Raises:
        PartError: it cannot be read, or is none of these.
    """
    source, key = Source(name=str(name)), "tower"
    config, _ = config_of(source, key)
    config = getattr(config, "vision_config", config)
    if config.model_type not in FAMILIES:
        raise PartError(f"{key}: {name}: expected one of {', '.join(FAMILIES)}, got {config.model_type}")
    model = load_vision(source, config, key).eval()
    settings = Path(name) / checkpoint.SETTINGS
    if settings.is_file():
        own = json.loads(settings.read_text(encoding="utf-8"))
        return Tower(model, _triple(own["mean"]), _triple(own["std"]), int(own["image_size"]))
    mean, std, _ = normalisation(source, NORMALISATION[config.model_type], key)
    side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    return Tower(model.to(torch.float32), _triple(mean), _triple(std), side)


def read_image(path: str | Path) -> Tensor:
    """An image file, upright and in RGB: uint8 ``(3, H, W)``.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return torch.from_numpy(np.array(decode(data, name=str(path)))).permute(2, 0, 1)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
