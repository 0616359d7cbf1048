"""What is asked about the regions of an image, and the company that each of them is in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from granvit.data.record import Record
from granvit.data.sources import Shown
from granvit.data.tasks import TASKS, Pair, ambiguous_captions, bbox_to_caption, caption_to_bbox, global_caption
from granvit.errors import UserError
from granvit.eval.metrics import Box, overlap
from granvit.geometry import BOX_STYLES, BoxTransform, clip, format_box

QUESTION = "question"  # the task of a question that comes with its image
PROMPTS = ("text", "region", "box", "mixed")
_COUNTS = ((1, "1"), (4, "2-4"), (9, "5-9"))


class SettingsError(UserError):
    """A setting of an evaluation that is not one; the text names it."""


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        tasks: of :data:`granvit.data.tasks.TASKS`, about images without questions of their own.
        regions: of an image that each task asks about, at most, drawn at random; None is all.
        prompt: how Bbox2Caption names its region: one of :data:`PROMPTS`; ``mixed`` draws between text and region.
        style: of boxes in text, one of :data:`granvit.geometry.BOX_STYLES`.
        ambiguous: whether Caption2Bbox asks for captions that several boxes of the image have, as RefCOCO's own
            evaluation does.
        seed: of the draws.

    Raises:
        SettingsError: a setting that is none of these.
    """

    tasks: tuple[str, ...] = TASKS[1:]
    regions: int | None = None
    prompt: str = "text"
    style: str = "relative"
    ambiguous: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or set(self.tasks) - set(TASKS) or len(set(self.tasks)) < len(self.tasks):
            raise SettingsError(f"tasks: expected some of {', '.join(TASKS)}, each once, got {list(self.tasks)}")
        for name, value, known in (("prompt", self.prompt, PROMPTS), ("style", self.style, BOX_STYLES)):
            if value not in known:
                raise SettingsError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.regions is not None and self.regions < 1:
            raise SettingsError(f"regions: expected at least 1, got {self.regions}")


@dataclass(frozen=True)
class Asked:
    """A question about an image.

    Attributes:
        pair: as the model is asked; its box is relative to the frame.
        references: the right answers.
        box: of the region, relative to the image; None for the whole image.
        region: number of the region in the record.
        groups: of which it is a part, by what they are made: ``size``, ``regions``, ``covered``, ``prompt``.
    """

    pair: Pair
    references: tuple[str, ...]
    box: Box | None = None
    region: int | None = None
    groups: dict[str, str] = field(default_factory=dict)


def ask(shown: Shown, asking: Asking, skipped: Counter[str]) -> list[Asked]:
    """The questions about an image, the same for the same settings and record.

    Bbox2Caption asks once about each box, and every caption of that box is right. Caption2Bbox asks for each caption.

    Args:
        shown: the image.
        asking: how.
        skipped: counts regions that could not be asked about, by reason.
    """
    if shown.question is not None:
        pair = Pair(QUESTION, shown.question.text, shown.question.answers[0])
        return [Asked(pair, shown.question.answers)]
    record, framed = shown.record, _framed(shown)
    crowd = crowding(record)
    found: list[Asked] = []
    for task in asking.tasks:
        rng = random.Random(f"{asking.seed} {task} {record.key}")
        if task == "global_caption":
            if record.caption:
                found.append(Asked(global_caption(record), (record.caption,)))
            else:
                skipped["no global caption"] += 1
            continue
        regions = _regions(task, framed, asking, skipped)
        if asking.regions is not None and len(regions) > asking.regions:
            skipped["more regions than asked for"] += len(regions) - asking.regions
            regions = sorted(rng.sample(regions, asking.regions))
        for i in regions:
            pair, prompt = _pair(task, framed, i, asking, rng)
            groups = {"size": record.regions[i].size(), **crowd[i], **({"prompt": prompt} if prompt else {})}
            found.append(Asked(pair, _references(task, record, i, pair), record.regions[i].box, i, groups))
    return found


def _framed(shown: Shown) -> Record:
    """The record of the frame: its size, and all regions where they are in it."""
    corners = torch.tensor([region.box for region in shown.record.regions], dtype=torch.float64).reshape(-1, 4)
    boxes = clip(shown.transform.boxes(corners))[0].tolist()  # rounding may lead out of the frame by the last bit
    regions = tuple(
        replace(region, box=(box[0], box[1], box[2], box[3]))
        for region, box in zip(shown.record.regions, boxes, strict=True)
    )
    height, width = shown.transform.target
    return replace(shown.record, width=width, height=height, regions=regions)


def _regions(task: str, record: Record, asking: Asking, skipped: Counter[str]) -> list[int]:
    """Of a record, those that a task can ask about; the others are counted."""
    ambiguous = set() if asking.ambiguous or task != "caption_to_bbox" else ambiguous_captions(record)
    first: dict[Box, int] = {}
    found = []
    for i, region in enumerate(record.regions):
        same = first.setdefault(region.box, i) if region.caption.strip() else i
        if not region.caption.strip():
            skipped["no caption"] += 1
        elif not region.area():
            skipped["box without area"] += 1
        elif task == "bbox_to_caption" and same != i:
            continue  # another caption of a box that is asked about
        elif task == "bbox_to_caption" and asking.prompt in ("text", "mixed") and _flat(record, i, asking.style):
            skipped["box without area in text"] += 1
        elif i in ambiguous:
            skipped["ambiguous caption"] += 1
        else:
            found.append(i)
    return found


def _flat(record: Record, region: int, style: str) -> bool:
    text = format_box(record.regions[region].box, style, (record.height, record.width))
    x0, y0, x1, y1 = text.strip("[]").split(", ")
    return x0 == x1 or y0 == y1


def _pair(task: str, record: Record, i: int, asking: Asking, rng: random.Random) -> tuple[Pair, str]:
    """The question about a region of the frame, and how it names the region."""
    if task == "caption_to_bbox":
        return caption_to_bbox(record, i, style=asking.style), ""
    pair = bbox_to_caption(record, i, style=asking.style)
    prompt = rng.choice(("text", "region")) if asking.prompt == "mixed" else asking.prompt
    if prompt != "text":
        text = format_box(record.regions[i].box, asking.style, (record.height, record.width))
        pair = replace(pair, question=pair.question.replace(text, f"<{prompt}>"))
    return pair, prompt


def _references(task: str, record: Record, i: int, pair: Pair) -> tuple[str, ...]:
    if task == "caption_to_bbox":
        return (pair.answer,)
    same = (other for other in record.regions if other.box == record.regions[i].box and other.caption.strip())
    return tuple(dict.fromkeys(other.caption for other in same))


def crowding(record: Record) -> list[dict[str, str]]:
    """How crowded it is around each region: ``regions`` and ``covered``.

    Several captions of exactly one box are one region here. ``regions`` is how many the image has: ``1``, ``2-4``,
    ``5-9`` or ``10+``. ``covered`` is the largest share of the region's box that lies in the box of one other region:
    ``none``, ``below half`` or ``half or more``.
    """
    boxes = list(dict.fromkeys(region.box for region in record.regions))
    many = next((name for most, name in _COUNTS if len(boxes) <= most), "10+")
    found = []
    for region in record.regions:
        area = region.area()
        shares = (overlap(region.box, other) / area for other in boxes if area and other != region.box)
        found.append({"regions": many, "covered": _share_name(max(shares, default=0.0))})
    return found


def _share_name(share: float) -> str:
    return "none" if share == 0 else "below half" if share < 0.5 else "half or more"


def back(transform: BoxTransform, box: Sequence[float]) -> Box:
    """A box of the frame in the image's own coordinates, cut at the image's edges."""
    x0, y0, x1, y1 = clip(transform.inverse().boxes(torch.tensor(box, dtype=torch.float64)))[0].tolist()
    return x0, y0, x1, y1
