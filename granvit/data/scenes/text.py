"""Rendered text: fonts that matplotlib and Pillow ship, and lines with exact boxes of their ink."""

from __future__ import annotations

import importlib.resources
import random
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from granvit.data.scenes.photographs import package_file
from granvit.data.scenes.pictograms import pictograms
from granvit.data.scenes.scene import Colour, Labelled, Layer, Pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

SMALLEST = 9  # pixels; what is smaller cannot be read
PILLOW = "pillow"  # the font inside Pillow, Aileron
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSansMono", "DejaVuSansMono-Bold", PILLOW,
)  # fmt: skip
HELD_OUT_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")  # that no scene for training shows
MONOSPACED = ("DejaVuSansMono", "DejaVuSansMono-Bold")
_INK = 64  # opacity from which a pixel counts as ink
_CACHED_WORDS = 60_000  # some 100 MB at 256 pixels


@dataclass(frozen=True)
class _Word:
    """A word's opacity, cut to its ink, where that lies from the start of the baseline, and how far the pen moves."""

    mask: Image
    left: int
    top: int
    advance: float


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Common English words, and those of the names of the pictograms."""
    text = (importlib.resources.files("granvit.data.scenes") / "words.txt").read_text("utf-8")
    common = {word for line in text.splitlines() if not line.startswith("#") for word in line.split()}
    return tuple(sorted(common | {word for pictogram in pictograms() for word in pictogram.name.split()}))


@lru_cache(maxsize=1024)
def load_font(name: str, size: int) -> FreeTypeFont:
    """A font by name at a size in pixels.

    Raises:
        MissingDependencyError: matplotlib, which ships the font, is not installed.
    """
    from PIL import ImageFont

    if name == PILLOW:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(str(package_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf")), size)


@lru_cache(maxsize=200_000)
def advance(name: str, size: int, text: str) -> float:
    """How far the pen moves over a word, in pixels."""
    return load_font(name, size).getlength(text)


class Words:
    """Draws words and keeps the latest 60,000."""

    def __init__(self) -> None:
        self._drawn: OrderedDict[tuple[str, int, str], _Word] = OrderedDict()

    def draw(self, name: str, size: int, text: str) -> _Word:
        """A word in a font at a size in pixels."""
        key = (name, size, text)
        if key in self._drawn:
            self._drawn.move_to_end(key)
            return self._drawn[key]
        from PIL import Image as pil
        from PIL import ImageDraw

        room = size  # around the pen's way, for what leans out of it
        mask = pil.new("L", (int(advance(name, size, text)) + 2 * room, 3 * size))
        font = load_font(name, size)
        ImageDraw.Draw(mask).text((room, 2 * size), text, fill=255, font=font, anchor="ls")
        ink = np.asarray(mask) >= _INK
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        x, y = int(columns[0]), int(rows[0])
        cut = mask.crop((x, y, int(columns[-1]) + 1, int(rows[-1]) + 1))
        word = _Word(cut, x - room, y - 2 * size, advance(name, size, text))
        self._drawn[key] = word
        if len(self._drawn) > _CACHED_WORDS:
            self._drawn.popitem(last=False)
        return word


@dataclass(frozen=True)
class Style:
    """How a line looks: font, size in pixels, colour."""

    font: str
    size: int
    colour: Colour

    @property
    def ascent(self) -> int:
        """From the top of a line to its baseline, in pixels."""
        return load_font(self.font, self.size).getmetrics()[0]

    @property
    def height(self) -> int:
        """From line to line, in pixels."""
        return sum(load_font(self.font, self.size).getmetrics())

    def width(self, text: str) -> float:
        """Of a line, in pixels."""
        parts = text.split(" ")
        blanks = (len(parts) - 1) * advance(self.font, self.size, " ")
        return sum(advance(self.font, self.size, word) for word in parts) + blanks


class Sheet:
    """Takes lines and rules, and knows what of it is a region.

    Args:
        drawn: where words are kept.
        size: side of the scene in pixels.
    """

    def __init__(self, drawn: Words, size: int) -> None:
        self.size = size
        self.layers: list[Layer] = []
        self.regions: list[Labelled] = []
        self._drawn = drawn

    def write(self, text: str, x: float, y: float, style: Style, align: str = "left") -> bool:
        """Writes a line, which becomes a region; False, and nothing written, where it leads out of the scene.

        Args:
            text: words with single blanks between.
            x: of the line's left end, its middle or its right end, as `align` says.
            y: of its top.
            style: of all of it.
            align: ``"left"``, ``"centre"`` or ``"right"``.
        """
        blank = advance(style.font, style.size, " ")
        drawn = [(word, self._drawn.draw(style.font, style.size, word)) for word in text.split(" ")]
        length = style.width(text)
        pen = x - {"left": 0.0, "centre": length / 2, "right": length}[align]
        baseline = round(y) + style.ascent
        boxes: list[tuple[str, Pixels]] = []
        for word, ink in drawn:
            left, top = round(pen) + ink.left, baseline + ink.top
            boxes.append((word, (left, top, left + ink.mask.width, top + ink.mask.height)))
            pen += ink.advance + blank
        line = (
            min(b[0] for _, b in boxes), min(b[1] for _, b in boxes),
            max(b[2] for _, b in boxes), max(b[3] for _, b in boxes),
        )  # fmt: skip
        if line[0] < 0 or line[1] < 0 or line[2] > self.size or line[3] > self.size:
            return False
        region = len(self.regions)
        self.layers += [
            Layer(box, style.colour, ink.mask, region) for (_, box), (_, ink) in zip(boxes, drawn, strict=True)
        ]
        self.regions.append(Labelled(line, text, tuple(boxes)))
        return True

    def fill(self, box: tuple[float, float, float, float], colour: Colour) -> None:
        """A rectangle that is no region; nothing where it has no area."""
        x0, y0, x1, y1 = (min(max(round(x), 0), self.size) for x in box)
        if x0 < x1 and y0 < y1:
            self.layers.append(Layer((x0, y0, x1, y1), colour, None, None))


def fitting(rng: random.Random, style: Style, width: float, most: int) -> str:
    """Up to `most` words that fit a width in pixels, at least one where any fits; empty where none was found."""
    line = ""
    for _ in range(most):
        longer = f"{line} {rng.choice(words())}".strip()
        if style.width(longer) <= width:
            line = longer
        elif line:
            break
    return line
