"""region_distill_loss, the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granvit.reference._regions import GridSize, accumulation_dtype, per_region_grids
from granvit.reference.roi_align import roi_align


def region_distill_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_size: GridSize,
    output_size: int | Sequence[int] | Tensor,
    *,
    loss: str = "mse",
    reduction: str = "mean",
    weight: Tensor | None = None,
    sampling_ratio: int = 2,
) -> Tensor:
    """See :func:`granvit.ops.region_distill_loss`."""
    compute = accumulation_dtype(student.dtype)
    aligned = roi_align(student.to(compute), boxes, image_index, grid_size, output_size, sampling_ratio=sampling_ratio)
    target = teacher.detach().to(compute)
    if loss == "mse":
        per_cell = (target - aligned).square().mean(-1)
    else:
        per_cell = 1 - torch.cosine_similarity(aligned, target, dim=-1, eps=1e-8)
    cells = [h * w for h, w in per_region_grids(output_size, boxes.shape[0])]
    if not cells:
        return per_cell.new_zeros(0) + 0 * aligned.sum() if reduction == "none" else aligned.sum() * 0
    per_region = torch.stack([part.mean() for part in per_cell.flatten().split(cells)])
    if reduction == "none":
        return per_region
    share = torch.tensor(cells, device=student.device) if weight is None else weight.detach()
    share = share.to(compute)
    total = share.sum()
    return torch.where(total > 0, (share * per_region).sum() / torch.where(total > 0, total, 1), 0 * per_region.sum())
