"""What the kernels of region_attention do with tiles of cells and queries: loads, stores and products.

A head's dim is dealt out to a power of two and a rest, and queries are one, without tl.dot, or many.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# Where a running maximum starts: unlike -inf, its difference from a score of -inf is a number.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def load_rows(start, offsets, keep, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
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
def store_rows(start, offsets, keep, main, rest, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    column = tl.arange(0, MAIN)
    to = start + offsets[:, None] + column[None, :]
    tl.store(to, main.to(start.dtype.element_ty), mask=keep[:, None] & (column < DIM)[None, :])
    if REST:
        column = MAIN + tl.arange(0, REST)
        to = start + offsets[:, None] + column[None, :]
        tl.store(to, rest.to(start.dtype.element_ty), mask=keep[:, None] & (column < DIM)[None, :])


@triton.jit
def row_products(a, a_rest, b, b_rest, REST: tl.constexpr):
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
def products(cells, cells_rest, rows, rows_rest, REST: tl.constexpr, MANY: tl.constexpr):
    """Products of all cells with all rows of queries, (cells, queries)."""
    if MANY:
        product = _dot_256(cells, rows)
        if REST:
            product = tl.dot(cells_rest, tl.trans(rows_rest), product, input_precision="ieee")
    else:
        product = row_products(cells, cells_rest, rows, rows_rest, REST)[:, None]
    return product


@triton.jit
def matching_products(a, a_rest, b, b_rest, REST: tl.constexpr, MANY: tl.constexpr):
    """Products of each row of a with the same row of b, added up in the order of `products`.

    What the gradient of a softmax subtracts from such products is then exactly one of them where one cell has all the
    weight: the difference is zero, as it should be, and not two roundings apart.
    """
    product = products(a, a_rest, b, b_rest, REST, MANY)
    if MANY:
        i = tl.arange(0, a.shape[0])
        return tl.sum(tl.where(i[:, None] == i[None, :], product, 0.0), 0)
    else:
        return tl.sum(product, 1)


@triton.jit
def no_total(MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, MANY: tl.constexpr):
    """Totals of each query, transposed because its products are the larger tiles; of each cell for a single query."""
    rest: tl.constexpr = REST if REST else 1
    if MANY:
        return tl.zeros((MAIN, BLOCK_Q), tl.float32), tl.zeros((rest, BLOCK_Q), tl.float32)
    else:
        return tl.zeros((BLOCK_N, MAIN), tl.float32), tl.zeros((BLOCK_N, rest), tl.float32)


@triton.jit
def gather(total, total_rest, weights, cells, cells_rest, REST: tl.constexpr, MANY: tl.constexpr):
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
def query_rows(total, MANY: tl.constexpr):
    """Totals as rows of queries."""
    if MANY:
        return tl.trans(total)
    else:
        return tl.sum(total, 0)[None, :]


@triton.jit
def spread(total, weights, rows, covered, MANY: tl.constexpr):
    """Adds weighted rows of queries to totals of covered cells; weights of others are zero."""
    if MANY:
        return tl.dot(weights.to(rows.dtype), rows, total, input_precision="ieee")
    else:
        return total + tl.where(covered[:, None], weights * rows.to(tl.float32), 0.0)


@triton.jit
def load_lse(lse, offsets, keep):
    """lse in log2, as a float32 and what that leaves: one alone would put its rounding into every weight."""
    exact = tl.load(lse + offsets, mask=keep, other=0.0) * LOG2_E
    high = exact.to(tl.float32)
    return high, (exact - high.to(tl.float64)).to(tl.float32)


@triton.jit
def walk(first, count, row, column, columns, width, token, num_tokens, BLOCK_N: tl.constexpr):
    """Cells first, first + 1, ... of a footprint: row and column there, token, and whether they exist."""
    i = first + tl.arange(0, BLOCK_N)
    y = i // columns
    x = i - y * columns
    tokens = token + (row + y) * width + column + x
    return y, x, tokens, (i < count) & (tokens < num_tokens)
