"""How good an annotator is, measured on images whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from granvit.annotate.filters import Filters, box_iou
from granvit.annotate.inputs import ImageFile
from granvit.annotate.interfaces import OCR, AnnotationError, Captioner, Detector
from granvit.annotate.stages import Item, Plan, caption, find
from granvit.data.images import decode
from granvit.data.record import Record, Region
from granvit.data.shards import open_shard, read_index

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = (16, 32, 96)  # pixels of a box's shorter side, where one row of the table ends and the next begins


@dataclass
class Count:
    """Regions of one size.

    Attributes:
        truth: that are there.
        matched: of them, that were found.
        exact: of those, that have the same text.
    """

    truth: int = 0
    matched: int = 0
    exact: int = 0

    @property
    def recall(self) -> float | None:
        """Share of the truth that was found; None without any truth."""
        return self.matched / self.truth if self.truth else None

    @property
    def exact_rate(self) -> float | None:
        """Share of what was found that has the same text; None where nothing was found."""
        return self.exact / self.matched if self.matched else None


@dataclass
class Audit:
    """What was found of a known truth.

    Attributes:
        iou: least intersection over union of a box and its truth.
        images: that were looked at.
        found: regions that were found; those that lie on truth which the filters leave out are not counted.
        sizes: counts by the shorter side of the true box, by name, smallest first.
    """

    iou: float
    images: int = 0
    found: int = 0
    sizes: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in _size_names()})

    @property
    def all(self) -> Count:
        """Of all sizes."""
        counts = self.sizes.values()
        return Count(*(sum(getattr(c, name) for c in counts) for name in ("truth", "matched", "exact")))

    @property
    def precision(self) -> float | None:
        """Share of what was found that is there; None where nothing was found."""
        return self.all.matched / self.found if self.found else None

    def add(self, truth: Record, found: Sequence[Region], filters: Filters) -> None:
        """Counts an image.

        Args:
            truth: its record.
            found: its regions as the annotator says, already filtered.
            filters: true boxes that these leave out are neither missed nor wrongly found.
        """
        self.images += 1
        kept, _ = filters.boxes(truth.regions, truth.width, truth.height, truth.kind)
        ids = {id(region) for region in kept}
        left_out = [region for region in truth.regions if id(region) not in ids]
        pairs = match(found, kept, self.iou)
        taken = {i for i, _ in pairs}
        others = [region for i, region in enumerate(found) if i not in taken]
        self.found += len(found) - len(match(others, left_out, self.iou))
        for region in kept:
            self.sizes[_size_name(region, truth)].truth += 1
        for i, j in pairs:
            count = self.sizes[_size_name(kept[j], truth)]
            count.matched += 1
            count.exact += _plain(found[i].caption) == _plain(kept[j].caption)

    def to_json(self) -> bytes:
        """All counts and rates."""
        rows = {
            name: {**vars(count), "recall": count.recall, "exact_rate": count.exact_rate}
            for name, count in {"all": self.all, **self.sizes}.items()
        }
        plain = {"iou": self.iou, "images": self.images, "found": self.found, "precision": self.precision, "rows": rows}
        return json.dumps(plain, indent=1).encode()


def audit(
    samples: Iterable[tuple[Record, Image]],
    *,
    kind: str = "natural",
    detector: Detector | None = None,
    captioner: Captioner | None = None,
    ocr: OCR | None = None,
    filters: Filters | None = None,
    iou: float = 0.5,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda images: None,
) -> Audit:
    """Annotates images whose truth is known and compares.

    Found boxes are matched with true ones one to one, the highest score first, each with the true box left that
    it overlaps most. Texts are the same that differ only in spaces and line breaks; without a captioner the text of a
    natural region is the detector's label.

    Args:
        samples: records with their images, upright RGB; records of another kind are passed over.
        kind: ``"natural"`` or ``"ocr"``.
        detector: as for :func:`granvit.annotate.annotate`.
        captioner: likewise.
        ocr: likewise.
        filters: of boxes and captions, likewise; those of images are not asked.
        iou: least intersection over union of a box and its truth.
        batch_size: images that annotators see together.
        progress: is told after each batch how many images were looked at.

    Raises:
        AnnotationError: annotators that do not fit the kind, an image of another size than its record says, or no
            sample of this kind.
    """
    if not 0 < iou <= 1:
        raise AnnotationError(f"audit: iou: expected more than 0 and at most 1, got {iou}")
    plan = Plan(kind, detector, captioner, ocr, filters or Filters()).check()
    result = Audit(iou)
    batch: list[tuple[Record, Item]] = []
    for record, image in samples:
        if record.kind != kind:
            continue
        if image.size != (record.width, record.height):
            raise AnnotationError(
                f"record {record.key}: says {record.width} x {record.height} pixels, its image has "
                f"{image.width} x {image.height}"
            )
        file = ImageFile(record.key, record.key, Path(record.key), record.source)
        batch.append((record, Item(file, image, width=record.width, height=record.height)))
        if len(batch) == batch_size:
            _annotated(plan, batch, result)
            progress(result.images)
            batch = []
    _annotated(plan, batch, result)
    if not result.images:
        raise AnnotationError(f"audit: no sample of kind {kind}")
    return result


def shard_samples(folder: str | Path) -> Iterator[tuple[Record, Image]]:
    """The records of a folder of shards with their images.

    Raises:
        ShardError, RecordError, ImageError: a part that cannot be read.
    """
    for info in read_index(folder):
        with open_shard(folder, info) as shard:
            for record, data, _ in shard:
                yield record, decode(data, name=str(shard.path / record.key))


def match(found: Sequence[Region], truth: Sequence[Region], iou: float) -> list[tuple[int, int]]:
    """Positions of a found and a true region each, one to one.

    The found ones choose in the order of their scores (those without one last), each the true one left that it overlaps
    most.

    Args:
        found: regions that an annotator found.
        truth: regions that are there.
        iou: least intersection over union of a pair.
    """
    scores = [-1.0 if region.score is None else region.score for region in found]
    left = list(range(len(truth)))
    pairs = []
    for i in sorted(range(len(found)), key=lambda i: -scores[i]):
        overlap, best = max(((box_iou(found[i].box, truth[j].box), j) for j in left), default=(0.0, -1))
        if overlap >= iou:
            left.remove(best)
            pairs.append((i, best))
    return pairs


def _annotated(plan: Plan, batch: list[tuple[Record, Item]], result: Audit) -> None:
    items = caption(plan, find(plan, [item for _, item in batch]))
    for (record, _), item in zip(batch, items, strict=True):
        result.add(record, item.regions, plan.filters)


def _size_names() -> list[str]:
    edges = [0, *SIZES]
    return [*(f"{low} to {high} px" for low, high in zip(edges, SIZES, strict=False)), f"from {SIZES[-1]} px"]


def _size_name(region: Region, record: Record) -> str:
    x0, y0, x1, y1 = region.box
    short = min((x1 - x0) * record.width, (y1 - y0) * record.height)
    return _size_names()[sum(short >= size for size in SIZES)]


def _plain(text: str) -> str:
    return " ".join(text.split())
