"""LLaVA: regions out of conversations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from granvit.data.importers.base import AnnotationError
from granvit.data.importers.llava import llava
from granvit.geometry import BoxTransform
from tests.data.importers.support import image, told, written


def talk(*turns: str, image: Any = "vg/VG_100K/1.jpg", **more: Any) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(turns)
    entry = {
        "id": "VG_100K/1",
        "image": image,
        "conversations": [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)],
        **more,
    }
    return {key: value for key, value in entry.items() if value is not None}


def read(tmp_path: Path, *entries: Any, **options: Any) -> tuple[list[Any], Counter[str]]:
    drops: Counter[str] = Counter()
    path = written(tmp_path / "llava_v1_5_mix665k.json", list(entries))
    return list(llava(path, tmp_path, drops, **options)), drops


def test_both_questions_of_the_mix_give_regions(tmp_path: Path) -> None:
    entry = talk(
        "<image>\nPlease provide a short description for this region: [0.12, 0.4, 0.37, 0.98].",
        "A woman in a red coat.",
        "Please provide the bounding box coordinate of the region this sentence describes: the clock: green.",
        "[0.5,0.06,0.63,0.33]",
        "Please provide the bounding box coordinate of the region this sentence describes: yellow bus",
        "[0.00, 0.00, 1.00, 0.50]",
        "What colour is the bus?",
        "Yellow",
    )
    (sample,), drops = read(tmp_path, entry)
    assert told(sample.record) == [
        ((0.12, 0.4, 0.37, 0.98), "A woman in a red coat."),
        ((0.5, 0.06, 0.63, 0.33), "green."),
        ((0.0, 0.0, 1.0, 0.5), "yellow bus"),
    ]
    assert sample.image == tmp_path / "vg/VG_100K/1.jpg"
    assert (sample.record.width, sample.record.height, sample.record.caption) == (0, 0, None)
    assert sample.record.key == "VG_100K-1-0"
    assert sample.record.meta["conversations"] == entry["conversations"]
    assert not drops


def test_boxes_that_nothing_describes_keep_no_caption(tmp_path: Path) -> None:
    (sample,), drops = read(
        tmp_path,
        talk(
            "Is there a dog in [0.1, 0.1, 0.2, 0.2]?",
            "Yes",
            "Describe [0.1, 0.1, 0.2, 0.2] and [0.3, 0.3, 0.4, 0.4]",
            "A dog and a cat",
            "Where is the dog?",
            "[0.1, 0.1, 0.1, 0.2]",
        ),
    )
    assert told(sample.record) == [((0.1, 0.1, 0.2, 0.2), ""), ((0.3, 0.3, 0.4, 0.4), "")]
    assert drops == {"kept: box without a caption": 4, "region given twice": 1, "box without area": 1}


def test_boxes_of_the_padded_square_return_to_the_image(tmp_path: Path) -> None:
    image(tmp_path / "wide.jpg", 200, 100)
    image(tmp_path / "tall.jpg", 60, 91)
    question = "Provide a short description for this region: {}"
    cases = {"wide.jpg": ((100, 200), (0.1, 0.2, 0.5, 0.9)), "tall.jpg": ((91, 60), (0.25, 0.1, 0.75, 1.0))}
    entries, expected = [], []
    for name, (size, box) in cases.items():
        padded = BoxTransform.letterbox(size, (max(size),) * 2).boxes(torch.tensor(box, dtype=torch.float64))
        entries.append(talk(question.format([round(x, 6) for x in padded.tolist()]), "a dog", image=name))
        expected.append(pytest.approx(box, abs=1e-5))
    samples, drops = read(tmp_path, *entries, square=True)
    assert [s.record.regions[0].box for s in samples] == expected
    # The whole square leads out of the image.
    (sample,), drops = read(tmp_path, talk(question.format("[0, 0, 1, 1]"), "all", image="wide.jpg"), square=True)
    assert told(sample.record) == [((0.0, 0.0, 1.0, 1.0), "all")]
    assert drops == {"kept: box clipped": 1}


@pytest.mark.parametrize(
    ("style", "text", "more"),
    [
        ("thousandths", "[100, 200, 500, 1000]", {}),
        ("pixels", "[20, 20, 100, 100]", {}),
        ("pixels", "[80, 160, 400, 800]", {"width": 800, "height": 800}),
    ],
)
def test_boxes_are_read_in_their_style(tmp_path: Path, style: str, text: str, more: dict[str, Any]) -> None:
    image(tmp_path / "a.jpg", 200, 100)
    entry = talk(f"Describe the region {text}", "a dog", image="a.jpg", **more)
    (sample,), _ = read(tmp_path, entry, style=style)
    assert told(sample.record) == [((0.1, 0.2, 0.5, 1.0), "a dog")]
    assert sample.record.width == more.get("width", 0)


def test_an_image_that_cannot_be_measured_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    (sample,), _ = read(tmp_path, talk("Describe [20, 20, 100, 100]", "a", image="no.jpg"), style="pixels")
    assert sample.record.regions == ()
    assert sample.record.width == 0


def test_pretraining_answers_are_captions_when_asked_for(tmp_path: Path) -> None:
    one = talk("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture 3 - inch memory")
    more = talk("What is it?", "A bed", "What colour?", "Blue")
    assert [s.record.caption for s in read(tmp_path, one, more, captions=True)[0]] == [
        one["conversations"][1]["value"],
        None,
    ]
    assert [s.record.caption for s in read(tmp_path, one, more)[0]] == [None, None]


def test_what_has_no_single_image_is_counted(tmp_path: Path) -> None:
    entries = (
        talk("Hi", "Hello", image=None),
        talk("Compare", "Same", image=["a.jpg", "b.jpg"]),
        talk("What?", "That", image=["a.jpg"]),
        talk("What?", "That", image=""),
    )
    samples, drops = read(tmp_path, *entries)
    assert [s.image.name for s in samples] == ["a.jpg"]
    assert drops == {"conversation without an image": 2, "conversation about several images": 1}


def test_one_conversation_a_line_is_read_too(tmp_path: Path) -> None:
    entries = [talk("Describe [0.1, 0.2, 0.3, 0.4]", f"dog {i}", id=7) for i in range(2)]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, entries)))
    samples = list(llava(path, tmp_path, Counter()))
    assert [(s.record.key, s.record.regions[0].caption) for s in samples] == [("7-0", "dog 0"), ("7-1", "dog 1")]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"image": "a.jpg"}, r"\[1\]: expected an object with conversations"),
        (talk("a", "b", image=3), r"\[1\]: image: expected text or a list, got '3'"),
        (
            {"image": "a.jpg", "conversations": [{"from": "human"}]},
            r"\[1\]: conversations\[0\]: expected an object with v",
        ),
        ({"image": "a.jpg", "conversations": [{"from": "me", "value": "a"}]}, "from: expected human or gpt, got 'me'"),
        (talk("a", "b", width=0, height=4), r"\[1\]: expected a height and width of at least 1"),
        ("a", r"\[1\]: expected an object"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, entry: Any, text: str) -> None:
    with pytest.raises(AnnotationError, match=rf"mix665k\.json: .*{text}"):
        read(tmp_path, talk("a", "b"), entry)


def test_an_unknown_style_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="style: expected one of relative, thousandths, pixels, got 'percent'"):
        read(tmp_path, style="percent")
