"""The transpose of RoIAlign in Triton: from cells back to tokens, for the backward of two ops."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from granvit.kernels._regions import find_tile, load_grid, make_cells, make_plan, on_device
from granvit.kernels._resample import (
    COLUMNS,
    ROWS,
    Grids,
    align_block,
    axis_weights,
    block_of_channels,
    cells_near,
    first_line,
    load_axes,
    load_image,
    per_channel,
    precision,
    product,
    swap_axes,
)


@triton.jit
def pull_back_kernel(
    # The gradient of the tokens, which is written.
    grad_tokens,
    partial_loss,
    # What the cells hold: their gradient; or the student's tokens and the teacher's cells.
    cells,
    cell_row_stride,
    cell_region_stride,
    tokens,
    token_row_stride,
    token_image_stride,
    slope,  # (cells, 2): factors of student and teacher in the gradient of a cell, for cosine
    region_scale,
    scale,
    # Geometry.
    boxes,
    image_index,
    grids,
    grid_height,
    grid_width,
    outputs,
    output_height,
    output_width,
    cell_start,
    order,
    region_start,
    token_start,
    tile_start,
    num_images,
    num_tokens,
    channels,
    SAMPLING_RATIO: tl.constexpr,
    FROM: tl.constexpr,
    HAS_REGION_SCALE: tl.constexpr,
    PACKED: tl.constexpr,
    PACKED_CELLS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_tokens = sum over regions of A_y^T D A_x, where D, the gradient of the cells, comes from FROM.

    "cells": D is `cells`. "mse": D = 2 (student - teacher), and the sum of squares is left in `partial_loss`.
    "cosine": D = slope[0] * student + slope[1] * teacher. All times the region's scale. A program owns a tile of an
    image's tokens for a block of channels and walks the image's regions in their order, so nothing is added by two
    programs.
    """
    image, tile = find_tile(tile_start, num_images, tl.program_id(0), 256)
    c0 = tl.program_id(1) * CHANNELS
    loss = tl.zeros((), tl.float64)  # the sum over a tile keeps its last bits
    if image < num_images:
        height, width = load_grid(grids, image, grid_height, grid_width, PACKED)
        tiles_x = (width + TILE_W - 1) // TILE_W
        tile_y = tile // tiles_x * TILE_H
        tile_x = tile % tiles_x * TILE_W
        first_token = tl.load(token_start + image)
        if FROM != "cells":
            student, student_first, student_last = load_image(
                tokens, token_image_stride, token_start, image, height, width, num_tokens, PACKED
            )
        grad = tl.zeros((TILE_H, TILE_W * CHANNELS), tl.float32)
        for i in range(tl.load(region_start + image), tl.load(region_start + image + 1)):
            r = tl.load(order + i)
            _, _, _, y0, bin_y, samples_y, rows, x0, bin_x, samples_x, columns = load_axes(
                r,
                boxes,
                image_index,
                num_images,
                grids,
                grid_height,
                grid_width,
                outputs,
                output_height,
                output_width,
                SAMPLING_RATIO,
                PACKED,
                PACKED_CELLS,
            )
            factor = scale
            if HAS_REGION_SCALE:
                factor = tl.load(region_scale + r)
            if PACKED_CELLS:
                first_cell = tl.load(cell_start + r)
                region_cells = cells + first_cell * cell_row_stride
            else:
                first_cell = r.to(tl.int64) * rows * columns
                region_cells = cells + r.to(tl.int64) * cell_region_stride
            p_first, p_last = cells_near(y0, bin_y, samples_y, height, rows, tile_y, tile_y + TILE_H)
            q_first, q_last = cells_near(x0, bin_x, samples_x, width, columns, tile_x, tile_x + TILE_W)
            for p0 in range(p_first, p_last, ROWS):
                a_y = axis_weights(y0, bin_y, samples_y, height, p0, rows, tile_y, ROWS, TILE_H)
                for q0 in range(q_first, q_last, COLUMNS):
                    ours = tl.zeros((COLUMNS, ROWS * CHANNELS), tl.float32)
                    if FROM != "cells":
                        ours = align_block(
                            student,
                            token_row_stride,
                            student_first,
                            student_last,
                            height,
                            width,
                            y0,
                            bin_y,
                            samples_y,
                            x0,
                            bin_x,
                            samples_x,
                            p0,
                            rows,
                            q0,
                            columns,
                            c0,
                            channels,
                            CHANNELS,
                            PRECISION,
                        )
                    # [COLUMNS, (ROWS, CHANNELS)]
                    q = q0 + tl.arange(0, COLUMNS)
                    n = tl.arange(0, ROWS * CHANNELS)
                    p = p0 + n // CHANNELS
                    channel = c0 + n % CHANNELS
                    cell = p[None, :] * columns + q[:, None]
                    valid = (q < columns)[:, None] & ((p < rows) & (channel < channels))[None, :]
                    there = region_cells + cell.to(tl.int64) * cell_row_stride + channel[None, :]
                    theirs = tl.load(there, mask=valid, other=0.0).to(tl.float32)
                    if FROM == "cells":
                        d = theirs
                    elif FROM == "mse":
                        d = ours - theirs
                        # The loss of a cell belongs to the tile of the first line that it touches.
                        home_y = first_line(y0, bin_y, samples_y, height, p0 + tl.arange(0, ROWS))
                        home_x = first_line(x0, bin_x, samples_x, width, q)
                        at_home = (home_x // TILE_W * TILE_W == tile_x)[:, None]
                        at_home &= per_channel(home_y // TILE_H * TILE_H == tile_y, ROWS, CHANNELS)[None, :]
                        loss += tl.sum(tl.where(at_home & valid, d * d, 0.0)).to(tl.float64) * factor
                        d = 2 * d
                    else:
                        by_ours = tl.load(slope + 2 * (first_cell + cell), mask=valid, other=0.0)
                        by_theirs = tl.load(slope + 2 * (first_cell + cell) + 1, mask=valid, other=0.0)
                        d = by_ours * ours + by_theirs * theirs
                    d *= factor
                    a_x = axis_weights(x0, bin_x, samples_x, width, q0, columns, tile_x, COLUMNS, TILE_W)
                    along_x = product(tl.trans(a_x), d, PRECISION)  # [TILE_W, (ROWS, CHANNELS)]
                    along_x = swap_axes(along_x, TILE_W, ROWS, CHANNELS)
                    grad += product(tl.trans(a_y), along_x, PRECISION)
        y = tile_y + tl.arange(0, TILE_H)
        n = tl.arange(0, TILE_W * CHANNELS)
        x = tile_x + n // CHANNELS
        channel = c0 + n % CHANNELS
        token = first_token + y[:, None] * width + x[None, :]
        inside = (y < height)[:, None] & ((x < width) & (channel < channels))[None, :] & (token < num_tokens)
        tl.store(grad_tokens + token * channels + channel[None, :], grad, mask=inside)
    if FROM == "mse":
        tl.store(partial_loss + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), loss)


def pull_back(
    grad_tokens: Tensor,
    cells: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid: Grids,
    out: Grids,
    sampling_ratio: int,
    *,
    source: str = "cells",
    tokens: Tensor | None = None,
    slope: Tensor | None = None,
    region_scale: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Launches :func:`pull_back_kernel`.

    Args:
        grad_tokens: ``(B, H*W, C)`` or ``(T, C)`` contiguous, written completely.
        cells: ``(R, h*w, C)`` or ``(sum of h*w, C)``: the gradient of the cells, or the teacher.
        boxes: ``(R, 4)``.
        image_index: ``(R,)`` int64.
        grid: of the images.
        out: of the regions.
        sampling_ratio: as in the ops.
        source: "cells", "mse" or "cosine".
        tokens: the student's, with "mse" and "cosine".
        slope: ``(sum of h*w, 2)`` float32, with "cosine".
        region_scale: ``(R,)`` float32 factors, or None for `scale` everywhere.
        scale: see `region_scale`.

    Returns:
        With "mse" the weighted sums of squares that every program found, float64; else an empty tensor.
    """
    device, channels = grad_tokens.device, grad_tokens.shape[-1]
    dense = grid.sizes is None
    num_images = grad_tokens.shape[0] if grid.sizes is None else grid.sizes.shape[0]
    num_tokens = grad_tokens.numel() // channels
    tile = tile_of(cells.dtype, grid.height if dense else None)
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    grid_sizes, output_sizes = on_device(grid.sizes, device), on_device(out.sizes, device)
    plan = make_plan(image_index, grid_sizes, grid.height, grid.width, num_images, num_tokens, tile)
    # Only the starts of the regions' cells are of interest here, not their blocks.
    layout = make_cells(output_sizes, out.height, out.width, boxes.shape[0], cells.shape[0], (1, 1))
    block = block_of_channels(channels, cells.dtype, most=32 if source == "cells" else 16)
    programs = (plan.max_tiles, triton.cdiv(channels, block))
    partial_loss = torch.empty(programs if source == "mse" else 0, dtype=torch.float64, device=device)
    pull_back_kernel[programs](
        grad_tokens,
        partial_loss,
        cells,
        cells.stride(-2),
        cells.stride(0),
        tokens,
        0 if tokens is None else tokens.stride(-2),
        0 if tokens is None else tokens.stride(0),
        slope,
        region_scale,
        scale,
        boxes,
        image_index,
        grid_sizes,
        grid.height,
        grid.width,
        output_sizes,
        out.height,
        out.width,
        layout.start,
        plan.order,
        plan.region_start,
        plan.token_start,
        plan.tile_start,
        num_images,
        num_tokens,
        channels,
        SAMPLING_RATIO=sampling_ratio,
        FROM=source,
        HAS_REGION_SCALE=region_scale is not None,
        PACKED=not dense,
        PACKED_CELLS=output_sizes is not None,
        TILE_H=tile[0],
        TILE_W=tile[1],
        CHANNELS=block,
        PRECISION=precision(cells.dtype),
        num_warps=8,
        num_stages=1,
    )
    return partial_loss


def tile_of(dtype: torch.dtype, height: int | None) -> tuple[int, int]:
    """Rows and columns of a tile of tokens: what registers hold, and at least the 16 that a matrix product takes."""
    rows = 32 if precision(dtype) == "tf32" else 16
    return rows if height is None else min(rows, max(16, triton.next_power_of_2(height))), 16
