"""region_distill_loss, the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granvit.reference._regions import GridSize, accumulation_dtype, geometry_dtype, per_region_grids
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
    wide = torch.promote_types(compute, geometry_dtype(student.device))
    aligned = roi_align(
        student.to(compute), boxes, image_index, grid_size, output_size, sampling_ratio=sampling_ratio
    ).flatten(0, -2)  # [cells, C]
    target = teacher.detach().flatten(0, -2)
    cells = [h * w for h, w in per_region_grids(output_size, boxes.shape[0])]
    means = []
    for ours, theirs in zip(aligned.split(cells), target.split(cells), strict=True):
        if loss == "mse":
            means.append((theirs.to(wide) - ours.to(wide)).square().mean())
        else:
            means.append(1 - torch.cosine_similarity(ours.to(wide), theirs.to(wide), dim=-1, eps=1e-8).mean())
    if not means:
        nothing = aligned.sum() * 0
        return nothing.expand(0) if reduction == "none" else nothing
    per_region = torch.stack(means)
    if reduction == "none":
        return per_region.to(compute)
    share = torch.tensor(cells, device=student.device) if weight is None else weight.detach()
    share = share.to(wide)
    total = share.sum()
    mean = (share * per_region).sum() / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, 0 * per_region.sum()).to(compute)
