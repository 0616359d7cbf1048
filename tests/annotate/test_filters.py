"""Filters: every limit to the pixel, counted by its name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_iou

from granvit.annotate import AnnotationError, BoxRules, Filters
from granvit.annotate.filters import BOX_REASONS, box_iou
from granvit.data.record import Region

WIDTH, HEIGHT = 997, 1013


def region(x: float, y: float, width: float, height: float, score: float | None = 0.9, caption: str = "c") -> Region:
    """From pixels."""
    return Region((x / WIDTH, y / HEIGHT, (x + width) / WIDTH, (y + height) / HEIGHT), caption, score)


def boxes(*regions: Region, kind: str = "natural", **settings: Any) -> tuple[list[Region], Counter[str]]:
    return Filters(**settings).boxes(regions, WIDTH, HEIGHT, kind)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((449, 449), None),
        ((448, 800), "image_side"),
        ((800, 448), "image_side"),
        ((449, 1347), None),
        ((449, 1348), "image_ratio"),
        ((1348, 449), "image_ratio"),
    ],
)
def test_limits_of_images_are_the_papers(size: tuple[int, int], reason: str | None) -> None:
    assert Filters().image(*size) == reason
    assert Filters(image_side=None, image_ratio=None).image(*size) is None


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ((101, 100), None),
        ((100, 100), "box_area"),
        ((300, 100), None),
        ((100, 300), None),
        ((301, 100), "box_ratio"),
        ((100, 301), "box_ratio"),
        ((0, 500), "box_flat"),
        ((500, 0), "box_flat"),
    ],
)
@pytest.mark.parametrize("corner", [(0, 0), (7, 3), (331, 613)])
def test_limits_of_boxes_are_the_papers(sides: tuple[int, int], reason: str | None, corner: tuple[int, int]) -> None:
    left, dropped = boxes(region(*corner, *sides))
    assert dropped == Counter([reason] if reason else [])
    assert len(left) == (reason is None)


def test_lines_of_text_have_limits_of_their_own() -> None:
    line, low = region(10, 10, 700, 9), region(10, 50, 700, 7)
    assert boxes(line, low, kind="ocr") == ([line], Counter(box_side=1))
    assert boxes(line, low) == ([], Counter(box_ratio=2))
    assert boxes(line, low, kind="ocr", ocr=BoxRules()) == ([], Counter(box_ratio=2))


def test_a_box_without_a_score_stays() -> None:
    known, unknown, poor = region(0, 0, 200, 200, 0.5), region(300, 0, 200, 200, None), region(0, 300, 200, 200, 0.49)
    assert boxes(known, unknown, poor) == ([known, unknown], Counter(score=1))
    assert boxes(known, unknown, poor, score=None) == ([known, unknown, poor], Counter())
    assert boxes(region(0, 0, 200, 200, float("nan")))[1] == Counter(score=1)


def test_of_duplicates_the_best_stays_in_its_place() -> None:
    poor, other, good = region(0, 0, 200, 200, 0.6), region(500, 500, 200, 200), region(0, 0, 200, 205, 0.8)
    assert boxes(poor, other, good) == ([other, good], Counter(duplicate=1))
    assert boxes(poor, other, good, duplicate=0.99) == ([poor, other, good], Counter())
    assert boxes(poor, other, good, duplicate=None) == ([poor, other, good], Counter())


def test_the_best_stay_where_there_are_too_many() -> None:
    many = [region(100 * i, 0, 200, 200, 0.6 + 0.1 * (i % 3)) for i in range(6)]
    left, dropped = boxes(*many, max_regions=2)
    assert left == [many[2], many[5]]
    assert dropped == Counter(max_regions=4)


def test_empty_and_endless_captions() -> None:
    good, empty, endless = (region(0, 0, 200, 200, caption=text) for text in ("a cat", " \n", "x" * 5000))
    assert Filters().captions([good, empty, endless]) == ([good], Counter(empty_caption=1, long_caption=1))
    assert Filters(empty_captions=True).captions([good, empty])[0] == [good, empty]


coordinate = st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
any_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
ordered_box = any_box.map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))


@given(
    st.lists(st.tuples(any_box, st.none() | st.floats(0, 1)), max_size=12),
    st.none() | st.floats(0, 1),
    st.none() | st.integers(1, 5),
    st.sampled_from(["natural", "ocr"]),
)
def test_every_box_is_kept_or_counted(found: list[Any], duplicate: float | None, most: int | None, kind: str) -> None:
    regions = [Region(box, "c", score) for box, score in found]
    filters = Filters(duplicate=duplicate, max_regions=most)
    left, dropped = filters.boxes(regions, WIDTH, HEIGHT, kind)
    assert len(left) + dropped.total() == len(regions)
    assert set(dropped) <= set(BOX_REASONS)
    assert most is None or len(left) <= most
    places = [next(i for i, r in enumerate(regions) if r is kept) for kept in left]
    assert places == sorted(set(places))
    rules = filters.natural if kind == "natural" else filters.ocr
    for kept in left:
        width, height = (kept.box[2] - kept.box[0]) * WIDTH, (kept.box[3] - kept.box[1]) * HEIGHT
        assert width > 0
        assert height > 0
        assert kept.score is None or kept.score >= 0.5
        if rules.area is not None:
            assert width * height > rules.area - 1e-3
        if rules.ratio is not None:
            assert 1 / (rules.ratio + 1e-4) <= width / height <= rules.ratio + 1e-4
        if rules.side is not None:
            assert min(width, height) > rules.side - 1e-5
    if duplicate is not None:
        pairs = [(a, b) for i, a in enumerate(left) for b in left[:i]]
        assert all(box_iou(a.box, b.box) <= duplicate for a, b in pairs)
    # What the filters left, they leave again.
    assert filters.boxes(left, WIDTH, HEIGHT, kind) == (left, Counter())


@given(ordered_box, ordered_box)
def test_intersection_over_union_is_torchvisions(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float]
) -> None:
    expected = torchvision_iou(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)).item()
    if expected == expected:  # two boxes without area have none there
        assert box_iou(a, b) == pytest.approx(expected, abs=1e-12)
    else:
        assert box_iou(a, b) == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"image_ratio": 0.5}, "filters: image_ratio: expected at least 1, got 0.5"),
        ({"natural": BoxRules(ratio=0.0)}, "filters: natural.ratio: expected at least 1"),
        ({"score": 2.0}, "filters: score: expected 0 to 1, got 2.0"),
        ({"duplicate": -1.0}, "filters: duplicate: expected 0 to 1"),
        ({"max_regions": 0}, "filters: max_regions: expected at least 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(AnnotationError, match=text):
        Filters(**settings).check()
