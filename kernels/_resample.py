"""RoIAlign in its separable form, out = A_y X A_x^T, and its transpose, for the Triton kernels of two ops.

A tile holds channels beside the positions of one axis, so that both steps are matrix products: rows first,
``A_y [p, y] . X [y, (x, c)]``, then columns, ``A_x [q, x] . V [x, (p, c)]``. The weights of a block of cells cover a
window of the grid that starts at the first line that the block's samples touch; further windows follow where cells are
larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from granvit.kernels._regions import clamp, find_tile, load_grid, load_region

ROWS = tl.constexpr(16)  # cells along y in a block
COLUMNS = tl.constexpr(16)  # cells along x in a block
WINDOW_Y = tl.constexpr(16)  # grid rows in a window
WINDOW_X = tl.constexpr(16)  # grid columns in a window


@triton.jit
def samples_per_cell(bin_size, SAMPLING_RATIO: tl.constexpr):
    if SAMPLING_RATIO > 0:
        return SAMPLING_RATIO
    else:
        return tl.ceil(bin_size).to(tl.int32)


@triton.jit
def position(start, bin_size, p, k, samples):
    """Where sample k of cell p sits (float64, in grid lines). `start` is the box edge in grid units."""
    return start - 0.5 + bin_size * (p + (tl.cast(k, tl.float64) + 0.5) / samples)


@triton.jit
def axis_weights(start, bin_size, samples, size, cell0, cells, line0, M: tl.constexpr, N: tl.constexpr):
    """A [m, j]: the weight of grid line line0 + j in cell cell0 + m; zero from `cells` on."""
    cell = cell0 + tl.arange(0, M)
    line = line0 + tl.arange(0, N)
    weights = tl.zeros((M, N), tl.float32)
    for k in range(samples):
        t = position(start, bin_size, cell.to(tl.float64), k, samples)
        inside = (t >= -1) & (t <= size) & (cell < cells)
        t = clamp(t, 0.0, size - 1.0)
        low = t.to(tl.int32)
        high_weight = (t - low).to(tl.float32)  # [M]
        low_weight = tl.where(inside, 1 - high_weight, 0.0)
        high_weight = tl.where(inside, high_weight, 0.0)
        distance = line[None, :] - low[:, None]
        weights += tl.where(distance == 0, low_weight[:, None], 0.0)
        weights += tl.where(distance == 1, high_weight[:, None], 0.0)
    return weights / tl.maximum(samples, 1)


@triton.jit
def first_line(start, bin_size, samples, size, cell):
    """The first grid line that a cell touches, as if it were moved into the image."""
    t = position(start, bin_size, tl.cast(cell, tl.float64), 0, tl.maximum(samples, 1))
    return clamp(t, 0.0, size - 1.0).to(tl.int32)


@triton.jit
def last_line(start, bin_size, samples, size, cell):
    samples = tl.maximum(samples, 1)
    t = position(start, bin_size, tl.cast(cell, tl.float64), samples - 1, samples)
    return tl.minimum(clamp(t, 0.0, size - 1.0).to(tl.int32) + 1, size - 1)


@triton.jit
def cells_near(start, bin_size, samples, size, cells, line0, line1):
    """Cells [first, last) that may touch the grid lines [line0, line1), or that lie beyond the image on that side."""
    samples = tl.maximum(samples, 1)
    # The last sample's line + 1 is at least line0; the first sample's line is below line1. One more on either side
    # covers the rounding; a cell too many has weights of zero.
    first = (line0 - 0.5 - start) / bin_size - (samples - 0.5) / samples - 1
    last = (line1 + 0.5 - start) / bin_size - 0.5 / samples + 2
    thin = bin_size * cells < 1e-6  # all cells touch the same lines, and the quotients mean nothing
    first = tl.where(thin | (line0 == 0), 0.0, first)
    last = tl.where(thin | (line1 >= size), cells.to(tl.float64), last)
    return clamp(first, 0.0, cells.to(tl.float64)).to(tl.int32), clamp(last, 0.0, cells.to(tl.float64)).to(tl.int32)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a . b of float32 tiles on tensor cores: in tf32, rounded to nearest, or in three tf32 products."""
    if PRECISION == "tf32":
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def round_to_tf32(x):
    # Tensor cores cut float32 off after 10 bits, which would shrink every weight; infinities and NaN stay.
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x1000) & -0x2000
    return tl.where((bits & 0x7F800000) == 0x7F800000, bits, rounded).to(tl.float32, bitcast=True)


@triton.jit
def swap_axes(x, M: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr):
    """[m, (n, c)] -> [n, (m, c)]"""
    x = tl.permute(tl.reshape(x, (M, N, CHANNELS)), (1, 0, 2))
    return tl.reshape(x, (N, M * CHANNELS))


@triton.jit
def per_channel(x, N: tl.constexpr, CHANNELS: tl.constexpr):
    """[n] -> [(n, c)]"""
    return tl.reshape(tl.broadcast_to(x[:, None], (N, CHANNELS)), (N * CHANNELS,))


@triton.jit
def align_block(
    tokens,
    row_stride,
    first_token,
    num_tokens,
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
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """RoIAlign of a block of cells: [COLUMNS, (ROWS, CHANNELS)] float32, zero outside of the region's cells.

    `y0`, `x0` are the box's edges in grid units, `p0`, `q0`, `c0` the block's first row, column and channel.
    """
    out = tl.zeros((COLUMNS, ROWS * CHANNELS), tl.float32)
    n = tl.arange(0, WINDOW_X * CHANNELS)
    channel = c0 + n % CHANNELS
    top = first_line(y0, bin_y, samples_y, height, p0)
    bottom = last_line(y0, bin_y, samples_y, height, tl.minimum(p0 + ROWS, rows) - 1)
    left = first_line(x0, bin_x, samples_x, width, q0)
    right = last_line(x0, bin_x, samples_x, width, tl.minimum(q0 + COLUMNS, columns) - 1)
    for window_y in range(top, bottom + 1, WINDOW_Y):
        a_y = axis_weights(y0, bin_y, samples_y, height, p0, rows, window_y, ROWS, WINDOW_Y)
        y = window_y + tl.arange(0, WINDOW_Y)
        # A line that no cell of the block reads is not read either.
        used_y = (tl.max(a_y, 0) > 0) & (y < height)
        for window_x in range(left, right + 1, WINDOW_X):
            a_x = axis_weights(x0, bin_x, samples_x, width, q0, columns, window_x, COLUMNS, WINDOW_X)
            used_x = (tl.max(a_x, 0) > 0) & (window_x + tl.arange(0, WINDOW_X) < width)
            x = window_x + n // CHANNELS
            token = first_token + y[:, None] * width + x[None, :]  # [WINDOW_Y, (WINDOW_X, CHANNELS)]
            used = used_y[:, None] & per_channel(used_x, WINDOW_X, CHANNELS)[None, :]
            used = used & (channel < channels)[None, :] & (token < num_tokens)
            values = tl.load(tokens + token * row_stride + channel[None, :], mask=used, other=0.0).to(tl.float32)
            along_y = swap_axes(product(a_y, values, PRECISION), ROWS, WINDOW_X, CHANNELS)
            out += product(a_x, along_y, PRECISION)
    return out


@triton.jit
def load_axes(
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
    SAMPLING_RATIO: tl.constexpr,
    PACKED: tl.constexpr,
    PACKED_CELLS: tl.constexpr,
):
    """Region r's image and its grid, then per axis: edge and bin in grid units (float64), samples a cell, cells."""
    x0, y0, x1, y1, image = load_region(boxes, image_index, r, num_images)
    height, width = load_grid(grids, image, grid_height, grid_width, PACKED)
    rows, columns = load_grid(outputs, r, output_height, output_width, PACKED_CELLS)
    # As the reference rounds, so that no sample falls to the other side of an edge.
    top, left = y0 * height, x0 * width
    bin_y = (y1 * height - top) / rows
    bin_x = (x1 * width - left) / columns
    samples_y = samples_per_cell(bin_y, SAMPLING_RATIO)
    samples_x = samples_per_cell(bin_x, SAMPLING_RATIO)
    return image, height, width, top, bin_y, samples_y, rows, left, bin_x, samples_x, columns


@triton.jit
def load_image(tokens, image_stride, token_start, image, height, width, num_tokens, PACKED: tl.constexpr):
    """Where an image's tokens lie: the pointer and its first and last token from there (int64, exclusive)."""
    if PACKED:
        first = tl.load(token_start + image)
        return tokens, first, tl.minimum(first + height * width, num_tokens)
    else:
        first = tl.zeros((), tl.int64)
        return tokens + image.to(tl.int64) * image_stride, first, first + height * width


@triton.jit
def locate_block(block_start, num_regions, output_height, output_width, PACKED_CELLS: tl.constexpr):
    """The region and the number of this program's block of cells there; beyond the last block, `num_regions`."""
    if PACKED_CELLS:
        return find_tile(block_start, num_regions, tl.program_id(0), 256)
    else:
        blocks = ((output_height + ROWS - 1) // ROWS) * ((output_width + COLUMNS - 1) // COLUMNS)
        return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@dataclass(frozen=True)
class Grids:
    """One grid for all, or ``(n, 2)`` int64 sizes, on any device."""

    sizes: Tensor | None
    height: int
    width: int


def block_of_channels(channels: int, dtype: torch.dtype, *, most: int) -> int:
    """Channels of a block: at most `most`, or half of it where a product in three parts takes more registers."""
    most = most if precision(dtype) == "tf32" else most // 2
    return min(most, max(8, triton.next_power_of_2(channels)))


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: bfloat16 data has fewer bits than tf32 keeps; other data deserves more."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"
