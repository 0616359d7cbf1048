"""How the reference functions find the tokens of an image and widen their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GridSize = Sequence[int] | Tensor


def per_image_maps(tokens: Tensor, grid_size: GridSize) -> list[Tensor]:
    """Views ``(H_b, W_b, ...)`` of each image's tokens, from dense ``(B, H*W, ...)`` or packed ``(T, ...)`` tokens."""
    if isinstance(grid_size, Tensor):
        grids = [(int(h), int(w)) for h, w in grid_size.tolist()]
        images = tokens.split([h * w for h, w in grids])
    else:
        height, width = grid_size
        grids = [(int(height), int(width))] * tokens.shape[0]
        images = tokens.unbind(0)
    return [image.unflatten(0, grid) for image, grid in zip(images, grids, strict=True)]


def per_region_grids(output_size: int | Sequence[int] | Tensor, num_regions: int) -> list[tuple[int, int]]:
    """The output grid ``(h, w)`` of every region."""
    if isinstance(output_size, Tensor):
        return [(int(h), int(w)) for h, w in output_size.tolist()]
    if isinstance(output_size, int):
        return [(output_size, output_size)] * num_regions
    height, width = output_size
    return [(int(height), int(width))] * num_regions


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def geometry_dtype(device: torch.device) -> torch.dtype:
    """float64, so that a coordinate decides the same way in every token dtype; float32 where a device lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
