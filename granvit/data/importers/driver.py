"""Writes the samples of any importer into shards, with each image looked at on the way."""

from __future__ import annotations

import inspect
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from granvit.data.images import ImageError, decode, shard_extension, size_as_shown
from granvit.data.importers.base import AnnotationError, Sample
from granvit.data.importers.coco import coco
from granvit.data.importers.flickr30k import flickr30k
from granvit.data.importers.jsonl import jsonl
from granvit.data.importers.llava import llava
from granvit.data.importers.refcoco import refcoco
from granvit.data.importers.visual_genome import visual_genome
from granvit.data.record import Record
from granvit.data.shards import ShardWriter

FORMATS: dict[str, Callable[..., Iterator[Sample]]] = {
    "coco": coco,
    "refcoco": refcoco,
    "visual-genome": visual_genome,
    "flickr30k": flickr30k,
    "llava": llava,
    "jsonl": jsonl,
}
# Every pixel of a file is decoded to see that it is whole, but a JPEG needs an eighth of the work at this size.
_LOOK = (64, 64)


@dataclass
class ImportReport:
    """What became of a dataset.

    Attributes:
        samples: written.
        regions: of them.
        counts: what was left out, by reason; what begins with ``"kept: "`` was changed or is unusual, and written.
    """

    samples: int = 0
    regions: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def import_dataset(
    format: str,
    *,
    out: str | Path,
    samples_per_shard: int = 1000,
    append: bool = False,
    skip_broken: bool = False,
    limit: int | None = None,
    progress: Callable[[ImportReport], None] | None = None,
    **options: Any,
) -> ImportReport:
    """Reads a dataset and writes its samples into shards, in its order.

    Images keep their bytes; what shards do not hold, such as GIF, becomes PNG. Every image is decoded once to see that
    it is whole. Boxes are relative, so an image may be a smaller or larger copy of the one that was annotated.

    Args:
        format: one of :data:`FORMATS`.
        out: folder for the shards.
        samples_per_shard: at most.
        append: go on after the shards that are there.
        skip_broken: leave out and count images that are missing, broken, or of another shape than the annotated ones.
        limit: stop after so many samples.
        progress: called after every sample with the report so far.
        **options: of the importer, see :data:`FORMATS`.

    Raises:
        AnnotationError: an unknown format or option, annotations that cannot be read, or nothing to import.
        ImageError: an image that is missing, broken or of another shape, unless they are skipped.
        ShardError: the folder cannot be written; finished shards are whole.
    """
    report = ImportReport()
    samples = _samples(format, options, report.counts)
    anew = "make room and import again into an empty folder"
    with ShardWriter(out, samples=samples_per_shard, append=append, after_error=anew) as writer:
        usable = (found for sample in samples if (found := _looked_at(sample, skip_broken, report.counts)))
        for record, image, extension in islice(usable, limit):
            writer.add(record, image, extension)
            report.samples += 1
            report.regions += len(record.regions)
            if progress is not None:
                progress(report)
        if not report.samples:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(report.counts.items()))
            raise AnnotationError(f"{format}: found nothing to import; left out: {reasons or 'nothing'}")
    return report


def _samples(format: str, options: dict[str, Any], counts: Counter[str]) -> Iterator[Sample]:
    if format not in FORMATS:
        raise AnnotationError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    importer = FORMATS[format]
    try:
        inspect.signature(importer).bind(**options, drops=counts)
    except TypeError as error:
        raise AnnotationError(f"{format}: {error}") from None
    return importer(**options, drops=counts)


def _looked_at(sample: Sample, skip_broken: bool, counts: Counter[str]) -> tuple[Record, bytes, str] | None:
    """Record with the image's true size, its bytes and extension; None for what is left out."""
    record = sample.record
    if record.caption is None and not record.regions and "conversations" not in record.meta:
        counts["image of which nothing is told"] += 1
        return None
    name = str(sample.image) if isinstance(sample.image, Path) else f"image of {record.key}"
    try:
        data = _bytes(sample.image, name)
        extension = shard_extension(data, name)
        decode(data, _LOOK, name)
        record = _sized(record, size_as_shown(data, name), name, counts)
    except ImageError as error:
        if not skip_broken:
            raise
        counts[_REASONS[type(error)]] += 1
        return None
    if extension is None:
        file = io.BytesIO()
        decode(data, name=name).save(file, "PNG")
        data, extension = file.getvalue(), "png"
        counts["kept: image rewritten as PNG"] += 1
    return record, data, extension


class _MissingImageError(ImageError):
    """An image that the annotations name and no one can open."""


class _OtherImageError(ImageError):
    """An image that cannot be the annotated one."""


_REASONS = {ImageError: "image broken", _MissingImageError: "image missing", _OtherImageError: "image of another shape"}


def _bytes(image: Path | bytes, name: str) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise _MissingImageError(f"{name}: {error.strerror}") from error


def _sized(record: Record, size: tuple[int, int], name: str, counts: Counter[str]) -> Record:
    """The record with the size that the image has."""
    height, width = size
    if not record.width or (record.height, record.width) == size:
        return replace(record, width=width, height=height)
    # Of copies in other sizes, the shorter side is rounded to whole pixels.
    if abs(record.width * height - record.height * width) > max(record.width, record.height, width, height):
        raise _OtherImageError(
            f"{name}: is {width} x {height} pixels as it is shown, and was annotated at "
            f"{record.width} x {record.height}: not the same image, or turned since"
        )
    counts["kept: image of another size"] += 1
    return replace(record, width=width, height=height)
