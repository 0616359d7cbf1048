"""Which grid cells each region covers and by how much, worked out once for all heads and tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from granvit.kernels._regions import clamp, load_grid, load_region

# Columns of a footprint.
ROW = tl.constexpr(0)
COLUMN = tl.constexpr(1)
ROWS = tl.constexpr(2)
COLUMNS = tl.constexpr(3)
WIDTH = tl.constexpr(4)  # of the grid
IMAGE = tl.constexpr(5)
TOKEN = tl.constexpr(6)  # the image's first one, among packed tokens
FIELDS = tl.constexpr(8)


@triton.jit
def _axis(start, end, size, area):
    """First cell and number of cells under [start, end], and log2 of the coverage of the first and of the last one.

    Coverage is relative to that of the cell that is covered most: attention stays the same, and a box much smaller than
    a cell adds no large number to its scores, which would round them.
    """
    centre = ((start + end) * 0.5).to(tl.int32)
    first = tl.minimum(tl.where(area, start.to(tl.int32), centre), size - 1)
    whole = end.to(tl.int32)
    last = tl.minimum(whole + (whole.to(tl.float64) < end).to(tl.int32), size)
    count = tl.where(area, last - first, 1)
    cover_first = tl.minimum(end, (first + 1).to(tl.float64)) - tl.maximum(start, first.to(tl.float64))
    cover_last = end - tl.maximum(start, (last - 1).to(tl.float64))
    most = tl.where(count > 2, 1.0, tl.maximum(cover_first, cover_last))
    # A single cell is both the first and the last.
    log_first = tl.log2(tl.where(count > 1, cover_first / most, 1.0)).to(tl.float32)
    log_last = tl.log2(tl.where(count > 1, cover_last / most, 1.0)).to(tl.float32)
    return first, count, log_first, log_last


@triton.jit
def _footprint_kernel(
    boxes,
    image_index,
    grids,
    footprints,
    log_cover,
    num_images,
    num_tokens,
    height,
    width,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    x0, y0, x1, y1, image = load_region(boxes, image_index, r, num_images)
    height, width = load_grid(grids, image, height, width, PACKED)
    token = tl.zeros((), tl.int64)
    if PACKED:
        # Sizes on a device are not checked: what lies beyond the tokens must at least not keep us for ever.
        width = tl.minimum(tl.maximum(width, 1), num_tokens)
        height = tl.minimum(tl.maximum(height, 1), tl.maximum(num_tokens // width, 1))
        lane = tl.arange(0, BLOCK)
        for first in range(0, image, BLOCK):
            before = first + lane < image
            h = tl.load(grids + 2 * (first + lane), mask=before, other=0)
            w = tl.load(grids + 2 * (first + lane) + 1, mask=before, other=0)
            token += tl.sum(h * w)
    x0, y0 = clamp(x0, 0.0, 1.0) * width, clamp(y0, 0.0, 1.0) * height
    x1, y1 = clamp(x1, 0.0, 1.0) * width, clamp(y1, 0.0, 1.0) * height
    area = (x1 > x0) & (y1 > y0)
    column, columns, log_left, log_right = _axis(x0, x1, width, area)
    row, rows, log_top, log_bottom = _axis(y0, y1, height, area)
    footprint = footprints + r.to(tl.int64) * FIELDS
    tl.store(footprint + ROW, row)
    tl.store(footprint + COLUMN, column)
    tl.store(footprint + ROWS, rows)
    tl.store(footprint + COLUMNS, columns)
    tl.store(footprint + WIDTH, width)
    tl.store(footprint + IMAGE, image)
    tl.store(footprint + TOKEN, token)
    cover = log_cover + r.to(tl.int64) * 4
    tl.store(cover, log_top)
    tl.store(cover + 1, log_bottom)
    tl.store(cover + 2, log_left)
    tl.store(cover + 3, log_right)


@triton.jit
def load_log_cover(log_cover, r):
    """log2 of the relative coverage of a region's top and bottom row, left and right column."""
    cover = log_cover + r * 4
    return tl.load(cover), tl.load(cover + 1), tl.load(cover + 2), tl.load(cover + 3)


@triton.jit
def cell_log_cover(y, x, rows, columns, top, bottom, left, right):
    """log2 of the relative coverage of cells, counted from the footprint's corner: 0 but on its outermost lines."""
    return (
        tl.where(y == 0, top, 0.0)
        + tl.where(y == rows - 1, bottom, 0.0)
        + tl.where(x == 0, left, 0.0)
        + tl.where(x == columns - 1, right, 0.0)
    )


def make_footprints(
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    height: int,
    width: int,
    num_images: int,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Footprints ``(R, 8)`` int64, and log2 coverage ``(R, 4)`` float32; R at least 1.

    Args:
        boxes: ``(R, 4)`` float32, relative to the image.
        image_index: ``(R,)`` int64 on the device; values beyond the images are clamped.
        grid_sizes: ``(B, 2)`` int64 on the device for packed tokens, or None where all grids are `height` x `width`.
        height: of every grid, for dense tokens.
        width: likewise.
        num_images: B.
        num_tokens: of all images.
    """
    regions = boxes.shape[0]
    footprints = torch.empty(regions, FIELDS.value, dtype=torch.int64, device=boxes.device)
    log_cover = torch.empty(regions, 4, dtype=torch.float32, device=boxes.device)
    _footprint_kernel[(regions,)](
        boxes,
        image_index,
        grid_sizes,
        footprints,
        log_cover,
        num_images,
        num_tokens,
        height,
        width,
        PACKED=grid_sizes is not None,
        BLOCK=128,
        num_warps=1,
    )
    return footprints, log_cover
