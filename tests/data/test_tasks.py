"""Questions about a record: the paper's words, the settings' shares, and the same draws everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from granvit.data.record import Record, Region
from granvit.data.tasks import (
    Pair,
    TaskError,
    TaskSampler,
    Templates,
    ambiguous_captions,
    bbox_to_caption,
    caption_to_bbox,
    global_caption,
)
from granvit.geometry import parse_boxes

BOX = (0.1, 0.25, 0.5, 1.0)


def record(*regions: Region, key: str = "a", kind: str = "natural", caption: str | None = "a street") -> Record:
    return Record(key, 640, 480, "test", kind, caption, regions)


def many(count: int, key: str = "a", side: float = 0.3, **options: Any) -> Record:
    boxes = [(0.6 * i / count, 0.1, 0.6 * i / count + side, 0.1 + side) for i in range(count)]
    return record(*(Region(box, f"thing {i}") for i, box in enumerate(boxes)), key=key, **options)


def test_the_words_are_the_papers() -> None:
    one = record(Region(BOX, "a red {car}"))
    assert global_caption(one) == Pair(
        "global_caption", "Describe in detail what is shown in the image in one paragraph", "a street"
    )
    assert bbox_to_caption(one, 0) == Pair(
        "bbox_to_caption",
        "Describe the content contained within the normalized bounding box coordinates [0.100, 0.250, 0.500, 1.000] "
        "in no more than 10 words.",
        "a red {car}",
        0,
        BOX,
    )
    assert caption_to_bbox(one, 0) == Pair(
        "caption_to_bbox",
        "Please provide the bounding box coordinate of the region this sentence describes: a red {car}",
        "[0.100, 0.250, 0.500, 1.000]",
        0,
        BOX,
    )


@pytest.mark.parametrize(
    ("style", "text"), [("thousandths", "[100, 250, 500, 1000]"), ("pixels", "[64, 120, 320, 480]")]
)
def test_boxes_are_written_in_the_style_that_is_asked_for(style: str, text: str) -> None:
    one = record(Region(BOX, "a car"))
    assert bbox_to_caption(one, 0, "What is in {box}?", style).question == f"What is in {text}?"
    assert caption_to_bbox(one, 0, "Where is {caption}?", style).answer == text
    sampler = TaskSampler({"caption_to_bbox": 1}, style=style)
    (pair,) = sampler(one).pairs
    assert parse_boxes(pair.answer, style, (480, 640)) == [BOX]


def test_nothing_to_ask_about_is_refused() -> None:
    empty = record(Region(BOX, "  "), caption=None)
    with pytest.raises(TaskError, match="record a: caption: expected one to ask for, got None"):
        global_caption(empty)
    for ask in (bbox_to_caption, caption_to_bbox):
        with pytest.raises(TaskError, match=r"record a: regions\[0\]: caption: expected one to ask about"):
            ask(empty, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bbox_to_caption": ("What is here?",)}, r"bbox_to_caption: expected {box} in 'What is here\?', got none"),
        ({"bbox_to_caption": ("{box} {colour}",)}, r"expected {box} in .*, got \['box', 'colour'\]"),
        ({"bbox_to_caption": ("{box:.3f}",)}, "expected {box} in"),
        ({"bbox_to_caption": ("{box[0]}",)}, "expected {box} in"),
        ({"bbox_to_caption": ("in {box",)}, "bbox_to_caption: 'in {box': expected '}'"),
        ({"caption_to_bbox": ("Where is it?",)}, "caption_to_bbox: expected {caption} in"),
        ({"global_caption": ("Describe {box}",)}, "global_caption: expected no placeholder in"),
        ({"global_caption": ()}, "global_caption: expected a list of at least one wording"),
        ({"global_caption": "Describe"}, "global_caption: expected a list of at least one wording, got 'Describe'"),
        ({"caption_to_bbox": ("Where is {caption}?", "Where?")}, r"in 'Where\?', got none"),
    ],
)
def test_wrong_wordings_are_refused_when_they_are_given(change: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskError, match=text):
        Templates(**change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": {}}, "weights: expected weights of global_caption, bbox_to_caption, caption_to_bbox"),
        ({"weights": {"caption": 1}}, r"weights: expected weights of .* got \['caption'\]"),
        ({"weights": {"global_caption": -1}}, r"weights\[global_caption\]: expected a finite number"),
        ({"weights": {"global_caption": 0}}, "weights: expected at least one above 0"),
        ({"regions": -1}, "regions: expected at least 0, got -1"),
        ({"style": "percent"}, "style: expected one of relative, thousandths, pixels, got 'percent'"),
        ({"size_weights": {"natural": {"small": 1}}}, "size_weights: expected natural, ocr"),
        ({"size_weights": {"natural": {"tiny": 1}, "ocr": {"small": 1}}}, r"size_weights\[natural\]: expected weights"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskError, match=text):
        TaskSampler(**{"weights": {"global_caption": 1.0}, **change})


def test_an_image_is_asked_at_most_so_many_regions_and_each_once() -> None:
    sampler = TaskSampler({"global_caption": 1, "bbox_to_caption": 1, "caption_to_bbox": 1}, regions=5)
    for count in (0, 1, 5, 40):
        pairs, skipped = sampler(many(count))
        regions = [pair.region for pair in pairs if pair.task != "global_caption"]
        assert len(regions) == len(set(regions)) == min(count, 5)
        assert not skipped
        for pair in pairs[1:]:
            assert pair.region is not None
            assert pair.box == many(count).regions[pair.region].box
    assert [p.task for p in sampler(many(0)).pairs] == ["global_caption"]
    assert sampler(many(0, caption=None)).pairs == ()


def test_the_draws_depend_on_seed_key_and_epoch_alone() -> None:
    settings = {"weights": {"global_caption": 1, "bbox_to_caption": 1, "caption_to_bbox": 1}, "regions": 4}
    sampler = TaskSampler(**settings)
    records = [many(12, key=f"k{i}") for i in range(30)]
    first = {r.key: sampler(r, 1) for r in records}
    assert {r.key: sampler(r, 1) for r in reversed(records)} == first
    assert {r.key: TaskSampler(**settings)(r, 1) for r in records} == first
    asked = [[(p.task, p.region) for p in s(r, e).pairs] for s, r, e in (
        (sampler, records[0], 1),
        (sampler, records[0], 2),
        (sampler, records[1], 1),
        (TaskSampler(**settings, seed=1), records[0], 1),
    )]  # fmt: skip
    assert len({str(a) for a in asked}) == 4
    code = (
        "from tests.data.test_tasks import *\n"
        f"print([(p.task, p.region) for p in TaskSampler(**{settings!r})(many(12, key='k0'), 1).pairs])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout.strip() == str(asked[0])


def shares(sampler: TaskSampler, records: list[Record]) -> Counter[str]:
    return Counter(pair.task for r in records for pair in sampler(r).pairs)


def test_tasks_come_in_the_shares_of_their_weights() -> None:
    weights = {"global_caption": 1.0, "bbox_to_caption": 6.0, "caption_to_bbox": 3.0}
    counted = shares(TaskSampler(weights, regions=6), [many(20, key=str(i)) for i in range(2000)])
    assert counted.total() > 12_000
    for task, weight in weights.items():
        assert abs(counted[task] / counted.total() - weight / 10) < 0.02
    # An image has one caption to ask for, however much it weighs.
    counted = shares(TaskSampler({"global_caption": 5, "bbox_to_caption": 1}), [many(3, key=str(i)) for i in range(50)])
    assert counted == {"global_caption": 50, "bbox_to_caption": 150}
    counted = shares(TaskSampler({"caption_to_bbox": 1}), [many(3)])
    assert counted == {"caption_to_bbox": 3}


def test_regions_come_by_the_weight_of_their_size_and_kind() -> None:
    sides = {"small": 0.05, "medium": 0.15, "large": 0.6}
    regions = [
        Region((0.0, 0.0, side, side), f"{name} {i}") for name, side in sides.items() for i in range(10)
    ]  # ten of each
    assert Counter(r.size() for r in regions) == {"small": 10, "medium": 10, "large": 10}
    weights = {"natural": {"small": 1, "medium": 2, "large": 5}, "ocr": {"small": 1}}
    sampler = TaskSampler({"bbox_to_caption": 1}, regions=1, size_weights=weights)
    drawn: Counter[str] = Counter()
    for i in range(3000):
        (pair,) = sampler(record(*regions, key=f"{i}")).pairs
        drawn[pair.answer.split()[0]] += 1
    for name, weight in weights["natural"].items():
        assert abs(drawn[name] / 3000 - weight / 8) < 0.04
    pairs, skipped = sampler(record(*regions, kind="ocr", caption=None))
    assert [pair.answer.split()[0] for pair in pairs] == ["small"]
    assert skipped == {"size without weight": 20}


def test_a_caption_of_several_regions_is_no_answer_to_where() -> None:
    boxes = [(0.0, 0.0, 0.2 + 0.1 * i, 0.5) for i in range(4)]
    captions = ("A dog.", "a  dog", "a cat", "")
    image = record(*(Region(box, caption) for box, caption in zip(boxes, captions, strict=True)))
    assert ambiguous_captions(image) == {0, 1}
    pairs, skipped = TaskSampler({"caption_to_bbox": 1})(image)
    assert [pair.region for pair in pairs] == [2]
    assert skipped == {"ambiguous caption": 2, "no caption": 1}
    both = TaskSampler({"caption_to_bbox": 100, "bbox_to_caption": 1})
    for epoch in range(20):
        asked = {pair.region: pair.task for pair in both(image, epoch).pairs}
        assert set(asked) == {0, 1, 2}
        assert asked[0] == asked[1] == "bbox_to_caption"


def test_a_box_that_is_lost_in_rounding_is_not_asked_about() -> None:
    thin = record(Region((0.5, 0.1, 0.5002, 0.9), "a hair"), Region(BOX, "a car"))
    pairs, skipped = TaskSampler({"bbox_to_caption": 1, "caption_to_bbox": 1})(thin)
    assert [pair.region for pair in pairs] == [1]
    assert skipped == {"box without area in text": 1}


def test_several_wordings_are_all_used() -> None:
    templates = Templates(bbox_to_caption=("What is at {box}?", "Name {box}."), global_caption=("Tell.", "Say."))
    sampler = TaskSampler({"global_caption": 1, "bbox_to_caption": 1}, templates=templates)
    words = Counter(p.question.split()[0] for i in range(40) for p in sampler(many(4, key=str(i))).pairs)
    assert set(words) == {"What", "Name", "Tell.", "Say."}
    assert min(words.values()) >= 5
