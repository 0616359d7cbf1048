"""Sources whose images say which they are, and what they show."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from granvit.data.record import Record, Region
from granvit.data.shards import ShardWriter
from granvit.data.sources import Shown
from granvit.errors import UserError
from granvit.geometry import BoxTransform

TASKS = {"global_caption": 1.0, "bbox_to_caption": 4.0, "caption_to_bbox": 2.0}
CAPTIONS = ("one", "two", "three", "four", "five")
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))


class Numbered:
    """Images that say in every pixel which they are; some cannot be read."""

    name, asks = "numbered", False

    def __init__(self, number: int, count: int, broken: Sequence[int] = ()) -> None:
        self.number, self.count, self.broken = number, count, set(broken)

    def __len__(self) -> int:
        return self.count

    def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
        if i in self.broken:
            raise UserError(f"image {i} of {self.number} is broken")
        pixels = torch.zeros(3, size, size, dtype=torch.uint8)
        pixels[0], pixels[1], pixels[2] = self.number, i % 256, flip
        regions = tuple(Region((0.1 * k, 0.2, 0.1 * k + 0.5, 0.9), f"{name} {i}") for k, name in enumerate(CAPTIONS))
        record = Record(f"{self.number}-{i}", size, size, "numbers", "natural", f"image {i}", regions)
        return Shown(record, pixels[None], BoxTransform.resize((size, size), (size, size)))

    def identity(self) -> dict[str, Any]:
        return {"numbered": self.number}


def drawing(width: int, height: int, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """A grey image with a coloured rectangle for each box, relative to it."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for (x0, y0, x1, y1), color in zip(boxes, COLORS, strict=False):
        pixels[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = color
    return Image.fromarray(pixels)


def in_a_row(count: int, width: int) -> list[tuple[float, float, float, float]]:
    """Boxes that do not overlap, at least 8 pixels wide and on whole pixels."""
    cuts = sorted(random.sample(range(width // 10 + 1), 2 * count))
    tall = [sorted(random.sample(range(5), 2)) for _ in range(count)]
    return [
        (10 * cuts[2 * k] / width, tall[k][0] / 4, 10 * cuts[2 * k + 1] / width, tall[k][1] / 4) for k in range(count)
    ]


def shards(folder: Path, sizes: Sequence[tuple[int, int]], kind: str = "natural", samples: int = 2) -> Path:
    """Images in which the region of each caption has the caption's colour."""
    with ShardWriter(folder, samples=samples) as writer:
        for number, (width, height) in enumerate(sizes):
            boxes = in_a_row(3, width)
            file = io.BytesIO()
            drawing(width, height, boxes).save(file, "PNG")
            regions = tuple(Region(box, CAPTIONS[k]) for k, box in enumerate(boxes))
            caption = "a drawing" if kind == "natural" else None
            record = Record(f"{number:03d}", width, height, "drawings", kind, caption, regions)
            writer.add(record, file.getvalue(), "png")
    return folder


SIZES = [(160, 80), (80, 160), (120, 120), (320, 200), (100, 240), (200, 90)]  # width, height
