"""region_attention in Triton: softmax attention of each region's queries to the tokens under its box.

Forward and the gradient of the queries walk the cells of one region. The gradients of keys and values go the other way
round: a program owns a run of tokens and asks every region of their image, so that each gradient is written once,
without atomics. All scores are kept as tiles (cells, queries) in the log2 domain. One query alone would leave a matrix
unit idle: its products are plain sums, and cells stay apart until the end, so that no step of the loop waits for
another lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from granvit.kernels._attention_tiles import (
    LN_2,
    LOWEST,
    gather,
    load_lse,
    load_rows,
    matching_products,
    no_total,
    products,
    query_rows,
    spread,
    store_rows,
    walk,
)
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
)
from granvit.kernels._regions import find_tile, load_grid


@triton.jit
def forward_kernel(
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
    rows_q, rows_q_rest = load_rows(query_start, q.to(tl.int64) * query_stride, q < queries, DIM, MAIN, REST)
    maximum = tl.full((1 if MANY else BLOCK_N, BLOCK_Q), LOWEST, tl.float32)
    total, total_rest = no_total(MAIN, REST, BLOCK_N, BLOCK_Q, MANY)
    weight_sum = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)

    for first in range(0, rows * columns, BLOCK_N):
        y, x, tokens, valid = walk(first, rows * columns, row, column, columns, width, token, num_tokens, BLOCK_N)
        keys, keys_rest = load_rows(key_start, tokens * key_stride, valid, DIM, MAIN, REST)
        values, values_rest = load_rows(value_start, tokens * value_stride, valid, DIM, MAIN, REST)
        bias = tl.where(valid, cell_log_cover(y, x, rows, columns, top, bottom, left, right), -float("inf"))
        score = products(keys, keys_rest, rows_q, rows_q_rest, REST, MANY) * scale_log2 + bias[:, None]
        higher = tl.maximum(maximum, tl.max(score, 0)[None, :] if MANY else score)
        shrink = tl.exp2(maximum - higher)
        weight = tl.exp2(score - higher)
        weight_sum = weight_sum * shrink + weight
        total, total_rest = gather(total * shrink, total_rest * shrink, weight, values, values_rest, REST, MANY)
        maximum = higher

    highest = tl.max(maximum, 0)
    shrink = tl.exp2(maximum - highest[None, :])
    weight_sum = tl.sum(weight_sum * shrink, 0)
    total = query_rows(total * shrink, MANY) / weight_sum[:, None]
    total_rest = query_rows(total_rest * shrink, MANY) / weight_sum[:, None]
    to = output + r * queries * heads * DIM + head * DIM
    store_rows(to, q.to(tl.int64) * heads * DIM, q < queries, total, total_rest, DIM, MAIN, REST)
    exact = (highest.to(tl.float64) + tl.log2(weight_sum.to(tl.float64))) * LN_2
    tl.store(lse + (r * heads + head) * queries + q, exact, mask=q < queries)


@triton.jit
def query_gradient_kernel(
    grad,
    query,
    key,
    value,
    output,
    lse,
    footprints,
    log_cover,
    grad_query,
    lse_high,
    lse_low,
    delta,
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
    FOR_QUERY: tl.constexpr,
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
    rows_q, rows_q_rest = load_rows(query_start, q.to(tl.int64) * query_stride, q < queries, DIM, MAIN, REST)
    grads, grads_rest = load_rows(grad + own, offsets, q < queries, DIM, MAIN, REST)
    outputs, outputs_rest = load_rows(output + own, offsets, q < queries, DIM, MAIN, REST)
    mean_slope = matching_products(outputs, outputs_rest, grads, grads_rest, REST, MANY)
    of_query = (r * heads + head) * queries + q
    high, low = load_lse(lse, of_query, q < queries)
    tl.store(lse_high + of_query, high, mask=q < queries)
    tl.store(lse_low + of_query, low, mask=q < queries)
    tl.store(delta + of_query, mean_slope, mask=q < queries)
    if not FOR_QUERY:
        return
    total, total_rest = no_total(MAIN, REST, BLOCK_N, BLOCK_Q, MANY)

    for first in range(0, rows * columns, BLOCK_N):
        y, x, tokens, valid = walk(first, rows * columns, row, column, columns, width, token, num_tokens, BLOCK_N)
        keys, keys_rest = load_rows(key_start, tokens * key_stride, valid, DIM, MAIN, REST)
        values, values_rest = load_rows(value_start, tokens * value_stride, valid, DIM, MAIN, REST)
        bias = tl.where(valid, cell_log_cover(y, x, rows, columns, top, bottom, left, right), -float("inf"))
        score = products(keys, keys_rest, rows_q, rows_q_rest, REST, MANY) * scale_log2 + bias[:, None]
        weight = tl.exp2(score - high[None, :] - low[None, :])
        slope = weight * (products(values, values_rest, grads, grads_rest, REST, MANY) - mean_slope[None, :])
        total, total_rest = gather(total, total_rest, slope, keys, keys_rest, REST, MANY)

    total, total_rest = query_rows(total, MANY) * scale, query_rows(total_rest, MANY) * scale
    store_rows(grad_query + own, offsets, q < queries, total, total_rest, DIM, MAIN, REST)


@triton.jit
def token_gradient_kernel(
    grad,
    query,
    key,
    value,
    lse_high,
    lse_low,
    delta,
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
    keys, keys_rest = load_rows(key_start + head * DIM, key_offsets, keep, DIM, MAIN, REST)
    values, values_rest = load_rows(value_start + head * DIM, value_offsets, keep, DIM, MAIN, REST)
    key_total, key_total_rest = no_total(MAIN, REST, BLOCK_N, 1, False)
    value_total, value_total_rest = no_total(MAIN, REST, BLOCK_N, 1, False)

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
                keep_q = q < queries
                of_query = (r * heads + head) * queries + q
                high = tl.load(lse_high + of_query, mask=keep_q, other=0.0)
                low = tl.load(lse_low + of_query, mask=keep_q, other=0.0)
                mean_slope = tl.load(delta + of_query, mask=keep_q, other=0.0)
                # 0 * NaN would reach tokens of the run that the region does not cover. For matrix products, a query in
                # which anything is not finite is read as zeros, with weights of NaN where it belongs.
                sound = (tl.abs(mean_slope) < float("inf")) & (tl.abs(high) < float("inf"))
                if MANY:
                    keep_q = keep_q & sound
                from_query = query + r * region_stride + head * DIM
                rows_q, rows_q_rest = load_rows(from_query, q.to(tl.int64) * query_stride, keep_q, DIM, MAIN, REST)
                offsets = ((r * queries + q) * heads + head) * DIM
                grads, grads_rest = load_rows(grad, offsets, keep_q, DIM, MAIN, REST)
                score = products(keys, keys_rest, rows_q, rows_q_rest, REST, MANY) * scale_log2 + bias[:, None]
                weight = tl.where(covered[:, None], tl.exp2(score - high[None, :] - low[None, :]), 0.0)
                if MANY:
                    weight = tl.where(covered[:, None] & ~sound[None, :], float("nan"), weight)
                slope = products(values, values_rest, grads, grads_rest, REST, MANY) - mean_slope[None, :]
                slope = tl.where(covered[:, None], weight * slope, 0.0)
                value_total = spread(value_total, weight, grads, covered, MANY)
                key_total = spread(key_total, slope, rows_q, covered, MANY)
                if REST:
                    value_total_rest = spread(value_total_rest, weight, grads_rest, covered, MANY)
                    key_total_rest = spread(key_total_rest, slope, rows_q_rest, covered, MANY)

    store_rows(grad_key + head * DIM, own, keep, key_total * scale, key_total_rest * scale, DIM, MAIN, REST)
    store_rows(grad_value + head * DIM, own, keep, value_total, value_total_rest, DIM, MAIN, REST)
