"""Images by number, to train on and to evaluate on: shards, scenes, and files of questions with people's answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from granvit.data.images import frames, size_as_shown, tile_grid, tiled
from granvit.data.record import Record
from granvit.data.scenes import SceneComposer
from granvit.data.shards import Shard, open_shard, read_index
from granvit.errors import UserError
from granvit.geometry import BoxTransform

_FROM = 1000  # samples that the share is taken of at least, so that chance decides nothing


class SourceError(UserError):
    """Something to train or to evaluate on that cannot be read; the text names it."""


class Broken:
    """Counts what cannot be read, and says when that is too much.

    A broken sample of a million is left out. More of them mean that the folder or the disk is what is wrong.

    Args:
        most: share of the samples that may be broken, at least 0 and less than 1; of 1,000 where fewer were wanted.

    Attributes:
        wanted: samples so far.
        count: of them that could not be read.
    """

    def __init__(self, most: float) -> None:
        if not 0 <= most < 1:
            raise SourceError(f"max_broken: expected a share of at least 0 and less than 1, got {most}")
        self._most = most
        self.wanted = self.count = 0

    def add(self, wanted: int, reasons: Sequence[str]) -> None:
        """More samples, and why some of them cannot be read.

        Raises:
            SourceError: it is too much.
        """
        self.wanted += wanted
        self.count += len(reasons)
        if reasons and self.count > self._most * max(self.wanted, _FROM):
            raise SourceError(
                f"{self.count} of {self.wanted} samples cannot be read, and max_broken allows {self._most:g} "
                f"(of {_FROM} or more); the last: {reasons[-1]}"
            )


def image_bytes(path: Path, where: str) -> bytes:
    """An image file.

    Args:
        path: of it.
        where: it is named.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}: {path}: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class Question:
    """What people were asked about an image, and answered."""

    number: str
    text: str
    answers: tuple[str, ...]


class Shown(NamedTuple):
    """An image as the model sees it.

    Attributes:
        record: of the image.
        frames: uint8 ``(F, 3, size, size)``: the image letterboxed, and its tiles.
        transform: the way of the image's boxes into the first frame.
        question: of a file of questions; None where the regions of the record are asked about.
    """

    record: Record
    frames: Tensor
    transform: BoxTransform
    question: Question | None = None

    @property
    def pixels(self) -> Tensor:
        """The first frame, ``(3, size, size)``."""
        return self.frames[0]


class Source(Protocol):
    """Images by number.

    Attributes:
        name: in reports.
        asks: whether its images come with questions of their own.
    """

    name: str
    asks: bool

    def __len__(self) -> int: ...

    def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
        """Image i.

        Args:
            i: from 0.
            size: side of the frames in pixels.
            flip: exchange left and right.
            tiles: beside the overview, at most; see :func:`granvit.data.images.frames`.

        Raises:
            UserError: it cannot be read; the text names it.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What the images depend on, as plain data."""
        ...


class Shards:
    """A folder of shards, read in any order; files are opened when they are needed, in the process that needs them.

    Raises:
        ShardError: no index.
    """

    asks = False
    _OPEN = 32  # shards at a time

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self._infos = read_index(folder)
        self._ends = np.cumsum([info.samples for info in self._infos])
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
        """See :class:`Source`."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        within = i - (int(self._ends[number - 1]) if number else 0)
        shard = self._open.pop(number, None) or open_shard(self.folder, self._infos[number])
        self._open[number] = shard  # the last of them is the one that was used last
        if len(self._open) > self._OPEN:
            self._open.pop(next(iter(self._open))).close()
        record = shard.record(within)
        name = f"{shard.path.name}: {record.key}"
        return Shown(record, *frames(shard.image(within), (size, size), tiles, flip=flip, name=name))

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        digest = hashlib.sha256("".join(info.sha256 for info in self._infos).encode()).hexdigest()
        return {"shards": str(self.folder.resolve()), "sha256": digest}


class Scenes:
    """Scenes that are composed when they are looked at.

    Args:
        count: how many; the first is number 0.
        kind, split, seed, size, names, unique: see :class:`granvit.data.scenes.SceneComposer`.
    """

    asks = False

    def __init__(
        self,
        count: int,
        *,
        kind: str = "mixed",
        split: str = "heldout",
        seed: int = 0,
        size: int = 256,
        names: tuple[str, ...] = (),
        unique: bool = True,
    ) -> None:
        self._composer = SceneComposer(seed, split, size=size, kind=kind, names=names or None, unique=unique)
        self._count = count
        self.name = f"scenes-{kind}-{split}"

    def __len__(self) -> int:
        return self._count

    def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
        """See :class:`Source`."""
        record, image = self._composer[i]
        shown, frame = (image.height, image.width), (size, size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Shown(record, *tiled(pixels, shown, frame, tile_grid(shown, frame, tiles), flip=flip))

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        composer = self._composer
        settings = {name: getattr(composer, name) for name in ("kind", "split", "seed", "size", "names", "unique")}
        return {"scenes": settings, "count": self._count}


class Questions:
    """A file of questions about images, one object a line: ``question_id``, ``image``, ``text`` (or ``question``) and
    ``answers``, the layout of LLaVA's question files with people's answers in it.

    Args:
        path: of the file.
        images: folder that the paths in it start from.

    Raises:
        SourceError: it cannot be read, or a line is no such object; the text names the line.
    """

    asks = True

    def __init__(self, path: str | Path, images: str | Path) -> None:
        self.path, self.images = Path(path), Path(images)
        self.name = self.path.stem
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror}") from error
        self._sha256 = hashlib.sha256(data).hexdigest()
        self._entries = list(self._parsed(data))

    def _parsed(self, data: bytes) -> Iterator[tuple[str, Question]]:
        seen: set[str] = set()
        for number, line in enumerate(data.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{self.path}: line {number}"
            try:
                plain = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{where}: expected JSON: {error}") from None
            image, question = _question(plain, where)
            if question.number in seen:
                raise SourceError(f"{where}: question_id: {question.number} is there already")
            seen.add(question.number)
            yield image, question

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
        """See :class:`Source`."""
        file, question = self._entries[i]
        path, where = self.images / file, f"{self.path}: question {question.number}"
        data, name = image_bytes(path, where), f"{where}: {path}"
        height, width = size_as_shown(data, name)
        shown = frames(data, (size, size), tiles, flip=flip, name=name)
        return Shown(Record(f"{i:08d}", width, height, self.name), *shown, question)

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return {
            "questions": str(self.path.resolve()),
            "sha256": self._sha256,
            "images": str(self.images.resolve()),
        }


def _question(plain: Any, where: str) -> tuple[str, Question]:
    if not isinstance(plain, dict):
        raise SourceError(f"{where}: expected an object, got {str(plain)[:80]}")
    image, text = plain.get("image"), plain.get("text", plain.get("question"))
    number, answers = plain.get("question_id"), plain.get("answers")
    if not isinstance(number, (int, str)) or isinstance(number, bool):
        raise SourceError(f"{where}: question_id: expected a number or text, got {number!r}")
    for name, value in (("image", image), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            raise SourceError(f"{where}: {name}: expected text, got {value!r}")
    if not isinstance(answers, list) or not answers or not all(isinstance(x, str) for x in answers):
        raise SourceError(f"{where}: answers: expected a list of at least one text, got {str(answers)[:80]}")
    return str(image), Question(str(number), str(text).replace("<image>", "").strip(), tuple(answers))
