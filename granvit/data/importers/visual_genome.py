"""Visual Genome: region_descriptions.json and image_data.json (homes.cs.washington.edu/~ranjay/visualgenome)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from granvit.data.importers.base import (
    AnnotationError,
    Sample,
    caption_text,
    corners_of,
    distinct,
    field,
    image_size,
    json_items,
    record_key,
    relative_box,
)
from granvit.data.record import Record, Region

_SIDES = ("x", "y", "width", "height")


def visual_genome(
    descriptions: Path, image_data: Path, images: Path, drops: Counter[str], *, source: str = "visual_genome"
) -> Iterator[Sample]:
    """Samples of Visual Genome's region descriptions, in their order; the descriptions are never held as a whole.

    Args:
        descriptions: ``region_descriptions.json``; boxes are x, y, width and height in pixels.
        image_data: ``image_data.json``, which tells the sizes and the folders of the images.
        images: folder of the images, or of the two folders of them (``VG_100K`` and ``VG_100K_2``).
        drops: counts what is left out, by reason.
        source: name of the dataset in the records.

    Raises:
        AnnotationError: a file that is not what Visual Genome publishes.
    """
    sizes = _image_data(image_data)
    for i, entry in enumerate(json_items(descriptions, "item")):
        where = f"{descriptions}: [{i}]"
        number = field(entry, "id", int, where)
        if number not in sizes:
            raise AnnotationError(f"{where}: id: image {number} is not in {image_data}")
        size, path = sizes[number]
        regions = []
        for j, plain in enumerate(field(entry, "regions", list, where)):
            place = f"{where}: regions[{j}]"
            sides = [field(plain, name, (int, float, type(None)), place) for name in _SIDES]
            box = relative_box(corners_of(sides, place), size, drops, place)
            text = caption_text(field(plain, "phrase", str, place), drops, f"{place}: phrase")
            if box and text:
                regions.append(Region(box, text, origin=source))
        folder = images / path.parent.name
        file = (folder if folder.is_dir() else images) / path.name
        record = Record(
            record_key(f"vg-{number}"),
            size[1],
            size[0],
            source,
            regions=distinct(regions, drops),
            meta={"image_id": number},
        )
        yield Sample(record, file)


def _image_data(path: Path) -> dict[int, tuple[tuple[int, int], PurePosixPath]]:
    """Size and path of every image."""
    found = {}
    for i, entry in enumerate(json_items(path, "item")):
        where = f"{path}: [{i}]"
        # The first edition calls the number id.
        name = "id" if isinstance(entry, dict) and "image_id" not in entry else "image_id"
        number = field(entry, name, int, where)
        found[number] = (image_size(entry, where), PurePosixPath(field(entry, "url", str, where)))
    return found
