"""What is asked about an image, where its boxes go, and how crowded it is around them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from granvit.data.images import frames
from granvit.data.record import Record, Region
from granvit.data.sources import Question, Shown
from granvit.eval.questions import Asking, SettingsError, ask, back, crowding
from granvit.geometry import BoxTransform, format_box, parse_boxes
from tests.eval.support import noise, random_record

SIZES = [(20, 60), (60, 20), (31, 17), (24, 24), (17, 400)]


def shown_of(record: Record, size: int = 24, rng: random.Random | None = None) -> Shown:
    data = noise(rng or random.Random(), record.height, record.width)
    return Shown(record, *frames(data, (size, size), 0))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [24, 336])
def test_boxes_come_back_from_the_frame(height: int, width: int, size: int) -> None:
    transform = BoxTransform.letterbox((height, width), (size, size))
    for region in random_record(random.Random(), "a", height, width, 20).regions:
        framed = transform.boxes(torch.tensor(region.box, dtype=torch.float64))
        assert back(transform, framed.tolist()) == pytest.approx(region.box, abs=1e-12)


def test_a_box_in_the_border_is_cut_at_the_image() -> None:
    transform = BoxTransform.letterbox((50, 100), (100, 100))  # the image is between y of 0.25 and 0.75
    assert back(transform, (0.5, 0.0, 1.0, 0.5)) == pytest.approx((0.5, 0.0, 1.0, 0.5))
    assert back(transform, (0.2, 0.1, 0.4, 0.2)) == pytest.approx((0.2, 0.0, 0.4, 0.0))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("style", ["relative", "thousandths", "pixels"])
def test_a_right_answer_in_the_frame_is_right_in_the_image(height: int, width: int, style: str) -> None:
    size = 512
    shown = shown_of(random_record(random.Random(), "a", height, width, 8), size)
    asked = ask(shown, Asking(("caption_to_bbox",), style=style), Counter())
    assert [question.region for question in asked] == list(range(8))
    for question in asked:
        (said,) = parse_boxes(question.pair.answer, style, (size, size))
        assert question.box == shown.record.regions[question.region or 0].box
        unit = {"relative": 1e-3, "thousandths": 1e-3, "pixels": 1 / size}[style]
        largest = unit / min(shown.transform.scale)  # what rounding in the frame is in the image
        assert back(shown.transform, said) == pytest.approx(question.box, abs=largest)
        assert question.pair.answer == format_box(question.pair.box or (), style, (size, size))


def test_prompts() -> None:
    shown = shown_of(random_record(random.Random(), "a", 20, 30, 12))
    for prompt in ("text", "region", "box"):
        for question in ask(shown, Asking(("bbox_to_caption",), prompt=prompt), Counter()):
            assert question.groups["prompt"] == prompt
            assert (f"<{prompt}>" in question.pair.question) is (prompt != "text")
            assert ("[" in question.pair.question) is (prompt == "text")
            assert question.references == (shown.record.regions[question.region or 0].caption,)
    mixed = [
        x.groups["prompt"]
        for seed in range(8)
        for x in ask(shown, Asking(prompt="mixed", seed=seed), Counter())
        if "prompt" in x.groups
    ]
    assert set(mixed) == {"text", "region"}


def test_a_draw_of_regions_is_the_same_again() -> None:
    shown = shown_of(random_record(random.Random(), "a", 20, 30, 9))
    asking = Asking(regions=4, seed=5)
    skipped: Counter[str] = Counter()
    first = ask(shown, asking, skipped)
    assert first == ask(shown, asking, Counter())
    assert Counter(x.pair.task for x in first) == {"bbox_to_caption": 4, "caption_to_bbox": 4}
    assert skipped == {"more regions than asked for": 10}
    drawn = {tuple(x.region for x in ask(shown, replace(asking, seed=s), Counter())) for s in range(10)}
    assert len(drawn) > 1


def test_what_cannot_be_asked_is_counted() -> None:
    one, two, three = (0.1, 0.1, 0.5, 0.5), (0.2, 0.2, 0.9, 0.9), (0.5, 0.0, 0.8, 0.2)
    regions = (
        Region(one, "man"),
        Region(one, "the left one"),
        Region(two, "Man."),
        Region(three, " "),
        Region((0.3, 0.3, 0.3, 0.9), "a line"),
        Region((0.3, 0.3, 0.30001, 0.9), "a thin line"),
    )
    shown = shown_of(Record("a", 40, 40, "noise", regions=regions))
    skipped: Counter[str] = Counter()
    asked = ask(shown, Asking(), skipped)
    captions = [x for x in asked if x.pair.task == "bbox_to_caption"]
    assert [x.references for x in captions] == [("man", "the left one"), ("Man.",)]
    assert [x.region for x in asked if x.pair.task == "caption_to_bbox"] == [1, 5]
    assert skipped == {
        "no caption": 2,
        "box without area": 2,
        "box without area in text": 1,
        "ambiguous caption": 2,
    }
    everything = ask(shown, Asking(("caption_to_bbox",), ambiguous=True), Counter())
    assert [x.region for x in everything] == [0, 1, 2, 5]
    assert len(ask(shown, Asking(("bbox_to_caption",), prompt="region"), Counter())) == 3


def test_the_whole_image_and_questions_of_a_file() -> None:
    record = Record("a", 40, 40, "noise", caption="a thing")
    (asked,) = ask(shown_of(record), Asking(("global_caption",)), Counter())
    assert (asked.references, asked.box, asked.region) == (("a thing",), None, None)
    skipped: Counter[str] = Counter()
    assert ask(shown_of(replace(record, caption=None)), Asking(("global_caption",)), skipped) == []
    assert skipped == {"no global caption": 1}
    shown = shown_of(record)._replace(question=Question("7", "what?", ("x", "y")))
    (asked,) = ask(shown, Asking(), Counter())
    assert (asked.pair.task, asked.pair.question, asked.references) == ("question", "what?", ("x", "y"))


def test_crowding_by_hand() -> None:
    big, inside, apart = (0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
    regions = tuple(Region(box, "x") for box in (big, inside, apart, big))
    found = crowding(Record("a", 10, 10, "noise", regions=regions))
    assert [x["covered"] for x in found] == ["below half", "half or more", "none", "below half"]
    assert {x["regions"] for x in found} == {"2-4"}  # three boxes, one of them twice
    for count, name in ((1, "1"), (2, "2-4"), (4, "2-4"), (5, "5-9"), (9, "5-9"), (10, "10+")):
        boxes = tuple(Region((0.0, 0.0, 0.1, 0.01 * (i + 1)), "x") for i in range(count))
        assert {x["regions"] for x in crowding(Record("a", 9, 9, "n", regions=boxes))} == {name}
    assert crowding(Record("a", 9, 9, "n")) == []
    flat = (Region((0.1, 0.1, 0.1, 0.9), "x"), Region((0.0, 0.0, 1.0, 1.0), "y"))
    assert [x["covered"] for x in crowding(Record("a", 9, 9, "n", regions=flat))] == ["none", "none"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("chat",)}, "tasks"),
        ({"tasks": ("global_caption", "global_caption")}, "tasks"),
        ({"prompt": "tex"}, "prompt"),
        ({"style": "absolute"}, "style"),
        ({"regions": 0}, "regions"),
    ],
)
def test_settings_that_are_none(settings: dict, named: str) -> None:
    with pytest.raises(SettingsError, match=f"^{named}: expected"):
        Asking(**settings)
