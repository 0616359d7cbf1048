"""region_attention in stock PyTorch and in other libraries."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.roi_align import torchvision_float32
from benchmarks.providers import Provider, Setting

Pair = tuple[int, int]


def axis_cover(start: Tensor, end: Tensor, size: int) -> Tensor:
    """(R, size) length of each interval inside each unit cell."""
    j = torch.arange(size, device=start.device)
    return (torch.minimum(end[:, None], j + 1) - torch.maximum(start[:, None], j)).clamp(min=0)


def log_cover(boxes: Tensor, grid_size: Pair) -> Tensor:
    """(R, H*W) logarithm of the area of each cell that a box covers; -inf where it covers none."""
    height, width = grid_size
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = axis_cover(y0 * height, y1 * height, height)
    columns = axis_cover(x0 * width, x1 * width, width)
    return (rows[:, :, None] * columns[:, None, :]).flatten(1).log()


def _by_image(query: Tensor, images: int) -> Tensor:
    """(B, heads, n*Q, dim): the queries of an image's regions side by side."""
    return query.reshape(images, -1, *query.shape[2:]).transpose(1, 2)


def sdpa_mask(query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair) -> Tensor:
    """Regions of an image as its queries, under a dense mask of log coverage."""
    images, count = key.shape[0], query.shape[1]
    mask = log_cover(boxes, grid_size).to(query.dtype).repeat_interleave(count, 0)
    mask = mask.view(images, 1, -1, key.shape[1])
    out = F.scaled_dot_product_attention(
        _by_image(query, images), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2).reshape(query.shape)


def gather_padded(
    query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair
) -> Tensor:
    """The covered tokens of every region, padded to the largest region, under a mask."""
    cover = log_cover(boxes, grid_size)
    longest = int((cover > -torch.inf).sum(1).max())
    cover, cells = cover.topk(longest, dim=1)  # [R, N]
    rows = cells + image_index[:, None] * key.shape[1]
    k, v = key.flatten(0, 1)[rows], value.flatten(0, 1)[rows]  # [R, N, heads, dim]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=cover.to(query.dtype)[:, None, None]
    )
    return out.transpose(1, 2)


def _gather(key: Tensor, value: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair) -> tuple[Tensor, ...]:
    """Covered keys and values (N, heads, dim) region after region, their log coverage (N,), tokens a region (R,)."""
    cover = log_cover(boxes, grid_size)
    region, cell = (cover > -torch.inf).nonzero(as_tuple=True)
    rows = cell + image_index[region] * key.shape[1]
    counts = torch.bincount(region, minlength=boxes.shape[0])
    return key.flatten(0, 1)[rows], value.flatten(0, 1)[rows], cover[region, cell], counts


def gather_loop(
    query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair
) -> Tensor:
    """The covered tokens of every region, one attention call a region."""
    k, v, cover, counts = _gather(key, value, boxes, image_index, grid_size)
    sizes = counts.tolist()
    parts = zip(query.split(1), k.split(sizes), v.split(sizes), cover.to(query.dtype).split(sizes), strict=True)
    out = [
        F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=c[None, None, None]
        )
        for q, k, v, c in parts
    ]
    return torch.cat(out).transpose(1, 2)


def _varlen(kernel: Callable[..., Any], query, key, value, boxes, image_index, grid_size):
    """The covered tokens of every region through a variable-length kernel.

    Such kernels take no mask of real numbers: log coverage rides in extra channels, 1 / scale on the query's side.
    """
    regions, count, _, dim = query.shape
    k, v, cover, counts = _gather(key, value, boxes, image_index, grid_size)
    scale = dim**-0.5
    q = F.pad(query.flatten(0, 1), (0, 8))
    q[..., dim] = 1 / scale
    bias = F.pad(cover.to(k.dtype)[:, None, None].expand(-1, k.shape[1], 1), (0, 7))
    k, v = torch.cat([k, bias], -1), F.pad(v, (0, 8))
    starts_k = F.pad(counts.cumsum(0), (1, 0)).int()
    starts_q = torch.arange(0, (regions + 1) * count, count, dtype=torch.int32, device=q.device)
    out = kernel(q, k, v, starts_q, starts_k, count, int(counts.max()), scale)
    return out[..., :dim].unflatten(0, (regions, count))


def _flash_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, scale):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale=scale)


def _torch_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, scale):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, scale=scale)


def _xformers(q, k, v, starts_q, starts_k, longest_q, longest_k, scale):
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(starts_q.diff().tolist(), starts_k.diff().tolist())
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


def _needs(module: str) -> Callable[[Setting], str | None]:
    def reason(setting: Setting) -> str | None:
        if setting.device.type != "cuda":
            return f"{module} runs on CUDA tensors only"
        if setting.dtype == torch.float32 and module != "xformers":
            return f"{module} takes float16 and bfloat16 only"
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        return None if found else f"{module} is not installed"

    return reason


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def _compiled_block_mask() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def flex(query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair) -> Tensor:
    """FlexAttention: coverage as a score modification, with a block mask on the GPU."""
    images, count, width = key.shape[0], query.shape[1], grid_size[1]
    per_image = query.shape[0] // images
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = axis_cover(y0 * grid_size[0], y1 * grid_size[0], grid_size[0]).log().contiguous()
    columns = axis_cover(x0 * width, x1 * width, width).log().contiguous()

    def score(s, b, h, i, j):
        region = b * per_image + i // count
        return s + rows[region, j // width] + columns[region, j % width]

    def seen(b, h, i, j):
        region = b * per_image + i // count
        return (rows[region, j // width] > -torch.inf) & (columns[region, j % width] > -torch.inf)

    q = _by_image(query, images)
    blocks = None
    if query.is_cuda:
        blocks = _compiled_block_mask()(seen, images, None, q.shape[2], key.shape[1], device=str(query.device))
    out = _compiled_flex()(q, key.transpose(1, 2), value.transpose(1, 2), score_mod=score, block_mask=blocks)
    return out.transpose(1, 2).reshape(query.shape)


def _flex_unavailable(setting: Setting) -> str | None:
    if setting.device.type == "cpu" and setting.mode == "full":
        return "FlexAttention has no backward on the CPU"
    return None


ALIGNED = (14, 14)  # the RoI grid that region language models pool a box to


def roi_align_kv(
    query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair
) -> Tensor:
    """What region language models do instead: RoIAlign keys and values to a fixed grid, then attend to that."""

    def aligned(t: Tensor) -> Tensor:
        cells = torchvision_float32(t.flatten(2), boxes, image_index, grid_size, ALIGNED)
        return cells.unflatten(2, t.shape[2:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(query.transpose(1, 2), aligned(key), aligned(value))
    return out.transpose(1, 2)


REGION_ATTENTION = (
    Provider("sdpa_mask", sdpa_mask, sweep=True),
    Provider("gather_padded", gather_padded, sweep=True),
    Provider("gather_loop", gather_loop),
    Provider("flash_attn", functools.partial(_varlen, _flash_attn), unavailable=_needs("flash_attn")),
    Provider("xformers", functools.partial(_varlen, _xformers), unavailable=_needs("xformers")),
    Provider(
        "torch_varlen", functools.partial(_varlen, _torch_varlen), unavailable=_needs("torch.nn.attention.varlen")
    ),
    Provider("flex", flex, unavailable=_flex_unavailable),
    Provider("roi_align_kv", roi_align_kv, same_result=False),
)
