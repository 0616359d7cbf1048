"""The steps from image files to journal entries: plain functions over a batch, the same for every engine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from granvit.annotate.filters import Filters
from granvit.annotate.inputs import ImageFile
from granvit.annotate.interfaces import OCR, AnnotationError, Box, Captioner, Detector, describe
from granvit.annotate.journal import Entry
from granvit.annotate.reading import read_file
from granvit.data.images import ImageError, decode
from granvit.data.record import KINDS, MAX_CAPTION, Record, Region

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Plan:
    """Who annotates and what is left out.

    Attributes:
        kind: of the images, ``"natural"`` or ``"ocr"``.
        detector: finds the boxes of natural images.
        captioner: captions natural images and their boxes; without one, boxes keep the detector's labels.
        ocr: reads ocr images.
        filters: what is left out.
    """

    kind: str
    detector: Detector | None = None
    captioner: Captioner | None = None
    ocr: OCR | None = None
    filters: Filters = field(default_factory=Filters)

    def check(self) -> Plan:
        """The plan itself.

        Raises:
            AnnotationError: an unknown kind, or annotators that do not fit it.
        """
        if self.kind not in KINDS:
            raise AnnotationError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "ocr" and (self.ocr is None or self.detector is not None or self.captioner is not None):
            raise AnnotationError(
                "kind ocr: expected an OCR and neither detector nor captioner; the text is the caption"
            )
        if self.kind == "natural" and (self.detector is None or self.ocr is not None):
            raise AnnotationError("kind natural: expected a detector and no OCR")
        self.filters.check()
        return self

    def settings(self) -> dict[str, Any]:
        """What decides the result, as plain data."""
        annotators = {name: describe(getattr(self, name)) for name in ("detector", "captioner", "ocr")}
        return {"kind": self.kind, **annotators, "filters": asdict(self.filters)}


@dataclass
class Item:
    """An image on its way; `dropped` is the name of the filter that took it, and then no later step looks at it."""

    file: ImageFile
    pixels: Image | None = None
    sha256: str = ""
    width: int = 0
    height: int = 0
    caption: str | None = None
    regions: list[Region] = field(default_factory=list)
    found: int = 0
    boxes_dropped: Counter[str] = field(default_factory=Counter)
    dropped: str | None = None
    detail: str = ""

    def drop(self, reason: str, detail: str = "") -> None:
        """Ends its way."""
        self.dropped, self.detail, self.pixels = reason, detail, None


def read(plan: Plan, items: list[Item]) -> list[Item]:
    """Decodes the images and asks the filters of images; one that is broken is dropped with what is wrong with it."""
    for item in items:
        try:
            data = read_file(item.file.path)
            item.pixels = decode(data, name=str(item.file.path))
        except ImageError as error:
            item.drop("unreadable", str(error))
            continue
        item.sha256 = hashlib.sha256(data).hexdigest()
        item.width, item.height = item.pixels.size
        reason = plan.filters.image(item.width, item.height)
        if reason is not None:
            item.drop(reason, f"{item.width} x {item.height} pixels")
    return items


def find(plan: Plan, items: list[Item]) -> list[Item]:
    """Boxes, and with OCR their text; asks the filters of boxes."""
    left, images = _left(items)
    if not left:
        return items
    found: list[list[Region]]
    if plan.ocr is not None:
        origin = plan.ocr.name
        lines = _one_each(plan.ocr.read(images), left, origin)
        found = [[_region(line.box, line.text, line.score, origin) for line in image] for image in lines]
    else:
        assert plan.detector is not None
        origin = plan.detector.name
        detections = _one_each(plan.detector.detect(images), left, origin)
        found = [[_region(d.box, d.label, d.score, origin) for d in image] for image in detections]
    for item, regions in zip(left, found, strict=True):
        item.found = len(regions)
        item.regions, item.boxes_dropped = plan.filters.boxes(regions, item.width, item.height, plan.kind)
        _need_regions(plan, item)
    return items


def caption(plan: Plan, items: list[Item]) -> list[Item]:
    """Captions of the images and of the boxes that are left, and the filters of captions."""
    left, images = _left(items)
    if plan.captioner is not None and left:
        boxes = [[region.box for region in item.regions] for item in left]
        captions = _one_each(plan.captioner.caption(images, boxes), left, plan.captioner.name)
        for item, said in zip(left, captions, strict=True):
            item.caption = said.whole.strip() or None
            regions = zip(item.regions, said.regions, strict=True)
            item.regions = [replace(region, caption=text.strip()) for region, text in regions]
    for item in left:
        item.regions, dropped = plan.filters.captions(item.regions)
        item.boxes_dropped += dropped
        item.pixels = None
        if item.caption is not None and len(item.caption) > MAX_CAPTION:
            item.drop("long_caption", f"{len(item.caption)} characters")
        else:
            _need_regions(plan, item)
    return items


def entry_of(plan: Plan, item: Item) -> Entry:
    """What the journal keeps of an image.

    Raises:
        RecordError: an annotator said what no record can hold.
    """
    entry: Entry = {
        "key": item.file.key,
        "found": item.found,
        "boxes_dropped": dict(sorted(item.boxes_dropped.items())),
    }
    if item.dropped is not None:
        return {**entry, "dropped": item.dropped, "detail": item.detail}
    meta: dict[str, Any] = {"file": item.file.name.encode(errors="surrogateescape").decode(errors="replace")}
    if plan.captioner is not None:
        meta["captioner"] = plan.captioner.name
    record = Record(
        item.file.key, item.width, item.height, item.file.source, plan.kind, item.caption, tuple(item.regions), meta
    )
    return {**entry, "sha256": item.sha256, "record": json.loads(record.to_json())}


def annotate_batch(plan: Plan, files: Sequence[ImageFile]) -> list[Entry]:
    """All steps one after the other."""
    items = [Item(file) for file in files]
    for stage in (read, find, caption):
        items = stage(plan, items)
    return [entry_of(plan, item) for item in items]


def _left(items: list[Item]) -> tuple[list[Item], list[Image]]:
    left = [item for item in items if item.pixels is not None]
    return left, [item.pixels for item in left if item.pixels is not None]


def _one_each(results: list[Any], items: list[Item], name: str) -> list[Any]:
    if len(results) != len(items):
        raise AnnotationError(f"{name}: expected a result for each of {len(items)} images, got {len(results)}")
    return results


def _region(box: Box, text: str, score: float | None, origin: str) -> Region:
    """A region with its box cut at the image's edges and without digits that only repeat the arithmetic's noise."""
    x0, y0, x1, y1 = (round(min(max(float(x), 0.0), 1.0), 6) for x in box)
    return Region((x0, y0, x1, y1), text.strip(), None if score is None else round(float(score), 4), origin)


def _need_regions(plan: Plan, item: Item) -> None:
    if len(item.regions) < plan.filters.regions:
        item.drop("no_regions", f"{len(item.regions)} regions of {item.found} are left")
