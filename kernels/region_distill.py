"""The region self-distillation loss in Triton: loss and gradient in one pass over the teacher (cosine: two)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from granvit.kernels._pull_back import pull_back
from granvit.kernels._regions import Cells, make_cells, make_plan, on_device
from granvit.kernels._resample import (
    COLUMNS,
    ROWS,
    Grids,
    align_block,
    block_of_channels,
    load_axes,
    load_image,
    locate_block,
    precision,
)

NORM_FLOOR = tl.constexpr(1e-8)  # as torch.cosine_similarity


@triton.jit
def _compare_kernel(
    partial,
    slope,
    teacher,
    teacher_row_stride,
    teacher_region_stride,
    student,
    row_stride,
    image_stride,
    boxes,
    image_index,
    grids,
    grid_height,
    grid_width,
    outputs,
    output_height,
    output_width,
    cell_start,
    block_start,
    token_start,
    num_regions,
    num_images,
    num_tokens,
    channels,
    SAMPLING_RATIO: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    PACKED: tl.constexpr,
    PACKED_CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program's block of cells: the sum of its squared differences or of 1 - cosine, into partial.

    With HAS_SLOPE also what the gradient of each cell's cosine is made of, see pull_back_kernel.
    """
    r, block = locate_block(block_start, num_regions, output_height, output_width, PACKED_CELLS)
    total = tl.zeros((), tl.float64)
    if r < num_regions:
        image, height, width, y0, bin_y, samples_y, rows, x0, bin_x, samples_x, columns = load_axes(
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
        blocks_x = (columns + COLUMNS - 1) // COLUMNS
        p0 = block // blocks_x * ROWS
        q0 = block % blocks_x * COLUMNS
        student, first_token, last_token = load_image(
            student, image_stride, token_start, image, height, width, num_tokens, PACKED
        )
        if PACKED_CELLS:
            first_cell = tl.load(cell_start + r)
            teacher += first_cell * teacher_row_stride
        else:
            first_cell = r.to(tl.int64) * rows * columns
            teacher += r.to(tl.int64) * teacher_region_stride
        q = q0 + tl.arange(0, COLUMNS)
        n = tl.arange(0, ROWS * CHANNELS)
        p = p0 + n // CHANNELS
        cell = p[None, :] * columns + q[:, None]  # [COLUMNS, (ROWS, CHANNELS)]
        exists = (q < columns)[:, None] & (p < rows)[None, :]
        ours_ours = tl.zeros((COLUMNS, ROWS), tl.float32)
        ours_theirs = tl.zeros((COLUMNS, ROWS), tl.float32)
        theirs_theirs = tl.zeros((COLUMNS, ROWS), tl.float32)
        for c0 in range(0, channels, CHANNELS):
            channel = c0 + n % CHANNELS
            valid = exists & (channel < channels)[None, :]
            ours = align_block(
                student,
                row_stride,
                first_token,
                last_token,
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
            there = teacher + cell.to(tl.int64) * teacher_row_stride + channel[None, :]
            theirs = tl.load(there, mask=valid, other=0.0).to(tl.float32)
            if COSINE:
                ours_ours += _sum_channels(ours * ours, CHANNELS)
                ours_theirs += _sum_channels(ours * theirs, CHANNELS)
                theirs_theirs += _sum_channels(theirs * theirs, CHANNELS)
            else:
                difference = ours - theirs
                total += tl.sum(difference * difference).to(tl.float64)
        if COSINE:
            p = p0 + tl.arange(0, ROWS)
            exists = (q < columns)[:, None] & (p < rows)[None, :]
            ours_norm = tl.sqrt(ours_ours)
            by_ours = 1 / tl.maximum(ours_norm, NORM_FLOOR)
            by_theirs = 1 / tl.maximum(tl.sqrt(theirs_theirs), NORM_FLOOR)
            cosine = ours_theirs * by_ours * by_theirs
            total += tl.sum(tl.where(exists, 1 - cosine, 0.0)).to(tl.float64)
            if HAS_SLOPE:
                at = slope + 2 * (first_cell + p[None, :].to(tl.int64) * columns + q[:, None])
                # Below the floor the norm counts as a constant.
                tl.store(at, tl.where(ours_norm > NORM_FLOOR, cosine * by_ours * by_ours, 0.0), mask=exists)
                tl.store(at + 1, -by_ours * by_theirs, mask=exists)
    tl.store(partial + tl.program_id(0), total)


@triton.jit
def _sum_channels(x, CHANNELS: tl.constexpr):
    """[COLUMNS, (ROWS, CHANNELS)] -> [COLUMNS, ROWS]"""
    return tl.sum(tl.reshape(x, (COLUMNS, ROWS, CHANNELS)), 2)


@triton.jit
def _sum_blocks_kernel(sums, partial, block_start, BLOCK: tl.constexpr):
    # Always in the same order, which a sum by atomics would not be.
    r = tl.program_id(0)
    last = tl.load(block_start + r + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(tl.load(block_start + r), last, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < last, other=0.0)
    tl.store(sums + r, tl.sum(total))


def _compare(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid: Grids,
    out: Grids,
    loss: str,
    sampling_ratio: int,
    *,
    with_slope: bool,
) -> tuple[Tensor, Cells, Tensor]:
    """Sums of squares (or of 1 - cosine) by blocks of cells, float64; the blocks; and the slopes of the cosine."""
    device, channels = student.device, student.shape[-1]
    dense = grid.sizes is None
    num_images = student.shape[0] if grid.sizes is None else grid.sizes.shape[0]
    num_tokens = student.shape[0] * (grid.height * grid.width if dense else 1)
    grid_sizes = on_device(grid.sizes, device)
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    token_start = None
    if not dense:
        token_start = make_plan(image_index, grid_sizes, 0, 0, num_images, num_tokens, (16, 16)).token_start
    num_cells = teacher.numel() // channels
    sizes = on_device(out.sizes, device)
    cells = make_cells(sizes, out.height, out.width, boxes.shape[0], num_cells, (ROWS.value, COLUMNS.value))
    partial = torch.empty(cells.max_blocks, dtype=torch.float64, device=device)
    slope = torch.empty(num_cells if with_slope else 0, 2, dtype=torch.float32, device=device)
    block = block_of_channels(channels, student.dtype, most=32)
    _compare_kernel[(cells.max_blocks,)](
        partial,
        slope,
        teacher,
        teacher.stride(-2),
        teacher.stride(0),
        student,
        student.stride(-2),
        student.stride(0),
        boxes,
        image_index,
        grid_sizes,
        grid.height,
        grid.width,
        cells.sizes,
        out.height,
        out.width,
        cells.start,
        cells.block_start,
        token_start,
        boxes.shape[0],
        num_images,
        num_tokens,
        channels,
        SAMPLING_RATIO=sampling_ratio,
        COSINE=loss == "cosine",
        HAS_SLOPE=with_slope,
        PACKED=not dense,
        PACKED_CELLS=sizes is not None,
        CHANNELS=block,
        PRECISION=precision(student.dtype),
        num_warps=8,
        num_stages=1,
    )
    return partial, cells, slope


def _by_region(partial: Tensor, cells: Cells, num_regions: int) -> Tensor:
    if cells.block_start is None:
        return partial.view(num_regions, -1).sum(1)
    sums = partial.new_empty(num_regions)
    _sum_blocks_kernel[(num_regions,)](sums, partial, cells.block_start, BLOCK=64)
    return sums


def _rows(teacher: Tensor) -> Tensor:
    """The teacher with the channels of a cell side by side, copied only where they are not."""
    return teacher if teacher.stride(-1) == 1 or teacher.shape[-1] == 1 else teacher.contiguous()


def _elements(out: Grids, channels: int, loss: str, device: torch.device) -> Tensor | int:
    """How many terms the mean of each region has."""
    terms = channels if loss == "mse" else 1
    sizes = on_device(out.sizes, device)
    return out.height * out.width * terms if sizes is None else sizes.prod(1) * terms


def region_distill(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    output_sizes: Tensor | None,
    output_height: int,
    output_width: int,
    weight: Tensor | None,
    loss: str,
    reduction: str,
    sampling_ratio: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``granvit::region_distill``: the loss, and where it is a mean and wanted, the student's gradient of it.

    See :func:`granvit.ops.region_distill_loss`. The gradient is in the student's dtype, float32 for float16.
    """
    num_regions, channels, device = boxes.shape[0], student.shape[-1], student.device
    grid, out = Grids(grid_sizes, grid_height, grid_width), Grids(output_sizes, output_height, output_width)
    grad = student.new_empty(0)
    with_grad = with_grad and reduction == "mean"
    if with_grad:
        dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
        grad = torch.empty(student.shape, dtype=dtype, device=device)
    if not num_regions or not teacher.numel():
        shape = (num_regions,) if reduction == "none" else ()
        return torch.zeros(shape, dtype=torch.float32, device=device), grad.zero_()
    teacher = _rows(teacher)
    arguments = (teacher, boxes, image_index, grid, out)
    scale = 1 / (teacher.numel() if loss == "mse" else teacher.numel() // channels)
    region_scale = None
    if weight is not None:
        total = weight.sum()
        share = torch.where(total > 0, weight / total, 0)
        region_scale = (share / _elements(out, channels, loss, device)).float()
    if with_grad and loss == "mse":
        partial = pull_back(
            grad, *arguments, sampling_ratio, source="mse", tokens=student, region_scale=region_scale, scale=scale
        )
        return partial.sum().float(), grad
    partial, cells, slope = _compare(student, *arguments, loss, sampling_ratio, with_slope=with_grad)
    if with_grad:
        pull_back(
            grad,
            *arguments,
            sampling_ratio,
            source="cosine",
            tokens=student,
            slope=slope,
            region_scale=region_scale,
            scale=scale,
        )
    if reduction == "none":
        value = _by_region(partial, cells, num_regions) / _elements(out, channels, loss, device)
    elif region_scale is None:
        value = partial.sum() * scale
    else:
        value = (_by_region(partial, cells, num_regions) * region_scale).sum()
    return value.float(), grad


def region_distill_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    output_sizes: Tensor | None,
    output_height: int,
    output_width: int,
    loss: str,
    sampling_ratio: int,
) -> Tensor:
    """``granvit::region_distill_backward``: the student's gradient, given that of each region's mean ``(R,)``."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if not boxes.shape[0] or not teacher.numel():
        return grad.zero_()
    grid, out = Grids(grid_sizes, grid_height, grid_width), Grids(output_sizes, output_height, output_width)
    teacher = _rows(teacher)
    arguments = (teacher, boxes, image_index, grid, out)
    region_scale = (grad_loss / _elements(out, student.shape[-1], loss, student.device)).float().contiguous()
    slope = None
    if loss == "cosine":
        _, _, slope = _compare(student, *arguments, loss, sampling_ratio, with_slope=True)
    pull_back(grad, *arguments, sampling_ratio, source=loss, tokens=student, slope=slope, region_scale=region_scale)
    return grad
