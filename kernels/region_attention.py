"""region_attention in Triton: softmax attention of each region's queries to the tokens under its box.

Forward and the gradient of the queries walk the cells of one region. The gradients of keys and values go the other way
round: a program owns a run of tokens and asks every region of their image, so that each gradient is written once,
without atomics. All scores are kept as tiles (cells, queries) in the log2 domain. One query alone would leave a matrix
unit idle: its products are plain sums, and cells stay apart until the end, so that no step of the loop waits for
another lane.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granvit.kernels._footprints import (
    COLUMN,
    COLUMNS,
    FIELDS,
    IMAGE,
    ROW,
    ROWS,
    TOKEN,
    WIDTH,
    cell_log_cover,
    load_log_cover,
    make_footprints,
)
from granvit.kernels._regions import find_tile, load_grid, make_plan, on_device

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# Where a running maximum starts: unlike -inf, its difference from a score of -inf is a number.
LOWEST = tl.constexpr(-3.0e38)
REGIONS_AT_A_GLANCE = 64


@triton.jit
def _load_rows(start, offsets, keep, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows of DIM elements as (rows, MAIN) and (rows, REST): 72 = 64 + 8 instead of 128."""
    column = tl.arange(0, MAIN)
    main = tl.load(start + offsets[:, None] + column[None, :], mask=keep[:, None] & (column < DIM)[None, :], other=0.0)
    if REST:
        column = MAIN + tl.arange(0, REST)
        keep = keep[:, None] & (column < DIM)[None, :]
        rest = tl.load(start + offsets[:, None] + column[None, :], mask=keep, other=0.0)
    else:
        rest = main
    return main, rest


@triton.jit
def _store_rows(start, offsets, keep, main, rest, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    column = tl.arange(0, MAIN)
    to = start + offsets[:, None] + column[None, :]
    tl.store(to, main.to(start.dtype.element_ty), mask=keep[:, None] & (column < DIM)[None, :])
    if REST:
        column = MAIN + tl.arange(0, REST)
        to = start + offsets[:, None] + column[None, :]
        tl.store(to, rest.to(start.dtype.element_ty), mask=keep[:, None] & (column < DIM)[None, :])


@triton.jit
def _row_products(a, a_rest, b, b_rest, REST: tl.constexpr):
    """Products of each row of a with the same row of b, or with its only one."""
    product = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if REST:
        product += tl.sum(a_rest.to(tl.float32) * b_rest.to(tl.float32), 1)
    return product


@triton.jit
def _halves(rows):
    """Even and odd columns: their neighbours in registers stay neighbours."""
    return tl.split(tl.reshape(rows, (rows.shape[0], rows.shape[1] // 2, 2)))


@triton.jit
def _dot_128(a, b):
    if a.dtype == tl.float32 and a.shape[1] > 64:
        a_even, a_odd = _halves(a)
        b_even, b_odd = _halves(b)
        even = tl.dot(a_even, tl.trans(b_even), input_precision="ieee")
        return even + tl.dot(a_odd, tl.trans(b_odd), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _dot_256(a, b):
    """Products of all rows; in float32 no sum runs over more than 64 terms, because its rounding grows with each."""
    if a.dtype == tl.float32 and a.shape[1] > 128:
        a_even, a_odd = _halves(a)
        b_even, b_odd = _halves(b)
        return _dot_128(a_even, b_even) + _dot_128(a_odd, b_odd)
    else:
        return _dot_128(a, b)


@triton.jit
def _products(cells, cells_rest, rows, rows_rest, REST: tl.constexpr, MANY: tl.constexpr):
    """Products of all cells with all rows of queries, (cells, queries)."""
    if MANY:
        product = _dot_256(cells, rows)
        if REST:
            product = tl.dot(cells_rest, tl.trans(rows_rest), product, input_precision="ieee")
    else:
        product = _row_products(cells, cells_rest, rows, rows_rest, REST)[:, None]
    return product


@triton.jit
def _no_total(MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, MANY: tl.constexpr):
    """Totals of each query, transposed because its products are the larger tiles; of each cell for a single query."""
    rest: tl.constexpr = REST if REST else 1
    if MANY:
        return tl.zeros((MAIN, BLOCK_Q), tl.float32), tl.zeros((rest, BLOCK_Q), tl.float32)
    else:
        return tl.zeros((BLOCK_N, MAIN), tl.float32), tl.zeros((BLOCK_N, rest), tl.float32)


@triton.jit
def _gather(total, total_rest, weights, cells, cells_rest, REST: tl.constexpr, MANY: tl.constexpr):
    """Adds weighted cells to totals."""
    if MANY:
        weights = weights.to(cells.dtype)
        total = tl.dot(tl.trans(cells), weights, total, input_precision="ieee")
        if REST:
            total_rest = tl.dot(tl.trans(cells_rest), weights, total_rest, input_precision="ieee")
    else:
        total += weights * cells.to(tl.float32)
        if REST:
            total_rest += weights * cells_rest.to(tl.float32)
    return total, total_rest


@triton.jit
def _query_rows(total, MANY: tl.constexpr):
    """Totals as rows of queries."""
    if MANY:
        return tl.trans(total)
    else:
        return tl.sum(total, 0)[None, :]


@triton.jit
def _spread(total, weights, rows, covered, MANY: tl.constexpr):
    """Adds weighted rows of queries to totals of covered cells; weights of others are zero."""
    if MANY:
        return tl.dot(weights.to(rows.dtype), rows, total, input_precision="ieee")
    else:
        return total + tl.where(covered[:, None], weights * rows.to(tl.float32), 0.0)


@triton.jit
def _load_lse(lse, offsets, keep):
    """lse in log2, as a float32 and what that leaves: one alone would put its rounding into every weight."""
    exact = tl.load(lse + offsets, mask=keep, other=0.0) * LOG2_E
    high = exact.to(tl.float32)
    return high, (exact - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _walk(first, count, row, column, columns, width, token, num_tokens, BLOCK_N: tl.constexpr):
    """Cells first, first + 1, ... of a footprint: row and column there, token, and whether they exist."""
    i = first + tl.arange(0, BLOCK_N)
    y = i // columns
    x = i - y * columns
    tokens = token + (row + y) * width + column + x
    return y, x, tokens, (i < count) & (tokens < num_tokens)


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    footprints,
    log_cover,
    output,
    lse,
    region_stride,
    query_stride,
    key_image_stride,
    key_stride,
    value_image_stride,
    value_stride,
    num_tokens,
    heads,
    queries,
    query_blocks,
    scale_log2,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MANY: tl.constexpr,
):
    # Heads lie side by side in memory, and so do the programs that read them.
    pid = tl.program_id(0)
    head = pid % heads
    r = (pid // heads // query_blocks).to(tl.int64)
    q = (pid // heads % query_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    footprint = footprints + r * FIELDS
    row, column, columns = (
        tl.load(footprint + ROW),
        tl.load(footprint + COLUMN),
        tl.load(footprint + COLUMNS).to(tl.int32),
    )
    rows, width = tl.load(footprint + ROWS).to(tl.int32), tl.load(footprint + WIDTH)
    image, token = tl.load(footprint + IMAGE), tl.load(footprint + TOKEN)
    top, bottom, left, right = load_log_cover(log_cover, r)
    query_start = query + r * region_stride + head * DIM
    key_start = key + image * key_image_stride + head * DIM
    value_start = value + image * value_image_stride + head * DIM
    rows_q, rows_q_rest = _load_rows(query_start, q.to(tl.int64) * query_stride, q < queries, DIM, MAIN, REST)
    maximum = tl.full((1 if MANY else BLOCK_N, BLOCK_Q), LOWEST, tl.float32)
    total, total_rest = _no_total(MAIN, REST, BLOCK_N, BLOCK_Q, MANY)
    weight_sum = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)

    for first in range(0, rows * columns, BLOCK_N):
        y, x, tokens, valid = _walk(first, rows * columns, row, column, columns, width, token, num_tokens, BLOCK_N)
        keys, keys_rest = _load_rows(key_start, tokens * key_stride, valid, DIM, MAIN, REST)
        values, values_rest = _load_rows(value_start, tokens * value_stride, valid, DIM, MAIN, REST)
        bias = tl.where(valid, cell_log_cover(y, x, rows, columns, top, bottom, left, right), -float("inf"))
        score = _products(keys, keys_rest, rows_q, rows_q_rest, REST, MANY) * scale_log2 + bias[:, None]
        higher = tl.maximum(maximum, tl.max(score, 0)[None, :] if MANY else score)
        shrink = tl.exp2(maximum - higher)
        weight = tl.exp2(score - higher)
        weight_sum = weight_sum * shrink + weight
        total, total_rest = _gather(total * shrink, total_rest * shrink, weight, values, values_rest, REST, MANY)
        maximum = higher

    highest = tl.max(maximum, 0)
    shrink = tl.exp2(maximum - highest[None, :])
    weight_sum = tl.sum(weight_sum * shrink, 0)
    total = _query_rows(total * shrink, MANY) / weight_sum[:, None]
    total_rest = _query_rows(total_rest * shrink, MANY) / weight_sum[:, None]
    to = output + r * queries * heads * DIM + head * DIM
    _store_rows(to, q.to(tl.int64) * heads * DIM, q < queries, total, total_rest, DIM, MAIN, REST)
    exact = (highest.to(tl.float64) + tl.log2(weight_sum.to(tl.float64))) * LN_2
    tl.store(lse + (r * heads + head) * queries + q, exact, mask=q < queries)


@triton.jit
def _query_gradient_kernel(
    grad,
    query,
    key,
    value,
    output,
    lse,
    footprints,
    log_cover,
    grad_query,
    region_stride,
    query_stride,
    key_image_stride,
    key_stride,
    value_image_stride,
    value_stride,
    num_tokens,
    heads,
    queries,
    query_blocks,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MANY: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid % heads
    r = (pid // heads // query_blocks).to(tl.int64)
    q = (pid // heads % query_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    footprint = footprints + r * FIELDS
    row, column, columns = (
        tl.load(footprint + ROW),
        tl.load(footprint + COLUMN),
        tl.load(footprint + COLUMNS).to(tl.int32),
    )
    rows, width = tl.load(footprint + ROWS).to(tl.int32), tl.load(footprint + WIDTH)
    image, token = tl.load(footprint + IMAGE), tl.load(footprint + TOKEN)
    top, bottom, left, right = load_log_cover(log_cover, r)
    own = r * queries * heads * DIM + head * DIM
    offsets = q.to(tl.int64) * heads * DIM
    key_start = key + image * key_image_stride + head * DIM
    value_start = value + image * value_image_stride + head * DIM
    query_start = query + r * region_stride + head * DIM
    rows_q, rows_q_rest = _load_rows(query_start, q.to(tl.int64) * query_stride, q < queries, DIM, MAIN, REST)
    grads, grads_rest = _load_rows(grad + own, offsets, q < queries, DIM, MAIN, REST)
    outputs, outputs_rest = _load_rows(output + own, offsets, q < queries, DIM, MAIN, REST)
    delta = _row_products(grads, grads_rest, outputs, outputs_rest, REST)
    high, low = _load_lse(lse, (r * heads + head) * queries + q, q < queries)
    total, total_rest = _no_total(MAIN, REST, BLOCK_N, BLOCK_Q, MANY)

    for first in range(0, rows * columns, BLOCK_N):
        y, x, tokens, valid = _walk(first, rows * columns, row, column, columns, width, token, num_tokens, BLOCK_N)
        keys, keys_rest = _load_rows(key_start, tokens * key_stride, valid, DIM, MAIN, REST)
        values, values_rest = _load_rows(value_start, tokens * value_stride, valid, DIM, MAIN, REST)
        bias = tl.where(valid, cell_log_cover(y, x, rows, columns, top, bottom, left, right), -float("inf"))
        score = _products(keys, keys_rest, rows_q, rows_q_rest, REST, MANY) * scale_log2 + bias[:, None]
        weight = tl.exp2(score - high[None, :] - low[None, :])
        slope = weight * (_products(values, values_rest, grads, grads_rest, REST, MANY) - delta[None, :])
        total, total_rest = _gather(total, total_rest, slope, keys, keys_rest, REST, MANY)

    total, total_rest = _query_rows(total, MANY) * scale, _query_rows(total_rest, MANY) * scale
    _store_rows(grad_query + own, offsets, q < queries, total, total_rest, DIM, MAIN, REST)


@triton.jit
def _token_gradient_kernel(
    grad,
    query,
    key,
    value,
    output,
    lse,
    grids,
    order,
    region_start,
    token_start,
    tile_start,
    footprints,
    log_cover,
    grad_key,
    grad_value,
    region_stride,
    query_stride,
    key_image_stride,
    key_stride,
    value_image_stride,
    value_stride,
    height,
    width,
    num_images,
    num_tokens,
    heads,
    queries,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MANY: tl.constexpr,
    PACKED: tl.constexpr,
):
    head = tl.program_id(0) % heads
    image, tile = find_tile(tile_start, num_images, tl.program_id(0) // heads, BLOCK=128)
    if image >= num_images:
        return
    height, width = load_grid(grids, image, height, width, PACKED)
    begin = tile * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, height * width)  # of the run, in its image
    if begin >= end:
        return
    t = begin + tl.arange(0, BLOCK_N)
    y, x = t // width, t % width
    token = tl.load(token_start + image)  # the image's first one, of all
    keep = (t < end) & (token + t >= 0) & (token + t < num_tokens)
    own = (token + t) * heads * DIM  # of contiguous gradients
    if PACKED:
        key_offsets, value_offsets = (token + t) * key_stride, (token + t) * value_stride
    else:
        key_offsets, value_offsets = t.to(tl.int64) * key_stride, t.to(tl.int64) * value_stride
    wide = image.to(tl.int64)
    key_start, value_start = key + wide * key_image_stride, value + wide * value_image_stride
    keys, keys_rest = _load_rows(key_start + head * DIM, key_offsets, keep, DIM, MAIN, REST)
    values, values_rest = _load_rows(value_start + head * DIM, value_offsets, keep, DIM, MAIN, REST)
    key_total, key_total_rest = _no_total(MAIN, REST, BLOCK_N, 1, False)
    value_total, value_total_rest = _no_total(MAIN, REST, BLOCK_N, 1, False)

    first_row, last_row = begin // width, (end - 1) // width
    regions_end = tl.load(region_start + image + 1)
    for position in range(tl.load(region_start + image), regions_end, BLOCK_R):
        # Many regions at a glance: most touch no token of the run.
        lane = position + tl.arange(0, BLOCK_R)
        region = tl.load(order + lane, mask=lane < regions_end, other=0)
        footprint = footprints + region.to(tl.int64) * FIELDS
        row, column = tl.load(footprint + ROW).to(tl.int32), tl.load(footprint + COLUMN).to(tl.int32)
        row_end = row + tl.load(footprint + ROWS).to(tl.int32)
        column_end = column + tl.load(footprint + COLUMNS).to(tl.int32)
        touches = (row * width + column < end) & ((row_end - 1) * width + column_end > begin) & (lane < regions_end)
        if first_row == last_row:
            touches = touches & (column <= (end - 1) % width) & (column_end > begin % width)
        number = tl.cumsum(touches.to(tl.int32), 0)
        for i in range(tl.sum(touches.to(tl.int32))):
            r = tl.sum(tl.where(touches & (number == i + 1), region, 0)).to(tl.int64)
            footprint_r = footprints + r * FIELDS
            from_y = y - tl.load(footprint_r + ROW).to(tl.int32)
            from_x = x - tl.load(footprint_r + COLUMN).to(tl.int32)
            rows, columns = tl.load(footprint_r + ROWS).to(tl.int32), tl.load(footprint_r + COLUMNS).to(tl.int32)
            top, bottom, left, right = load_log_cover(log_cover, r)
            covered = keep & (from_y >= 0) & (from_y < rows) & (from_x >= 0) & (from_x < columns)
            bias = cell_log_cover(from_y, from_x, rows, columns, top, bottom, left, right)
            for first in range(0, queries, BLOCK_Q):
                q = first + tl.arange(0, BLOCK_Q)
                from_query = query + r * region_stride + head * DIM
                offsets = r * queries * heads * DIM + head * DIM + q.to(tl.int64) * heads * DIM
                rows_q, rows_q_rest = _load_rows(
                    from_query, q.to(tl.int64) * query_stride, q < queries, DIM, MAIN, REST
                )
                grads, grads_rest = _load_rows(grad, offsets, q < queries, DIM, MAIN, REST)
                outputs, outputs_rest = _load_rows(output, offsets, q < queries, DIM, MAIN, REST)
                delta = _row_products(grads, grads_rest, outputs, outputs_rest, REST)
                high, low = _load_lse(lse, (r * heads + head) * queries + q, q < queries)
                # 0 * NaN would reach tokens of the run that the region does not cover. For matrix products, a query in
                # which anything is not finite turns to zeros, with weights of NaN where it belongs.
                sound = (tl.abs(delta) < float("inf")) & (tl.abs(high) < float("inf"))
                if MANY:
                    rows_q, grads = tl.where(sound[:, None], rows_q, 0.0), tl.where(sound[:, None], grads, 0.0)
                    if REST:
                        rows_q_rest = tl.where(sound[:, None], rows_q_rest, 0.0)
                        grads_rest = tl.where(sound[:, None], grads_rest, 0.0)
                score = _products(keys, keys_rest, rows_q, rows_q_rest, REST, MANY) * scale_log2 + bias[:, None]
                weight = tl.where(covered[:, None], tl.exp2(score - high[None, :] - low[None, :]), 0.0)
                if MANY:
                    weight = tl.where(covered[:, None] & ~sound[None, :], float("nan"), weight)
                slope = _products(values, values_rest, grads, grads_rest, REST, MANY) - delta[None, :]
                slope = tl.where(covered[:, None], weight * slope, 0.0)
                value_total = _spread(value_total, weight, grads, covered, MANY)
                key_total = _spread(key_total, slope, rows_q, covered, MANY)
                if REST:
                    value_total_rest = _spread(value_total_rest, weight, grads_rest, covered, MANY)
                    key_total_rest = _spread(key_total_rest, slope, rows_q_rest, covered, MANY)

    _store_rows(grad_key + head * DIM, own, keep, key_total * scale, key_total_rest * scale, DIM, MAIN, REST)
    _store_rows(grad_value + head * DIM, own, keep, value_total, value_total_rest, DIM, MAIN, REST)


def _launch(dim: int, queries: int, itemsize: int, by_token: bool = False) -> dict[str, Any]:
    """Constants and warps of a launch, such that no register is spilled for the dims of Vision Transformers.

    Args:
        dim: of a head.
        queries: of a region.
        itemsize: bytes of an element.
        by_token: whether programs own tokens, whose keys, values and two gradients all stay in registers.
    """
    many = queries > 1
    least = 16 if many else 1  # a side of tl.dot
    main = max(2 ** (dim.bit_length() - 1), least)
    rest = max(triton.next_power_of_2(dim - main), least) if dim > main else 0
    if rest == main:
        main, rest = 2 * main, 0
    crowded = many and itemsize == 4  # float32 has no matrix unit, and its operands take twice the room
    cells = 2 ** ((64 * 80 // (main + rest)).bit_length() - 1)
    if crowded or (by_token and not many):
        cells //= 2
    return {
        "DIM": dim,
        "MAIN": main,
        "REST": rest,
        "BLOCK_N": min(max(cells, 16), 64),
        "BLOCK_Q": 16 if many else 1,
        "MANY": many,
        "num_warps": 8 if crowded or main + rest > 80 else 4,
        "num_stages": 1 if by_token else 2,
    }


def _strides(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> tuple[int, ...]:
    """Of query: regions and queries; of key and value: images and tokens."""
    if packed:
        return (*query.stride()[:2], 0, key.stride(0), 0, value.stride(0))
    return (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The forward.

    Args:
        query: ``(R, Q, heads, dim)``, heads and dim contiguous; float32, bfloat16 or float16.
        key: ``(B, H*W, heads, dim)`` or packed ``(T, heads, dim)``, heads and dim contiguous; in the dtype of `query`.
        value: like `key`.
        boxes: ``(R, 4)`` float32, relative to the image.
        image_index: ``(R,)`` int64.
        grid_sizes: ``(B, 2)`` int64 on any device for packed tokens, else None.
        grid_height: of every grid, for dense tokens.
        grid_width: likewise.
        scale: factor of the scores.

    Returns:
        ``(R, Q, heads, dim)`` in the dtype of `query`, and the log-sum-exp of the scores ``(R, heads, Q)`` in float64.
    """
    regions, queries, heads, dim = query.shape
    output = query.new_empty(query.shape)
    lse = query.new_empty((regions, heads, queries), dtype=torch.float64)
    if output.numel() == 0:
        return output, lse
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    grids = on_device(grid_sizes, query.device)
    num_images = key.shape[0] if grids is None else grids.shape[0]
    num_tokens = key.shape[0] * (1 if grids is not None else key.shape[1])
    if num_tokens == 0:
        return output.fill_(math.nan), lse.fill_(-math.inf)
    footprints, log_cover = make_footprints(boxes, image_index, grids, grid_height, grid_width, num_images, num_tokens)
    launch = _launch(dim, queries, query.element_size())
    query_blocks = triton.cdiv(queries, launch["BLOCK_Q"])
    _forward_kernel[(regions * heads * query_blocks,)](
        query,
        key,
        value,
        footprints,
        log_cover,
        output,
        lse,
        *_strides(query, key, value, grids is not None),
        num_tokens,
        heads,
        queries,
        query_blocks,
        scale * LOG2_E.value,
        **launch,
    )
    return output, lse


def region_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    scale: float,
    for_query: bool,
    for_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; those that are not wanted are empty.

    Args:
        grad: of the output, ``(R, Q, heads, dim)``.
        query: as in the forward, like all that is not named here.
        key: see there.
        value: see there.
        output: of the forward.
        lse: likewise.
        boxes: see there.
        image_index: see there.
        grid_sizes: see there.
        grid_height: see there.
        grid_width: see there.
        scale: see there.
        for_query: whether the gradient of the queries is wanted.
        for_tokens: whether the gradients of keys and values are.
    """
    regions, queries, heads, dim = query.shape
    grad_query = query.new_empty(query.shape if for_query else (0,))
    if output.numel() == 0:
        tokens = key.shape if for_tokens else (0,)
        return grad_query, key.new_zeros(tokens), value.new_zeros(tokens)
    grad_key = key.new_empty(key.shape if for_tokens else (0,))
    grad_value = value.new_empty(value.shape if for_tokens else (0,))
    grids = on_device(grid_sizes, query.device)
    num_images = key.shape[0] if grids is None else grids.shape[0]
    num_tokens = key.shape[0] * (1 if grids is not None else key.shape[1])
    if num_tokens == 0:
        return (grad_query.fill_(math.nan) if for_query else grad_query), grad_key, grad_value
    grad, output, lse = grad.contiguous(), output.contiguous(), lse.contiguous()
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    footprints, log_cover = make_footprints(boxes, image_index, grids, grid_height, grid_width, num_images, num_tokens)
    strides = _strides(query, key, value, grids is not None)
    if for_query:
        launch = _launch(dim, queries, query.element_size())
        query_blocks = triton.cdiv(queries, launch["BLOCK_Q"])
        _query_gradient_kernel[(regions * heads * query_blocks,)](
            grad,
            query,
            key,
            value,
            output,
            lse,
            footprints,
            log_cover,
            grad_query,
            *strides,
            num_tokens,
            heads,
            queries,
            query_blocks,
            scale,
            scale * LOG2_E.value,
            **launch,
        )
    if for_tokens:
        launch = _launch(dim, queries, query.element_size(), by_token=True)
        plan = make_plan(image_index, grids, grid_height, grid_width, num_images, num_tokens, (launch["BLOCK_N"], 0))
        _token_gradient_kernel[(plan.max_tiles * heads,)](
            grad,
            query,
            key,
            value,
            output,
            lse,
            grids,
            plan.order,
            plan.region_start,
            plan.token_start,
            plan.tile_start,
            footprints,
            log_cover,
            grad_key,
            grad_value,
            *strides,
            grid_height,
            grid_width,
            num_images,
            num_tokens,
            heads,
            queries,
            scale,
            scale * LOG2_E.value,
            **launch,
            BLOCK_R=REGIONS_AT_A_GLANCE,
            PACKED=grids is not None,
        )
    return grad_query, grad_key, grad_value
