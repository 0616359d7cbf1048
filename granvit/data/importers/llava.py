"""LLaVA: conversations about images, with boxes written into the text (github.com/haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from granvit.data.images import ImageError, size_as_shown
from granvit.data.importers.base import (
    AnnotationError,
    Sample,
    caption_text,
    distinct,
    field,
    image_size,
    json_items,
    json_lines,
    record_key,
    relative_box,
)
from granvit.data.record import Record, Region
from granvit.geometry import BOX_STYLES, BoxTransform, parse_boxes

_QUESTION, _ANSWER = ("human", "user"), ("gpt", "assistant")
_ASKS_FOR_CAPTION = re.compile(r"descri(?:be|ption)|caption", re.I)


def llava(
    annotations: Path,
    images: Path,
    drops: Counter[str],
    *,
    style: str = "relative",
    square: bool = False,
    captions: bool = False,
    source: str = "llava",
) -> Iterator[Sample]:
    """A sample for every conversation about one image; the conversation stays in the record's meta as it is.

    A question with one box that asks for a description or caption, and an answer without a box, give a region with the
    answer as its caption; a question without a box and an answer with one, a region whose caption is what follows the
    question's last colon. Every other box gives a region without a caption.

    Args:
        annotations: a JSON list, or one conversation a line (``.jsonl``).
        images: folder that the paths under ``image`` start from.
        drops: counts what is left out, by reason; conversations without an image, or about several, are.
        style: in which boxes are written, one of :data:`granvit.geometry.BOX_STYLES`.
        square: boxes are meant in the image padded to a square, itself in the middle, as in LLaVA-1.5's mix665k.
        captions: the answer of a conversation of one question, without boxes, is the image's caption, as in
            LLaVA-Pretrain.
        source: name of the dataset in the records.

    Raises:
        AnnotationError: a file that is not what LLaVA publishes.
    """
    if style not in BOX_STYLES:
        raise AnnotationError(f"style: expected one of {', '.join(BOX_STYLES)}, got {style!r}")
    lines = annotations.suffix == ".jsonl"
    listed = ((entry, f"{annotations}: [{i}]") for i, entry in enumerate(json_items(annotations, "item")))
    for i, (entry, where) in enumerate(json_lines(annotations) if lines else listed):
        field(entry, "conversations", list, where)
        file = field(entry, "image", (str, list), where) if entry.get("image") else []
        files = [file] if isinstance(file, str) else file
        if len(files) != 1:
            drops["conversation about several images" if files else "conversation without an image"] += 1
            continue
        turns = _turns(entry, where)
        path = images / str(files[0])
        told = image_size(entry, where) if "height" in entry and "width" in entry else None
        size = told or (_size(path) if square or style == "pixels" else (1, 1))
        caption = turns[0][1] if captions and len(turns) == 1 and not parse_boxes(turns[0][1]) else None
        record = Record(
            record_key(entry.get("id", path.stem), f"-{i}"),  # because ids come more than once
            told[1] if told else 0,
            told[0] if told else 0,
            source,
            caption=caption and caption_text(caption, drops, where),
            regions=distinct(_regions(turns, _Frame(style, size, square), source, drops, where), drops) if size else (),
            meta={"conversations": entry["conversations"]},
        )
        yield Sample(record, path)


def _turns(entry: object, where: str) -> list[tuple[str, str]]:
    """Questions with their answers."""
    turns = []
    question = None
    for i, turn in enumerate(field(entry, "conversations", list, where)):
        place = f"{where}: conversations[{i}]"
        speaker, text = field(turn, "from", str, place), field(turn, "value", str, place)
        if speaker in _QUESTION:
            question = text.replace("<image>", " ").strip()
        elif speaker in _ANSWER:
            if question is not None:
                turns.append((question, text.strip()))
            question = None
        elif speaker != "system":
            raise AnnotationError(f"{place}: from: expected human or gpt, got {speaker!r}")
    return turns


def _size(path: Path) -> tuple[int, int] | None:
    """Of an image file; None for one that cannot be read, which whoever reads the sample's image will find."""
    try:
        return size_as_shown(path.read_bytes(), str(path))
    except (OSError, ImageError):
        return None


@dataclass(frozen=True)
class _Frame:
    """In what the boxes of a file are written."""

    style: str
    size: tuple[int, int]
    square: bool

    def boxes(self, text: str) -> list[list[float]]:
        """All boxes in a text, relative to the image; not clipped."""
        if not self.square:
            return [list(box) for box in parse_boxes(text, self.style, self.size)]
        side = max(self.size)
        padding = BoxTransform.letterbox(self.size, (side, side)).inverse()
        found = torch.tensor(parse_boxes(text, self.style, (side, side)), dtype=torch.float64)
        return padding.boxes(found.reshape(-1, 4)).tolist()


def _regions(
    turns: list[tuple[str, str]], frame: _Frame, source: str, drops: Counter[str], where: str
) -> Iterator[Region]:
    for question, answer in turns:
        asked, told = frame.boxes(question), frame.boxes(answer)
        text: str | None = None
        if len(asked) == 1 and not told and _ASKS_FOR_CAPTION.search(question):
            text = caption_text(answer, drops, where)
        elif len(told) == 1 and not asked and ":" in question:
            text = caption_text(question.rpartition(":")[2], drops, where)
        elif asked or told:
            drops["kept: box without a caption"] += len(asked) + len(told)
        for corners in asked + told:
            if box := relative_box(corners, (1, 1), drops, where):
                yield Region(box, text or "", origin=source)
