"""Photographs that scikit-image and scikit-learn carry in their wheels, with boxes placed by hand."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from granvit import geometry
from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
BOXES_PER_PHOTOGRAPH = 5


@dataclass(frozen=True)
class Photograph:
    """One photograph inside an installed package; boxes are ``x0 y0 x1 y1`` relative to it, by label."""

    name: str
    package: str
    file: str
    boxes: dict[str, Box]

    def path(self) -> Path:
        """Where the file lies. Found without importing the package, whose own loaders may reach for the network."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                f"demo: the photograph {self.name} is part of {self.package}, which is not installed"
            )
        path = Path(spec.origin).parent / self.file
        if not path.is_file():
            raise FileNotFoundError(f"demo: this version of {self.package} ships no {self.file}")
        return path


PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "skimage",
        "data/astronaut.png",
        {
            "face": (0.335, 0.12, 0.535, 0.375),
            "mission patch": (0.255, 0.675, 0.41, 0.835),
            "helmet": (0.535, 0.665, 1.0, 1.0),
            "space shuttle": (0.69, 0.0, 0.9, 0.56),
            "flag": (0.0, 0.0, 0.185, 0.79),
        },
    ),
    Photograph(
        "coffee",
        "skimage",
        "data/coffee.png",
        {
            "saucer": (0.12, 0.16, 0.8, 0.98),
            "cup": (0.285, 0.04, 0.685, 0.78),
            "espresso": (0.345, 0.235, 0.62, 0.485),
            "spoon": (0.54, 0.555, 0.68, 0.82),
            "table": (0.8, 0.0, 1.0, 1.0),
        },
    ),
    Photograph(
        "pagoda",
        "sklearn",
        "datasets/images/china.jpg",
        {
            "pagoda": (0.095, 0.06, 0.585, 0.99),
            "upper roof": (0.145, 0.065, 0.505, 0.325),
            "gallery": (0.145, 0.435, 0.515, 0.595),
            "lake": (0.53, 0.53, 0.85, 0.74),
            "tree": (0.85, 0.315, 1.0, 1.0),
        },
    ),
    Photograph(
        "dahlia",
        "sklearn",
        "datasets/images/flower.jpg",
        {
            "blossom": (0.26, 0.195, 0.7, 0.845),
            "centre": (0.42, 0.415, 0.55, 0.615),
            "second blossom": (0.445, 0.875, 0.74, 1.0),
            "leaf": (0.0, 0.13, 0.24, 0.81),
            "far leaf": (0.72, 0.19, 1.0, 0.53),
        },
    ),
    Photograph(
        "motorcycle",
        "skimage",
        "data/motorcycle_left.png",
        {
            "rear wheel": (0.16, 0.475, 0.38, 0.805),
            "front wheel": (0.69, 0.565, 0.925, 0.91),
            "engine": (0.44, 0.48, 0.65, 0.765),
            "seat": (0.195, 0.305, 0.485, 0.515),
            "headlight": (0.665, 0.235, 0.77, 0.385),
        },
    ),
    Photograph(
        "cat",
        "skimage",
        "data/chelsea.png",
        {
            "left eye": (0.295, 0.275, 0.465, 0.5),
            "right eye": (0.645, 0.36, 0.77, 0.555),
            "nose": (0.505, 0.74, 0.655, 0.905),
            "ear": (0.715, 0.0, 0.89, 0.275),
            "forehead": (0.44, 0.0, 0.7, 0.3),
        },
    ),
)


@dataclass(frozen=True)
class Regions:
    """Photographs fitted into squares of one size, and their boxes.

    Attributes:
        names: name of each photograph.
        images: the squares; the photograph in the upper left corner, grey around it.
        sizes: width and height in pixels of the photograph within its square.
        labels: label of each box.
        boxes: ``(R, 4)`` float32 relative to the square.
        image_index: ``(R,)`` the image of each box; boxes of an image follow one another, equally many in each.
    """

    names: list[str]
    images: list[Image]
    sizes: list[tuple[int, int]]
    labels: list[str]
    boxes: Tensor
    image_index: Tensor


def load(count: int, size: int) -> Regions:
    """The first `count` photographs and their regions, fitted into squares of `size` pixels with their aspect kept."""
    from PIL import Image as pil

    if not 1 <= count <= len(PHOTOGRAPHS):
        raise ValueError(f"demo: photos: expected 1 to {len(PHOTOGRAPHS)}, got {count}")
    images, sizes, boxes = [], [], []
    for photograph in PHOTOGRAPHS[:count]:
        picture = pil.open(photograph.path()).convert("RGB")
        scale = size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        square = pil.new("RGB", (size, size), (128, 128, 128))
        square.paste(picture.resize((width, height), pil.Resampling.BICUBIC))
        images.append(square)
        sizes.append((width, height))
        boxes.append(geometry.rescale(torch.tensor(list(photograph.boxes.values())), (height, width), (size, size)))
    return Regions(
        names=[photograph.name for photograph in PHOTOGRAPHS[:count]],
        images=images,
        sizes=sizes,
        labels=[label for photograph in PHOTOGRAPHS[:count] for label in photograph.boxes],
        boxes=torch.cat(boxes),
        image_index=torch.arange(count).repeat_interleave(BOXES_PER_PHOTOGRAPH),
    )
