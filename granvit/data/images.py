"""Encoded images to RGB pixels and frames: upright, no larger than needed, one sentence for what cannot be read."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from granvit.errors import MissingDependencyError, UserError
from granvit.geometry import BoxTransform, resize_image

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 27  # 400 MB as RGB: no photograph, but easily the content of a hostile file of a few kilobytes
# Named, because among all that Pillow can open are formats that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(UserError):
    """An image that cannot be read; the text names the file."""


def size_as_shown(data: bytes, name: str = "image") -> tuple[int, int]:
    """Height and width in pixels after the EXIF orientation, from the header alone.

    Args:
        data: the encoded file.
        name: what an error calls it.

    Raises:
        ImageError: empty, no image, or larger than :data:`MAX_PIXELS`.
    """
    with _opened(data, name) as image:
        return _shown(image, _orientation(image))


def shard_extension(data: bytes, name: str = "image") -> str | None:
    """``"jpg"``, ``"png"`` or ``"webp"`` by content, whatever the file is called; None for what shards do not hold.

    Raises:
        ImageError: as for :func:`size_as_shown`.
    """
    with _opened(data, name) as image:
        return _EXTENSIONS.get(image.format or "")


def decode(data: bytes, fit: tuple[int, int] | None = None, name: str = "image") -> Image:
    """The first frame in 8-bit RGB, upright.

    Transparency is laid over white, 16-bit channels are scaled to 8, CMYK and palettes are converted; colour profiles
    are not applied. EXIF that cannot be read counts as none, as in every viewer.

    Args:
        data: the encoded file.
        fit: ``(height, width)`` of a frame in pixels. A larger image is made as large as fits into it with its aspect
            ratio kept, as by :meth:`granvit.geometry.BoxTransform.letterbox`; a smaller one stays as it is. A JPEG is
            decoded at the smallest of its halvings that is no smaller, which saves most of the time and costs little:
            50 dB of photographs against decoding them whole.
        name: what an error calls it.

    Raises:
        ImageError: empty, no image, cut short, broken, larger than :data:`MAX_PIXELS`, or with channels of more than
            16 bits.
        ValueError: a frame without area.
    """
    image, shown, orientation = _loaded(data, fit, name)
    return _upright(resize_image(image, _stored(_fitting(shown, fit), orientation)), orientation)


def frame(
    data: bytes, size: tuple[int, int], *, flip: bool = False, name: str = "image"
) -> tuple[Tensor, BoxTransform]:
    """An image as a training step takes it, and the way its boxes go.

    The whole image as large as fits, in the middle of a black frame. The values stay bytes: a quarter of what would
    have to travel from worker to device as float32, and the device scales them in passing.

    Args:
        data: the encoded file.
        size: ``(height, width)`` of the frame in pixels.
        flip: exchange left and right.
        name: what an error calls it.

    Returns:
        uint8 ``(3, height, width)``, RGB, and the transform for boxes of the image as it is shown.

    Raises:
        ImageError, ValueError: as for :func:`decode`.
    """
    pixels, transform = frames(data, size, 0, flip=flip, name=name)
    return pixels[0], transform


def frames(
    data: bytes, size: tuple[int, int], tiles: int, *, flip: bool = False, name: str = "image"
) -> tuple[Tensor, BoxTransform]:
    """An image as :func:`frame` shows it, and its tiles, where it has more to show than one frame.

    Args:
        data: the encoded file.
        size: ``(height, width)`` of every frame in pixels.
        tiles: as many at most; see :func:`tile_grid`.
        flip: exchange left and right.
        name: what an error calls it.

    Returns:
        uint8 ``(frames, 3, height, width)``, RGB, as of :func:`tiled`, and the transform for boxes, which leads to the
        first frame. The overview of an image with tiles is made of the pixels that they are made of.

    Raises:
        ImageError, ValueError: as for :func:`decode`.
    """
    grid = tile_grid(size_as_shown(data, name), size, tiles) if tiles > 1 else (1, 1)
    image, shown, orientation = _loaded(data, (grid[0] * size[0], grid[1] * size[1]), name)
    pixels = torch.from_numpy(np.array(_upright(image, orientation))).permute(2, 0, 1)
    return tiled(pixels, shown, size, grid, flip=flip)


def tiled(
    pixels: Tensor, shown: tuple[int, int], size: tuple[int, int], grid: tuple[int, int], *, flip: bool = False
) -> tuple[Tensor, BoxTransform]:
    """An overview, and the tiles of a grid.

    The tiles are those of the whole image as large as fits, in the middle of a black canvas of the grid's size: they
    meet without a gap or an overlap.

    Args:
        pixels: uint8 ``(3, h, w)``, all of the image.
        shown: ``(height, width)`` of the image in pixels, which may have been more.
        size: of every frame.
        grid: rows and columns of tiles; ``(1, 1)`` is the overview alone.
        flip: exchange left and right, of the whole image.

    Returns:
        uint8 ``(frames, 3, height, width)``: the overview, then the tiles row by row; and the transform for boxes of
        the image, to the overview.
    """
    source = (pixels.shape[1], pixels.shape[2])

    def placed(target: tuple[int, int]) -> BoxTransform:
        transform = BoxTransform.letterbox(shown, target)
        return transform.then(BoxTransform.flip(target)) if flip else transform

    overview = placed(size)
    # What was decoded may be smaller than the image, but shows all of it: relative places are the same.
    made = [replace(overview, source=source).pixels(pixels)]
    if grid != (1, 1):
        canvas = (grid[0] * size[0], grid[1] * size[1])
        large = replace(placed(canvas), source=source).pixels(pixels)
        made += [tile.pixels(large) for tile in BoxTransform.tiles(canvas, size)]
    return torch.stack(made), overview


def tile_grid(shown: tuple[int, int], size: tuple[int, int], tiles: int) -> tuple[int, int]:
    """Rows and columns of tiles in which an image keeps most of its pixels, and of such grids the one of fewest tiles.

    That is the choice of LLaVA-NeXT (``select_best_resolution``) among all grids. An image that is no larger than a
    frame needs one tile, and so does one whose shape no grid suits better: the overview.

    Args:
        shown: ``(height, width)`` of the image in pixels.
        size: ``(height, width)`` of a tile.
        tiles: in the grid, at most; 0 and 1 are the overview alone.
    """
    grids = [(rows, columns) for rows in range(1, tiles + 1) for columns in range(1, tiles // rows + 1)]

    def rank(grid: tuple[int, int]) -> tuple[Fraction, int]:
        # Fractions, because grids are often equally good, and the last bit must not choose the larger one.
        zoom = min(Fraction(n * side, length) for n, side, length in zip(grid, size, shown, strict=True))
        return min(zoom, Fraction(1)), -grid[0] * grid[1]

    return max(grids, key=rank, default=(1, 1))


def _loaded(data: bytes, fit: tuple[int, int] | None, name: str) -> tuple[Image, tuple[int, int], int]:
    """The first frame in RGB as it is stored, no smaller than it has to be; the height and width of the file as shown;
    its orientation."""
    if fit is not None and min(fit) < 1:
        raise ValueError(f"decode: fit: expected a height and width of at least 1, got {fit}")
    with _opened(data, name) as image:
        orientation = _orientation(image)
        shown = _shown(image, orientation)
        image.draft(None, _stored(_fitting(shown, fit), orientation)[::-1])
        image.load()
        return _rgb(image, name), shown, orientation


def _fitting(shown: tuple[int, int], fit: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width that fit into a frame; those of the image where it does already."""
    zoom = 1.0 if fit is None else min(1.0, fit[0] / shown[0], fit[1] / shown[1])
    return max(1, round(shown[0] * zoom)), max(1, round(shown[1] * zoom))


def _stored(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in _SIDEWAYS else size


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image]:
    try:
        from PIL import Image as pil
        from PIL import UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError(f"{name}: reading images needs pillow: pip install 'granvit[data]'") from None
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with pil.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(_too_large(name, f"{image.width} x {image.height} pixels"))
            yield image
    except (ImageError, MemoryError):
        raise
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise ImageError(_too_large(name, str(error))) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: no image, or its header is broken; read are {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders answer broken bytes with almost any error there is
        raise ImageError(f"{name}: broken or cut short: {error or type(error).__name__}") from error


def _too_large(name: str, what: str) -> str:
    return f"{name}: too large to be read safely, at most {MAX_PIXELS} pixels are: {what}"


def _orientation(image: Image) -> int:
    """1 to 8 as EXIF counts; 1 is upright."""
    from PIL import Image as pil

    if image.format == "TIFF":  # which Pillow itself turns, pixels and size
        return 1
    try:
        # The base class's: PNG's own would decode the whole image in search of EXIF behind the pixels.
        value = pil.Image.getexif(image).get(_ORIENTATION, 1)
    except (SyntaxError, struct.error, ValueError, KeyError, TypeError, IndexError, EOFError):
        return 1
    return value if value in range(1, 9) else 1


def _shown(image: Image, orientation: int) -> tuple[int, int]:
    """Height and width after the orientation."""
    return _stored((image.height, image.width), orientation)


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _rgb(image: Image, name: str) -> Image:
    from PIL import Image as pil

    if image.mode == "F" or (image.mode == "I" and not _fits_16_bits(image)):
        raise ImageError(f"{name}: its channels have 32 bits; expected at most 16")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Half of 257 is added because the scaled values are cut, not rounded.
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = pil.new("RGB", layer.size, (255, 255, 255))
        canvas.paste(layer, mask=layer.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _fits_16_bits(image: Image) -> bool:
    low, high = image.getextrema()
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low >= 0 and high < 1 << 16
