"""Text scenes: lines, pages, tables, receipts and charts, with exact boxes of every line."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from granvit.data.scenes.photographs import Backgrounds, Photograph
from granvit.data.scenes.scene import Colour, Scene
from granvit.data.scenes.text import MONOSPACED, SMALLEST, Sheet, Style, Words, fitting, words

if TYPE_CHECKING:
    from PIL.Image import Image

_DARKEST_PAPER, _LIGHTEST_INK = 190, 90  # of 255: paper is lighter and ink darker than these, or the other way round
_SEPARATE = 1.35  # from line to line over the height of a line, so that no two boxes touch


class Documents:
    """Composes text scenes.

    Args:
        backgrounds: photographs for behind the text, and how large a scene is.
        fonts: to choose from.
    """

    def __init__(self, backgrounds: Backgrounds, fonts: Sequence[str]) -> None:
        self._backgrounds = backgrounds
        self._fonts = fonts
        self._monospaced = [font for font in fonts if font in MONOSPACED] or list(fonts)
        self._words = Words()
        self._layouts: dict[str, Callable[[random.Random, Sheet, bool], None]] = {
            "lines": self._lines,
            "page": self._page,
            "table": self._table,
            "receipt": self._receipt,
            "chart": self._chart,
        }

    def compose(self, rng: random.Random) -> Scene:
        """A scene; the same for the same state of `rng`."""
        layout = rng.choices(list(self._layouts), (35, 20, 15, 15, 15))[0]
        on_light = rng.random() < 0.75
        sheet = Sheet(self._words, self._backgrounds.size)
        background, photograph = self._paper(rng, layout == "lines", on_light)
        meta: dict[str, Any] = {"layout": layout, "photograph": None, "licence": "CC0-1.0", "attribution": []}
        if photograph is not None:
            meta |= {"photograph": photograph.name, "licence": photograph.licence}
            meta["attribution"] = [text for text in (photograph.attribution,) if text]
        self._layouts[layout](rng, sheet, on_light)
        while not sheet.regions:  # a single word of the smallest size always finds its place
            sheet.write(rng.choice(words()), 4, 4, self._style(rng, SMALLEST, on_light))
        meta["words"] = [[[word, list(box)] for word, box in region.words] for region in sheet.regions]
        return Scene(background, tuple(sheet.layers), tuple(sheet.regions), "ocr", None, meta)

    def _paper(self, rng: random.Random, photographs: bool, on_light: bool) -> tuple[Image, Photograph | None]:
        from PIL import Image as pil

        if photographs and rng.random() < 0.5:
            # Only as many tones as leave the text its contrast.
            tones = (float(_DARKEST_PAPER), 255.0) if on_light else (0.0, float(_LIGHTEST_INK))
            return self._backgrounds.draw(rng, tones)
        colour = _tone(rng, on_light) if rng.random() < 0.5 else (255, 255, 255) if on_light else (0, 0, 0)
        return pil.new("RGB", (self._backgrounds.size,) * 2, colour), None

    def _style(
        self, rng: random.Random, size: int, on_light: bool, font: str | None = None, black: float = 0.4
    ) -> Style:
        plain: Colour = (0, 0, 0) if on_light else (255, 255, 255)
        colour = plain if rng.random() < black else _tone(rng, not on_light)
        return Style(font or rng.choice(self._fonts), max(SMALLEST, size), colour)

    def _lines(self, rng: random.Random, sheet: Sheet, on_light: bool) -> None:
        """Single lines of any font, size and colour, one below the other."""
        y = rng.uniform(0.02, 0.3) * sheet.size
        for _ in range(rng.randint(1, 8)):
            size = round(sheet.size * 0.035 * (0.16 / 0.035) ** rng.random())
            style = self._style(rng, size, on_light)
            x = rng.uniform(0.02, 0.5) * sheet.size
            text = _cased(rng, fitting(rng, style, 0.98 * sheet.size - x, rng.randint(1, 5)))
            if text:
                sheet.write(text, x, y, style)
            y += style.height * rng.uniform(1.05, 2.0)

    def _page(self, rng: random.Random, sheet: Sheet, on_light: bool) -> None:
        """A title and paragraphs, one region a line."""
        margin = rng.uniform(0.04, 0.1) * sheet.size
        width = sheet.size - 2 * margin
        title = self._style(rng, round(sheet.size * rng.uniform(0.055, 0.085)), on_light)
        body = self._style(rng, round(sheet.size * rng.uniform(0.036, 0.05)), on_light)
        y = margin
        text = fitting(rng, title, width, 4).title()
        if text and title.width(text) <= width:
            sheet.write(text, margin, y, title)
            y += title.height * 1.5
        while y + body.height < sheet.size - margin:
            for _ in range(rng.randint(2, 5)):
                text = fitting(rng, body, width, 12)
                if y + body.height > sheet.size - margin or not text:
                    break
                sheet.write(text, margin, y, body)
                y += body.height * 1.1
            y += body.height * 0.8

    def _table(self, rng: random.Random, sheet: Sheet, on_light: bool) -> None:
        """A head and rows of cells with rules between, one region a cell."""
        columns = rng.randint(2, 4)
        style = self._style(rng, round(sheet.size * rng.uniform(0.036, 0.05)), on_light)
        margin = rng.uniform(0.03, 0.08) * sheet.size
        cell = (sheet.size - 2 * margin) / columns
        row = style.height * rng.uniform(1.4, 1.9)
        rows = min(rng.randint(3, 9), int((sheet.size - 2 * margin) / row))
        rule = tuple(
            (a + b) // 2 for a, b in zip(style.colour, (255, 255, 255) if on_light else (0, 0, 0), strict=True)
        )
        for i in range(rows + 1):
            y = margin + i * row
            sheet.fill((margin, y, sheet.size - margin, y + 1), (rule[0], rule[1], rule[2]))
            for j in range(columns if i < rows else 0):
                is_number = i > 0 and j > 0
                text = _number(rng) if is_number else fitting(rng, style, cell - 8, 1 + (j == 0))
                if text and style.width(text) <= cell - 8:
                    at = margin + (j + 1) * cell - 4 if is_number else margin + j * cell + 4
                    sheet.write(text, at, y + (row - style.height) / 2 + 1, style, "right" if is_number else "left")
        for j in range(columns + 1):
            x = margin + j * cell
            sheet.fill((x, margin, x + 1, margin + rows * row), (rule[0], rule[1], rule[2]))

    def _receipt(self, rng: random.Random, sheet: Sheet, on_light: bool) -> None:
        """A shop, a date, items and prices, and their sum: every name and every price a region."""
        style = self._style(
            rng, round(sheet.size * rng.uniform(0.038, 0.05)), on_light, rng.choice(self._monospaced), black=0.8
        )
        width = rng.uniform(0.65, 0.92) * sheet.size
        left, right = (sheet.size - width) / 2, (sheet.size + width) / 2
        y = rng.uniform(0.03, 0.08) * sheet.size
        step = style.height * _SEPARATE
        shop = fitting(rng, style, width, 2).upper()
        for text in (shop, f"{rng.randint(2001, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"):
            if text and style.width(text) <= width:
                sheet.write(text, sheet.size / 2, y, style, "centre")
                y += step
        cents = []
        for _ in range(rng.randint(2, 10)):
            if y + 3 * step > sheet.size:
                break
            cents.append(rng.randint(20, 9999))
            item = fitting(rng, style, 0.6 * width, 2)
            if item:
                sheet.write(item, left, y, style)
            sheet.write(f"{cents[-1] / 100:.2f}", right, y, style, "right")
            y += step
        sheet.fill((left, y + 2, right, y + 3), style.colour)
        sheet.write("TOTAL", left, y + 6, style)
        sheet.write(f"{sum(cents) / 100:.2f}", right, y + 6, style, "right")

    def _chart(self, rng: random.Random, sheet: Sheet, on_light: bool) -> None:
        """A title and bars with their names and values."""
        size = sheet.size
        title = self._style(rng, round(size * rng.uniform(0.05, 0.07)), on_light)
        style = self._style(rng, round(size * rng.uniform(0.036, 0.042)), on_light, title.font)
        text = fitting(rng, title, 0.9 * size, 3).capitalize()
        if text and title.width(text) <= 0.96 * size:
            sheet.write(text, size / 2, 0.03 * size, title, "centre")
        top = 0.03 * size + title.height * _SEPARATE
        left, bars = 0.36 * size, rng.randint(2, 6)
        step = min((0.97 * size - top) / bars, 3.5 * style.height)
        sheet.fill((left - 2, top, left - 1, top + bars * step), style.colour)
        for i in range(bars):
            y = top + i * step
            value = rng.randint(1, 100)
            right = left + value / 100 * 0.45 * size
            sheet.fill((left, y + 0.15 * step, right, y + 0.85 * step), _tone(rng, rng.random() < 0.5))
            middle = y + (step - style.height) / 2
            name = fitting(rng, style, left - 12, 1)
            if name:
                sheet.write(name, left - 6, middle, style, "right")
            sheet.write(str(value), right + 4, middle, style)


def _tone(rng: random.Random, light: bool) -> Colour:
    """A colour that text of the other kind can be read on, or that can be read on paper of the other kind."""
    low, high = (_DARKEST_PAPER, 255) if light else (0, _LIGHTEST_INK)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _number(rng: random.Random) -> str:
    """As tables hold them: whole, with decimals, or a share."""
    return rng.choice((f"{rng.randint(0, 9999)}", f"{rng.uniform(0, 100):.1f}", f"{rng.randint(0, 100)}%"))


def _cased(rng: random.Random, text: str) -> str:
    """A line as it is, with a capital, or all in capitals."""
    choice = rng.random()
    if choice < 0.6:
        return text
    return text.capitalize() if choice < 0.85 else text.upper()
