"""RefCOCO, RefCOCO+ and RefCOCOg: refs(...).p with instances.json (github.com/lichengunc/refer), or JSON.

Two JSON forms are about: the pickle's list written as JSON, and MDETR's ``finetune_*.json``, a COCO file whose images
come once for each expression, with the expression as ``caption``.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def refcoco(
    refs: Path,
    images: Path,
    drops: Counter[str],
    *,
    instances: Path | None = None,
    split: str | None = None,
    source: str = "refcoco",
) -> Iterator[Sample]:
    """A sample for every image that expressions refer to; each expression is a region with the box of its object.

    Args:
        refs: ``refs(unc).p``, ``refs(google).p`` or ``refs(umd).p``; or a JSON file of either form. A pickle is read as
            plain data; nothing in it is run.
        images: folder of the images (COCO's ``train2014``).
        drops: counts what is left out, by reason.
        instances: ``instances.json`` that belongs to the refs; MDETR's form has none.
        split: of the refs, ``"train"``, ``"val"``, ``"testA"``, ...; required with refs, so that no test data slips in
            unseen. MDETR's form is a file a split.
        source: name of the dataset in the records.

    Raises:
        AnnotationError: a file that is not what it should be, a pickle that holds more than plain data, a split that
            the refs do not have.
    """
    whole = _expressions(refs, instances, split, drops)
    for number, (size, file, expressions) in whole.items():
        regions = []
        for text, corners, where in expressions:
            box = relative_box(corners, size, drops, where)
            if box:
                regions.append(Region(box, text, origin=source))
        record = Record(
            record_key(Path(file).stem),
            size[1],
            size[0],
            source,
            regions=distinct(regions, drops),
            meta={"image_id": number, **({"split": split} if split else {})},
        )
        yield Sample(record, images / file)


_Expression = tuple[str, list[Any], str]  # text, corners in pixels, place in the file
_Images = dict[int, tuple[tuple[int, int], str, list[_Expression]]]  # size, file and expressions by number


def _expressions(refs: Path, instances: Path | None, split: str | None, drops: Counter[str]) -> _Images:
    if refs.suffix == ".json" and not _is_list(refs):
        if instances or split:
            raise AnnotationError(f"{refs}: holds boxes and one split itself; give neither instances nor a split")
        return _of_mdetr(refs, drops)
    if instances is None or split is None:
        missing = "instances" if instances is None else "split"
        raise AnnotationError(f"{refs}: expected {missing} beside refs")
    return _of_refs(refs, instances, split, drops)


def _is_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] != b"{"
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}") from error


def _of_refs(refs: Path, instances: Path, split: str, drops: Counter[str]) -> _Images:
    entries: Iterator[Any] = json_items(refs, "item") if refs.suffix == ".json" else iter(_unpickled(refs))
    wanted: dict[int, list[tuple[str, str]]] = {}  # texts and their places, by annotation
    splits: set[str] = set()
    for i, entry in enumerate(entries):
        where = f"{refs}: [{i}]"
        splits.add(field(entry, "split", str, where))
        if entry["split"] != split:
            continue
        for j, sentence in enumerate(field(entry, "sentences", list, where)):
            place = f"{where}: sentences[{j}]"
            if text := caption_text(field(sentence, "sent", str, place), drops, f"{place}: sent"):
                wanted.setdefault(field(entry, "ann_id", int, where), []).append((text, place))
    if not wanted:
        raise AnnotationError(
            f"{refs}: expected refs of the split {split!r}, found {', '.join(sorted(splits)) or 'none'}"
        )
    found: dict[int, list[_Expression]] = {}
    for i, entry in enumerate(json_items(instances, "annotations.item")):
        where = f"{instances}: annotations[{i}]"
        texts = wanted.pop(field(entry, "id", int, where), None)
        if texts:
            corners = corners_of(field(entry, "bbox", list, where), f"{where}: bbox")
            of_image = found.setdefault(field(entry, "image_id", int, where), [])
            of_image.extend((text, corners, place) for text, place in texts)
    if wanted:
        number, texts = next(iter(wanted.items()))
        raise AnnotationError(f"{texts[0][1]}: annotation {number} is not in {instances}")
    return _with_images(instances, found)


def _with_images(path: Path, found: dict[int, list[_Expression]]) -> _Images:
    images: _Images = {}
    for i, entry in enumerate(json_items(path, "images.item")):
        where = f"{path}: images[{i}]"
        expressions = found.pop(field(entry, "id", int, where), None)
        if expressions:
            images[entry["id"]] = (image_size(entry, where), field(entry, "file_name", str, where), expressions)
    if found:
        number, expressions = next(iter(found.items()))
        raise AnnotationError(f"{expressions[0][2]}: image {number} is not in {path}")
    return images


def _of_mdetr(path: Path, drops: Counter[str]) -> _Images:
    boxes: dict[int, list[tuple[list[Any], str]]] = {}
    for i, entry in enumerate(json_items(path, "annotations.item")):
        where = f"{path}: annotations[{i}]"
        corners = corners_of(field(entry, "bbox", list, where), f"{where}: bbox")
        boxes.setdefault(field(entry, "image_id", int, where), []).append((corners, where))
    images: _Images = {}
    for i, entry in enumerate(json_items(path, "images.item")):
        where = f"{path}: images[{i}]"
        text = caption_text(field(entry, "caption", str, where), drops, f"{where}: caption")
        original = field(entry, "original_id", int, where)
        one = images.setdefault(original, (image_size(entry, where), field(entry, "file_name", str, where), []))
        for corners, place in boxes.pop(field(entry, "id", int, where), []):
            if text:
                one[2].append((text, corners, place))
    if boxes:
        drops["region of an image that is not listed"] += sum(map(len, boxes.values()))
    return images


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists and dicts, and refuses whatever would import or call something."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and refs are plain data")


def _unpickled(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            # The published files were written by Python 2, whose text is bytes.
            content = _PlainUnpickler(file, encoding="utf-8").load()
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}") from error
    except Exception as error:  # of broken bytes the unpickler makes almost any error there is
        raise AnnotationError(f"{path}: no pickle of refs: {error}") from error
    if not isinstance(content, list):
        raise AnnotationError(f"{path}: expected a list of refs, got {type(content).__name__}")
    return content
