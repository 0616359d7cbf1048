"""Scenes by number: the same for the same seed, split and number, in any order and in any process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from granvit.data.record import Record, Region
from granvit.data.scenes.documents import Documents
from granvit.data.scenes.natural import Natural
from granvit.data.scenes.photographs import PHOTOGRAPHS, Backgrounds, Photograph, SceneError
from granvit.data.scenes.pictograms import Pictogram, pictograms
from granvit.data.scenes.scene import Scene
from granvit.data.scenes.text import FONTS, HELD_OUT_FONTS

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "heldout", "heldout-drawings")
SCENE_KINDS = ("natural", "ocr", "mixed")
SOURCE = "granvit-scenes"
_SIZES = range(128, 2049)


@dataclass(frozen=True)
class Material:
    """What the scenes of a split are made of."""

    photographs: tuple[Photograph, ...]
    pictograms: tuple[Pictogram, ...]
    fonts: tuple[str, ...]


def material(split: str) -> Material:
    """What a split may use: train and the others share no photograph, train and heldout-drawings share nothing.

    Raises:
        SceneError: no such split.
    """
    if split not in SPLITS:
        raise SceneError(f"scenes: split: expected one of {', '.join(SPLITS)}, got {split!r}")
    new = split == "heldout-drawings"
    return Material(
        tuple(photograph for photograph in PHOTOGRAPHS if photograph.held_out == (split != "train")),
        tuple(pictogram for pictogram in pictograms() if pictogram.held_out == new),
        HELD_OUT_FONTS if new else FONTS,
    )


class SceneComposer:
    """Composes labelled images from material that packages carry: no download, no folder of data.

    Natural scenes show named pictograms over photographs; text scenes show lines, pages, tables, receipts and charts.
    Boxes are the exact bounds of what is visible. Composers can be pickled; what they have drawn stays behind.

    Args:
        seed: any integer; other seeds give other scenes.
        split: one of :data:`SPLITS`.
        size: side of the square images in pixels, 128 to 2048.
        kind: ``"natural"``, ``"ocr"``, or ``"mixed"`` for as many of each.
        unique: whether no two regions of a natural scene may have the same caption.
        names: the only pictograms to show, by name; None for all that the split may show.

    Raises:
        SceneError: an argument is not one of these.
    """

    def __init__(
        self,
        seed: int = 0,
        split: str = "train",
        *,
        size: int = 256,
        kind: str = "mixed",
        unique: bool = True,
        names: Sequence[str] | None = None,
    ) -> None:
        if kind not in SCENE_KINDS:
            raise SceneError(f"scenes: kind: expected one of {', '.join(SCENE_KINDS)}, got {kind!r}")
        if size not in _SIZES:
            raise SceneError(f"scenes: size: expected {_SIZES.start} to {_SIZES.stop - 1} pixels, got {size}")
        self.seed, self.split, self.size, self.kind, self.unique = seed, split, size, kind, unique
        self.names = None if names is None else tuple(names)
        self.material = material(split)
        chosen = {pictogram.name: pictogram for pictogram in self.material.pictograms}
        unknown = [name for name in self.names or () if name not in chosen]
        if unknown or self.names == ():
            raise SceneError(f"scenes: names: expected names of pictograms of split {split}, got {unknown}")
        shown = self.material.pictograms if self.names is None else tuple(chosen[name] for name in self.names)
        backgrounds = Backgrounds(self.material.photographs, size)
        self._natural = Natural(backgrounds, shown, unique)
        self._documents = Documents(backgrounds, self.material.fonts)

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.seed, self.split, self.size, self.kind, self.unique, self.names)

    def scene(self, index: int) -> Scene:
        """A scene before it is flattened.

        Args:
            index: from 0, without an end.

        Raises:
            SceneError: a negative index.
            MissingDependencyError: a package that carries material is not installed.
        """
        if index < 0:
            raise SceneError(f"scenes: index: expected 0 or more, got {index}")
        name = f"{self.seed}/{self.split}/{self.kind}/{self.size}/{index}"
        rng = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        is_text = self.kind == "ocr" or (self.kind == "mixed" and rng.random() < 0.5)
        return self._documents.compose(rng) if is_text else self._natural.compose(rng)

    def __getitem__(self, index: int) -> tuple[Record, Image]:
        """A scene's record and its image in RGB; as :meth:`scene`."""
        scene = self.scene(index)
        return self.record(index, scene), scene.image()

    def record(self, index: int, scene: Scene) -> Record:
        """What is known of a scene."""
        regions = tuple(
            Region(
                (r.box[0] / self.size, r.box[1] / self.size, r.box[2] / self.size, r.box[3] / self.size),
                r.caption,
                origin=SOURCE,
            )
            for r in scene.regions
        )
        meta = {"split": self.split, "seed": self.seed, "index": index, **scene.meta}
        key = f"{self.split}-{self.seed}-{index:08d}"
        return Record(key, self.size, self.size, SOURCE, scene.kind, scene.caption, regions, meta).check()


def _again(seed: int, split: str, size: int, kind: str, unique: bool, names: Sequence[str] | None) -> SceneComposer:
    return SceneComposer(seed, split, size=size, kind=kind, unique=unique, names=names)
