"""A scene before it is flattened: a background, and what lies on it from back to front."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = tuple[int, int, int, int]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """What is painted over a rectangle of the scene.

    Attributes:
        box: ``x0 y0 x1 y1`` in whole pixels; may lead out of the scene.
        paint: a picture of the size of the box, or one colour.
        mask: how opaque, of the size of the box; None where it is opaque all over.
        region: which of the scene's regions it belongs to; None for what is no region.
    """

    box: Pixels
    paint: Image | Colour
    mask: Image | None
    region: int | None


@dataclass(frozen=True)
class Labelled:
    """A region in whole pixels, its caption, and its words where it is text."""

    box: Pixels
    caption: str
    words: tuple[tuple[str, Pixels], ...] = ()


@dataclass(frozen=True)
class Scene:
    """Everything that the image and its record are made of.

    Attributes:
        background: in RGB.
        layers: from back to front.
        regions: what is known of the scene, with exact boxes.
        kind: ``"natural"`` or ``"ocr"``.
        caption: of the whole scene, or None.
        meta: what it is made of.
    """

    background: Image
    layers: tuple[Layer, ...]
    regions: tuple[Labelled, ...]
    kind: str
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)

    def image(self, without: int | None = None) -> Image:
        """The scene in RGB, or what it would be without one of its regions."""
        canvas = self.background.copy()
        for layer in self.layers:
            if layer.region is None or layer.region != without:
                canvas.paste(layer.paint, layer.box, layer.mask)
        return canvas
