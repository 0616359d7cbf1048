"""RoIAlign on token layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from granvit import reference
from granvit.ops import _checks, _dispatch


def roi_align(
    tokens: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_size: Sequence[int] | Tensor,
    output_size: int | Sequence[int] | Tensor,
    *,
    sampling_ratio: int = 2,
    impl: str | None = None,
) -> Tensor:
    """Resamples the tokens under each box onto a grid of its own (RoIAlign, He et al. 2017).

    The same values as ``torchvision.ops.roi_align(..., aligned=True)``, straight from the tokens that a ViT emits: no
    transposed copy of the map, any float dtype, images and regions of different grids in one call, and a backward
    without atomics that gives the same bits every time.

    Args:
        tokens: dense ``(B, H*W, C)``, row-major patch grids; or packed ``(T, C)``, image after image. float32,
            bfloat16, float16 or float64. Rows may be strided; a last dimension that is not contiguous is copied.
        boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the image, 0 to 1. Treated as constant.
        image_index: ``(R,)`` integer, the image of each box. Any order, any number of boxes an image.
        grid_size: ``(H, W)`` of every image, or for packed tokens an integer tensor ``(B, 2)``, on the
            CPU or on the device of the tokens.
        output_size: cells of every region as one integer or ``(h, w)``; or an integer tensor ``(R, 2)`` (likewise) with
            a grid of its own per region.
        sampling_ratio: samples a cell along each axis; 0 takes one per grid unit that the cell spans, rounded up.
        impl: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None picks the best that can run.

    Returns:
        ``(R, h*w, C)``; with an `output_size` per region packed ``(sum of h*w, C)``. In the dtype of `tokens`; sums are
        kept in float32 or wider. Differentiable in `tokens`, any number of times.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or value; the text names it.
        RuntimeError: the implementation asked for cannot run here.
    """
    op = "roi_align"
    grid = _checks.grids(op, "grid_size", grid_size, None, "image")
    tokens = _checks.tokens(op, "tokens", tokens, grid, 1)
    boxes, image_index = _checks.regions(op, boxes, image_index, tokens.device)
    out = _checks.grids(op, "output_size", output_size, boxes.shape[0], "region")
    sampling_ratio = _checks.sampling_ratio(op, sampling_ratio)
    chosen = _dispatch.choose(op, impl, tokens.device.type, tokens.dtype)
    if _dispatch.must_check(chosen, tokens.device):
        _checks.values(op, boxes, image_index, _checks.num_images(tokens, grid))
    if chosen == "reference":
        return reference.roi_align(
            tokens,
            boxes,
            image_index,
            grid.as_argument(),
            out.as_argument(),
            sampling_ratio=sampling_ratio,
        )
    return _dispatch.call(
        _dispatch.ops(chosen).roi_align,
        tokens,
        boxes,
        image_index,
        grid.sizes,
        grid.height,
        grid.width,
        out.sizes,
        out.height,
        out.width,
        sampling_ratio,
    )


def _cells(boxes: Tensor, output_sizes: Tensor | None, height: int, width: int) -> tuple[Any, ...]:
    """Leading shape of an op's output on cells."""
    if output_sizes is None:
        return (boxes.shape[0], height * width)
    return (torch.library.get_ctx().new_dynamic_size(),)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, boxes, image_index, grid_sizes, height, width, output_sizes, out_height, out_width, sampling_ratio = inputs
    ctx.save_for_backward(boxes, image_index, grid_sizes, output_sizes)
    ctx.sizes = (height, width, out_height, out_width, sampling_ratio)
    ctx.num_tokens = tokens.shape[0] if grid_sizes is not None else tokens.shape[0] * tokens.shape[1]


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, image_index, grid_sizes, output_sizes = ctx.saved_tensors
    height, width, out_height, out_width, ratio = ctx.sizes
    grad_tokens = ops.roi_align_backward(
        grad, boxes, image_index, grid_sizes, height, width, output_sizes, out_height, out_width, ratio, ctx.num_tokens
    )
    return (grad_tokens, *[None] * 9)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, boxes, image_index, grid_sizes, height, width, output_sizes, out_height, out_width, ratio, _ = inputs
    ctx.save_for_backward(boxes, image_index, grid_sizes, output_sizes)
    ctx.sizes = (height, width, out_height, out_width, ratio)


def _backward_of_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The op is linear, so the derivative of its transpose is the op itself.
    boxes, image_index, grid_sizes, output_sizes = ctx.saved_tensors
    height, width, out_height, out_width, ratio = ctx.sizes
    grad_cells = ops.roi_align(
        grad.contiguous(), boxes, image_index, grid_sizes, height, width, output_sizes, out_height, out_width, ratio
    )
    return (grad_cells, *[None] * 10)


def _fake(
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
    return tokens.new_empty((*_cells(boxes, output_sizes, output_height, output_width), tokens.shape[-1]))


def _fake_backward(
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
    if grid_sizes is not None:
        return grad.new_empty((num_tokens, grad.shape[-1]))
    per_image = grid_height * grid_width
    return grad.new_empty((num_tokens // per_image, per_image, grad.shape[-1]))


_dispatch.declare("roi_align")
_dispatch.register("roi_align", "roi_align", _fake, setup=_setup_forward, backward=_backward)
_dispatch.register(
    "roi_align", "roi_align_backward", _fake_backward, setup=_setup_backward, backward=_backward_of_backward
)
