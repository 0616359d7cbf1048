"""The kernels of box_embedding; what is launched when stands in box_embedding.py."""

from __future__ import annotations

import triton
import triton.language as tl

from granvit.kernels._elementary import normal, sine_cosine
from granvit.kernels._matmul import dot, load_tile, multiply, tile_of


@triton.jit
def _turns(boxes, frequencies, rows, columns, num_rows, num_frequencies):
    """boxes @ frequencies, a tile. In float64, where products of float32 numbers are exact."""
    row_mask = rows < num_rows
    column_mask = columns < num_frequencies
    turns = tl.zeros((rows.shape[0], columns.shape[0]), tl.float64)
    for i in tl.static_range(4):
        edge = tl.load(boxes + rows.to(tl.int64) * 4 + i, mask=row_mask, other=0.0).to(tl.float64)
        frequency = tl.load(frequencies + i * num_frequencies + columns, mask=column_mask, other=0.0).to(tl.float64)
        turns += edge[:, None] * frequency[None, :]
    return turns


@triton.jit
def features_kernel(
    boxes, frequencies, features, num_rows, num_frequencies, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sine, cosine = sine_cosine(_turns(boxes, frequencies, rows, m, num_rows, num_frequencies))
    to = features + rows[:, None].to(tl.int64) * (2 * num_frequencies) + m[None, :]
    mask = (rows < num_rows)[:, None] & (m < num_frequencies)[None, :]
    tl.store(to, sine, mask=mask)
    tl.store(to + num_frequencies, cosine, mask=mask)


@triton.jit
def _multiply_features(
    boxes,
    frequencies,
    w1,
    w1_stride_k,
    w1_stride_c,
    rows,
    columns,
    num_rows,
    num_frequencies,
    num_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Tile of features @ w1^T; a step takes BLOCK_K frequencies, and the columns of w1 for their sines and cosines."""
    k = tl.arange(0, BLOCK_K)
    w_tile = w1 + k[:, None].to(tl.int64) * w1_stride_k + columns[None, :].to(tl.int64) * w1_stride_c
    to_cosines = tl.cast(num_frequencies, tl.int64) * w1_stride_k
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, num_frequencies, BLOCK_K):
        inside = first + k < num_frequencies
        for_sine = load_tile(w_tile, inside, columns < num_columns, not EVEN_K, True)
        for_cosine = load_tile(w_tile + to_cosines, inside, columns < num_columns, not EVEN_K, True)
        sine, cosine = sine_cosine(_turns(boxes, frequencies, rows, first + k, num_rows, num_frequencies))
        acc = dot(sine.to(for_sine.dtype), for_sine, acc)
        acc = dot(cosine.to(for_sine.dtype), for_cosine, acc)
        w_tile += BLOCK_K * w1_stride_k
    return acc


@triton.jit
def layer_kernel(
    boxes,
    frequencies,
    x,
    w,
    bias,
    hidden,
    out,
    index,
    num_rows,
    num_frequencies,
    depth,
    num_columns,
    out_rows,
    w_stride_c,
    w_stride_k,
    out_stride,
    FEATURES: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # A linear layer on x, or with FEATURES on those of the boxes; `hidden` keeps what GELU is applied to.
    row_block, column_block = tile_of(tl.program_id(0), num_rows, num_columns, BLOCK_R, BLOCK_C)
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = rows < num_rows
    if FEATURES:
        acc = _multiply_features(
            boxes, frequencies, w, w_stride_k, w_stride_c, rows, columns, num_rows, num_frequencies, num_columns,
            BLOCK_R, BLOCK_C, BLOCK_K, EVEN_K,
        )  # fmt: skip
    else:
        acc = multiply(
            x, rows.to(tl.int64) * depth, valid, 1, w, w_stride_k, w_stride_c, columns, depth, num_columns,
            BLOCK_R, BLOCK_C, BLOCK_K, EVEN_K,
        )  # fmt: skip
    target = rows.to(tl.int64)
    written = valid
    if index is not None:
        target = tl.load(index + rows, mask=valid, other=-1)
        written = (target >= 0) & (target < out_rows)
    to = out + target * out_stride
    if BLOCK_C <= 128:
        _store_layer(acc, bias, hidden, to, rows, valid, written, columns, num_columns, GELU)
    else:
        # Half of the columns at a time: what GELU needs does not fit the registers beside the sums.
        left, right = _halves(acc)
        columns = column_block * BLOCK_C + tl.arange(0, BLOCK_C // 2)
        _store_layer(left, bias, hidden, to, rows, valid, written, columns, num_columns, GELU)
        _store_layer(right, bias, hidden, to, rows, valid, written, columns + BLOCK_C // 2, num_columns, GELU)


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_layer(acc, bias, hidden, to, rows, valid, written, columns, num_columns, GELU: tl.constexpr):
    column_mask = columns < num_columns
    acc += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if hidden is not None:
        offsets = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
        tl.store(hidden + offsets, acc, mask=valid[:, None] & column_mask[None, :])
    if GELU:
        cdf, _ = normal(acc)
        acc *= cdf
    tl.store(to[:, None] + columns[None, :], acc, mask=written[:, None] & column_mask[None, :])


@triton.jit
def _source_rows(index, rows, num_rows, source_rows):
    """Rows of the sequence (int64) that belong to the boxes `rows`, and where there are such."""
    valid = rows < num_rows
    source = rows.to(tl.int64)
    if index is not None:
        source = tl.load(index + rows, mask=valid, other=-1)
        valid &= (source >= 0) & (source < source_rows)
    return source, valid


@triton.jit
def grad_hidden_kernel(
    grad,
    index,
    w2,
    hidden,
    grad_hidden,
    activation,
    partial_b1,
    num_rows,
    grad_rows,
    depth,
    num_columns,
    grad_stride_r,
    grad_stride_k,
    w2_stride_k,
    w2_stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # (grad @ w2) * GELU'(hidden); while hidden is at hand, the activation again, and the tile's share of grad_b1.
    row_block, column_block = tile_of(tl.program_id(0), num_rows, num_columns, BLOCK_R, BLOCK_C)
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    source, valid = _source_rows(index, rows, num_rows, grad_rows)
    acc = multiply(
        grad, source * grad_stride_r, valid, grad_stride_k, w2, w2_stride_k, w2_stride_c, columns, depth, num_columns,
        BLOCK_R, BLOCK_C, BLOCK_K, EVEN_K,
    )  # fmt: skip
    to_b1 = None if partial_b1 is None else partial_b1 + row_block.to(tl.int64) * num_columns
    # 64 columns at a time: hidden, activation and slope of a wide tile do not fit the registers beside the sums.
    if BLOCK_C <= 64:
        _store_grad_hidden(acc, hidden, grad_hidden, activation, to_b1, rows, columns, num_rows, num_columns)
    elif BLOCK_C == 128:
        first = column_block * BLOCK_C
        _store_two(acc, hidden, grad_hidden, activation, to_b1, rows, first, num_rows, num_columns)
    else:
        tl.static_assert(BLOCK_C == 256)
        first = column_block * BLOCK_C
        left, right = _halves(acc)
        _store_two(left, hidden, grad_hidden, activation, to_b1, rows, first, num_rows, num_columns)
        _store_two(right, hidden, grad_hidden, activation, to_b1, rows, first + 128, num_rows, num_columns)


@triton.jit
def _store_two(acc, hidden, grad_hidden, activation, to_b1, rows, first, num_rows, num_columns):
    left, right = _halves(acc)
    columns = first + tl.arange(0, 64)
    _store_grad_hidden(left, hidden, grad_hidden, activation, to_b1, rows, columns, num_rows, num_columns)
    _store_grad_hidden(right, hidden, grad_hidden, activation, to_b1, rows, columns + 64, num_rows, num_columns)


@triton.jit
def _store_grad_hidden(acc, hidden, grad_hidden, activation, to_b1, rows, columns, num_rows, num_columns):
    column_mask = columns < num_columns
    mask = (rows < num_rows)[:, None] & column_mask[None, :]
    offsets = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    h = tl.load(hidden + offsets, mask=mask, other=0.0).to(tl.float32)
    cdf, density = normal(h)
    if activation is not None:
        tl.store(activation + offsets, h * cdf, mask=mask)
    acc *= cdf + h * density
    tl.store(grad_hidden + offsets, acc, mask=mask)
    if to_b1 is not None:
        tl.store(to_b1 + columns, tl.sum(acc, 0), mask=column_mask)


@triton.jit
def grad_weight_kernel(
    grad,
    index,
    boxes,
    frequencies,
    hidden,
    grad_w,
    grad_b,
    num_rows,
    grad_rows,
    num_frequencies,
    size,
    depth,
    grad_stride_r,
    grad_stride_c,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # grad^T @ x (size, depth) and the sums of grad's columns, for few rows. x is GELU(hidden), or the boxes' features
    # where hidden is None.
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_mask = columns < size
    acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, num_rows, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        source, valid = _source_rows(index, rows, num_rows, grad_rows)
        from_grad = grad + source[:, None] * grad_stride_r + columns[None, :].to(tl.int64) * grad_stride_c
        g = tl.load(from_grad, mask=valid[:, None] & column_mask[None, :], other=0.0)
        if grad_b is not None:
            sums += tl.sum(g.to(tl.float32), 0)
        if grad_w is not None:
            if hidden is None:
                m = tl.where(k < num_frequencies, k, k - num_frequencies)
                sine, cosine = sine_cosine(_turns(boxes, frequencies, rows, m, num_rows, num_frequencies))
                x = tl.where((k < num_frequencies)[None, :], sine, cosine)
            else:
                mask = (rows < num_rows)[:, None] & (k < depth)[None, :]
                h = tl.load(hidden + rows[:, None].to(tl.int64) * depth + k[None, :], mask=mask, other=0.0)
                x = h.to(tl.float32)
                cdf, _ = normal(x)
                x *= cdf
            acc = dot(tl.trans(g), x.to(g.dtype), acc)
    if grad_w is not None:
        mask = column_mask[:, None] & (k < depth)[None, :]
        tl.store(grad_w + columns[:, None].to(tl.int64) * depth + k[None, :], acc, mask=mask)
    if grad_b is not None:
        tl.store(grad_b + columns, sums, mask=column_mask & (tl.program_id(1) == 0))


@triton.jit
def rows_kernel(
    grad,
    index,
    copy,
    partial,
    num_rows,
    grad_rows,
    size,
    grad_stride_r,
    grad_stride_c,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The boxes' rows of grad, side by side in memory, and the sums of the columns over STEPS * BLOCK_R rows.
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = columns < size
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0) * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        source, valid = _source_rows(index, rows, num_rows, grad_rows)
        from_grad = grad + source[:, None] * grad_stride_r + columns[None, :].to(tl.int64) * grad_stride_c
        g = tl.load(from_grad, mask=valid[:, None] & column_mask[None, :], other=0.0)
        if copy is not None:
            mask = (rows < num_rows)[:, None] & column_mask[None, :]
            tl.store(copy + rows[:, None].to(tl.int64) * size + columns[None, :], g, mask=mask)
        sums += g.to(tl.float32)
    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * size + columns, tl.sum(sums, 0), mask=column_mask)


@triton.jit
def angle_kernel(
    grad_hidden,
    w1,
    boxes,
    frequencies,
    partial_boxes,
    partial_frequencies,
    num_rows,
    num_frequencies,
    depth,
    w1_stride_k,
    w1_stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # A tile of the gradient of the turns, boxes by frequencies, and its shares of the gradients of both.
    row_block, column_block = tile_of(tl.program_id(0), num_rows, num_frequencies, BLOCK_R, BLOCK_C)
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = rows < num_rows
    column_mask = m < num_frequencies
    k = tl.arange(0, BLOCK_K)
    x_tile = grad_hidden + rows[:, None].to(tl.int64) * depth + k[None, :]
    w_tile = w1 + k[:, None].to(tl.int64) * w1_stride_k + m[None, :].to(tl.int64) * w1_stride_c
    to_cosines = tl.cast(num_frequencies, tl.int64) * w1_stride_c
    grad_sine = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    grad_cosine = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, depth, BLOCK_K):
        inside = first + k < depth
        x = load_tile(x_tile, valid, inside, True, not EVEN_K)
        for_sine = load_tile(w_tile, inside, column_mask, not EVEN_K, True)
        for_cosine = load_tile(w_tile + to_cosines, inside, column_mask, not EVEN_K, True)
        grad_sine = dot(x, for_sine, grad_sine)
        grad_cosine = dot(x, for_cosine, grad_cosine)
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w1_stride_k
    sine, cosine = sine_cosine(_turns(boxes, frequencies, rows, m, num_rows, num_frequencies))
    grad_turns = 6.283185307179586 * (grad_sine * cosine - grad_cosine * sine)
    for i in tl.static_range(4):
        if partial_boxes is not None:
            frequency = tl.load(frequencies + i * num_frequencies + m, mask=column_mask, other=0.0).to(tl.float32)
            to = partial_boxes + (column_block.to(tl.int64) * num_rows + rows) * 4 + i
            tl.store(to, tl.sum(grad_turns * frequency[None, :], 1), mask=valid)
        if partial_frequencies is not None:
            edge = tl.load(boxes + rows.to(tl.int64) * 4 + i, mask=valid, other=0.0).to(tl.float32)
            to = partial_frequencies + (row_block.to(tl.int64) * 4 + i) * num_frequencies + m
            tl.store(to, tl.sum(grad_turns * edge[:, None], 0), mask=column_mask)
