"""Questions and answers about a record: the three tasks of the paper, and which regions of an image they ask about."""

from __future__ import annotations

import math
import random
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from granvit.data.record import KINDS, SIZES, Record, Region
from granvit.errors import UserError
from granvit.geometry import BOX_STYLES, format_box

TASKS = ("global_caption", "bbox_to_caption", "caption_to_bbox")
_PLACEHOLDERS = {"global_caption": set(), "bbox_to_caption": {"box"}, "caption_to_bbox": {"caption"}}


class TaskError(UserError):
    """Settings that make no question; the text names the setting."""


@dataclass(frozen=True)
class Pair:
    """One question and its answer, or a whole conversation, whose later turns see the earlier ones.

    Attributes:
        task: one of :data:`TASKS`, or ``chat`` for what nobody asked for this model.
        question: what is asked.
        answer: what the model is to say.
        region: index of the region in its record; None for the whole image.
        box: of the region, relative to the image; None for the whole image.
        later: the questions and answers of a conversation after the first.
    """

    task: str
    question: str
    answer: str
    region: int | None = None
    box: tuple[float, float, float, float] | None = None
    later: tuple[tuple[str, str], ...] = ()

    def said(self) -> tuple[str, ...]:
        """What the user and the assistant say, in turns."""
        return (self.question, self.answer, *(text for turn in self.later for text in turn))


class Asked(NamedTuple):
    """The pairs of an image, and how many of its regions could not be asked about, by reason."""

    pairs: tuple[Pair, ...]
    skipped: Counter[str]


@dataclass(frozen=True)
class Templates:
    """Wordings of the questions; the defaults are the paper's. Where a task has several, each is as likely.

    ``{box}`` stands for the box in :attr:`bbox_to_caption`, ``{caption}`` for the caption in :attr:`caption_to_bbox`.

    Raises:
        TaskError: a task without a wording, or a wording that lacks its placeholder or has another.
    """

    global_caption: Sequence[str] = ("Describe in detail what is shown in the image in one paragraph",)
    bbox_to_caption: Sequence[str] = (
        "Describe the content contained within the normalized bounding box coordinates {box} in no more than 10 words.",
    )
    caption_to_bbox: Sequence[str] = (
        "Please provide the bounding box coordinate of the region this sentence describes: {caption}",
    )

    def __post_init__(self) -> None:
        for task in TASKS:
            wordings = getattr(self, task)
            if isinstance(wordings, str) or not wordings:
                raise TaskError(f"templates: {task}: expected a list of at least one wording, got {wordings!r}")
            for wording in wordings:
                _check_wording(task, wording)


def _check_wording(task: str, wording: str) -> None:
    try:
        parts = list(string.Formatter().parse(wording))
    except ValueError as error:
        raise TaskError(f"templates: {task}: {wording!r}: {error}") from None
    found = [name for _, name, _, _ in parts if name is not None]
    plain = all(not spec and not conversion for _, _, spec, conversion in parts)
    wanted = _PLACEHOLDERS[task]
    if set(found) != wanted or not plain:
        expected = " and ".join(f"{{{name}}}" for name in wanted) or "no placeholder"
        raise TaskError(f"templates: {task}: expected {expected} in {wording!r}, got {found or 'none'}")


def global_caption(record: Record, wording: str = Templates.global_caption[0]) -> Pair:
    """Asks for the caption of the whole image.

    Raises:
        TaskError: the record has none.
    """
    if not record.caption:
        raise TaskError(f"record {record.key}: caption: expected one to ask for, got {record.caption!r}")
    return Pair("global_caption", wording.format(), record.caption)


def bbox_to_caption(
    record: Record, region: int, wording: str = Templates.bbox_to_caption[0], style: str = "relative"
) -> Pair:
    """Asks what is in the box of a region: Bbox2Caption.

    Args:
        record: of the image as the model sees it; for the style ``"pixels"`` its size is the unit.
        region: index of the region.
        wording: with ``{box}`` in it.
        style: of the box, one of :data:`granvit.geometry.BOX_STYLES`.

    Raises:
        TaskError: the region has no caption.
    """
    found = _captioned(record, region)
    box = format_box(found.box, style, (record.height, record.width))
    return Pair("bbox_to_caption", wording.format(box=box), found.caption, region, found.box)


def caption_to_bbox(
    record: Record, region: int, wording: str = Templates.caption_to_bbox[0], style: str = "relative"
) -> Pair:
    """Asks where the region is that a caption names: Caption2Bbox. The arguments are those of :func:`bbox_to_caption`.

    Raises:
        TaskError: the region has no caption.
    """
    found = _captioned(record, region)
    box = format_box(found.box, style, (record.height, record.width))
    return Pair("caption_to_bbox", wording.format(caption=found.caption), box, region, found.box)


def _captioned(record: Record, region: int) -> Region:
    found = record.regions[region]
    if not found.caption.strip():
        raise TaskError(f"record {record.key}: regions[{region}]: caption: expected one to ask about, got none")
    return found


def ambiguous_captions(record: Record) -> set[int]:
    """Indices of the regions whose caption another region of the image has too, but for case and spaces."""
    names = [_folded(region.caption) for region in record.regions]
    often = Counter(names)
    return {i for i, name in enumerate(names) if name and often[name] > 1}


def _folded(caption: str) -> str:
    return " ".join(caption.casefold().split()).rstrip(" .")


def _no_preference() -> dict[str, dict[str, float]]:
    return {kind: dict.fromkeys(SIZES, 1.0) for kind in KINDS}


@dataclass(frozen=True)
class TaskSampler:
    """Draws the questions about an image. The same ones for the same seed, record key and epoch, in any process.

    A region is drawn by the weight of its kind and size, at most :attr:`regions` of an image and each once, and asked
    about by one task. The global caption, of which an image has only one, is asked as often as its weight demands
    beside the regions that are asked about, and always where there are none. So ``{"global_caption": 1,
    "bbox_to_caption": 4}`` asks for it once in four regions: always in an image with four or more, and in every fourth
    image with one.

    Attributes:
        weights: how often each task is asked, relative to the others; what is not named is not asked.
        regions: of an image that are asked about, at most.
        seed: of all draws.
        size_weights: of the regions, by the record's kind and :meth:`granvit.data.record.Region.size`; 0 leaves them
            out.
        style: of boxes in text, one of :data:`granvit.geometry.BOX_STYLES`; pixels are those of the record's size.
        templates: the wordings.

    Raises:
        TaskError: a setting that is none of these.
    """

    weights: Mapping[str, float]
    regions: int = 8
    seed: int = 0
    size_weights: Mapping[str, Mapping[str, float]] = field(default_factory=_no_preference)
    style: str = "relative"
    templates: Templates = field(default_factory=Templates)

    def __post_init__(self) -> None:
        _check_weights("weights", self.weights, TASKS)
        if not any(self.weights.values()):
            raise TaskError("task sampler: weights: expected at least one above 0")
        if self.regions < 0:
            raise TaskError(f"task sampler: regions: expected at least 0, got {self.regions}")
        if sorted(self.size_weights) != sorted(KINDS):
            raise TaskError(f"task sampler: size_weights: expected {', '.join(KINDS)}, got {list(self.size_weights)}")
        for kind, weights in self.size_weights.items():
            _check_weights(f"size_weights[{kind}]", weights, SIZES)
        if self.style not in BOX_STYLES:
            raise TaskError(f"task sampler: style: expected one of {', '.join(BOX_STYLES)}, got {self.style!r}")

    def __call__(self, record: Record, epoch: int = 0) -> Asked:
        """The pairs of an image, the global caption first.

        A region is skipped and counted where it has no caption, where its size has no weight, and where its box
        rounds to one without area in text. Caption2Bbox does not ask for a caption that several regions of the image
        have; such a region is left to Bbox2Caption, and is skipped and counted where that has no weight.

        Args:
            record: of the image as the model sees it.
            epoch: from 0; each draws anew.
        """
        rng = random.Random(f"{self.seed} {epoch} {record.key}")
        skipped: Counter[str] = Counter()
        tasks = self._tasks(record, skipped)
        pairs = []
        for region in self._drawn(record, list(tasks), rng):
            names = tasks[region]
            task = rng.choices(names, [self.weights[name] for name in names])[0]
            wording = rng.choice(getattr(self.templates, task))
            ask = bbox_to_caption if task == "bbox_to_caption" else caption_to_bbox
            pairs.append(ask(record, region, wording, self.style))
        if record.caption and rng.random() < self._global_share(len(pairs)):
            pairs.insert(0, global_caption(record, rng.choice(self.templates.global_caption)))
        return Asked(tuple(pairs), skipped)

    def _tasks(self, record: Record, skipped: Counter[str]) -> dict[int, list[str]]:
        """The tasks that can ask about each region; what none can is counted."""
        wanted = [task for task in TASKS[1:] if self.weights.get(task, 0) > 0]
        if not wanted:
            return {}
        ambiguous = ambiguous_captions(record) if "caption_to_bbox" in wanted else set()
        tasks = {}
        for i, region in enumerate(record.regions):
            possible = [task for task in wanted if task != "caption_to_bbox" or i not in ambiguous]
            if not region.caption.strip():
                skipped["no caption"] += 1
            elif not self._size_weight(record, i):
                skipped["size without weight"] += 1
            elif not self._has_area_in_text(record, region):
                skipped["box without area in text"] += 1
            elif not possible:
                skipped["ambiguous caption"] += 1
            else:
                tasks[i] = possible
        return tasks

    def _size_weight(self, record: Record, region: int) -> float:
        weights = self.size_weights[record.kind]
        return weights.get(record.regions[region].size(), 0.0)

    def _has_area_in_text(self, record: Record, region: Region) -> bool:
        text = format_box(region.box, self.style, (record.height, record.width))
        x0, y0, x1, y1 = text.strip("[]").split(", ")
        return x0 != x1 and y0 != y1

    def _drawn(self, record: Record, regions: list[int], rng: random.Random) -> list[int]:
        """At most :attr:`regions` of them by weight, each once, in the order of the draws.

        The smallest of exponential variates with the weights as rates is a draw by weight, the next one a draw from
        what is left, and so on (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006).
        """
        order = {i: -math.log(1 - rng.random()) / self._size_weight(record, i) for i in regions}
        return sorted(regions, key=order.__getitem__)[: self.regions]

    def _global_share(self, asked: int) -> float:
        """Probability of the global caption beside `asked` regions."""
        weight = self.weights.get("global_caption", 0.0)
        others = sum(self.weights.values()) - weight
        return 1.0 if weight and not (others and asked) else asked * weight / others if others else 0.0


def _check_weights(name: str, weights: Mapping[str, float], known: Sequence[str]) -> None:
    if not weights or set(weights) - set(known):
        raise TaskError(f"task sampler: {name}: expected weights of {', '.join(known)}, got {list(weights)}")
    for key, weight in weights.items():
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
            raise TaskError(f"task sampler: {name}[{key}]: expected a finite number of at least 0, got {weight!r}")
