"""Boxes and the pixels under them. Boxes are ``x0 y0 x1 y1`` relative to the image, 0 to 1, everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Window = tuple[float, float, float, float]  # x0 y0 x1 y1

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


@dataclass(frozen=True)
class BoxTransform:
    """How one image became another: the box inside a frame, scaled, moved and flipped along each axis.

    Sizes are ``(height, width)`` in pixels; positions in the old image of size `source` go to the new image of size
    `target` by ``new = scale * old + offset``, in relative coordinates of each, x first. Boxes and pixels take the same
    way: :meth:`boxes` and :meth:`image`.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name, size in (("source", self.source), ("target", self.target)):
            if min(size) < 1:
                raise ValueError(f"BoxTransform: {name}: expected height and width of at least 1, got {size}")
        if 0.0 in self.scale or not all(map(math.isfinite, (*self.scale, *self.offset))):
            raise ValueError(f"BoxTransform: expected finite numbers and a scale other than 0, got {self}")

    @classmethod
    def resize(cls, source: tuple[int, int], target: tuple[int, int]) -> BoxTransform:
        """The whole image, stretched to another size: relative boxes stay what they are."""
        return cls(source, target)

    @classmethod
    def letterbox(
        cls, source: tuple[int, int], target: tuple[int, int], anchor: tuple[float, float] = (0.5, 0.5)
    ) -> BoxTransform:
        """The whole image as large as fits with its aspect ratio kept, in a frame that shows around it.

        Args:
            source: size of the image.
            target: size of the frame.
            anchor: where the free room goes, x and y: 0 leaves it right and below, 0.5 halves it.
        """
        (height, width), (frame_height, frame_width) = source, target
        zoom = min(frame_height / height, frame_width / width)
        # In whole pixels, so that pixels and boxes agree on where the image begins.
        inner = (max(1, round(height * zoom)), max(1, round(width * zoom)))
        x, y = (
            int(a * free) for a, free in zip(anchor, (frame_width - inner[1], frame_height - inner[0]), strict=True)
        )
        scale = (inner[1] / frame_width, inner[0] / frame_height)
        return cls(source, target, scale, (x / frame_width, y / frame_height))

    @classmethod
    def crop(cls, source: tuple[int, int], pixels: tuple[int, int, int, int]) -> BoxTransform:
        """A window ``x0 y0 x1 y1`` of whole pixels; it may lead out of the image."""
        height, width = source
        x0, y0, x1, y1 = pixels
        if x1 <= x0 or y1 <= y0:
            raise ValueError(f"BoxTransform.crop: expected x0 < x1 and y0 < y1, got {pixels}")
        scale = (width / (x1 - x0), height / (y1 - y0))
        return cls(source, (y1 - y0, x1 - x0), scale, (-x0 / (x1 - x0), -y0 / (y1 - y0)))

    @classmethod
    def flip(cls, source: tuple[int, int]) -> BoxTransform:
        """Left and right exchanged."""
        return cls(source, source, (-1.0, 1.0), (1.0, 0.0))

    @classmethod
    def tiles(cls, source: tuple[int, int], tile: tuple[int, int]) -> list[BoxTransform]:
        """Crops of one size that cover the image row by row; the last ones of a row or column may lead out of it."""
        (height, width), (rows, columns) = source, tile
        corners = ((x, y) for y in range(0, height, rows) for x in range(0, width, columns))
        return [cls.crop(source, (x, y, x + columns, y + rows)) for x, y in corners]

    def then(self, after: BoxTransform) -> BoxTransform:
        """This transform followed by another, as one.

        Raises:
            ValueError: the other starts from another size than this one ends with.
        """
        if after.source != self.target:
            raise ValueError(f"BoxTransform.then: expected a transform of images of {self.target}, got {after.source}")
        scale = (self.scale[0] * after.scale[0], self.scale[1] * after.scale[1])
        moved = [o * s + p for o, s, p in zip(self.offset, after.scale, after.offset, strict=True)]
        return BoxTransform(self.source, after.target, scale, (moved[0], moved[1]))

    def inverse(self) -> BoxTransform:
        """From the new image back to the old one: how predicted boxes return to where the image came from."""
        scale = (1 / self.scale[0], 1 / self.scale[1])
        return BoxTransform(self.target, self.source, scale, (-self.offset[0] * scale[0], -self.offset[1] * scale[1]))

    def boxes(self, boxes: Tensor) -> Tensor:
        """Relative boxes ``(..., 4)`` of the old image, in the new one; not clipped, corners in order again."""
        wide = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).unflatten(-1, (2, 2))
        moved = wide * wide.new_tensor(self.scale) + wide.new_tensor(self.offset)
        return moved.sort(-2).values.flatten(-2).to(boxes.dtype)

    def image(self, image: Image, fill: tuple[int, int, int] = (0, 0, 0)) -> Image:
        """The pixels of an image of size `source`, with antialiasing; `fill` where the old image does not reach.

        Raises:
            ValueError: the image has another size.
        """
        from PIL import Image as pil

        if (image.height, image.width) != self.source:
            raise ValueError(f"BoxTransform.image: expected {self.source}, got {(image.height, image.width)}")
        height, width = self.target
        window, (top, left), size = self._placement()
        canvas = pil.new(image.mode, (width, height), fill if len(image.getbands()) == 3 else 0)
        if window is None:
            return canvas
        canvas.paste(resize_image(image, size, window), (left, top))
        if self.scale[0] < 0:
            canvas = canvas.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
        return canvas.transpose(pil.Transpose.FLIP_TOP_BOTTOM) if self.scale[1] < 0 else canvas

    def pixels(self, pixels: Tensor) -> Tensor:
        """As :meth:`image`, for a tensor, uint8 ``(3, H, W)``; black where the old image does not reach.

        Raises:
            ValueError: the image has another size, or another dtype or number of channels.
        """
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != (3, *self.source):
            raise ValueError(
                f"BoxTransform.pixels: expected uint8 of shape {(3, *self.source)}, "
                f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
            )
        window, (top, left), size = self._placement()
        canvas = pixels.new_zeros((3, *self.target))
        if window is None:
            return canvas
        canvas[:, top : top + size[0], left : left + size[1]] = _resize_pixels(pixels, size, window)
        turned = [axis for axis, scale in ((2, self.scale[0]), (1, self.scale[1])) if scale < 0]
        return canvas.flip(turned) if turned else canvas

    def _placement(self) -> tuple[Window | None, tuple[int, int], tuple[int, int]]:
        """Before any flip: the part of the source that shows, in its pixels; its upper left corner in the target, y
        first, and its height and width there."""
        height, width = self.target
        # The target frame in pixels of the source, then what of it the source has.
        (x0, x1), (y0, y1) = (
            # Rounded, because the last bit must not make a fraction of a whole pixel.
            sorted(round((edge - offset) / scale * side, 6) for edge in (0.0, 1.0))
            for scale, offset, side in zip(self.scale, self.offset, self.source[::-1], strict=True)
        )
        seen = (max(x0, 0.0), max(y0, 0.0), min(x1, float(self.source[1])), min(y1, float(self.source[0])))
        if seen[0] >= seen[2] or seen[1] >= seen[3]:
            return None, (0, 0), (0, 0)
        shown = [(a - b) / (c - b) for a, b, c in zip(seen, (x0, y0, x0, y0), (x1, y1, x1, y1), strict=True)]
        left, top = round(shown[0] * width), round(shown[1] * height)
        size = (max(1, round(shown[3] * height) - top), max(1, round(shown[2] * width) - left))
        return seen, (top, left), size


def resize_image(image: Image, size: tuple[int, int], window: Window | None = None) -> Image:
    """Pixels at another size: bicubic, with antialiasing, as Pillow does it.

    RGB is left to torch, whose vectorised form of the same filter is as exact and takes a quarter of the time.

    Args:
        image: 8-bit.
        size: ``(height, width)`` to make.
        window: ``x0 y0 x1 y1`` in pixels, what to show of the image; by default all.
    """
    from PIL import Image as pil

    whole = (0.0, 0.0, float(image.width), float(image.height))
    if (image.height, image.width) == size and window in (None, whole):
        return image
    if image.mode != "RGB":
        return image.resize(size[::-1], pil.Resampling.BICUBIC, box=window or whole)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pil.fromarray(_resize_pixels(pixels, size, window or whole).permute(1, 2, 0).contiguous().numpy())


def _resize_pixels(pixels: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """uint8 ``(3, H, W)`` to ``(3, *size)``."""
    from PIL import Image as pil

    if not all(edge.is_integer() for edge in window):  # torch resizes whole pixels only
        image = pil.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        resized = image.resize(size[::-1], pil.Resampling.BICUBIC, box=window)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    x0, y0, x1, y1 = (int(edge) for edge in window)
    part = pixels[:, y0:y1, x0:x1]
    if tuple(part.shape[1:]) == size:
        return part
    return torch.nn.functional.interpolate(part[None], size, mode="bicubic", antialias=True)[0]


def clip(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Relative boxes ``(..., 4)`` cut at the edges of the image, and the share ``(...)`` of each area that is left.

    A box without area keeps 1 where it lies in the image and 0 outside.
    """
    clipped = boxes.clamp(0, 1)
    sides, left = boxes[..., 2:] - boxes[..., :2], clipped[..., 2:] - clipped[..., :2]
    inside = (clipped == boxes).unflatten(-1, (2, 2)).all(-2)
    share = torch.where(sides > 0, left / sides, inside.to(boxes.dtype))
    return clipped, share.prod(-1)


# How language models write a box: as shares of the image, as thousandths of it, or as pixels of the image they see.
BOX_STYLES = ("relative", "thousandths", "pixels")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")
# What may stand between two numbers of a box: brackets, separators, names of coordinates.
_BETWEEN = re.compile(
    r"""(?:[\s,;:|\[\](){}<>"'=]|[xy]_?(?:min|max|[0-2])?(?!\w)|left|top|right|bottom|and|to)*""", re.I
)
_SLACK = 0.05  # of the image, by which a written box may lead out of it


def format_box(box: Sequence[float], style: str = "relative", size: tuple[int, int] | None = None) -> str:
    """A box as text: ``[0.123, 0.456, 0.789, 1.000]``, or whole numbers for the other styles.

    Args:
        box: ``x0 y0 x1 y1`` relative to the image.
        style: one of :data:`BOX_STYLES`.
        size: ``(height, width)`` of the image in pixels; only for ``"pixels"``.

    Raises:
        ValueError: a box that is not finite, inverted or leads out of the image; an unknown style; a missing size.
    """
    x0, y0, x1, y1 = (float(x) for x in box)
    if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):  # and so for NaN
        raise ValueError(f"format_box: expected 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1, got {list(box)}")
    if style == "relative":
        return "[" + ", ".join(f"{x:.3f}" for x in (x0, y0, x1, y1)) + "]"
    width, height = _units(style, size)
    return "[" + ", ".join(str(round(x * n)) for x, n in zip((x0, y0, x1, y1), (width, height) * 2, strict=True)) + "]"


def parse_boxes(
    text: str, style: str = "relative", size: tuple[int, int] | None = None
) -> list[tuple[float, float, float, float]]:
    """All boxes that a text holds, relative to the image; what is no box is passed over.

    Any brackets and separators, names of coordinates, corners in any order, and numbers that lead out of the image a
    little are taken; four numbers that lead out by more than a twentieth are no box.

    Args:
        text: what a model wrote.
        style: one of :data:`BOX_STYLES`, in which the numbers are meant.
        size: ``(height, width)`` of the image in pixels; only for ``"pixels"``.
    """
    width, height = (1, 1) if style == "relative" else _units(style, size)
    found: list[tuple[float, float, float, float]] = []
    run: list[re.Match[str]] = []
    for number in _NUMBER.finditer(text):
        between = text[run[-1].end() : number.start()] if run else ""
        opens = "[" in between or "(" in between  # a box, or its second corner
        if not _BETWEEN.fullmatch(between) or (opens and len(run) != 2):
            run = []
        run.append(number)
        if len(run) == 4:
            x0, y0, x1, y1 = (float(m.group()) / n for m, n in zip(run, (width, height) * 2, strict=True))
            run = []
            if all(-_SLACK <= x <= 1 + _SLACK for x in (x0, y0, x1, y1)):
                x0, y0, x1, y1 = (min(max(x, 0.0), 1.0) for x in (x0, y0, x1, y1))
                found.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return found


def _units(style: str, size: tuple[int, int] | None) -> tuple[int, int]:
    """What 1 is written as, along x and y."""
    if style == "thousandths":
        return 1000, 1000
    if style != "pixels":
        raise ValueError(f"style: expected one of {', '.join(BOX_STYLES)}, got {style!r}")
    if size is None:
        raise ValueError("size: expected (height, width) of the image for style 'pixels', got None")
    return size[1], size[0]
