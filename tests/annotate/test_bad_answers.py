"""Annotators that answer nonsense, and a disk that is full when the shards are written."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from granvit.annotate import AnnotationError, Captions, Detection, annotate
from granvit.annotate.interfaces import Box
from granvit.cli import app
from granvit.data.record import MAX_CAPTION
from granvit.data.shards import Shard, ShardError, read_index, verify
from tests.annotate.support import FixedDetector, NumberCaptioner, contents, make_images, number_of

NAN, INF = float("nan"), float("inf")
GOOD = Detection((0.1, 0.1, 0.6, 0.6), 0.9, "cat")


@dataclass(frozen=True)
class Astray:
    """A cat, and a dog in a box that is written as text, because settings go to the journal and JSON has no NaN."""

    box: str
    name: str = "astray"

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        x0, y0, x1, y1 = map(float, self.box.split())
        return [[GOOD, Detection((x0, y0, x1, y1), 0.8, "dog")] for _ in images]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((NAN, 0.1, 0.6, 0.6), "box_flat"),
        ((0.1, 0.1, 0.6, NAN), "box_flat"),
        ((0.6, 0.1, 0.1, 0.6), "box_flat"),  # inverted
        ((0.1, 0.1, 0.1, 0.6), "box_flat"),
        ((1.2, 0.1, 1.9, 0.6), "box_flat"),  # outside
        ((-0.9, -0.9, -0.1, -0.1), "box_flat"),
        ((-INF, -INF, INF, INF), None),  # the whole image
        ((-0.5, 0.2, 0.5, 0.9), None),
    ],
)
def test_impossible_boxes_are_cut_or_counted(tmp_path: Path, box: Box, reason: str | None) -> None:
    detector = Astray(" ".join(map(str, box)))
    report = annotate([make_images(tmp_path / "in", 2)], tmp_path / "out", detector=detector)
    assert report.boxes_dropped == (Counter({reason: 2}) if reason else Counter())
    with Shard(tmp_path / "out" / "000000.tar") as shard:
        captions = [region.caption for region in shard.record(0).regions]
    assert captions == (["cat"] if reason else ["cat", "dog"])


@dataclass(frozen=True)
class Rambling:
    """Has no end for the image of number 1."""

    name: str = "rambling"

    def caption(self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[Captions]:
        words = ["on and " * MAX_CAPTION if number_of(image) == 1 else "short" for image in images]
        return [Captions(text, tuple("box" for _ in b)) for text, b in zip(words, boxes, strict=True)]


def test_an_endless_caption_costs_its_image_and_not_the_run(tmp_path: Path) -> None:
    images = make_images(tmp_path / "in", 3)
    report = annotate([images], tmp_path / "out", detector=FixedDetector((GOOD,)), captioner=Rambling())
    assert (report.samples, report.dropped) == (2, Counter(long_caption=1))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]["long_caption"] == 1


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stop", [0, 5])
def test_a_disk_that_is_full_of_shards_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    images, out = make_images(tmp_path / "in", 5), tmp_path / "out"
    options: dict[str, Any] = {"detector": FixedDetector((GOOD,)), "captioner": NumberCaptioner(), "shard_samples": 2}
    add = tarfile.TarFile.addfile
    taken: list[object] = []

    def ending(*sample: Any) -> None:
        taken.append(sample)
        (full if len(taken) > stop else add)(*sample)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", ending)
        with pytest.raises(ShardError) as caught:
            annotate([images], out, **options)
    whole = stop // 4  # two files for each of two samples
    assert str(caught.value) == (
        f"{out}: the disk is full; {2 * whole} samples in {whole} finished shards are safe; "
        "the same command goes on from there"
    )
    assert len(list(out.glob("*.tar"))) == whole
    annotate([images], out, **options)
    annotate([images], tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_report_for_which_no_room_is_left_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = make_images(tmp_path / "in", 2), tmp_path / "out"

    with monkeypatch.context() as patched:
        patched.setattr("granvit.annotate.run.write_atomically", full)
        text = r"report\.json: the disk is full; all shards are safe, and the same command writes it"
        with pytest.raises(AnnotationError, match=text):
            annotate([images], out, detector=FixedDetector((GOOD,)))
    assert not (out / "report.json").exists()
    verify(out)
    assert [info.samples for info in read_index(out)] == [2]
    annotate([images], out, detector=FixedDetector((GOOD,)))
    assert json.loads((out / "report.json").read_text())["samples"] == 2


@pytest.mark.parametrize("command", [("annotate", "in", "--out", "out"), ("audit", "in")])
def test_without_an_annotator_the_options_are_named(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["data", *command])
    assert str(result.exception) == (
        "say who finds the regions: --detector for natural images, or --ocr rapidocr for images of text"
    )
