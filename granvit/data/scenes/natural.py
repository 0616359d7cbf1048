"""Natural scenes: pictograms over photographs, with boxes of what is visible of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from granvit.data.scenes.photographs import Backgrounds
from granvit.data.scenes.pictograms import ATTRIBUTION, LICENCE, Drawings, Pictogram
from granvit.data.scenes.scene import Labelled, Layer, Pixels, Scene

SMALLEST, LARGEST = 0.05, 0.7  # longer side of an object over the side of the scene
VISIBLE = 0.6  # share of an object that nothing hides and no edge cuts off, at least
_COUNTS, _WEIGHTS = range(1, 13), (6, 9, 10, 10, 9, 8, 6, 5, 4, 3, 3, 3)
_OPAQUE = 96  # alpha from which a pixel counts as the object's
_SEEN = 26  # of 255: share of a pixel's colour from which the object is seen in it
_TONES = (80.0, 255.0)  # of backgrounds: the black lines of the drawings must show on any
_TRIES = 4
_TINTED, _REPEATED, _CUT = 0.2, 0.15, 0.15  # how often
_APART, _LARGER = 0.25, 1.5  # centres by this share of the scene, or sides by this factor: enough to tell two apart


@dataclass
class _Object:
    pictogram: Pictogram
    tint: str | None
    box: Pixels
    alpha: npt.NDArray[np.uint8]
    pixels: int
    visible: int

    @property
    def name(self) -> str:
        return self.pictogram.name if self.tint is None else f"{self.tint} {self.pictogram.name}"

    @property
    def side(self) -> int:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


class Natural:
    """Composes natural scenes.

    Args:
        backgrounds: what lies behind, and how large a scene is.
        pictograms: to choose from.
        unique: whether no two regions of a scene may have the same caption.
    """

    def __init__(self, backgrounds: Backgrounds, pictograms: Sequence[Pictogram], unique: bool) -> None:
        self._backgrounds = backgrounds
        self._pictograms = pictograms
        self._unique = unique
        self._drawings = Drawings()

    def compose(self, rng: random.Random) -> Scene:
        """A scene; the same for the same state of `rng`."""
        background, photograph = self._backgrounds.draw(rng, _TONES)
        size = self._backgrounds.size
        owner = np.zeros((size, size), np.uint8)  # number of the object that is seen at a pixel, from 1
        objects: list[_Object] = []
        layers: list[Layer] = []
        count = rng.choices(_COUNTS, _WEIGHTS)[0]
        largest = LARGEST if count <= 3 else 0.5 if count <= 6 else 0.35
        shares = [SMALLEST * (largest / SMALLEST) ** rng.random() for _ in range(count)]
        if rng.random() < 0.7:
            shares.sort(reverse=True)  # small ones in front; else they hide behind large ones now and then
        for share in shares:
            self._place(rng, max(8, round(share * size)), owner, objects, layers)
        captions = _captions(objects, size) if self._unique else [o.name for o in objects]
        boxes = _visible_boxes(objects, size)
        regions = tuple(Labelled(box, caption) for box, caption in zip(boxes, captions, strict=True))
        listed = sorted(range(len(objects)), key=lambda i: -objects[i].visible)
        meta = {
            "layout": "natural",
            "photograph": photograph.name,
            "pictograms": [o.pictogram.code for o in objects],
            "licence": LICENCE,
            "attribution": [text for text in (ATTRIBUTION, photograph.attribution) if text],
        }
        caption = f"Drawings over a photograph: {', '.join(captions[i] for i in listed)}."
        return Scene(background, tuple(layers), regions, "natural", caption, meta)

    def _place(
        self,
        rng: random.Random,
        side: int,
        owner: npt.NDArray[np.uint8],
        objects: list[_Object],
        layers: list[Layer],
    ) -> None:
        """Adds an object where enough of it and of all the others stays visible; none where no try finds a place."""
        size = self._backgrounds.size
        pictogram = (
            rng.choice(objects).pictogram if objects and rng.random() < _REPEATED else rng.choice(self._pictograms)
        )
        tints = self._drawings.tints(pictogram) if rng.random() < _TINTED else ()
        tint = rng.choice(tints) if tints else None
        image = self._drawings.draw(pictogram, side, tint)
        alpha = image.getchannel("A")
        opacity = np.asarray(alpha)
        mask = opacity >= _OPAQUE
        pixels = int(mask.sum())
        for _ in range(_TRIES):
            over = 0.25 if rng.random() < _CUT else 0.0
            x, y = (rng.randint(-int(over * n), size - n + int(over * n)) for n in image.size)
            box = (x, y, x + image.width, y + image.height)
            inside = _overlap(box, (0, 0, size, size))
            seen = mask[inside[1] - y : inside[3] - y, inside[0] - x : inside[2] - x]
            new = _Object(pictogram, tint, box, opacity, pixels, int(seen.sum()))
            window = owner[inside[1] : inside[3], inside[0] : inside[2]]
            hidden = np.bincount(window[seen], minlength=len(objects) + 1)[1:].tolist()
            if new.visible < VISIBLE * pixels or any(
                o.visible - h < VISIBLE * o.pixels for o, h in zip(objects, hidden, strict=True)
            ):
                continue
            if self._unique and not _can_be_told_apart(new, objects, size):
                continue
            for o, h in zip(objects, hidden, strict=True):
                o.visible -= h
            layers.append(Layer(box, image, alpha, len(objects)))
            objects.append(new)
            window[seen] = len(objects)
            return


def _visible_boxes(objects: Sequence[_Object], size: int) -> list[Pixels]:
    """Bounds of what is seen of each object: of the pixels that it colours by a tenth or more."""
    boxes = []
    for i, back in enumerate(objects):
        x0, y0, x1, y1 = inside = _overlap(back.box, (0, 0, size, size))
        left = back.alpha[y0 - back.box[1] : y1 - back.box[1], x0 - back.box[0] : x1 - back.box[0]].astype(np.float32)
        for front in objects[i + 1 :]:
            a0, b0, a1, b1 = _overlap(front.box, inside)
            if a0 < a1 and b0 < b1:
                x, y = front.box[:2]
                left[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0] *= 1 - front.alpha[b0 - y : b1 - y, a0 - x : a1 - x] / 255
        seen = left >= _SEEN
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        boxes.append((x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1))
    return boxes


def _overlap(a: Pixels, b: Pixels) -> Pixels:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _can_be_told_apart(new: _Object, objects: Sequence[_Object], size: int) -> bool:
    """Whether captions can tell it from the others: at most one of them has its name, and a difference shows."""
    same = [o for o in objects if o.name == new.name]
    return not same or (len(same) == 1 and _difference(same[0], new, size) is not None)


def _difference(a: _Object, b: _Object, size: int) -> tuple[str, str] | None:
    """What can be said of each of two objects with one name, the name in braces."""
    if max(a.side, b.side) >= _LARGER * min(a.side, b.side):
        words = ("larger {}", "smaller {}")
        return words if a.side > b.side else (words[1], words[0])
    x, y = ((b.box[i] + b.box[i + 2] - a.box[i] - a.box[i + 2]) / (2 * size) for i in (0, 1))
    if abs(x) >= _APART:
        words = ("{} on the left", "{} on the right")
        return words if x > 0 else (words[1], words[0])
    if abs(y) >= _APART:
        words = ("upper {}", "lower {}")
        return words if y > 0 else (words[1], words[0])
    return None


def _captions(objects: Sequence[_Object], size: int) -> list[str]:
    """A name each, and what tells two with the same name apart."""
    captions = [o.name for o in objects]
    for i, a in enumerate(objects):
        for j in range(i):
            if objects[j].name == a.name:
                words = _difference(objects[j], a, size)
                assert words is not None
                captions[j], captions[i] = (word.format(a.name) for word in words)
    return captions
