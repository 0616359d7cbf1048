"""roi_align, the specification."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from granvit.reference._regions import (
    GridSize,
    accumulation_dtype,
    geometry_dtype,
    per_image_maps,
    per_region_grids,
)


def sampling_weights(start: Tensor, end: Tensor, cells: int, size: int, sampling_ratio: int) -> Tensor:
    """Weight of every grid line in every output cell, along one axis.

    ``A[p, j] = mean_k inside(t) * max(0, 1 - |clamp(t) - j|)``: sample k of n in cell p sits at
    ``t = start - 0.5 + bin * (p + (k + 0.5) / n)``; a sample beyond [-1, size] counts as zero. These are the weights of
    bilinear RoIAlign with ``aligned=True`` (He et al. 2017; torchvision), which factor into one matrix an axis.

    Args:
        start: box edge in grid units, scalar tensor.
        end: the opposite edge in grid units, scalar tensor.
        cells: output cells along the axis.
        size: grid lines along the axis.
        sampling_ratio: samples a cell; 0 means ``ceil(bin)``.

    Returns:
        ``(cells, size)`` weights in the dtype of `start`.
    """
    bin_size = (end - start) / cells
    samples = sampling_ratio if sampling_ratio > 0 else math.ceil(float(bin_size))
    if samples <= 0:  # a box without extent has no adaptive samples
        return start.new_zeros(cells, size)
    k = torch.arange(samples, dtype=start.dtype, device=start.device)
    p = torch.arange(cells, dtype=start.dtype, device=start.device)
    j = torch.arange(size, dtype=start.dtype, device=start.device)
    t = start - 0.5 + bin_size * (p[:, None] + (k + 0.5) / samples)  # [P, K]
    inside = ((t >= -1) & (t <= size)).to(t.dtype)
    t = t.clamp(0, size - 1)
    hat = (1 - (t[..., None] - j).abs()).clamp(min=0)  # [P, K, J]
    return (inside[..., None] * hat).mean(1)


def roi_align(
    tokens: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_size: GridSize,
    output_size: int | Sequence[int] | Tensor,
    *,
    sampling_ratio: int = 2,
) -> Tensor:
    """See :func:`granvit.ops.roi_align`. Per region: ``out = A_y X A_x^T``."""
    compute = accumulation_dtype(tokens.dtype)
    # Widened once, so that the gradients of all regions meet in the wide dtype.
    maps = per_image_maps(tokens.to(compute), grid_size)
    grids = per_region_grids(output_size, boxes.shape[0])
    edges = boxes.detach().to(geometry_dtype(boxes.device))
    regions = []
    for box, image, (h, w) in zip(edges, image_index.tolist(), grids, strict=True):
        x = maps[image]  # [H, W, C]
        height, width = x.shape[:2]
        a_y = sampling_weights(box[1] * height, box[3] * height, h, height, sampling_ratio).to(compute)
        a_x = sampling_weights(box[0] * width, box[2] * width, w, width, sampling_ratio).to(compute)
        aligned = torch.einsum("py,yxc,qx->pqc", a_y, x, a_x)
        regions.append(aligned.flatten(0, 1).to(tokens.dtype))  # [h*w, C]
    if isinstance(output_size, Tensor):
        return torch.cat(regions) if regions else tokens.new_zeros(0, tokens.shape[-1]) + 0 * tokens.sum()
    h, w = per_region_grids(output_size, 1)[0]
    if regions:
        return torch.stack(regions)
    return tokens.new_zeros(0, h * w, tokens.shape[-1]) + 0 * tokens.sum()  # keeps the graph to the tokens
