"""What annotators do, in three small interfaces. Images are upright RGB; boxes are ``x0 y0 x1 y1`` relative to them.

An annotator is a frozen dataclass: its fields are its settings. It loads its model on first use, so that it can be sent
to other processes and other machines as it is, and its settings can be written down beside what it found.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from granvit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
_T = TypeVar("_T")


class AnnotationError(UserError):
    """Annotation that cannot go on; what is finished is safe."""


@dataclass(frozen=True)
class Detection:
    """A box that a detector found; `score` is None where the detector gives none, `label` empty likewise."""

    box: Box
    score: float | None = None
    label: str = ""


@dataclass(frozen=True)
class TextLine:
    """A box of text and what is written in it."""

    box: Box
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Captions:
    """Of one image: as a whole, and of each of its boxes in their order."""

    whole: str
    regions: tuple[str, ...]


class Annotator(Protocol):
    """What all three have; `name` becomes the origin of the regions."""

    @property
    def name(self) -> str:
        """Who found it, with its model."""


class Detector(Annotator, Protocol):
    """Finds objects."""

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """The boxes of each image, in an order that is the same every time."""


class Captioner(Annotator, Protocol):
    """Says what is seen."""

    def caption(self, images: Sequence[Image], boxes: Sequence[Sequence[Box]]) -> list[Captions]:
        """A caption for each image and one for each of its boxes."""


class OCR(Annotator, Protocol):
    """Reads text."""

    def read(self, images: Sequence[Image]) -> list[list[TextLine]]:
        """The lines of text of each image, in reading order."""


def running(default: _T) -> _T:
    """A field that says where or how fast an annotator runs and not what it finds: a run may go on with another."""
    return dataclasses.field(default=default, metadata={"running": True})


def describe(annotator: Annotator | None) -> dict[str, Any] | None:
    """The class and the settings that decide what an annotator finds, as plain data.

    Raises:
        AnnotationError: it is no dataclass.
    """
    if annotator is None:
        return None
    kind = type(annotator).__qualname__
    if not dataclasses.is_dataclass(annotator) or isinstance(annotator, type):
        raise AnnotationError(f"{kind}: expected a dataclass, whose fields are the settings of an annotator")
    fields = [f.name for f in dataclasses.fields(annotator) if not f.metadata.get("running")]
    values = dataclasses.asdict(annotator)
    return {"class": kind, **{name: values[name] for name in fields}}


def loaded_once(load: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """A loader whose result stays for annotators with the same settings, one at a time in each process."""
    return functools.lru_cache(maxsize=1)(load)


def batches(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Consecutive slices of at most `size`.

    Raises:
        ValueError: a size under 1.
    """
    if operator.index(size) < 1:
        raise ValueError(f"batches: size: expected at least 1, got {size}")
    return [items[i : i + size] for i in range(0, len(items), size)]
