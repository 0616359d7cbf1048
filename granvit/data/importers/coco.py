"""COCO: instances_*.json, and captions_*.json beside it (cocodataset.org)."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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


def coco(
    instances: Path, images: Path, drops: Counter[str], *, captions: Path | None = None, source: str = "coco"
) -> Iterator[Sample]:
    """Samples of a COCO detection file, in the order of its images; captions of regions are names of categories.

    The file is read three times, because its categories come last and its annotations in no order; of the annotations
    48 bytes each are held.

    Args:
        instances: the file of images, annotations and categories; boxes are ``x y width height`` in pixels.
        images: folder of the images.
        drops: counts what is left out, by reason; crowds are.
        captions: the file of captions of the same images. The first is the record's, all are in its meta.
        source: name of the dataset in the records.

    Raises:
        AnnotationError: a file that is not what COCO publishes.
    """
    names = _categories(instances)
    boxes = _Boxes(instances, names, drops)
    written = _captions(captions, drops) if captions else {}
    for i, entry in enumerate(json_items(instances, "images.item")):
        where = f"{instances}: images[{i}]"
        size, file = image_size(entry, where), field(entry, "file_name", str, where)
        number = field(entry, "id", int, where)
        regions = []
        for corners, name in boxes.take(number):
            box = relative_box(corners, size, drops, f"{instances}: a box of image {number}")
            if box:
                regions.append(Region(box, name, origin=source))
        texts = written.pop(number, [])
        meta = {"image_id": number, **({"captions": texts} if texts else {})}
        record = Record(
            record_key(Path(file).stem),
            size[1],
            size[0],
            source,
            caption=texts[0] if texts else None,
            regions=distinct(regions, drops),
            meta=meta,
        )
        yield Sample(record, images / file)
    if left := boxes.left():
        drops["region of an image that is not listed"] += left
    if written:
        drops["caption of an image that is not listed"] += sum(map(len, written.values()))


def _categories(instances: Path) -> dict[int, str]:
    names = {}
    for i, entry in enumerate(json_items(instances, "categories.item")):
        where = f"{instances}: categories[{i}]"
        names[field(entry, "id", int, where)] = field(entry, "name", str, where)
    return names


def _captions(path: Path, drops: Counter[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for i, entry in enumerate(json_items(path, "annotations.item")):
        where = f"{path}: annotations[{i}]"
        if text := caption_text(field(entry, "caption", str, where), drops, f"{where}: caption"):
            found.setdefault(field(entry, "image_id", int, where), []).append(text)
    return found


class _Boxes:
    """The boxes of a file, to be taken by image."""

    def __init__(self, instances: Path, names: dict[int, str], drops: Counter[str]) -> None:
        self.names = names
        images, self.corners, self.categories = array("q"), array("d"), array("q")
        for i, entry in enumerate(json_items(instances, "annotations.item")):
            where = f"{instances}: annotations[{i}]"
            if entry.get("iscrowd") if isinstance(entry, dict) else False:
                drops["crowd"] += 1
                continue
            category = field(entry, "category_id", int, where)
            if category not in names:
                raise AnnotationError(f"{where}: category_id: {category} is not among the categories")
            corners = corners_of(field(entry, "bbox", list, where), f"{where}: bbox")
            images.append(field(entry, "image_id", int, where))
            self.categories.append(category)
            self.corners.extend(float("nan") if x is None else x for x in corners)
        self.order = array("q", sorted(range(len(images)), key=images.__getitem__))
        self.images = array("q", (images[i] for i in self.order))
        self.taken: set[int] = set()
        self.untaken = len(images)

    def take(self, image: int) -> Iterator[tuple[list[float], str]]:
        """Corners and category of each box of an image, as the file has them."""
        at = bisect_left(self.images, image)
        if image in self.taken:
            return
        self.taken.add(image)
        while at < len(self.images) and self.images[at] == image:
            i = self.order[at]
            yield list(self.corners[4 * i : 4 * i + 4]), self.names[self.categories[i]]
            self.untaken -= 1
            at += 1

    def left(self) -> int:
        """Boxes that no image took."""
        return self.untaken
