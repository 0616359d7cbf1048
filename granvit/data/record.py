"""One image and what is known of its regions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from granvit.errors import UserError

KINDS = ("natural", "ocr")
SIZES = ("small", "medium", "large")
MAX_CAPTION = 4096  # characters; what is longer is no caption
_REGION_FIELDS = ("box", "caption", "score", "origin")
_RECORD_FIELDS = ("key", "width", "height", "source", "kind", "caption", "regions", "meta")


class RecordError(UserError):
    """A record that says what no image can be; the text names the record and the field."""


@dataclass(frozen=True)
class Region:
    """A box and its caption.

    Attributes:
        box: ``x0 y0 x1 y1`` relative to the image, 0 to 1, ordered.
        caption: what is in the box; for ocr images the text that is written there. Empty where nothing is known yet.
        score: of the detector or captioner, 0 to 1; None where there was none.
        origin: who found it: a dataset, a model, a person.
    """

    box: tuple[float, float, float, float]
    caption: str = ""
    score: float | None = None
    origin: str = ""

    def area(self) -> float:
        """Share of the image."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def size(self) -> str:
        """``"small"``, ``"medium"`` or ``"large"``: COCO's 32 and 96 pixels of a square's side, in an image of 512."""
        side = math.sqrt(self.area())
        return "small" if side < 32 / 512 else "medium" if side < 96 / 512 else "large"


@dataclass(frozen=True)
class Record:
    """An image's size, origin, caption and regions; the image itself lies beside it in a shard.

    Attributes:
        key: names the sample in its dataset; at most 90 letters, digits, ``_`` and ``-``.
        width: of the image in pixels, as it is shown (after its EXIF orientation).
        height: likewise.
        source: the dataset or folder that the image came from.
        kind: ``"natural"`` or ``"ocr"``.
        caption: of the whole image, or None.
        regions: in the order in which they were found.
        meta: anything else worth keeping that JSON can hold.
    """

    key: str
    width: int
    height: int
    source: str
    kind: str = "natural"
    caption: str | None = None
    regions: tuple[Region, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def check(self) -> Record:
        """The record itself.

        Raises:
            RecordError: a field holds what it cannot.
        """
        if not isinstance(self.key, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,90}", self.key):
            raise RecordError(f"record {self.key!r}: key: expected 1 to 90 letters, digits, _ and -")
        for name in ("width", "height"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecordError(f"record {self.key}: {name}: expected an integer of at least 1, got {value!r}")
        if self.kind not in KINDS:
            raise RecordError(f"record {self.key}: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        _check_text(self.key, "source", self.source)
        if self.caption is not None:
            _check_text(self.key, "caption", self.caption)
        for i, region in enumerate(self.regions):
            _check_region(self.key, f"regions[{i}]", region)
        return self

    def with_regions(self, regions: tuple[Region, ...]) -> Record:
        """The same image with other regions."""
        return replace(self, regions=regions)

    def to_json(self) -> bytes:
        """UTF-8 JSON in one line, the same bytes for the same record.

        Raises:
            RecordError: a field holds what it cannot.
        """
        self.check()
        plain = {name: getattr(self, name) for name in _RECORD_FIELDS}
        plain["regions"] = [{name: getattr(r, name) for name in _REGION_FIELDS} for r in self.regions]
        try:
            return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (ValueError, TypeError, RecursionError) as error:  # what check() looks at can all be written
            raise RecordError(f"record {self.key}: meta: expected what JSON in UTF-8 can hold: {error}") from None

    @classmethod
    def from_json(cls, data: bytes | str, name: str = "record") -> Record:
        """Reads what :meth:`to_json` wrote.

        Args:
            data: the JSON.
            name: what an error calls it.

        Raises:
            RecordError: it is not UTF-8, not JSON, or holds what a record cannot.
        """
        try:
            plain = json.loads(data)
        except UnicodeDecodeError:
            raise RecordError(f"{name}: expected UTF-8 text") from None
        except ValueError as error:
            raise RecordError(f"{name}: expected JSON: {error}") from None
        if not isinstance(plain, dict) or not isinstance(plain.get("regions"), list):
            raise RecordError(f"{name}: expected an object with regions, got {str(plain)[:80]}")
        unknown = sorted(set(plain) - set(_RECORD_FIELDS))
        missing = [f for f in ("key", "width", "height", "source", "kind") if f not in plain]
        if unknown or missing:
            raise RecordError(f"{name}: fields missing: {missing or 'none'}, unknown: {unknown or 'none'}")
        regions = tuple(_region(f"{name}: regions[{i}]", r) for i, r in enumerate(plain.pop("regions")))
        return cls(**{**plain, "meta": plain.get("meta") or {}}, regions=regions).check()


def _region(name: str, plain: object) -> Region:
    if not isinstance(plain, dict) or "box" not in plain or set(plain) - set(_REGION_FIELDS):
        raise RecordError(f"{name}: expected an object of {', '.join(_REGION_FIELDS)}, got {str(plain)[:80]}")
    box = plain["box"]
    # JSON's whole numbers have no end, those of a float do.
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(x, (int, float)) and not x > 1e300 for x in box)
    ):
        raise RecordError(f"{name}: box: expected four numbers, got {str(box)[:80]}")
    return Region(**{**plain, "box": tuple(float(x) for x in box)})


def _check_region(key: str, name: str, region: Region) -> None:
    x0, y0, x1, y1 = region.box
    if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):  # and so for NaN
        raise RecordError(
            f"record {key}: {name}: box: expected 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1, got {list(region.box)}"
        )
    _check_text(key, f"{name}: caption", region.caption)
    if region.score is not None and not (isinstance(region.score, (int, float)) and abs(region.score) < math.inf):
        raise RecordError(f"record {key}: {name}: score: expected a finite number or null, got {region.score!r}")
    _check_text(key, f"{name}: origin", region.origin)


def _check_text(key: str, name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RecordError(f"record {key}: {name}: expected a string, got {text!r}")
    if len(text) > MAX_CAPTION:
        raise RecordError(f"record {key}: {name}: expected at most {MAX_CAPTION} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"record {key}: {name}: expected text that UTF-8 can hold, got {text[:40]!r}") from None
