"""The one way of boxes into records, and JSON read as a stream."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import (
    AnnotationError,
    caption_text,
    corners_of,
    distinct,
    field,
    image_size,
    json_items,
    json_lines,
    record_key,
    relative_box,
)
from granvit.data.record import Record, Region
from granvit.errors import MissingDependencyError

SIZE = (480, 640)


@pytest.mark.parametrize(
    ("corners", "box", "counted"),
    [
        ((64, 48, 320, 480), (0.1, 0.1, 0.5, 1.0), {}),
        ((0.0, 0.0, 640.0, 480.0), (0.0, 0.0, 1.0, 1.0), {}),
        ((-0.3, 0, 640.4, 480), (0.0, 0.0, 1.0, 1.0), {}),
        ((-64, -48, 320, 960), (0.0, 0.0, 0.5, 1.0), {"kept: box clipped": 1}),
        ((10, 10, 10, 20), None, {"box without area": 1}),
        ((10, 10, 20, 10), None, {"box without area": 1}),
        ((20, 10, 10, 20), None, {"box inverted": 1}),
        ((10, 20, 20, 10), None, {"box inverted": 1}),
        ((640, 0, 700, 100), None, {"box outside the image": 1}),
        ((-50, -50, -10, 100), None, {"box outside the image": 1}),
        ((0, 0, math.nan, 10), None, {"box not finite": 1}),
        ((0, 0, math.inf, 10), None, {"box not finite": 1}),
        ((None, 0, 10, 10), None, {"box not finite": 1}),
    ],
)
def test_boxes_become_relative_clipped_or_counted(corners: tuple, box: Any, counted: dict) -> None:
    drops: Counter[str] = Counter()
    found = relative_box(corners, SIZE, drops, "here")
    assert found == (None if box is None else pytest.approx(box, abs=1e-12))
    assert drops == counted
    if found:
        Record("a", 640, 480, "s", regions=(Region(found),)).check()


@pytest.mark.parametrize("corners", [(1, 2, 3), (1, 2, 3, "4"), (1, 2, 3, True), (1, 2, 3, 10**400), (1, 2, 3, [4])])
def test_what_is_no_box_is_refused(corners: tuple) -> None:
    with pytest.raises(AnnotationError, match="^file: bbox: expected a box of four numbers, got"):
        relative_box(corners, SIZE, Counter(), "file: bbox")
    with pytest.raises(AnnotationError, match="^file: bbox: expected a box of four numbers, got"):
        corners_of(list(corners), "file: bbox")


def test_corners_of_a_box_with_sides() -> None:
    assert corners_of([10, 20, 30.5, 40], "here") == [10, 20, 40.5, 60]
    drops: Counter[str] = Counter()
    assert relative_box(corners_of([10, 20, None, 40], "here"), SIZE, drops, "here") is None
    assert relative_box(corners_of([10, 20, -5, 40], "here"), SIZE, drops, "here") is None
    assert drops == {"box not finite": 1, "box inverted": 1}


def test_captions_are_put_in_order_or_counted() -> None:
    drops: Counter[str] = Counter()
    assert caption_text("  a\tred\n car ", drops, "here") == "a red car"
    assert caption_text(" \n", drops, "here") is None
    assert caption_text("x" * 5000, drops, "here") is None
    assert drops == {"caption empty": 1, "caption too long": 1}
    assert caption_text("a \ud800 b", drops, "here") == "a ? b"
    with pytest.raises(AnnotationError, match="here: expected text, got 3"):
        caption_text(3, drops, "here")


def test_a_region_counts_once() -> None:
    drops: Counter[str] = Counter()
    box, other = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
    given = [Region(box, "A dog"), Region(other, "a dog"), Region(box, "a dog"), Region(box, "a cat")]
    assert distinct(given, drops) == (given[0], given[1], given[3])
    assert drops == {"region given twice": 1}


def test_keys_hold_what_records_take() -> None:
    for name in ("000000001", "train2014/COCO.jpg", "ü" * 20, "a" * 300, "", 7):
        Record(record_key(name, "-12"), 1, 1, "s").check()
    assert record_key("coco/train/000001.jpg") == "coco-train-000001-jpg"
    assert record_key("a" * 300, "-12").endswith("a-12")


@pytest.mark.parametrize(
    ("entry", "kind", "text"),
    [
        ({}, int, "here: expected an object with id, got {}"),
        ([1], int, r"here: expected an object with id, got \[1\]"),
        ({"id": "7"}, int, "here: id: expected a whole number, got '7'"),
        ({"id": True}, int, "here: id: expected a whole number, got 'True'"),
        ({"id": 1 << 70}, int, "here: id: expected a whole number"),
        ({"id": None}, (str, list), "here: id: expected text or a list, got 'None'"),
    ],
)
def test_fields_are_checked(entry: Any, kind: Any, text: str) -> None:
    with pytest.raises(AnnotationError, match=text):
        field(entry, "id", kind, "here")
    with pytest.raises(AnnotationError, match="here: expected a height and width of at least 1, got 0 and 5"):
        image_size({"height": 0, "width": 5}, "here")


def test_json_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "annotations": [')
        file.write(",".join(json.dumps({"id": i, "text": "x" * 1000, "x": i / 7}) for i in range(20_000)))
        file.write('], "categories": [{"id": 1, "name": "a"}]}')
    size = path.stat().st_size
    assert size > 20_000_000
    tracemalloc.start()
    count = 0
    for i, item in enumerate(json_items(path, "annotations.item")):
        assert item["id"] == i
        assert item["x"] == i / 7
        count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < size / 4
    assert list(json_items(path, "categories.item")) == [{"id": 1, "name": "a"}]


@pytest.mark.parametrize(
    ("content", "prefix", "text"),
    [
        (b"", "item", "the file is empty"),
        (b" \n", "item", "the file is empty"),
        (b'{"a": []}', "item", "expected JSON that is a list, but it begins with '{'"),
        (b"[1]", "a.item", "expected JSON that is an object with a list a, but it begins with '\\['"),
        (b"<html>", "a.item", "expected JSON that is an object with a list a, but it begins with '<'"),
        (b'{"b": [1]}', "a.item", "expected an object with a list a, and found no such list"),
        (b'{"a": {"b": 1}}', "a.item", "expected an object with a list a, and found no such list"),
        (b'{"a": [1, 2', "a.item", "no JSON after 2 elements of a: "),
        (b'[{"x": 1}, {"x": nan}]', "item", "no JSON after 1 elements of the list: .*nan"),
        (b'[{"x": NaN}, {"x": "a', "item", "no JSON after 1 elements of the list: "),
        (b'[1, "\xff\xfe"]', "item", "no JSON after 1 elements of the list: .*UTF"),
        (b"[1] 2", "item", "no JSON after 1 elements of the list: "),
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes, prefix: str, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=rf"a\.json: {text}"):
        list(json_items(path, prefix))


def test_an_empty_list_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [], "b": 1}')
    assert list(json_items(path, "a.item")) == []
    path.write_text("[]")
    assert list(json_items(path, "item")) == []


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    for read in (json_items(tmp_path / "a.json", "item"), json_lines(tmp_path / "a.json")):
        with pytest.raises(AnnotationError, match=r"a\.json: No such file or directory"):
            list(read)


def test_lines_are_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n{"a":\n')
    lines = json_lines(path)
    assert next(lines) == ({"a": 1}, f"{path}: line 1")
    assert next(lines) == ([2], f"{path}: line 3")
    with pytest.raises(AnnotationError, match=r"a\.jsonl: line 4: no JSON: "):
        next(lines)


def test_without_ijson_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ijson", None)
    with pytest.raises(MissingDependencyError, match=r"needs ijson: pip install 'granvit\[data\]'"):
        list(json_items(tmp_path / "a.json", "item"))
