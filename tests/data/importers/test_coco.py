"""COCO: images, boxes and captions of files in COCO's structure."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import AnnotationError
from granvit.data.importers.coco import coco
from tests.data.importers.support import told, written

CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "vehicle", "id": 3, "name": "car"},
]


def listed(number: int, width: int = 640, height: int = 480) -> dict[str, Any]:
    name = f"{number:012d}.jpg"
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/val2017/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg",
        "id": number,
    }


def boxed(number: int, image: int, bbox: list[Any], category: int = 1, crowd: int = 0) -> dict[str, Any]:
    polygon = [[510.66, 423.01, 511.72, 420.03, 510.45, 416.0]]
    return {
        "segmentation": {"counts": [272, 2, 4], "size": [480, 640]} if crowd else polygon,
        "area": 702.1,
        "iscrowd": crowd,
        "image_id": image,
        "bbox": bbox,
        "category_id": category,
        "id": number,
    }


def instances(tmp_path: Path, images: list[Any], annotations: list[Any], /, **change: Any) -> Path:
    content = {
        "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc/2.0/", "id": 3, "name": "A"}],
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
        **change,
    }
    return written(tmp_path / "instances_val2017.json", content)


def read(path: Path, **options: Any) -> tuple[list[Any], Counter[str]]:
    drops: Counter[str] = Counter()
    return list(coco(path, Path("images"), drops, **options)), drops


def test_boxes_find_their_images_in_any_order(tmp_path: Path) -> None:
    path = instances(
        tmp_path,
        [listed(397133), listed(37777, 352, 230), listed(5)],
        [
            boxed(1, 37777, [102.49, 118.47, 7.9, 17.31], 3),
            boxed(2, 397133, [64, 48, 320, 240.0]),
            boxed(3, 37777, [0, 0, 352, 230]),
        ],
    )
    samples, drops = read(path)
    assert [str(s.image) for s in samples] == [f"images/{n:012d}.jpg" for n in (397133, 37777, 5)]
    first, second, third = (s.record.check() for s in samples)
    assert (first.key, first.width, first.height, first.source) == ("000000397133", 640, 480, "coco")
    assert told(first) == [((0.1, 0.1, 0.6, 0.6), "person")]
    box = (102.49 / 352, 118.47 / 230, 110.39 / 352, 135.78 / 230)
    assert told(second) == [(box, "car"), ((0.0, 0.0, 1.0, 1.0), "person")]
    assert second.regions[0].origin == "coco"
    assert second.meta == {"image_id": 37777}
    assert third.regions == ()
    assert not drops


def test_captions_go_to_their_images(tmp_path: Path) -> None:
    path = instances(tmp_path, [listed(1), listed(2)], [boxed(1, 1, [0, 0, 10, 10])])
    captions = {
        "info": {},
        "images": [listed(1), listed(2)],
        "licenses": [],
        "annotations": [
            {"image_id": 2, "id": 38, "caption": "A man with a red helmet on a small moped. "},
            {"image_id": 1, "id": 39, "caption": "A black Honda\nmotorcycle"},
            {"image_id": 2, "id": 40, "caption": "Man riding a motor bike."},
            {"image_id": 1, "id": 41, "caption": " "},
            {"image_id": 99, "id": 42, "caption": "Another."},
        ],
    }
    samples, drops = read(path, captions=written(tmp_path / "captions_val2017.json", captions))
    assert [s.record.caption for s in samples] == [
        "A black Honda motorcycle",
        "A man with a red helmet on a small moped.",
    ]
    assert samples[1].record.meta["captions"] == [samples[1].record.caption, "Man riding a motor bike."]
    assert drops == {"caption empty": 1, "caption of an image that is not listed": 1}


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    good = [10, 10, 20, 20]
    boxes = [good, good, [10, 10, 0, 20], [10, 10, -5, 20], [700, 10, 20, 20], [600, 0, 100, 480], [1, None, 3, 4]]
    boxes += [[math.nan, 1, 2, 3], [1, 2, math.inf, 3]]
    annotations = [boxed(i, 1, box) for i, box in enumerate(boxes)]
    annotations += [boxed(50, 1, [0, 0, 640, 400], crowd=1), boxed(51, 2, good), boxed(52, 77, good)]
    samples, drops = read(instances(tmp_path, [listed(1), listed(2)], annotations))
    assert [len(s.record.regions) for s in samples] == [2, 1]
    assert drops == {
        "region given twice": 1,
        "box without area": 1,
        "box inverted": 1,
        "box outside the image": 1,
        "kept: box clipped": 1,
        "box not finite": 3,
        "crowd": 1,
        "region of an image that is not listed": 1,
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, r"images\[0\]: expected an object with height"),
        ({"images": [listed(1), {**listed(2), "width": 0}]}, r"images\[1\]: expected a height and width of at least 1"),
        ({"images": [{**listed(1), "id": "1"}]}, r"images\[0\]: id: expected a whole number, got '1'"),
        ({"annotations": [boxed(1, 1, [1, 2, 3])]}, r"annotations\[0\]: bbox: expected a box of four numbers"),
        ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"annotations\[0\]: expected an object with bbox"),
        (
            {"annotations": [boxed(1, 1, [1, 2, 3, 4], 90)]},
            r"annotations\[0\]: category_id: 90 is not among the categories",
        ),
        ({"annotations": ["a"]}, r"annotations\[0\]: expected an object with category_id, got a"),
        ({"annotations": {}}, "expected an object with a list annotations"),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: expected an object with name"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path = instances(tmp_path, [listed(1)], [boxed(1, 1, [1, 2, 3, 4])], **change)
    with pytest.raises(AnnotationError, match=rf"instances_val2017\.json: {text}"):
        read(path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    captions = written(tmp_path / "captions.json", {"images": [listed(1)], "annotations": [{"caption": "a"}]})
    with pytest.raises(AnnotationError, match=r"captions\.json: expected an object with a list categories"):
        read(captions)
    path = instances(tmp_path, [listed(1)], [])
    with pytest.raises(AnnotationError, match=r"instances_val2017\.json: expected an object with a list annotations"):
        read(written(tmp_path / "b" / path.name, {"images": [], "categories": CATEGORIES}))
    with pytest.raises(AnnotationError, match=r"captions\.json: annotations\[0\]: expected an object with image_id"):
        read(path, captions=captions)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AnnotationError, match=r"instances_val2017\.json: no JSON after 1 elements of categories"):
        read(path)
