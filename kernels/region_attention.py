"""region_attention in Triton: what is launched, and with which tiles."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from granvit.kernels._attention_tiles import LOG2_E
from granvit.kernels._footprints import make_footprints
from granvit.kernels._region_attention import forward_kernel, query_gradient_kernel, token_gradient_kernel
from granvit.kernels._regions import make_plan, on_device

REGIONS_AT_A_GLANCE = 64


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
        "num_warps": 8 if crowded or main + rest > 80 or (by_token and many) else 4,
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
    forward_kernel[(regions * heads * query_blocks,)](
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
    launch = _launch(dim, queries, query.element_size())
    query_blocks = triton.cdiv(queries, launch["BLOCK_Q"])
    # For the tokens' gradients: lse in two floats, and what the softmax's gradient subtracts.
    lse_high, lse_low, delta = (lse.new_empty(lse.shape, dtype=torch.float32) for _ in range(3))
    query_gradient_kernel[(regions * heads * query_blocks,)](
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
        *strides,
        num_tokens,
        heads,
        queries,
        query_blocks,
        scale,
        scale * LOG2_E.value,
        **launch,
        FOR_QUERY=for_query,
    )
    if for_tokens:
        launch = _launch(dim, queries, query.element_size(), by_token=True)
        plan = make_plan(image_index, grids, grid_height, grid_width, num_images, num_tokens, (launch["BLOCK_N"], 0))
        token_gradient_kernel[(plan.max_tiles * heads,)](
            grad,
            query,
            key,
            value,
            lse_high,
            lse_low,
            delta,
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
