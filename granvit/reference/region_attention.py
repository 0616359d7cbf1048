"""region_attention, the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from granvit.reference._regions import GridSize, accumulation_dtype, geometry_dtype, per_image_maps


def coverage(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Length of ``[start, end]`` inside every unit cell ``[j, j + 1]`` of an axis of `size` cells, as ``(size,)``."""
    j = torch.arange(size, dtype=start.dtype, device=start.device)
    return (torch.minimum(end, j + 1) - torch.maximum(start, j)).clamp(min=0)


def cell_weights(box: Tensor, height: int, width: int) -> Tensor:
    """Overlap area of a relative box with every grid cell, ``(H, W)``; one cell of weight 1 where there is no area.

    A box without area after clamping to the image is stood in for by the one cell that holds its (clamped) centre.
    """
    x0, y0, x1, y1 = box.clamp(0, 1).unbind()
    c_y = coverage(y0 * height, y1 * height, height)
    c_x = coverage(x0 * width, x1 * width, width)
    cells = c_y[:, None] * c_x
    if bool((cells > 0).any()):
        return cells
    row = int(((y0 + y1) * (0.5 * height)).floor().clamp(0, height - 1))
    column = int(((x0 + x1) * (0.5 * width)).floor().clamp(0, width - 1))
    cells = torch.zeros_like(cells)
    cells[row, column] = 1
    return cells


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_size: GridSize,
    *,
    scale: float | None = None,
) -> Tensor:
    """See :func:`granvit.ops.region_attention`. Cell j has weight proportional to ``c_j * exp(scale * q . k_j)``."""
    compute = accumulation_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Widened once, so that the gradients of all regions meet in the wide dtype.
    keys = per_image_maps(key.to(compute), grid_size)
    values = per_image_maps(value.to(compute), grid_size)
    boxes = boxes.detach().to(geometry_dtype(boxes.device))
    outputs = []
    for q, box, image in zip(query, boxes, image_index.tolist(), strict=True):
        height, width = keys[image].shape[:2]
        cells = cell_weights(box, height, width)
        covered = cells > 0
        k = keys[image][covered]  # [N, heads, dim]
        v = values[image][covered]
        log_cover = cells[covered].log().to(compute)  # [N]
        scores = scale * torch.einsum("qhd,nhd->hqn", q.to(compute), k) + log_cover
        outputs.append(torch.einsum("hqn,nhd->qhd", scores.softmax(-1), v).to(query.dtype))
    if outputs:
        return torch.stack(outputs)
    return query * 0 + 0 * (key.sum() + value.sum())  # R = 0: empty, and still part of the graph
