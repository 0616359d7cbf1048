"""RefCOCO: the published pickle, the same as JSON, and MDETR's JSON."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import AnnotationError
from granvit.data.importers.refcoco import refcoco
from tests.data.importers.support import told, written

FILE = "COCO_train2014_000000581857.jpg"
IMAGES = [
    {
        "license": 1,
        "file_name": name,
        "coco_url": "http://mscoco.org/images/581857",
        "height": height,
        "width": width,
        "date_captured": "2013-11-18 21:49:09",
        "flickr_url": "http://farm4.staticflickr.com/3504/4024498213_e4b4c8d2bc_z.jpg",
        "id": number,
    }
    for name, number, width, height in ((FILE, 581857, 427, 640), ("COCO_train2014_000000000001.jpg", 1, 100, 200))
]
ANNOTATIONS = [
    {
        "segmentation": [[239.16, 318.03, 245.12, 330.42]],
        "area": 14863.61,
        "iscrowd": 0,
        "image_id": image,
        "bbox": bbox,
        "category_id": 1,
        "id": number,
    }
    for number, image, bbox in (
        (1719310, 581857, [103.93, 299.99, 134.22, 177.42]),
        (1728227, 581857, [0, 10.0, 427, 630]),
        (3, 1, [10, 20, 30, 40]),
        (4, 1, [10, 20, 0, 40]),
    )
]


def ref(number: int, ann: int, image: int, split: str, *sentences: str) -> dict[str, Any]:
    return {
        "sent_ids": list(range(len(sentences))),
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "ann_id": ann,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": i, "sent": text}
            for i, text in enumerate(sentences)
        ],
        "category_id": 1,
    }


REFS = [
    ref(0, 1719310, 581857, "train", "the lady with the blue shirt", "lady with back to us", "blue shirt"),
    ref(1, 3, 1, "testA", "left man"),
    ref(2, 1728227, 581857, "train", "the whole table"),
    ref(3, 4, 1, "val", "a line"),
]


def files(tmp_path: Path, refs: Any = REFS, name: str = "refs(unc).p", protocol: int = 0) -> dict[str, Path]:
    content = refs if name.endswith(".json") else pickle.dumps(refs, protocol)
    instances = {"info": {}, "images": IMAGES, "licenses": [], "annotations": ANNOTATIONS, "type": "instances"}
    instances["categories"] = [{"supercategory": "person", "id": 1, "name": "person"}]
    return {"refs": written(tmp_path / name, content), "instances": written(tmp_path / "instances.json", instances)}


def read(**options: Any) -> tuple[list[Any], Counter[str]]:
    drops: Counter[str] = Counter()
    return list(refcoco(images=Path("train2014"), drops=drops, **options)), drops


@pytest.mark.parametrize(
    ("name", "protocol"), [("refs(unc).p", 0), ("refs(umd).p", 2), ("refs.p", 4), ("refs.json", 0)]
)
def test_expressions_become_regions(tmp_path: Path, name: str, protocol: int) -> None:
    (sample,), drops = read(**files(tmp_path, name=name, protocol=protocol), split="train")
    record = sample.record.check()
    assert str(sample.image) == f"train2014/{FILE}"
    assert (record.key, record.width, record.height) == ("COCO_train2014_000000581857", 427, 640)
    box = (103.93 / 427, 299.99 / 640, 238.15 / 427, 477.41 / 640)
    assert [text for _, text in told(record)] == [
        "the lady with the blue shirt",
        "lady with back to us",
        "blue shirt",
        "the whole table",
    ]
    assert all(region.box == pytest.approx(box) for region in record.regions[:3])
    assert record.regions[3].box == pytest.approx((0, 10 / 640, 1, 1))
    assert record.meta == {"image_id": 581857, "split": "train"}
    assert not drops


def test_a_split_holds_nothing_of_another(tmp_path: Path) -> None:
    (sample,), _ = read(**files(tmp_path), split="testA", source="refcoco+")
    assert told(sample.record) == [((0.1, 0.1, 0.4, 0.3), "left man")]
    assert sample.record.source == sample.record.regions[0].origin == "refcoco+"
    (sample,), drops = read(**files(tmp_path), split="val")
    assert sample.record.regions == ()
    assert drops == {"box without area": 1}
    with pytest.raises(AnnotationError, match="expected refs of the split 'test', found testA, train, val"):
        read(**files(tmp_path), split="test")
    with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p: expected split beside refs"):
        read(**files(tmp_path))
    with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p: expected instances beside refs"):
        read(refs=files(tmp_path)["refs"], split="train")


def test_text_of_python_2_is_read(tmp_path: Path) -> None:
    """A pickle as Python 2 wrote it, with bytes for text: protocol 2, SHORT_BINSTRING."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def pairs(*items: tuple[bytes, bytes]) -> bytes:
        return b"}(" + b"".join(short(key) + value for key, value in items) + b"u"

    sentence = pairs((b"sent", short("the caf\u00e9".encode())))
    entry = pairs((b"ann_id", b"M\x03\x00"), (b"split", short(b"train")), (b"sentences", b"](" + sentence + b"e"))
    paths = files(tmp_path)
    paths["refs"].write_bytes(b"\x80\x02](" + entry + b"e.")
    (sample,), _ = read(**paths, split="train")
    assert told(sample.record) == [((0.1, 0.1, 0.4, 0.3), "the café")]


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for refs in (Trap(sprung), [Trap(sprung)], [{"split": Trap(sprung)}]):
        for protocol in (0, 2, 4):
            with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p: no pickle of refs: it asks for .*plain data"):
                read(**files(tmp_path, refs, protocol=protocol), split="train")
    assert not sprung.exists()
    pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    assert sprung.exists()  # so it was a trap


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "no pickle of refs"),
        (b"not a pickle", "no pickle of refs"),
        (pickle.dumps(REFS)[:-20], "no pickle of refs"),
        (pickle.dumps({"a": 1}), "expected a list of refs, got dict"),
        (pickle.dumps([3]), r"\[0\]: expected an object with split, got 3"),
        (pickle.dumps([{**REFS[0], "sentences": [{"raw": "a"}]}]), r"\[0\]: sentences\[0\]: expected an object with s"),
        (
            pickle.dumps([{**REFS[0], "ann_id": 99}]),
            r"\[0\]: sentences\[0\]: annotation 99 is not in .*instances\.json",
        ),
    ],
)
def test_wrong_refs_are_named(tmp_path: Path, content: bytes, text: str) -> None:
    paths = files(tmp_path)
    paths["refs"].write_bytes(content)
    with pytest.raises(AnnotationError, match=rf"refs\(unc\)\.p: {text}"):
        read(**paths, split="train")


def test_wrong_instances_are_named(tmp_path: Path) -> None:
    paths = files(tmp_path)
    written(paths["instances"], {"images": IMAGES[1:], "annotations": ANNOTATIONS})
    with pytest.raises(AnnotationError, match=r"sentences\[0\]: image 581857 is not in .*instances\.json"):
        read(**paths, split="train")
    with pytest.raises(AnnotationError, match=r"nowhere\.p: No such file or directory"):
        read(refs=tmp_path / "nowhere.p", instances=paths["instances"], split="train")


def mdetr(tmp_path: Path, **change: Any) -> Path:
    def one(number: int, caption: str) -> dict[str, Any]:
        return {
            "file_name": FILE,
            "height": 640,
            "width": 427,
            "id": number,
            "original_id": 581857,
            "caption": caption,
            "dataset_name": "refcoco",
            "tokens_negative": [[0, len(caption)]],
        }

    annotations = [
        {
            "area": 14863.6,
            "iscrowd": 0,
            "image_id": number,
            "category_id": 1,
            "id": number,
            "bbox": [103.93, 299.99, 134.22, 177.42],
            "original_id": 1719310,
            "tokens_positive": [[0, 4]],
        }
        for number in (0, 1)
    ]
    content = {
        "info": [],
        "licenses": [],
        "images": [one(0, "the lady with the blue shirt"), one(1, "lady with back to us")],
        "annotations": annotations,
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }
    return written(tmp_path / "finetune_refcoco_train.json", {**content, **change})


def test_mdetrs_json_is_read(tmp_path: Path) -> None:
    (sample,), drops = read(refs=mdetr(tmp_path))
    box = pytest.approx((103.93 / 427, 299.99 / 640, 238.15 / 427, 477.41 / 640))
    assert [(r.box, r.caption) for r in sample.record.check().regions] == [
        (box, "the lady with the blue shirt"),
        (box, "lady with back to us"),
    ]
    assert (sample.record.width, sample.record.height) == (427, 640)
    assert not drops
    with pytest.raises(AnnotationError, match="holds boxes and one split itself; give neither instances nor a split"):
        read(refs=mdetr(tmp_path), split="train")
    with pytest.raises(AnnotationError, match=r"train\.json: images\[0\]: expected an object with caption"):
        read(refs=mdetr(tmp_path, images=[IMAGES[0]]))
