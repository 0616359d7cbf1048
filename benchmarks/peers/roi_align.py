"""roi_align in stock PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.providers import Provider, Setting, compiled

Pair = tuple[int, int]


def torchvision_align(tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair, output_size: Pair) -> Tensor:
    """torchvision's op, with the transposes that token layout asks for."""
    from torchvision.ops import roi_align

    height, width = grid_size
    scale = torch.tensor([width, height, width, height], device=boxes.device)
    rois = torch.cat([image_index[:, None].to(boxes), boxes * scale], 1).to(tokens.dtype)
    maps = tokens.unflatten(1, grid_size).permute(0, 3, 1, 2)
    aligned = roi_align(maps, rois, output_size, sampling_ratio=2, aligned=True)
    return aligned.flatten(2).transpose(1, 2)


def torchvision_float32(
    tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair, output_size: Pair
) -> Tensor:
    """torchvision's op for a dtype that it lacks or that rounds box corners: through float32 and back."""
    return torchvision_align(tokens.float(), boxes, image_index, grid_size, output_size).to(tokens.dtype)


def axis_weights(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """(R, cells, size) weights of bilinear sampling, two samples a cell, of all regions at once."""
    k = torch.arange(2 * cells, dtype=torch.float32, device=start.device)
    t = start[:, None] - 0.5 + ((end - start) / cells)[:, None] * ((k + 0.5) / 2)  # [R, 2P]
    inside = (t >= -1) & (t <= size)
    lines = torch.arange(size, device=start.device)
    hat = (1 - (t.clamp(0, size - 1)[..., None] - lines).abs()).clamp(min=0) * inside[..., None]
    return hat.unflatten(1, (cells, 2)).mean(2)


def _weights(boxes: Tensor, grid_size: Pair, output_size: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    height, width = grid_size
    x0, y0, x1, y1 = boxes.unbind(1)
    a_y = axis_weights(y0 * height, y1 * height, output_size[0], height)
    a_x = axis_weights(x0 * width, x1 * width, output_size[1], width)
    return a_y.to(dtype), a_x.to(dtype)


def einsum(tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair, output_size: Pair) -> Tensor:
    """The separable form as one einsum over a gathered map a region."""
    a_y, a_x = _weights(boxes, grid_size, output_size, tokens.dtype)
    maps = tokens.unflatten(1, grid_size)[image_index]  # [R, H, W, C]
    return torch.einsum("rpy,ryxc,rqx->rpqc", a_y, maps, a_x).flatten(1, 2)


def separable(tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Pair, output_size: Pair) -> Tensor:
    """The separable form as two batched matmuls: the regions of an image share its map, which is not gathered."""
    images, channels = tokens.shape[0], tokens.shape[2]
    a_y, a_x = _weights(boxes, grid_size, output_size, tokens.dtype)
    rows = tokens.reshape(images, grid_size[0], grid_size[1] * channels)
    blended = torch.bmm(a_y.reshape(images, -1, grid_size[0]), rows)  # [B, n*h, W*C]
    blended = blended.view(boxes.shape[0], output_size[0], grid_size[1], channels)
    return torch.matmul(a_x[:, None], blended).flatten(1, 2)


def _no_kernel(setting: Setting) -> str | None:
    if setting.device.type == "cpu" and setting.dtype == torch.bfloat16:
        return "torchvision::roi_align has no bfloat16 kernel on the CPU; torchvision_float32 stands in"
    if setting.device.type == "cpu" and setting.dtype == torch.float16:
        return "torchvision::roi_align takes about a minute a call in float16 on the CPU; torchvision_float32 stands in"
    return None


def _float32_already(setting: Setting) -> str | None:
    return "the same as torchvision in float32" if setting.dtype == torch.float32 else None


_TORCHVISION = Provider("torchvision", torchvision_align, unavailable=_no_kernel)
_EINSUM = Provider("einsum", einsum)
_SEPARABLE = Provider("separable", separable, sweep=True)

ROI_ALIGN = (
    _TORCHVISION,
    compiled(_TORCHVISION),
    Provider("torchvision_float32", torchvision_float32, unavailable=_float32_already),
    _EINSUM,
    compiled(_EINSUM),
    _SEPARABLE,
    compiled(_SEPARABLE),
)


def with_loss(align, student, teacher, boxes, image_index, grid_size, output_size):
    """Mean squared error against the teacher."""
    return (teacher - align(student, boxes, image_index, grid_size, output_size)).square().mean()


REGION_DISTILL = tuple(
    Provider(
        p.name,
        functools.partial(with_loss, p.function),
        compiled=p.compiled,
        sweep=p.sweep,
        unavailable=p.unavailable,
    )
    for p in ROI_ALIGN
)
