"""Flickr30k Entities: phrases of sentences and boxes in XML."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import AnnotationError
from granvit.data.importers.flickr30k import flickr30k
from tests.data.importers.support import told, written

SENTENCES = """\
[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] see [/EN#0/notvisual it] in [/EN#3/scene the yard] .
[/EN#4/people/other A man] in [/EN#5/clothing a blue shirt] is standing on [/EN#6/other a ladder] .
[/EN#4/people a man] is outside .
"""
XML = """\
<annotation>
	<filename>1000092795.jpg</filename>
	<size>
		<width>200</width>
		<height>500</height>
		<depth>3</depth>
	</size>
{objects}
	<object>
		<name>3</name>
		<scene>1</scene>
		<nobndbox>0</nobndbox>
	</object>
	<object>
		<name>6</name>
		<scene>0</scene>
		<nobndbox>1</nobndbox>
	</object>
</annotation>
"""


def boxed(names: list[int], *corners: Any) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in sides)
    return f"<object>{''.join(f'<name>{n}</name>' for n in names)}<bndbox>{inner}</bndbox></object>"


OBJECTS = [boxed([1], 1, 101, 50, 300), boxed([1], 101, 51, 200, 250), boxed([2, 4], 21, 1, 40, 100)]


def dataset(
    tmp_path: Path, objects: list[str] = OBJECTS, sentences: str = SENTENCES, xml: str = XML
) -> dict[str, Path]:
    written(tmp_path / "Sentences/1000092795.txt", sentences)
    written(tmp_path / "Annotations/1000092795.xml", xml.format(objects="\n".join(objects)))
    return {
        "sentences": tmp_path / "Sentences",
        "annotations": tmp_path / "Annotations",
        "images": Path("flickr30k-images"),
    }


def read(**options: Any) -> tuple[list[Any], Counter[str]]:
    drops: Counter[str] = Counter()
    return list(flickr30k(drops=drops, **options)), drops


PHRASES = [
    ((20 / 200, 0.0, 40 / 200, 100 / 500), "shaggy hair"),
    ((20 / 200, 0.0, 40 / 200, 100 / 500), "A man"),
]
GUYS = [(0.0, 0.2, 0.25, 0.6), (0.5, 0.1, 1.0, 0.5)]


@pytest.mark.parametrize(
    ("several", "guys", "counted"),
    [
        ("union", [(0.0, 0.1, 1.0, 0.6)], {}),
        ("each", GUYS, {}),
        ("skip", [], {"phrase with several boxes": 1}),
    ],
)
def test_phrases_with_boxes_become_regions(tmp_path: Path, several: str, guys: list[Any], counted: Any) -> None:
    (sample,), drops = read(**dataset(tmp_path), several=several)
    record = sample.record.check()
    assert (record.key, record.width, record.height, record.source) == ("1000092795", 200, 500, "flickr30k")
    assert str(sample.image) == "flickr30k-images/1000092795.jpg"
    assert told(record) == [*((box, "Two young guys") for box in guys), *PHRASES]
    assert record.caption == "Two young guys with shaggy hair see it in the yard ."
    assert record.meta["captions"][1:] == [
        "A man in a blue shirt is standing on a ladder .",
        "a man is outside .",
    ]
    assert drops == {"region given twice": 1, **counted}


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    objects = [
        boxed([1], 90, 10, 20, 40),
        boxed([2], 201, 10, 260, 40),
        boxed([4], 0, 490, 100, 550),
        boxed([5], "nan", 1, 2, 3),
    ]
    (sample,), drops = read(**dataset(tmp_path, objects))
    assert told(sample.record) == [((0.0, 489 / 500, 0.5, 1.0), "A man")]
    assert drops == {
        "box inverted": 1,
        "box outside the image": 1,
        "box not finite": 1,
        "kept: box clipped": 2,
        "region given twice": 1,
    }


def test_a_split_names_its_images(tmp_path: Path) -> None:
    paths = dataset(tmp_path)
    written(tmp_path / "Sentences/1.txt", "[/EN#9/people A dog] runs .\n")
    written(tmp_path / "Annotations/1.xml", XML.format(objects=boxed([9], 1, 1, 100, 250)))
    assert [s.record.key for s in read(**paths)[0]] == ["1", "1000092795"]
    (sample,), _ = read(**paths, ids=written(tmp_path / "val.txt", "1\n"))
    assert told(sample.record) == [((0.0, 0.0, 0.5, 0.5), "A dog")]
    with pytest.raises(AnnotationError, match=r"7\.xml: No such file or directory"):
        read(**paths, ids=written(tmp_path / "val.txt", "1\n7\n"))
    with pytest.raises(AnnotationError, match=r"nowhere\.txt"):
        read(**paths, ids=tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"xml": "<annotation><size>"}, r"1000092795\.xml: no XML: no element found"),
        ({"xml": "<annotation></annotation>"}, r"1000092795\.xml: size/height: expected a number, got None"),
        ({"xml": XML.replace("200", "0")}, r"\.xml: size: expected a height and width of at least 1"),
        ({"xml": XML.replace("200", "2.5")}, r"\.xml: size/width: expected a whole number, got 2\.5"),
        ({"objects": ["<object><name>1</name><bndbox><xmin>1</xmin></bndbox></object>"]}, "ymin: expected a number"),
        ({"objects": [boxed([1], 1, "x", 3, 4)]}, "ymin: expected a number, got 'x'"),
        ({"sentences": "[/EN#1/people Two young guys with hair\n"}, r"1000092795\.txt: line 1: expected phrases as"),
        ({"sentences": "A man .\n[/EN#1 Two] guys\n"}, r"1000092795\.txt: line 2: expected phrases as"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(AnnotationError, match=text):
        read(**dataset(tmp_path, **change))


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="several: expected one of union, each, skip, got 'all'"):
        read(**dataset(tmp_path), several="all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match="empty: expected a folder of sentences"):
        read(**{**dataset(tmp_path), "sentences": tmp_path / "empty"})
