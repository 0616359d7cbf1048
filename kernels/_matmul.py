"""Tiled matrix products with float32 sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """The part of a product that one program makes, and how it goes about it."""

    rows: int
    columns: int
    depth: int  # of one step
    warps: int
    stages: int


@triton.jit
def tile_of(pid, num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Block of rows and block of columns of tile `pid`."""
    # Eight blocks of rows at a time, so that tiles at work together share operands in the L2 cache.
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    column_blocks = tl.cdiv(num_columns, BLOCK_C)
    group = pid // (8 * column_blocks)
    size = tl.minimum(row_blocks - 8 * group, 8)
    within = pid % (8 * column_blocks)
    return 8 * group + within % size, within // size


@triton.jit
def dot(a, b, acc):
    """acc + a @ b; float32 operands keep all their bits."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(tile, row_mask, column_mask, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Loads a tile of pointers, 0 where masked; masks known to be true are left out of the code."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(tile, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(tile, mask=row_mask[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(tile, mask=column_mask[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def multiply(
    x,
    x_rows,
    x_valid,
    x_stride,
    w,
    w_stride_k,
    w_stride_c,
    columns,
    depth,
    num_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Tile (BLOCK_R, BLOCK_C) of x @ w, float32.

    x (rows, depth) is read at the int64 row offsets `x_rows` where `x_valid`; w (depth, num_columns) at `columns`.
    EVEN_K: depth is a multiple of BLOCK_K.
    """
    k = tl.arange(0, BLOCK_K)
    x_tile = x + x_rows[:, None] + k[None, :].to(tl.int64) * x_stride
    w_tile = w + k[:, None].to(tl.int64) * w_stride_k + columns[None, :].to(tl.int64) * w_stride_c
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, depth, BLOCK_K):
        inside = first + k < depth
        a = load_tile(x_tile, x_valid, inside, True, not EVEN_K)
        b = load_tile(w_tile, inside, columns < num_columns, not EVEN_K, True)
        acc = dot(a, b, acc)
        x_tile += BLOCK_K * x_stride
        w_tile += BLOCK_K * w_stride_k
    return acc


@triton.jit
def _sum_kernel(partial, out, count, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, count, BLOCK_S):
        mask = (first + s < count)[:, None] & (columns < size)[None, :]
        acc += tl.load(partial + (first + s)[:, None].to(tl.int64) * size + columns[None, :], mask=mask, other=0.0)
    tl.store(out + columns, tl.sum(acc, 0), mask=columns < size)


def partial_sums(out: Tensor, count: int) -> Tensor:
    """Where `count` programs leave their shares of `out`: float32, ``(count, *out.shape)``; `out` itself for one."""
    return out if count == 1 else torch.empty((count, *out.shape), dtype=torch.float32, device=out.device)


def add_up(partial: Tensor, out: Tensor) -> None:
    """Adds partial sums into `out` (contiguous, any float dtype), always in the same order."""
    if partial is not out:
        size = out.numel()
        _sum_kernel[(triton.cdiv(size, 64),)](partial, out, partial.shape[0], size, BLOCK_S=32, BLOCK=64)
