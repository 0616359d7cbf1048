"""Conversations to train on, from the JSON files of LLaVA (github.com/haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from granvit.data.images import frames
from granvit.data.importers.base import field, json_items, json_lines
from granvit.data.progress import progress_bar
from granvit.data.sources import image_bytes
from granvit.data.tasks import Pair
from granvit.errors import UserError

IMAGE = "<image>"
_ROLES = ("human", "gpt")


class ConversationError(UserError):
    """An entry that makes no conversation; the text names the file and the entry, counted from 0."""


class Conversations:
    """The entries of a file, in any order, each a conversation about one image or about none.

    An entry has ``conversations``, a list of turns ``{"from": "human" or "gpt", "value": text}`` in which a human asks
    and is answered, and, where it is about one, the path of an ``image``; then ``<image>`` stands once, at the start or
    the end of the first turn. Entries are looked at when they are read, as images are.

    Args:
        file: a JSON list of entries, or one entry a line (``.jsonl``).
        images: folder that the paths of images start from.
        progress: show a bar while the file is read through, which takes a minute for a million entries.

    Raises:
        AnnotationError: the file is missing or no such JSON.
        ConversationError: it has no entries.
    """

    def __init__(self, file: str | Path, images: str | Path, *, progress: bool = False) -> None:
        self.file, self.images = Path(file), Path(images)
        # One run of bytes: a million entries as Python objects take several times as much, and every worker that only
        # looks at one copies its page of memory, since that counts references. A tensor, because workers that are not
        # forked share its memory too.
        text, ends = bytearray(), array("q", [0])
        lines = (entry for entry, _ in json_lines(self.file)) if self.file.suffix == ".jsonl" else None
        bar = progress_bar()
        bar.disable = not progress
        with bar:
            task = bar.add_task(f"reading {self.file.name}", total=None)
            for entry in json_items(self.file, "item") if lines is None else lines:
                text += json.dumps(_needed(entry)).encode()
                ends.append(len(text))
                if len(ends) % 1000 == 0:
                    bar.update(task, completed=len(ends))
        if not text:
            raise ConversationError(f"{self.file}: expected at least one conversation, got none")
        self._text = torch.frombuffer(text, dtype=torch.uint8)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, i: int, size: int, tiles: int) -> tuple[Pair, Tensor]:
        """The conversation of entry i, and its image.

        Args:
            i: from 0.
            size: side of the frames in pixels.
            tiles: of an image beside the overview, at most; see :func:`granvit.data.images.frames`.

        Returns:
            The conversation without ``<image>``, and uint8 ``(frames, 3, size, size)``; no frame without an image.

        Raises:
            ConversationError, AnnotationError, SourceError, ImageError: what is wrong with the entry or its image.
        """
        begin, end = self._ends[i : i + 2].tolist()
        entry = json.loads(self._text[begin:end].numpy().tobytes())
        where = f"{self.file}: [{i}]"
        said = _said(entry, where)
        image = field(entry, "image", str, where) if entry.get("image") is not None else None
        said[0] = _without_image(said, where) if image is not None else said[0]
        for turn, text in enumerate(said):
            if IMAGE in text:
                expected = "an image for it" if image is None else "it once, in the first turn"
                raise ConversationError(
                    f"{where}: conversations[{turn}]: {IMAGE}: expected {expected}, got {text[:80]!r}"
                )
        pair = Pair("chat", said[0], said[1], later=tuple(zip(said[2::2], said[3::2], strict=True)))
        if image is None:
            return pair, torch.empty(0, 3, size, size, dtype=torch.uint8)
        path = self.images / image
        return pair, frames(image_bytes(path, where), (size, size), tiles, name=f"{where}: {path}")[0]


def _needed(entry: Any) -> Any:
    """An entry without what nothing here reads; what is no entry stays as it is, and is named when it is read."""
    return {k: entry[k] for k in ("image", "conversations") if k in entry} if isinstance(entry, dict) else entry


def _said(entry: Any, where: str) -> list[str]:
    """What human and model say in turns."""
    turns = field(entry, "conversations", list, where)
    said = []
    for i, turn in enumerate(turns):
        place = f"{where}: conversations[{i}]"
        role = field(turn, "from", str, place)
        if role not in _ROLES:
            raise ConversationError(f"{place}: from: expected {' or '.join(_ROLES)}, got {role!r}")
        if role != _ROLES[i % 2]:
            raise ConversationError(f"{place}: from: expected {_ROLES[i % 2]}, since turns alternate, got {role}")
        text = field(turn, "value", str, place)
        said.append(text.encode("utf-8", "replace").decode())  # half a surrogate pair is no text for a tokenizer
    if not said or len(said) % 2:
        raise ConversationError(f"{where}: conversations: expected questions with answers, got {len(said)} turns")
    return said


def _without_image(said: list[str], where: str) -> str:
    """The first turn without its ``<image>``, for which a prompt has a place of its own."""
    text = said[0].strip()
    for rest in (text.removeprefix(IMAGE), text.removesuffix(IMAGE)):
        if rest != text and IMAGE not in rest:
            return rest.strip()
    raise ConversationError(
        f"{where}: conversations[0]: expected {IMAGE} once, at the start or the end, got {said[0][:80]!r}"
    )
