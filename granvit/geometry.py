"""Boxes and the pixels under them. Boxes are ``x0 y0 x1 y1`` relative to the image, 0 to 1, everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Crops are made a few regions at a time: an image is gathered for each, and that copy has to stay small.
_CHUNK_ELEMENTS = 1 << 25


def rescale(boxes: Tensor, image_size: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
    """Boxes relative to an image, made relative to a frame that shares its upper left corner.

    A ViT whose patch size does not divide the image ignores (or pads) pixels on the far sides, so its grid covers
    another frame than the image: SigLIP-so400m reads 378 of 384 pixels.

    Args:
        boxes: ``(..., 4)``, relative to the image.
        image_size: ``(height, width)`` of the image.
        frame_size: ``(height, width)`` of the frame, in the same unit.

    Returns:
        ``(..., 4)``; `boxes` itself where the sizes are equal.
    """
    if tuple(image_size) == tuple(frame_size):
        return boxes
    y, x = image_size[0] / frame_size[0], image_size[1] / frame_size[1]
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([x0 * x, y0 * y, x1 * x, y1 * y], dim=-1)


def crop_boxes(images: Tensor, boxes: Tensor, image_index: Tensor, size: int | Sequence[int]) -> Tensor:
    """Cuts the boxes out of images and resizes every cut to one size, with antialiasing.

    For boxes on whole pixels the values are those of ``torch.nn.functional.interpolate(cut, size, mode="bilinear",
    antialias=True)``: the triangle filter as wide as the step between output pixels, and no narrower than an input
    pixel. A pixel that a box covers in part counts in part, so a crop never shows what is outside its box and moves
    smoothly with it. All on the device of the images, without waiting for it.

    Args:
        images: ``(B, C, H, W)``, floating.
        boxes: ``(R, 4)``, relative to the image; clamped to it. An axis without extent shows the one pixel at its
            centre.
        image_index: ``(R,)`` integer, the image of each box.
        size: of every crop, one integer or ``(height, width)``.

    Returns:
        ``(R, C, height, width)`` in the dtype of `images`; differentiable in `images`.

    Raises:
        TypeError, ValueError: an argument of wrong type or shape; on the CPU also boxes that are inverted or clearly in
            another unit, and an image_index that is out of range.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _check_crop(images, boxes, image_index, height, width)
    compute = torch.promote_types(images.dtype, torch.float32)
    edges = boxes.detach().to(compute).clamp(0, 1)
    channels, image_height, image_width = images.shape[1:]
    pixels = channels * image_width * (image_height + height)  # of the gathered image, and of it resized along one axis
    per_region = pixels + height * image_height + width * image_width
    chunk = max(1, _CHUNK_ELEMENTS // per_region)
    crops = []
    for part, index in zip(edges.split(chunk), image_index.long().split(chunk), strict=True):
        rows = _resize_weights(part[:, 1] * image_height, part[:, 3] * image_height, height, image_height)
        columns = _resize_weights(part[:, 0] * image_width, part[:, 2] * image_width, width, image_width)
        cut = torch.einsum("rpy,rcyx->rcpx", rows, images[index].to(compute))
        crops.append(torch.einsum("rqx,rcpx->rcpq", columns, cut).to(images.dtype))
    return torch.cat(crops)


def _resize_weights(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """Weight ``(R, cells, size)`` of every pixel in every output pixel along one axis; edges ``(R,)`` in pixels."""
    centre = ((start + end) / 2).floor().clamp(0, size - 1)
    flat = end <= start
    start, end = torch.where(flat, centre, start), torch.where(flat, centre + 1, end)
    pixel = torch.arange(size, dtype=start.dtype, device=start.device)
    covered = (torch.minimum(end[:, None], pixel + 1) - torch.maximum(start[:, None], pixel)).clamp(0, 1)  # [R, S]
    step = ((end - start) / cells)[:, None, None]
    cell = torch.arange(cells, dtype=start.dtype, device=start.device)[:, None]
    t = start[:, None, None] + step * (cell + 0.5)  # [R, P, 1]
    hat = (1 - (pixel + 0.5 - t).abs() / step.clamp(min=1)).clamp(min=0)
    weights = hat * covered[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _check_crop(images: Tensor, boxes: Tensor, image_index: Tensor, height: int, width: int) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"crop_boxes: images: expected floating (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"crop_boxes: boxes: expected floating (R, 4), got {boxes.dtype} of shape {tuple(boxes.shape)}"
        )
    if image_index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"crop_boxes: image_index: expected an integer tensor, got {image_index.dtype}")
    if image_index.shape != boxes.shape[:1]:
        raise ValueError(
            f"crop_boxes: image_index: expected shape ({boxes.shape[0]},) to match boxes, "
            f"got {tuple(image_index.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"crop_boxes: size: expected height and width of at least 1, got ({height}, {width})")
    if boxes.device.type != "cpu" or torch.compiler.is_compiling() or not boxes.shape[0]:
        return
    wrong = ~((boxes[:, :2] <= boxes[:, 2:]).all(1) & (boxes >= -1).all(1) & (boxes <= 2).all(1))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"crop_boxes: boxes: expected x0 <= x1 and y0 <= y1 relative to the image, 0 to 1, "
            f"got {boxes[row].tolist()} in row {row}"
        )
    outside = (image_index < 0) | (image_index >= images.shape[0])
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"crop_boxes: image_index: expected values in [0, {images.shape[0]}), "
            f"got {int(image_index[row])} in row {row}"
        )
