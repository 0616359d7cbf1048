"""RoIAlign on token layout, in Triton: forward, and its transpose as backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from granvit.kernels._pull_back import pull_back
from granvit.kernels._regions import make_cells, make_plan, on_device
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


@triton.jit
def _forward_kernel(
    out,
    tokens,
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
    PACKED: tl.constexpr,
    PACKED_CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c0 = tl.program_id(1) * CHANNELS
    r, block = locate_block(block_start, num_regions, output_height, output_width, PACKED_CELLS)
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
        tokens, first_token, last_token = load_image(
            tokens, image_stride, token_start, image, height, width, num_tokens, PACKED
        )
        values = align_block(
            tokens,
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
        q = q0 + tl.arange(0, COLUMNS)
        n = tl.arange(0, ROWS * CHANNELS)
        p = p0 + n // CHANNELS
        channel = c0 + n % CHANNELS
        first_cell = tl.load(cell_start + r) if PACKED_CELLS else r.to(tl.int64) * rows * columns
        cell = first_cell + p[None, :] * columns + q[:, None]
        valid = (q < columns)[:, None] & ((p < rows) & (channel < channels))[None, :]
        tl.store(out + cell * channels + channel[None, :], values, mask=valid)


def roi_align(
    tokens: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    output_sizes: Tensor | None,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
) -> Tensor:
    """``granvit::roi_align``, see :func:`granvit.ops.roi_align`.

    Waits for the device only where `output_sizes` lies on it: the sum of its products is how many rows to allocate.
    """
    num_regions, channels = boxes.shape[0], tokens.shape[-1]
    if output_sizes is None:
        num_cells = num_regions * output_height * output_width
        out = tokens.new_empty(num_regions, output_height * output_width, channels)
    else:
        num_cells = int(output_sizes.prod(1).sum())
        out = tokens.new_empty(num_cells, channels)
    if not out.numel():
        return out
    dense = grid_sizes is None
    num_images = tokens.shape[0] if grid_sizes is None else grid_sizes.shape[0]
    grid_sizes = on_device(grid_sizes, tokens.device)
    token_start = None
    if not dense:
        token_start = make_plan(image_index, grid_sizes, 0, 0, num_images, tokens.shape[0], (16, 16)).token_start
    sizes = on_device(output_sizes, tokens.device)
    cells = make_cells(sizes, output_height, output_width, num_regions, num_cells, (ROWS.value, COLUMNS.value))
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    block = block_of_channels(channels, tokens.dtype, most=32)
    _forward_kernel[(cells.max_blocks, triton.cdiv(channels, block))](
        out,
        tokens,
        tokens.stride(-2),
        tokens.stride(0) if dense else 0,
        boxes,
        image_index,
        grid_sizes,
        grid_height,
        grid_width,
        cells.sizes,
        output_height,
        output_width,
        cells.start,
        cells.block_start,
        token_start,
        num_regions,
        num_images,
        tokens.shape[0] * (1 if not dense else grid_height * grid_width),
        channels,
        SAMPLING_RATIO=sampling_ratio,
        PACKED=not dense,
        PACKED_CELLS=sizes is not None,
        CHANNELS=block,
        PRECISION=precision(tokens.dtype),
        num_warps=8,
        num_stages=1,
    )
    return out


def roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    output_sizes: Tensor | None,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    num_tokens: int,
) -> Tensor:
    """``granvit::roi_align_backward``: the gradient of all tokens, ``(T, C)`` or ``(B, H*W, C)`` contiguous."""
    channels = grad.shape[-1]
    if grid_sizes is None:
        grad_tokens = grad.new_empty(num_tokens // (grid_height * grid_width), grid_height * grid_width, channels)
    else:
        grad_tokens = grad.new_empty(num_tokens, channels)
    if grad_tokens.numel():
        pull_back(
            grad_tokens,
            grad.contiguous(),
            boxes,
            image_index,
            Grids(grid_sizes, grid_height, grid_width),
            Grids(output_sizes, output_height, output_width),
            sampling_ratio,
        )
    return grad_tokens
