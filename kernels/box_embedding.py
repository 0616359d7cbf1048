"""box_embedding: Fourier features, linear, GELU, linear.

Up to FEW_BOXES the launches are what costs, so features and activations are made inside the products that use them.
Beyond, making them again for every tile would cost more than the products: they pass through memory once, and the
gradients of the weights, plain products by then, are left to cuBLAS.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from granvit.kernels._box_embedding import (
    angle_kernel,
    features_kernel,
    grad_hidden_kernel,
    grad_weight_kernel,
    layer_kernel,
    rows_kernel,
)
from granvit.kernels._matmul import Tile, add_up, partial_sums

FEW_BOXES = 128


@functools.cache
def _widest(device: torch.device) -> bool:
    # Only these parts have the registers and the 150 KiB of shared memory for it.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0), (10, 3))


def choose_tile(num_boxes: int, dtype: torch.dtype, widest: bool = False) -> Tile:
    """The tile of a product with `num_boxes` rows; `widest` where tiles of 128 x 256 can be had.

    Few rows get narrow tiles, so that every multiprocessor has one: the time goes into reading the weights.
    """
    if dtype == torch.float32:  # no tensor cores: all bits are wanted
        if num_boxes <= 16:
            return Tile(16, 16, 64, 4, 3)
        return Tile(32, 32, 32, 4, 3) if num_boxes <= 512 else Tile(64, 64, 32, 8, 3)
    if num_boxes <= 16:
        return Tile(16, 16, 128, 4, 4)
    if num_boxes <= FEW_BOXES:
        return Tile(32, 32, 128, 4, 4)
    if num_boxes <= 1024:
        return Tile(64, 64, 64, 4, 4)
    return Tile(128, 256, 64, 8, 3) if widest and num_boxes > 8192 else Tile(128, 128, 64, 8, 3)


def features_tile(tile: Tile) -> Tile:
    """The tile of the first product where it makes the features itself; its depth counts frequencies.

    Sines and cosines take registers: more warps and shorter steps keep them there.
    """
    return tile._replace(depth=min(tile.depth // 2, 1024 // tile.rows), warps=8)


def _num_tiles(tile: Tile, rows: int, columns: int) -> int:
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)


def _make_features(boxes: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines of every frequency, ``(R, 2 M)``; boxes and frequencies contiguous."""
    num_boxes, num_frequencies = boxes.shape[0], frequencies.shape[1]
    features = torch.empty(num_boxes, 2 * num_frequencies, dtype=dtype, device=boxes.device)
    grid = (triton.cdiv(num_boxes, 16), triton.cdiv(num_frequencies, 64))
    features_kernel[grid](boxes, frequencies, features, num_boxes, num_frequencies, BLOCK_R=16, BLOCK_M=64)
    return features


def _embed(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    hidden: Tensor | None,
    out: Tensor,
    index: Tensor | None,
) -> None:
    """Writes the tokens into rows `index` of `out` ``(T, D)``; what GELU is applied to, into `hidden` ``(R, D1)``."""
    boxes, frequencies, b1, b2 = (t.contiguous() for t in (boxes, frequencies, b1, b2))
    index = None if index is None else index.contiguous()
    num_boxes, num_frequencies = boxes.shape[0], frequencies.shape[1]
    hidden_size, size = w1.shape[0], w2.shape[0]
    tile = choose_tile(num_boxes, w1.dtype, _widest(boxes.device))
    fused = num_boxes <= FEW_BOXES
    features = None if fused else _make_features(boxes, frequencies, w1.dtype)
    depth = num_frequencies if fused else 2 * num_frequencies
    first = features_tile(tile) if fused else tile
    activation = torch.empty(num_boxes, hidden_size, dtype=w1.dtype, device=w1.device)
    layer_kernel[(_num_tiles(tile, num_boxes, hidden_size),)](
        boxes, frequencies, features, w1, b1, hidden, activation, None, num_boxes, num_frequencies,
        2 * num_frequencies, hidden_size, num_boxes, *w1.stride(), hidden_size, FEATURES=fused, GELU=True,
        BLOCK_R=first.rows, BLOCK_C=first.columns, BLOCK_K=first.depth, EVEN_K=depth % first.depth == 0,
        num_warps=first.warps, num_stages=first.stages,
    )  # fmt: skip
    layer_kernel[(_num_tiles(tile, num_boxes, size),)](
        None, None, activation, w2, b2, None, out, index, num_boxes, num_frequencies,
        hidden_size, size, out.shape[0], *w2.stride(), out.stride(0), FEATURES=False, GELU=False,
        BLOCK_R=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth, EVEN_K=hidden_size % tile.depth == 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def box_embedding(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    out: Tensor | None,
    index: Tensor | None,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """The registered op: the tokens ``(R, D)``, or `out` ``(T, D)`` with them; and hidden ``(R or 0, D1)``.

    Boxes ``(R, 4)``, frequencies ``(4, M)``, w1 ``(D1, 2 M)``, w2 ``(D, D1)``, any strides; index ``(R,)`` int64, where
    values outside of [0, T) are left out. Weights, `out` and hidden are of one dtype: hidden is only there for the
    backward, and stock PyTorch keeps it in that dtype too.
    """
    num_boxes = boxes.shape[0]
    tokens = w1.new_empty((num_boxes if out is None else out.shape[0], w2.shape[0]))
    if out is not None:
        tokens.copy_(out)
    hidden = w1.new_empty((num_boxes if save_hidden else 0, w1.shape[0]))
    if num_boxes:
        _embed(boxes, frequencies, w1, b1, w2, b2, hidden if save_hidden else None, tokens, index)
    return tokens, hidden


def box_embedding_(
    out: Tensor,
    index: Tensor,
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> None:
    """The registered op that writes into `out` itself, whose last dimension is contiguous."""
    if boxes.shape[0]:
        _embed(boxes, frequencies, w1, b1, w2, b2, None, out, index)


def box_embedding_backward(
    grad: Tensor,
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    for_boxes: bool,
    for_frequencies: bool,
    for_w1: bool,
    for_b1: bool,
    for_w2: bool,
    for_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered op: gradients of the first six arguments of the forward, empty where not wanted.

    `grad` ``(R, D)``, or ``(T, D)`` with `index`; any strides. `hidden` is what the forward saved.
    """
    needed = (for_boxes, for_frequencies, for_w1, for_b1, for_w2, for_b2)
    inputs = (boxes, frequencies, w1, b1, w2, b2)
    grads = tuple(t.new_empty(t.shape if n else 0) for t, n in zip(inputs, needed, strict=True))
    grad_boxes, grad_frequencies, grad_w1, grad_b1, grad_w2, grad_b2 = grads
    if boxes.shape[0] == 0:
        for g in grads:
            g.zero_()
        return grad_boxes, grad_frequencies, grad_w1, grad_b1, grad_w2, grad_b2
    boxes, frequencies, hidden = boxes.contiguous(), frequencies.contiguous(), hidden.contiguous()
    index = None if index is None else index.contiguous()
    num_boxes, hidden_size, size = boxes.shape[0], w1.shape[0], w2.shape[0]
    few = num_boxes <= FEW_BOXES
    tile = choose_tile(num_boxes, w1.dtype, _widest(boxes.device))

    activation = None
    if any(needed[:4]) or (for_w2 and not few):
        grad_hidden = torch.empty_like(hidden)
        activation = torch.empty_like(hidden) if for_w2 and not few else None
        partial = partial_sums(grad_b1, triton.cdiv(num_boxes, tile.rows)) if for_b1 and not few else None
        grad_hidden_kernel[(_num_tiles(tile, num_boxes, hidden_size),)](
            grad, index, w2, hidden, grad_hidden, activation, partial, num_boxes, grad.shape[0], size, hidden_size,
            *grad.stride(), *w2.stride(), BLOCK_R=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth,
            EVEN_K=size % tile.depth == 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if partial is not None:
            add_up(partial, grad_b1)

    if few:
        if for_w2 or for_b2:
            _few_rows(grad, index, None, None, hidden, num_boxes, *_wanted(grad_w2, grad_b2, needed[4:]))
        if for_w1 or for_b1:
            wanted = _wanted(grad_w1, grad_b1, needed[2:4])
            _few_rows(grad_hidden, None, boxes, frequencies, None, num_boxes, *wanted)
    else:
        # Products of strided matrices add up in another order.
        copy = for_w2 and (index is not None or not grad.is_contiguous())
        if for_b2 or copy:
            grad = _gather(grad, index, num_boxes, copy, grad_b2 if for_b2 else None)
        if for_w2:
            assert activation is not None
            # With out=, autocast leaves the dtypes alone.
            torch.mm(grad.t(), activation, out=grad_w2)
        if for_w1:
            torch.mm(grad_hidden.t(), _make_features(boxes, frequencies, w1.dtype), out=grad_w1)
    if for_boxes or for_frequencies:
        _angle_gradients(grad_hidden, w1, boxes, frequencies, *_wanted(grad_boxes, grad_frequencies, needed[:2]))
    return grad_boxes, grad_frequencies, grad_w1, grad_b1, grad_w2, grad_b2


def _wanted(first: Tensor, second: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    return first if needed[0] else None, second if needed[1] else None


def _few_rows(
    grad: Tensor,
    index: Tensor | None,
    boxes: Tensor | None,
    frequencies: Tensor | None,
    hidden: Tensor | None,
    num_boxes: int,
    grad_w: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    """A layer's gradients of weights and bias from that of its output; its input is GELU(hidden) or the features."""
    size = grad.shape[1]
    num_frequencies = 0 if frequencies is None else frequencies.shape[1]
    depth = 2 * num_frequencies if hidden is None else hidden.shape[1]
    block_r, block = (16 if num_boxes <= 16 else 32), (32 if grad.dtype == torch.float32 else 64)
    grid = (triton.cdiv(size, block), 1 if grad_w is None else max(1, triton.cdiv(depth, block)))
    grad_weight_kernel[grid](
        grad, index, boxes, frequencies, hidden, grad_w, grad_b, num_boxes, grad.shape[0], num_frequencies, size,
        depth, *grad.stride(), BLOCK_C=block, BLOCK_K=block, BLOCK_R=block_r,
    )  # fmt: skip


def _gather(grad: Tensor, index: Tensor | None, num_boxes: int, copy: bool, grad_b2: Tensor | None) -> Tensor:
    """The rows of grad at `index`, side by side with `copy`; on the way, the sums of their columns."""
    size = grad.shape[1]
    block, steps = 16, 8
    gathered = grad.new_empty((num_boxes, size)) if copy else None
    programs = triton.cdiv(num_boxes, block * steps)
    partial = None if grad_b2 is None else partial_sums(grad_b2, programs)
    rows_kernel[(programs, triton.cdiv(size, 128))](
        grad, index, gathered, partial, num_boxes, grad.shape[0], size, *grad.stride(), STEPS=steps, BLOCK_R=block,
        BLOCK_C=128,
    )  # fmt: skip
    if partial is not None and grad_b2 is not None:
        add_up(partial, grad_b2)
    return grad if gathered is None else gathered


def _angle_gradients(
    grad_hidden: Tensor,
    w1: Tensor,
    boxes: Tensor,
    frequencies: Tensor,
    grad_boxes: Tensor | None,
    grad_frequencies: Tensor | None,
) -> None:
    """Gradients of boxes ``(R, 4)`` and frequencies ``(4, M)`` from that of the hidden layer ``(R, D1)``."""
    num_boxes, num_frequencies, depth = boxes.shape[0], frequencies.shape[1], w1.shape[0]
    # A frequency has two sums, and a step of it reads twice the weights.
    tile = choose_tile(num_boxes, w1.dtype)
    tile = tile._replace(columns=max(16, tile.columns // 2), depth=min(64, tile.depth))
    row_blocks, column_blocks = triton.cdiv(num_boxes, tile.rows), triton.cdiv(num_frequencies, tile.columns)
    for_boxes = None if grad_boxes is None else partial_sums(grad_boxes, column_blocks)
    for_frequencies = None if grad_frequencies is None else partial_sums(grad_frequencies, row_blocks)
    angle_kernel[(row_blocks * column_blocks,)](
        grad_hidden, w1, boxes, frequencies, for_boxes, for_frequencies, num_boxes, num_frequencies, depth,
        *w1.stride(), BLOCK_R=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth, EVEN_K=depth % tile.depth == 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if for_boxes is not None and grad_boxes is not None:
        add_up(for_boxes, grad_boxes)
    if for_frequencies is not None and grad_frequencies is not None:
        add_up(for_frequencies, grad_frequencies)
