"""The audit: counts that can be counted by hand, and an OCR held against rendered truth."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from granvit.annotate import AnnotationError, BoxRules, Detection, Filters, TextLine
from granvit.annotate.audit import Count, audit, match, shard_samples
from granvit.annotate.filters import box_iou
from granvit.annotate.ocr import RapidOCRReader
from granvit.cli import app
from granvit.data.record import Record, Region
from granvit.data.shards import ShardWriter
from tests.annotate.support import FixedDetector, page


@dataclass(frozen=True)
class FixedOCR:
    lines: tuple[TextLine, ...]
    name: str = "fixed"

    def read(self, images: Sequence[Image.Image]) -> list[list[TextLine]]:
        return [list(self.lines) for _ in images]


def sample(*regions: Region, kind: str = "ocr", key: str = "a") -> tuple[Record, Image.Image]:
    return Record(key, 1000, 500, "s", kind, None, regions), Image.new("RGB", (1000, 500))


def test_counts_by_hand() -> None:
    truth = sample(
        Region((0.1, 0.10, 0.5, 0.15), "one"),  # 25 pixels high
        Region((0.1, 0.30, 0.5, 0.35), "two  words"),
        Region((0.1, 0.50, 0.5, 0.75), "three"),  # 125
        Region((0.6, 0.10, 0.9, 0.11), "too low"),  # 5: neither missed nor, found, wrong
    )
    lines = (
        TextLine((0.1, 0.10, 0.5, 0.15), "one", 0.6),
        TextLine((0.1, 0.11, 0.5, 0.16), "one", 0.9),  # chooses first and takes the truth, with less overlap
        TextLine((0.1, 0.30, 0.5, 0.36), " two\nwords ", 0.9),
        TextLine((0.1, 0.50, 0.5, 0.56), "three", 0.9),  # IoU below a half
        TextLine((0.6, 0.096, 0.9, 0.113), "too low", 0.9),  # 8.5 pixels
    )
    result = audit([truth, sample(kind="natural")], kind="ocr", ocr=FixedOCR(lines))
    assert result.images == 1
    assert result.found == 4
    assert result.sizes["16 to 32 px"] == Count(2, 2, 2)
    assert result.sizes["from 96 px"] == Count(1, 0, 0)
    assert result.all == Count(3, 2, 2)
    assert (result.all.recall, result.precision, result.all.exact_rate) == (2 / 3, 0.5, 1.0)
    plain = json.loads(result.to_json())
    assert plain["rows"]["all"] == {"truth": 3, "matched": 2, "exact": 2, "recall": 2 / 3, "exact_rate": 1.0}
    assert plain["rows"]["0 to 16 px"]["recall"] is None
    other = audit([truth], kind="ocr", ocr=FixedOCR((TextLine((0.1, 0.1, 0.5, 0.15), "One", None),)))
    assert other.all == Count(3, 1, 0)
    nothing = audit([truth], kind="ocr", ocr=FixedOCR(()))
    assert (nothing.all.recall, nothing.precision) == (0.0, None)


def test_labels_of_a_detector() -> None:
    boxes = [(0.0, 0.0, 0.3, 0.5), (0.5, 0.2, 0.9, 0.9)]
    samples = [sample(*(Region(box, "cat") for box in boxes), kind="natural", key=f"{i}") for i in range(5)]
    detector = FixedDetector((Detection(boxes[0], 0.9, "cat"), Detection(boxes[1], 0.8, "dog")))
    result = audit(samples, detector=detector, batch_size=2)
    assert (result.images, result.found, result.all) == (5, 10, Count(10, 10, 5))
    assert audit(samples, detector=detector, iou=1.0).all == Count(10, 10, 5)


coordinate = st.integers(0, 6).map(lambda n: n / 6)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(st.lists(st.tuples(box, st.none() | st.floats(0, 1)), max_size=8), st.lists(box, max_size=8))
def test_matching_is_one_to_one_and_greedy(found: list[Any], truth: list[Any]) -> None:
    regions, true = [Region(b, "", score) for b, score in found], [Region(b) for b in truth]
    pairs = match(regions, true, 0.5)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(box_iou(regions[i].box, true[j].box) >= 0.5 for i, j in pairs)
    lonely = [
        (i, j)
        for i in {*range(len(regions))} - {i for i, _ in pairs}
        for j in {*range(len(true))} - {j for _, j in pairs}
    ]
    assert all(box_iou(regions[i].box, true[j].box) < 0.5 for i, j in lonely)


def test_wrong_truth_is_named() -> None:
    record, _ = sample()
    with pytest.raises(AnnotationError, match="record a: says 1000 x 500 pixels, its image has 40 x 50"):
        audit([(record, Image.new("RGB", (40, 50)))], kind="ocr", ocr=FixedOCR(()))
    with pytest.raises(AnnotationError, match="audit: no sample of kind natural"):
        audit([sample()], detector=FixedDetector(()))
    with pytest.raises(AnnotationError, match="audit: iou: expected more than 0 and at most 1, got 0"):
        audit([sample()], kind="ocr", ocr=FixedOCR(()), iou=0)


def test_rapidocr_against_rendered_truth(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    texts = ["Chapter one", "It was a bright cold day", "17.50 EUR, paid in cash"]
    image, ink = page(texts, size=(700, 500))
    regions = tuple(
        Region((x0 / 700, y0 / 500, x1 / 700, y1 / 500), text)
        for text, (x0, y0, x1, y1) in zip(texts, ink, strict=True)
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    with ShardWriter(tmp_path) as writer:
        writer.add(Record("a", 700, 500, "pages", "ocr", None, regions), file.getvalue(), "png")
    free = BoxRules(None, None, None)
    result = audit(shard_samples(tmp_path), kind="ocr", ocr=RapidOCRReader(), filters=Filters(ocr=free))
    assert result.all == Count(3, 3, 3)
    assert result.precision == 1.0
    command = ["data", "audit", str(tmp_path), "--ocr", "rapidocr"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "precision 100.0% of 3 found regions" in shown.output
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout) == json.loads(result.to_json())
