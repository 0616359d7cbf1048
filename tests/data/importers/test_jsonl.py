"""JSON lines: granvit's own records."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import AnnotationError
from granvit.data.importers.jsonl import jsonl
from granvit.data.record import RecordError
from tests.data.importers.support import told, written
from tests.data.support import some_record


def line(number: int, **change: Any) -> str:
    return json.dumps({**json.loads(some_record(number).to_json()), "image": f"{number}.jpg", **change})


def read(tmp_path: Path, *lines: str) -> tuple[list[Any], Counter[str]]:
    drops: Counter[str] = Counter()
    return list(jsonl(written(tmp_path / "a.jsonl", "\n".join(lines)), Path("images"), drops)), drops


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples, drops = read(tmp_path, *map(line, range(5)))
    assert [s.record for s in samples] == [some_record(i) for i in range(5)]
    assert [str(s.image) for s in samples] == [f"images/{i}.jpg" for i in range(5)]
    assert not drops


def test_impossible_boxes_are_mended_or_counted(tmp_path: Path) -> None:
    boxes = [
        [-0.5, 0, 1.5, 1],
        [0.5, 0, 0.4, 1],
        [0.5, 0, 0.5, 1],
        [2, 2, 3, 3],
        [float("nan"), 0, 1, 1],
        [0, 0, float("inf"), 1],
    ]
    regions = [{"box": box, "caption": str(i)} for i, box in enumerate(boxes)]
    (sample,), drops = read(tmp_path, line(0, regions=regions))
    assert told(sample.record) == [((0.0, 0.0, 1.0, 1.0), "0")]
    assert drops == {
        "kept: box clipped": 1,
        "box inverted": 1,
        "box without area": 1,
        "box outside the image": 1,
        "box not finite": 2,
    }


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", r"line 2: no JSON"),
        ("[1]", r"line 2: expected an object with image"),
        (line(1, image=3), r"line 2: image: expected text, got '3'"),
        (line(1, kind="scan"), "record 000001: kind: expected one of natural, ocr"),
        (line(1, colour=3), "line 2: fields missing: none, unknown: .*'colour'"),
        (line(1, regions=3), "line 2: expected an object with regions"),
        (line(1, regions=[{"box": [1, 2, 3]}]), r"line 2: regions\[0\]: box: expected a box of four numbers"),
        (line(1, regions=[{"caption": ""}]), r"line 2: regions\[0\]: expected an object with box"),
        (line(1, regions=[{"box": [0, 0, 1, 1], "label": 3}]), r"line 2: regions\[0\]: expected an object of box"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises((AnnotationError, RecordError), match=error):
        read(tmp_path, line(0), text)
