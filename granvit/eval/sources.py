"""Images to evaluate on, with what is known of them: shards, scenes, and files of questions with people's answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from granvit.data.images import frame, size_as_shown
from granvit.data.record import Record
from granvit.data.scenes import SceneComposer
from granvit.data.shards import Shard, open_shard, read_index, sha256
from granvit.errors import UserError
from granvit.geometry import BoxTransform


class SourceError(UserError):
    """Something to evaluate on that cannot be read; the text names it."""


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
        pixels: uint8 ``(3, size, size)``, letterboxed.
        transform: the way of the image's boxes into the frame.
        question: of a file of questions; None where the regions of the record are asked about.
    """

    record: Record
    pixels: Tensor
    transform: BoxTransform
    question: Question | None = None


class Source(Protocol):
    """Images by number.

    Attributes:
        name: in reports.
        asks: whether its images come with questions of their own.
    """

    name: str
    asks: bool

    def __len__(self) -> int: ...

    def read(self, i: int, size: int) -> Shown:
        """Image i in a frame of this side in pixels."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the images depend on, as plain data."""
        ...


class Shards:
    """A folder of shards.

    Raises:
        ShardError: no index.
    """

    asks = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self._infos = read_index(folder)
        self._ends = np.cumsum([info.samples for info in self._infos])
        self._open: tuple[int, Shard] | None = None  # images are read in their order, hence one shard at a time

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, i: int, size: int) -> Shown:
        """See :class:`Source`."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = (number, open_shard(self.folder, self._infos[number]))
        shard = self._open[1]
        within = i - (int(self._ends[number - 1]) if number else 0)
        record = shard.record(within)
        pixels, transform = frame(shard.image(within), (size, size), name=f"{shard.path.name}: {record.key}")
        return Shown(record, pixels, transform)

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        digest = hashlib.sha256("".join(info.sha256 for info in self._infos).encode()).hexdigest()
        return {"shards": str(self.folder.resolve()), "sha256": digest}


class Scenes:
    """Scenes that are composed when they are looked at.

    Args:
        count: how many.
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

    def read(self, i: int, size: int) -> Shown:
        """See :class:`Source`."""
        record, image = self._composer[i]
        transform = BoxTransform.letterbox((image.height, image.width), (size, size))
        return Shown(record, transform.pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1)), transform)

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

    def read(self, i: int, size: int) -> Shown:
        """See :class:`Source`.

        Raises:
            SourceError: there is no such image.
            ImageError: it cannot be read.
        """
        file, question = self._entries[i]
        path = self.images / file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}; {self.path} asks about it") from error
        height, width = size_as_shown(data, str(path))
        pixels, transform = frame(data, (size, size), name=str(path))
        return Shown(Record(f"{i:08d}", width, height, self.name), pixels, transform, question)

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


def of_identity(plain: Mapping[str, Any]) -> Source:
    """The source that an evaluation was made with, from the ``config`` of its ``evaluation.json``.

    Raises:
        UserError: its files are not there any more.
        ValueError: it is no identity of a source.
    """
    if "shards" in plain:
        return Shards(plain["shards"])
    if "scenes" in plain:
        settings = plain["scenes"]
        return Scenes(plain["count"], **{**settings, "names": tuple(settings["names"] or ())})
    if "questions" in plain:
        return Questions(plain["questions"], plain["images"])
    raise ValueError(f"of_identity: expected shards, scenes or questions, got {sorted(plain)}")


def chosen(source: Source, count: int | None, seed: int) -> list[int]:
    """Numbers of the images to take of a source, in order: all, or so many drawn at random."""
    everything = range(len(source))
    if count is None or count >= len(everything):
        return list(everything)
    return sorted(random.Random(seed).sample(everything, count))


def checksum(folder: Path) -> str:
    """One checksum of a model's folder: of the names and contents of its weights and settings."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()
