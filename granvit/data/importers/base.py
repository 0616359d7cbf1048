"""What all importers share: samples, the one way from foreign boxes to relative ones, and files read as streams."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from granvit.data.importers.finite_json import finite
from granvit.data.record import MAX_CAPTION, Record, Region
from granvit.errors import MissingDependencyError, UserError

Box = tuple[float, float, float, float]


class AnnotationError(UserError):
    """Annotations that are not what their format says; the text names the file and the place."""


class Sample(NamedTuple):
    """An image as its annotations describe it.

    Attributes:
        record: without the image; width and height are 0 where the annotations do not tell them.
        image: the file, or its bytes.
    """

    record: Record
    image: Path | bytes


def relative_box(corners: Sequence[Any], size: tuple[float, float], drops: Counter[str], where: str) -> Box | None:
    """A box in some unit, relative to its image and cut at the image's edges. Every importer's boxes come this way.

    Args:
        corners: ``x0 y0 x1 y1``; None among them, as some writers put it for NaN, is no finite number.
        size: ``(height, width)`` of the image in the same unit; ``(1, 1)`` for boxes that are relative already.
        drops: counts a box that is dropped, by reason, and under ``"kept: box clipped"`` one that led out of the image
            by more than a thousandth of it.
        where: what an error calls the box.

    Returns:
        None for a box that is not finite, inverted, without area, or outside the image.

    Raises:
        AnnotationError: not four numbers.
    """
    if len(corners) != 4 or not all(x is None or _is_number(x) for x in corners):
        raise AnnotationError(f"{where}: expected a box of four numbers, got {str(list(corners))[:80]}")
    height, width = size
    box = [math.nan if x is None else float(x) / n for x, n in zip(corners, (width, height) * 2, strict=True)]
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        drops["box not finite"] += 1
    elif x1 < x0 or y1 < y0:
        drops["box inverted"] += 1
    elif x1 == x0 or y1 == y0:
        drops["box without area"] += 1
    else:
        clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0))
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            drops["box outside the image"] += 1
            return None
        if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > 1e-3:
            drops["kept: box clipped"] += 1
        return clipped
    return None


def corners_of(box: object, where: str) -> list[Any]:
    """``x0 y0 x1 y1`` of a box that is written as ``x y width height``.

    Raises:
        AnnotationError: not four numbers.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(x is None or _is_number(x) for x in box):
        raise AnnotationError(f"{where}: expected a box of four numbers, got {str(box)[:80]}")
    if None in box:
        return [None] * 4
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: object) -> bool:
    """An integer of at most 64 bits; JSON holds larger ones, datasets do not."""
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64


def caption_text(text: object, drops: Counter[str], where: str) -> str | None:
    """A caption with its spaces in order; None, and counted, where it is empty or longer than a record holds.

    Raises:
        AnnotationError: no text.
    """
    if not isinstance(text, str):
        raise AnnotationError(f"{where}: expected text, got {str(text)[:80]}")
    clean = " ".join(text.encode("utf-8", "replace").decode().split())
    if not clean or len(clean) > MAX_CAPTION:
        drops["caption too long" if clean else "caption empty"] += 1
        return None
    return clean


def distinct(regions: Iterable[Region], drops: Counter[str]) -> tuple[Region, ...]:
    """Each pair of a box and a caption once, in the order in which they came."""
    seen: dict[tuple[Box, str], Region] = {}
    for region in regions:
        if seen.setdefault((region.box, region.caption.casefold()), region) is not region:
            drops["region given twice"] += 1
    return tuple(seen.values())


def record_key(name: object, suffix: str = "") -> str:
    """A key that a record can have: the end of a name, with ``-`` for what keys do not hold."""
    return (re.sub(r"[^A-Za-z0-9_-]+", "-", str(name))[-(90 - len(suffix)) :] or "-") + suffix


def field(entry: object, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a JSON object.

    Raises:
        AnnotationError: the field is missing or of another kind.
    """
    if not isinstance(entry, dict) or name not in entry:
        raise AnnotationError(f"{where}: expected an object with {name}, got {str(entry)[:80]}")
    value = entry[name]
    if not isinstance(value, kind) or (isinstance(value, int) and not _is_whole(value)):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_NAMES[k] for k in kinds if not (k is int and float in kinds))
        raise AnnotationError(f"{where}: {name}: expected {expected}, got {str(value)[:80]!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", list: "a list", type(None): "null"}


def image_size(entry: object, where: str) -> tuple[int, int]:
    """Height and width of an entry that tells them.

    Raises:
        AnnotationError: they are missing or less than 1.
    """
    height, width = field(entry, "height", int, where), field(entry, "width", int, where)
    if height < 1 or width < 1:
        raise AnnotationError(f"{where}: expected a height and width of at least 1, got {height} and {width}")
    return height, width


def json_items(path: Path, prefix: str) -> Iterator[Any]:
    """The elements of a list in a JSON file, one after the other; the file is never held as a whole.

    NaN and Infinity, which Python writes and JSON does not have, are read as null.

    Args:
        path: of the file.
        prefix: ``"item"`` for a list that is the file, ``"name.item"`` for the list that the file's object calls so.

    Raises:
        AnnotationError: the file is missing, not whole JSON, or has no such list.
    """
    ijson = _ijson()
    name = prefix.removesuffix("item").rstrip(".")
    _check_start(path, name)
    count = 0
    with _opened(path) as file:
        try:
            for item in ijson.items(finite(file), prefix, use_float=True, buf_size=1 << 20):
                yield item
                count += 1
            if name and not count and next(ijson.items(finite(file), name), None) != []:
                raise AnnotationError(f"{path}: expected an object with a list {name}, and found no such list")
        except (ijson.JSONError, ValueError) as error:
            told = " ".join(str(error).split())
            raise AnnotationError(f"{path}: no JSON after {count} elements of {name or 'the list'}: {told}") from error


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """The values of a file with one JSON value a line, and what an error calls each; empty lines are passed over.

    Raises:
        AnnotationError: the file is missing, or a line is not JSON.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line), f"{path}: line {number}"
                except ValueError as error:
                    raise AnnotationError(f"{path}: line {number}: no JSON: {error}") from error


def _check_start(path: Path, name: str) -> None:
    with _opened(path) as file:
        start = file.read(64).lstrip(b" \t\r\n")[:1]
    if not start:
        raise AnnotationError(f"{path}: the file is empty")
    if start in (b"\xef", b"\xfe", b"\xff"):
        raise AnnotationError(f"{path}: expected UTF-8 without a byte order mark, which it begins with")
    if start != (b"{" if name else b"["):
        expected = f"an object with a list {name}" if name else "a list"
        raise AnnotationError(
            f"{path}: expected JSON that is {expected}, but it begins with {start.decode('latin1')!r}"
        )


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}") from error


def _ijson() -> Any:
    try:
        import ijson
    except ImportError:
        raise MissingDependencyError("reading large JSON files needs ijson: pip install 'granvit[data]'") from None
    return ijson
