"""Attention pooling over the tokens that a box covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from granvit import reference
from granvit.ops import _checks, _dispatch

MAX_DIM = 256


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_size: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attends from queries of each region to the tokens under its box, and to no others.

    Grid cell j, of which the box covers the area ``c_j`` (in cells), has a weight proportional to
    ``c_j * exp(scale * q . k_j)``: softmax attention with ``log c_j`` added to the scores, as where every token counted
    ``c_j`` times. Only covered tokens are read, so the cost follows the area of the boxes and not that of the images.
    Boxes are clamped to the image first; one without area there attends to the single cell that holds its centre.

    Args:
        query: ``(R, Q, heads, dim)``, Q queries for every region. float32, bfloat16, float16 or float64; `dim` a
            multiple of 8 up to 256.
        key: dense ``(B, H*W, heads, dim)``, row-major patch grids; or packed ``(T, heads, dim)``, image after image. In
            the dtype of `query`. Tokens may be strided (a slice of a fused projection, say); heads that are not
            contiguous are copied.
        value: like `key`.
        boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the image, 0 to 1. Treated as constant.
        image_index: ``(R,)`` integer, the image of each box. Any order, any number of boxes an image.
        grid_size: ``(H, W)`` of every image, or for packed tokens an integer tensor ``(B, 2)``, on the
            CPU or on the device of the tokens.
        scale: factor of the scores; None is ``1 / sqrt(dim)``.
        impl: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None picks the best that can run.

    Returns:
        ``(R, Q, heads, dim)`` in the dtype of `query`; sums are kept in float32 or wider. Differentiable once in
        `query`, `key` and `value` (with ``impl="reference"`` any number of times).

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or value; the text names it.
        RuntimeError: the implementation asked for cannot run here, or the gradient of a gradient was asked for.
    """
    op = "region_attention"
    grid = _checks.grids(op, "grid_size", grid_size, None, "image")
    query = _query(op, query)
    key = _memory(op, "key", key, grid, query)
    value = _memory(op, "value", value, grid, query)
    if value.shape != key.shape:
        raise _checks.wrong_value(op, "value", f"shape {tuple(key.shape)} like key", value)
    boxes, image_index = _checks.regions(op, boxes, image_index, query.device)
    if query.shape[0] != boxes.shape[0]:
        raise _checks.wrong_value(op, "query", f"shape ({boxes.shape[0]}, Q, heads, dim) to match boxes", query)
    scale = _scale(op, scale, query.shape[-1])
    chosen = _dispatch.choose(op, impl, query.device.type, query.dtype)
    if _dispatch.must_check(chosen, query.device):
        _checks.values(op, boxes, image_index, _checks.num_images(key, grid))
    if chosen == "reference":
        return reference.region_attention(query, key, value, boxes, image_index, grid.as_argument(), scale=scale)
    output, _ = _dispatch.call(
        _dispatch.ops(chosen).region_attention,
        query,
        key,
        value,
        boxes,
        image_index,
        grid.sizes,
        grid.height,
        grid.width,
        scale,
    )
    return output


def _query(op: str, query: object) -> Tensor:
    """The queries, with heads and dim contiguous: a probe that is expanded over the regions is not copied."""
    query = _checks.floating(op, "query", query)
    if query.dim() != 4:
        raise _checks.wrong_value(op, "query", "shape (R, Q, heads, dim)", query)
    heads, dim = query.shape[2:]
    if heads < 1 or dim < 8 or dim > MAX_DIM or dim % 8 != 0:
        raise _checks.wrong_value(
            op, "query", f"at least one head and a dim that is a multiple of 8 up to {MAX_DIM}", query
        )
    if query.stride(3) != 1 or (heads > 1 and query.stride(2) != dim):
        return query.contiguous()
    return query


def _memory(op: str, argument: str, t: object, grid: _checks.Grid, query: Tensor) -> Tensor:
    """Keys or values that go with `query`."""
    t = _checks.floating(op, argument, t)
    if t.dtype != query.dtype:
        raise _checks.wrong_type(op, argument, f"{str(query.dtype).removeprefix('torch.')} like query", t)
    _checks.on_device(op, argument, t, query.device)
    t = _checks.tokens(op, argument, t, grid, 2)
    if t.shape[-2:] != query.shape[-2:]:
        raise _checks.wrong_value(op, argument, f"heads and dim {tuple(query.shape[-2:])} like query", t)
    return t


def _scale(op: str, scale: object, dim: int) -> float:
    if scale is None:
        return float(dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise _checks.wrong_type(op, "scale", "a number or None", scale)
    return float(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, boxes, image_index, grid_sizes, height, width, scale = inputs
    ctx.save_for_backward(query, key, value, *output, boxes, image_index, grid_sizes)
    ctx.sizes = (height, width, scale)


def _backward(ops: Any, ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    _dispatch.refuse_double_backward("region_attention")
    for_query, for_tokens = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    grads = ops.region_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes, for_query, for_tokens)
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 6)


def _fake(
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
    regions, queries, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((regions, heads, queries), dtype=torch.float64)


def _fake_backward(
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
    none = (0,)
    return (
        query.new_empty(query.shape if for_query else none),
        key.new_empty(key.shape if for_tokens else none),
        value.new_empty(value.shape if for_tokens else none),
    )


_dispatch.declare("region_attention")
_dispatch.register("region_attention", "region_attention", _fake, setup=_setup, backward=_backward)
_dispatch.register("region_attention", "region_attention_backward", _fake_backward)
