"""Image files as annotation takes them, and as shards hold them."""

from __future__ import annotations

import errno
import io
from pathlib import Path

from granvit.annotate.interfaces import AnnotationError
from granvit.data.images import ImageError, decode, shard_extension


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ImageError: missing, a folder, not to be read by us, or empty: the image's own fault.
        AnnotationError: the disk or the network failed; the same image may be read another time.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR):
            raise ImageError(f"{path}: {error.strerror}") from None
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise ImageError(f"{path}: the file is empty")
    return data


def for_shard(data: bytes, path: Path) -> tuple[bytes, str]:
    """The file and its extension as a shard holds it: as it is, or as PNG where shards do not hold its format.

    Raises:
        ImageError: as for :func:`granvit.data.images.decode`.
    """
    extension = shard_extension(data, str(path))
    if extension is not None:
        return data, extension
    png = io.BytesIO()
    decode(data, name=str(path)).save(png, "PNG")
    return png.getvalue(), "png"
