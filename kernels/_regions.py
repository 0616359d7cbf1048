"""What the Triton kernels share: grids, boxes, the regions of each image, and tiles of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Relative coordinates are clamped to this before anything is computed, so that no box, NaN included, can lead to an
# endless loop or a wild address. It is the range that granvit.ops documents.
BOX_LOW = tl.constexpr(-1.0)
BOX_HIGH = tl.constexpr(2.0)


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN becomes low."""
    x = tl.where(x > low, x, low)
    return tl.where(x < high, x, high)


@triton.jit
def load_region(boxes, image_index, r, num_images):
    """Edges x0, y0, x1, y1 (float64, relative, clamped to the documented range) and image of region r."""
    x0 = clamp(tl.load(boxes + r * 4).to(tl.float64), BOX_LOW, BOX_HIGH)
    y0 = clamp(tl.load(boxes + r * 4 + 1).to(tl.float64), BOX_LOW, BOX_HIGH)
    x1 = clamp(tl.load(boxes + r * 4 + 2).to(tl.float64), BOX_LOW, BOX_HIGH)
    y1 = clamp(tl.load(boxes + r * 4 + 3).to(tl.float64), BOX_LOW, BOX_HIGH)
    image = tl.load(image_index + r)
    image = tl.minimum(tl.maximum(image, 0), num_images - 1).to(tl.int32)
    return x0, y0, x1, y1, image


@triton.jit
def load_grid(grids, i, height, width, PACKED: tl.constexpr):
    """Height and width (int32) of grid i: of a tensor (n, 2) of int64, or the same for all."""
    if PACKED:
        height = tl.load(grids + 2 * i).to(tl.int32)
        width = tl.load(grids + 2 * i + 1).to(tl.int32)
    return height, width


@triton.jit
def _plan_kernel(
    image_index,
    grids,
    order,
    region_start,
    token_start,
    tile_start,
    num_regions,
    num_images,
    height,
    width,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program b looks at everything and writes what belongs to image b; program num_images writes the totals.
    b = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = 0
    for first in range(0, num_regions, BLOCK):
        valid = first + lane < num_regions
        image = tl.load(image_index + first + lane, mask=valid, other=0)
        image = tl.minimum(tl.maximum(image, 0), num_images - 1)
        before += tl.sum((valid & (image < b)).to(tl.int32))
    tl.store(region_start + b, before)
    if b < num_images:
        for first in range(0, num_regions, BLOCK):
            valid = first + lane < num_regions
            image = tl.load(image_index + first + lane, mask=valid, other=0)
            image = tl.minimum(tl.maximum(image, 0), num_images - 1)
            mine = (valid & (image == b)).to(tl.int32)
            tl.store(order + before + tl.cumsum(mine) - 1, first + lane, mask=mine > 0)
            before += tl.sum(mine)
    if PACKED:
        tokens = tl.zeros((), tl.int64)
        tiles = 0
        for first in range(0, b, BLOCK):
            valid = first + lane < b
            h = tl.load(grids + 2 * (first + lane), mask=valid, other=0)
            w = tl.load(grids + 2 * (first + lane) + 1, mask=valid, other=0)
            tokens += tl.sum(h * w)
            tiles += tl.sum(_tiles(h, w, TILE_H, TILE_W).to(tl.int32))
    else:
        tokens = b.to(tl.int64) * height * width
        tiles = b * _tiles(height, width, TILE_H, TILE_W)
    tl.store(token_start + b, tokens)
    tl.store(tile_start + b, tiles)


@triton.jit
def _tiles(height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    if TILE_W == 0:  # runs of TILE_H tokens in row-major order
        return (height * width + TILE_H - 1) // TILE_H
    else:
        return ((height + TILE_H - 1) // TILE_H) * ((width + TILE_W - 1) // TILE_W)


@triton.jit
def find_tile(tile_start, num_images, pid, BLOCK: tl.constexpr):
    """The image that tile `pid` belongs to and its number there; image is `num_images` beyond the last tile."""
    lane = tl.arange(0, BLOCK)
    image = 0
    for first in range(0, num_images, BLOCK):
        ends = tl.load(tile_start + 1 + first + lane, mask=first + lane < num_images, other=2147483647)
        image += tl.sum((ends <= pid).to(tl.int32))
    return image, pid - tl.load(tile_start + image)


@dataclass(frozen=True)
class Plan:
    """Regions grouped by image, and where each image's tokens and tiles start, all on the device.

    Attributes:
        order: ``(R,)`` int32, regions sorted by image, in their own order within an image.
        region_start: ``(B + 1,)`` int32, positions in `order` where images start.
        token_start: ``(B + 1,)`` int64.
        tile_start: ``(B + 1,)`` int32.
        max_tiles: at least as many as there are tiles in all; known without asking the device.
    """

    order: Tensor
    region_start: Tensor
    token_start: Tensor
    tile_start: Tensor
    max_tiles: int


def make_plan(
    image_index: Tensor,
    grid_sizes: Tensor | None,
    height: int,
    width: int,
    num_images: int,
    num_tokens: int,
    tile: tuple[int, int],
) -> Plan:
    """Groups regions by image in one launch, without waiting for the device.

    Args:
        image_index: ``(R,)`` int64 on the device; values beyond the images are clamped.
        grid_sizes: ``(B, 2)`` int64 on the device for packed tokens, or None where all grids are `height` x `width`.
        height: of every grid, for dense tokens.
        width: likewise.
        num_images: B.
        num_tokens: of all images.
        tile: height and width of a tile of tokens; ``(n, 0)`` for runs of n tokens in row-major order.
    """
    device = image_index.device
    order = torch.empty(image_index.shape[0], dtype=torch.int32, device=device)
    region_start, tile_start = torch.empty(2, num_images + 1, dtype=torch.int32, device=device).unbind(0)
    token_start = torch.empty(num_images + 1, dtype=torch.int64, device=device)
    if grid_sizes is not None:
        # An image of h x w tokens has at most (h / H + 1)(w / W + 1) tiles, and h, w <= h w.
        tile_h, tile_w = tile
        bound = num_tokens // tile_h + num_images
        if tile_w:
            bound = num_tokens // (tile_h * tile_w) + num_tokens // tile_h + num_tokens // tile_w + num_images
    elif tile[1]:
        bound = num_images * triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1])
    else:
        bound = num_images * triton.cdiv(height * width, tile[0])
    _plan_kernel[(num_images + 1,)](
        image_index,
        grid_sizes,
        order,
        region_start,
        token_start,
        tile_start,
        image_index.shape[0],
        num_images,
        height,
        width,
        TILE_H=tile[0],
        TILE_W=tile[1],
        PACKED=grid_sizes is not None,
        BLOCK=256,
    )
    return Plan(order, region_start, token_start, tile_start, bound)


@dataclass(frozen=True)
class Cells:
    """Output grids of the regions, and where each region's cells and blocks of cells start, on the device.

    Attributes:
        sizes: ``(R, 2)`` int64, or None where all grids are alike; then the starts are None too.
        start: ``(R + 1,)`` int64, first cell.
        block_start: ``(R + 1,)`` int32, first block.
        max_blocks: at least as many as there are blocks in all; known without asking the device.
    """

    sizes: Tensor | None
    start: Tensor | None
    block_start: Tensor | None
    max_blocks: int


def make_cells(
    sizes: Tensor | None, height: int, width: int, num_regions: int, num_cells: int, block: tuple[int, int]
) -> Cells:
    """Lays out the cells of all regions; `num_cells` counts them all, `block` is a block's height and width."""
    if sizes is None:
        blocks = triton.cdiv(height, block[0]) * triton.cdiv(width, block[1])
        return Cells(None, None, None, num_regions * blocks)
    high, wide = sizes.unbind(1)
    blocks = -(-high // block[0]) * -(-wide // block[1])
    starts = torch.zeros(2, num_regions + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(torch.stack([high * wide, blocks]), 1, out=starts[:, 1:])
    bound = num_cells // (block[0] * block[1]) + num_cells // block[0] + num_cells // block[1] + num_regions
    return Cells(sizes, starts[0], starts[1].int(), bound)


def on_device(sizes: Tensor | None, device: torch.device) -> Tensor | None:
    """Grid sizes where the kernels can read them, without waiting."""
    return None if sizes is None else sizes.to(device, non_blocking=True).contiguous()
