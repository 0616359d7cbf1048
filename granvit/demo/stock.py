"""The region part with stock PyTorch and torchvision, written as region-aware encoders write it today."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distill_loss(
    student: Tensor, teacher: Tensor, boxes: Tensor, image_index: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Mean squared distance between the teacher's tokens and ``torchvision.ops.roi_align`` of the student's."""
    from torchvision.ops import roi_align

    height, width = grid_size
    # torchvision has no bfloat16 roi_align on the CPU, so the map is widened first, as autocast would.
    wide = torch.promote_types(student.dtype, torch.float32)
    maps = student.to(wide).transpose(1, 2).unflatten(2, grid_size)  # [B, C, H, W]
    cells = boxes.to(wide) * boxes.new_tensor([width, height, width, height])
    rois = torch.cat([image_index[:, None].to(wide), cells], dim=1)  # [R, 5]
    aligned = roi_align(maps, rois, grid_size, sampling_ratio=2, aligned=True)
    target = teacher.to(wide).transpose(1, 2).unflatten(2, grid_size)  # [R, C, h, w]
    return F.mse_loss(aligned, target)


def attention_pool(
    query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """Attention of each region's queries over the tokens under its box: SDPA with a dense additive mask.

    The regions of an image are the queries of one attention, the fastest stock form. It needs equally many regions an
    image, in order. Shapes as in :func:`granvit.ops.region_attention`.
    """
    images = key.shape[0]
    edges = boxes.to(torch.promote_types(query.dtype, torch.float32))
    area = _overlap(edges[:, 1::2], grid_size[0])[:, :, None] * _overlap(edges[:, 0::2], grid_size[1])[:, None]
    mask = area.flatten(1).log().to(query.dtype)  # [R, H*W]
    queries = query.shape[1]
    pooled = F.scaled_dot_product_attention(
        query.flatten(0, 1).unflatten(0, (images, -1)).transpose(1, 2),  # [B, heads, R/B * Q, dim]
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask.repeat_interleave(queries, 0).unflatten(0, (images, -1))[:, None],
        scale=scale,
    )
    return pooled.transpose(1, 2).flatten(0, 1).unflatten(0, (-1, queries))


def _overlap(edges: Tensor, cells: int) -> Tensor:
    """Length of each relative interval ``(R, 2)`` inside every one of `cells` equal cells, in cells: ``(R, cells)``."""
    start, end = (edges * cells).unsqueeze(-1).unbind(1)
    j = torch.arange(cells, dtype=edges.dtype, device=edges.device)
    return (torch.minimum(end, j + 1) - torch.maximum(start, j)).clamp(min=0)
