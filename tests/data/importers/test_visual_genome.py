"""Visual Genome: descriptions and sizes come from two files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import AnnotationError
from granvit.data.importers.visual_genome import visual_genome
from tests.data.importers.support import told, written


def region(number: int, image: int, x: int, y: int, width: int, height: int, phrase: str) -> dict[str, Any]:
    return {
        "region_id": number,
        "width": width,
        "height": height,
        "image_id": image,
        "phrase": phrase,
        "y": y,
        "x": x,
    }


IMAGE_DATA = [
    {
        "width": 800,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
        "height": 600,
        "image_id": 1,
        "coco_id": None,
        "flickr_id": None,
    },
    {
        "width": 400,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K/2.jpg",
        "height": 300,
        "image_id": 2,
        "coco_id": 58,
        "flickr_id": 9000,
    },
]
DESCRIPTIONS = [
    {
        "regions": [
            region(1382, 1, 421, 57, 82, 139, "the clock is green in colour"),
            region(1383, 1, 80, 0, 720, 600, "  shade is along the street\n"),
            region(1384, 1, -40, 570, 120, 60, "man wearing sneakers"),
            region(1385, 1, 10, 10, 0, 60, "a line"),
            region(1386, 1, 10, 10, 40, 60, ""),
            region(1387, 1, 10, float("nan"), 40, 60, "NaN"),
        ],
        "id": 1,
    },
    {"regions": [], "id": 2},
]


def read(tmp_path: Path, descriptions: Any = DESCRIPTIONS, data: Any = IMAGE_DATA) -> tuple[list[Any], Counter[str]]:
    drops: Counter[str] = Counter()
    paths = (
        written(tmp_path / "region_descriptions.json", descriptions),
        written(tmp_path / "image_data.json", data),
        tmp_path / "images",
    )
    return list(visual_genome(*paths, drops)), drops


def test_regions_are_read(tmp_path: Path) -> None:
    samples, drops = read(tmp_path)
    first, second = (sample.record.check() for sample in samples)
    assert (first.key, first.width, first.height, first.source) == ("vg-1", 800, 600, "visual_genome")
    assert told(first) == [
        ((421 / 800, 57 / 600, 503 / 800, 196 / 600), "the clock is green in colour"),
        ((0.1, 0.0, 1.0, 1.0), "shade is along the street"),
        ((0.0, 0.95, 0.1, 1.0), "man wearing sneakers"),
    ]
    assert (second.key, second.regions) == ("vg-2", ())
    assert drops == {"kept: box clipped": 1, "box without area": 1, "caption empty": 1, "box not finite": 1}


def test_images_are_found_in_one_folder_or_two(tmp_path: Path) -> None:
    assert [s.image for s in read(tmp_path)[0]] == [tmp_path / "images" / name for name in ("1.jpg", "2.jpg")]
    (tmp_path / "images/VG_100K_2").mkdir(parents=True)
    (tmp_path / "images/VG_100K").mkdir()
    found = [str(s.image.relative_to(tmp_path / "images")) for s in read(tmp_path)[0]]
    assert found == ["VG_100K_2/1.jpg", "VG_100K/2.jpg"]


def test_the_first_editions_ids_are_read(tmp_path: Path) -> None:
    data = [{("id" if k == "image_id" else k): v for k, v in entry.items()} for entry in IMAGE_DATA]
    assert [s.record.key for s in read(tmp_path, data=data)[0]] == ["vg-1", "vg-2"]


@pytest.mark.parametrize(
    ("descriptions", "data", "text"),
    [
        (DESCRIPTIONS, IMAGE_DATA[:1], r"descriptions\.json: \[1\]: id: image 2 is not in .*image_data\.json"),
        (DESCRIPTIONS, [{"image_id": 1}], r"image_data\.json: \[0\]: expected an object with height"),
        (DESCRIPTIONS, {"a": 1}, r"image_data\.json: expected JSON that is a list"),
        ([{"id": 1}], IMAGE_DATA, r"descriptions\.json: \[0\]: expected an object with regions"),
        (
            [{"id": 1, "regions": [{"x": 1}]}],
            IMAGE_DATA,
            r"\[0\]: regions\[0\]: expected an object with y, got {'x': 1}",
        ),
        (
            [{"id": 1, "regions": [region(1, 1, 2, 3, 4, "5", "a")]}],
            IMAGE_DATA,
            "height: expected a number or null, got '5'",
        ),
        ([{"id": 1, "regions": [region(1, 1, 2, 3, 4, 5, 6)]}], IMAGE_DATA, "phrase: expected text, got '6'"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, descriptions: Any, data: Any, text: str) -> None:
    with pytest.raises(AnnotationError, match=text):
        read(tmp_path, descriptions, data)
