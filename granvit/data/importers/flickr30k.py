"""Flickr30k Entities: Sentences/*.txt and Annotations/*.xml (github.com/BryanPlummer/flickr30k_entities)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from granvit.data.importers.base import AnnotationError, Box, Sample, caption_text, distinct, record_key, relative_box
from granvit.data.record import Record, Region

SEVERAL = ("union", "each", "skip")
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]*)\]")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def flickr30k(
    sentences: Path,
    annotations: Path,
    images: Path,
    drops: Counter[str],
    *,
    ids: Path | None = None,
    several: str = "union",
    source: str = "flickr30k",
) -> Iterator[Sample]:
    """A sample for every image; each phrase of its sentences that has boxes is a region.

    Args:
        sentences: folder of the sentences; the first is the record's caption, all are in its meta.
        annotations: folder of the boxes; corners are numbers of pixels, counted from 1, and both are inside.
        images: folder of the images, ``<number>.jpg``.
        drops: counts what is left out, by reason.
        ids: file with the number of an image a line, as ``train.txt``; by default every image with sentences.
        several: what a phrase with several boxes becomes: ``"union"``, one region with the box around them; ``"each"``,
            a region for each; ``"skip"``, none.
        source: name of the dataset in the records.

    Raises:
        AnnotationError: a file that is missing or not what Flickr30k Entities publishes.
    """
    if several not in SEVERAL:
        raise AnnotationError(f"several: expected one of {', '.join(SEVERAL)}, got {several!r}")
    for number in _numbers(sentences, ids):
        boxes = _Boxes(annotations / f"{number}.xml")
        texts, phrases = _sentences(sentences / f"{number}.txt")
        regions = []
        for entity, phrase in phrases:
            text = caption_text(phrase, drops, f"{boxes.path}: phrase")
            for corners in _merged(boxes.of.get(entity, []), several, drops):
                box = relative_box(corners, boxes.size, drops, f"{boxes.path}: entity {entity}")
                if box and text:
                    regions.append(Region(box, text, origin=source))
        record = Record(
            record_key(number),
            boxes.size[1],
            boxes.size[0],
            source,
            caption=caption_text(texts[0], drops, f"{sentences}: {number}") if texts else None,
            regions=distinct(regions, drops),
            meta={"captions": texts},
        )
        yield Sample(record, images / f"{number}.jpg")


def _numbers(sentences: Path, ids: Path | None) -> list[str]:
    if ids is not None:
        try:
            return ids.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise AnnotationError(f"{ids}: {error}") from error
    found = sorted(path.stem for path in sentences.glob("*.txt"))
    if not found:
        raise AnnotationError(f"{sentences}: expected a folder of sentences, <number>.txt, and found none")
    return found


def _sentences(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The sentences as plain text, and the entity and text of every phrase that can have a box."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: {error}") from error
    texts, phrases = [], []
    for number, line in enumerate(lines, 1):
        plain = _PHRASE.sub(lambda match: match[3], line)
        if "/EN#" in plain:
            raise AnnotationError(f"{path}: line {number}: expected phrases as [/EN#1/people a man], got {line[:80]!r}")
        if plain.strip():
            texts.append(" ".join(plain.split()))
        # Entity 0 stands for whatever cannot be seen.
        phrases += [(match[1], match[3]) for match in _PHRASE.finditer(line) if match[1] != "0"]
    return texts, phrases


def _merged(boxes: list[Box], several: str, drops: Counter[str]) -> list[Box]:
    if len(boxes) < 2 or several == "each":
        return boxes
    if several == "skip":
        drops["phrase with several boxes"] += 1
        return []
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return [(min(x0), min(y0), max(x1), max(y1))]


class _Boxes:
    """The boxes of an image by entity, in pixels, and its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            root = ElementTree.parse(path).getroot()
        except OSError as error:
            raise AnnotationError(f"{path}: {error.strerror}") from error
        except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two of encodings it does not know
            raise AnnotationError(f"{path}: no XML: {error}") from error
        self.size = (self._number(root, "size/height"), self._number(root, "size/width"))
        if min(self.size) < 1:
            raise AnnotationError(f"{path}: size: expected a height and width of at least 1, got {self.size}")
        self.of: dict[str, list[Box]] = {}
        for item in root.iter("object"):
            frame = item.find("bndbox")
            if frame is None:  # the whole scene, or something that is not in the image
                continue
            x0, y0, x1, y1 = (self._coordinate(frame, name) for name in _CORNERS)
            for name in item.iter("name"):
                self.of.setdefault(name.text or "", []).append((x0 - 1, y0 - 1, x1, y1))

    def _number(self, parent: ElementTree.Element, path: str) -> int:
        value = self._coordinate(parent, path)
        if not value.is_integer():
            raise AnnotationError(f"{self.path}: {path}: expected a whole number, got {value}")
        return int(value)

    def _coordinate(self, parent: ElementTree.Element, path: str) -> float:
        text = parent.findtext(path)
        try:
            return float(text or "")
        except ValueError:
            raise AnnotationError(f"{self.path}: {path}: expected a number, got {text!r}") from None
