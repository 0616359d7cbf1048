"""A contact sheet: scenes side by side with their boxes drawn and captions written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from granvit.data.scenes.composer import SceneComposer

if TYPE_CHECKING:
    from PIL.Image import Image

_COLOURS = ((230, 30, 60), (20, 110, 240), (10, 150, 70), (200, 60, 200), (220, 120, 0))


def contact_sheet(composer: SceneComposer, indices: Sequence[int], columns: int = 4) -> Image:
    """Scenes row by row, each region framed; captions only over natural scenes, where no text is hidden by them."""
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    side, gap = composer.size, 6
    rows = -(-len(indices) // columns)
    sheet = pil.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), (255, 255, 255))
    font = ImageFont.load_default(10)
    for place, index in enumerate(indices):
        scene = composer.scene(index)
        image = scene.image()
        draw = ImageDraw.Draw(image)
        for i, region in enumerate(scene.regions):
            x0, y0, x1, y1 = region.box
            colour = _COLOURS[i % len(_COLOURS)]
            draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=colour)
            if scene.kind == "natural":
                x, y = min(max(x0, 0), side - int(font.getlength(region.caption)) - 2), y0 - 12 if y0 >= 12 else y1
                draw.rectangle(draw.textbbox((x, y), region.caption, font), fill=colour)
                draw.text((x, y), region.caption, (255, 255, 255), font)
        row, column = divmod(place, columns)
        sheet.paste(image, (gap + column * (side + gap), gap + row * (side + gap)))
    return sheet
