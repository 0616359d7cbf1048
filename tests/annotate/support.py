"""Annotators whose answers are known, and images to give them. Imported by worker processes too: keep it light."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from granvit.annotate import Captions, Detection, TextLine
from granvit.annotate.interfaces import Box, running

ROOT = Path(__file__).parents[2]


def colour(number: int) -> tuple[int, int, int]:
    return (number % 256, number // 256, 77)


def make_images(folder: Path, count: int, size: tuple[int, int] = (500, 460), form: str = "png") -> Path:
    """Images of one colour each, which tells their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, colour(number)).save(folder / f"{number:04d}.{form}")
    return folder


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return int(red) + 256 * int(green)


def contents(folder: Path) -> dict[str, bytes]:
    """What a finished run leaves, but for the journal, whose batches may come in any order."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "journal.jsonl"}


@dataclass(frozen=True)
class SlowOCR:
    """Reads an image's number, and notes in a file that it did.

    What it answers depends on the whole batch, as a neural network's last digits do.
    """

    seconds: float = running(0.0)
    log: str | None = running(None)
    name: str = "slow"

    def read(self, images: Sequence[Image.Image]) -> list[list[TextLine]]:
        numbers = [number_of(image) for image in images]
        if self.log is not None:
            with open(self.log, "a") as file:
                file.writelines(f"{number}\n" for number in numbers)
        time.sleep(self.seconds * len(images))
        together = sum(numbers)
        return [[TextLine((0.1, 0.1, 0.6, 0.2), f"number {number}, {together} together", 0.9)] for number in numbers]


@dataclass(frozen=True)
class FixedDetector:
    """The same boxes for every image."""

    found: tuple[Detection, ...]
    name: str = "fixed"

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        return [list(self.found) for _ in images]


@dataclass(frozen=True)
class NumberCaptioner:
    """The image's number, and each box; nothing for boxes that begin at the left edge."""

    name: str = "numbers"

    def caption(self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[Captions]:
        return [
            Captions(f"number {number_of(image)}", tuple("" if b[0] == 0 else f"box at {b[0]}" for b in of_image))
            for image, of_image in zip(images, boxes, strict=True)
        ]


def page(lines: Sequence[str], size: tuple[int, int] = (900, 600), height: int = 30) -> tuple[Image.Image, list[Any]]:
    """A page with lines of text, and the boxes of their ink in pixels."""
    matplotlib = __import__("matplotlib")
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), height)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    places = [(50, 40 + i * (size[1] - 80) // len(lines)) for i in range(len(lines))]
    for place, line in zip(places, lines, strict=True):
        draw.text(place, line, fill="black", font=font)
    return image, [draw.textbbox(place, line, font=font) for place, line in zip(places, lines, strict=True)]
