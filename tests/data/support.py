"""Records with real images, for tests of what reads and writes them."""

from __future__ import annotations

import io
import random

from PIL import Image

from granvit.data.record import Record, Region


def encoded(
    width: int = 64, height: int = 48, color: tuple[int, int, int] = (200, 30, 60), form: str = "JPEG"
) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, form)
    return file.getvalue()


def some_record(number: int, regions: int = 3) -> Record:
    """The same one for the same number."""
    rng = random.Random(number)
    found = []
    for i in range(regions):
        xs, ys = (sorted(rng.random() for _ in range(2)) for _ in range(2))
        found.append(Region((xs[0], ys[0], xs[1], ys[1]), f"region {i} of {number} 豆", rng.random(), "test"))
    kind = ("natural", "ocr")[number % 2]
    caption = f"image {number}" if kind == "natural" else None
    return Record(f"{number:06d}", 64, 48, "colours", kind, caption, tuple(found), {"number": number})
