"""Image files as pixels, and as what a shard holds of them."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from granvit.annotate.interfaces import AnnotationError
from granvit.errors import MissingDependencyError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 27  # 400 MB as RGB; a few hostile kilobytes can claim far more
# Named, because among all that Pillow can open are formats that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class ImageFileError(UserError):
    """An image that cannot be read; the text names the file."""


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ImageFileError: missing, a folder, not to be read by us, or empty: the image's own fault.
        AnnotationError: the disk or the network failed; the same image may be read another time.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR):
            raise ImageFileError(f"{path}: {error.strerror}") from None
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise ImageFileError(f"{path}: the file is empty")
    return data


def decode(data: bytes, path: Path) -> Image:
    """The first frame in 8-bit RGB, upright, transparency laid over white.

    Raises:
        ImageFileError: no image, cut short, broken, larger than :data:`MAX_PIXELS`, or with channels of more than 16
            bits.
    """
    from PIL import ImageOps

    with _opened(data, path) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image), path)


def for_shard(data: bytes, path: Path) -> tuple[bytes, str]:
    """The file and its extension as a shard holds it: as it is, or as PNG where shards do not hold its format.

    Raises:
        ImageFileError: as for :func:`decode`.
    """
    with _opened(data, path) as image:
        extension = _KEPT.get(image.format or "")
    if extension is not None:
        return data, extension
    png = io.BytesIO()
    decode(data, path).save(png, "PNG")
    return png.getvalue(), "png"


@contextmanager
def _opened(data: bytes, path: Path) -> Iterator[Image]:
    try:
        from PIL import Image as pil
        from PIL import UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError("annotation needs pillow: pip install 'granvit[annotate]'") from None
    try:
        with pil.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageFileError(f"{path}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            yield image
    except (UserError, MemoryError):
        raise
    except pil.DecompressionBombError:
        raise ImageFileError(f"{path}: too many pixels; at most {MAX_PIXELS} are read") from None
    except UnidentifiedImageError:
        raise ImageFileError(f"{path}: no image, or its header is broken; read are {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders answer broken bytes with almost any error there is
        raise ImageFileError(f"{path}: broken or cut short: {error or type(error).__name__}") from error


def _rgb(image: Image, path: Path) -> Image:
    from PIL import Image as pil

    if image.mode.startswith("I;16"):  # whose own conversion would cut at 255 instead of scaling
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("I", "F"):
        raise ImageFileError(f"{path}: channels of 32 bits (mode {image.mode}), expected at most 16")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        upper = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")
