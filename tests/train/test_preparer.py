"""What an image becomes: boxes where the frame shows them, text never mirrored, and prompts exact."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from granvit.data.record import Record, Region
from granvit.data.sources import Shards, Shown
from granvit.data.tasks import TaskSampler, Templates
from granvit.geometry import BoxTransform
from granvit.model.packing import Sample, pack
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.train.data import Preparer
from tests.model.support import byte_level
from tests.train.pictures import CAPTIONS, COLORS, SIZES, TASKS, Numbered, shards


@pytest.fixture(autouse=True)
def drawn() -> None:
    """Python's generator follows torch's, which the run's seed sets."""
    random.seed(int(torch.randint(1 << 40, ())))


def painted(pixels: Tensor, color: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Bounds of a colour, in pixels of the frame."""
    distance = (pixels.int() - torch.tensor(color)[:, None, None]).abs().amax(0)
    y, x = (distance < 100).nonzero(as_tuple=True)
    return float(x.min()), float(y.min()), float(x.max()) + 1, float(y.max()) + 1


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_are_where_the_letterboxed_frame_shows_them(tmp_path: Path, flip: float) -> None:
    source = Shards(shards(tmp_path, SIZES))
    side = 96
    prepare = Preparer(TaskSampler({"bbox_to_caption": 1}, regions=3), side, flip=flip)
    for i, (width, height) in enumerate(SIZES):
        sample = prepare(source, i, epoch=random.randrange(9))
        assert sample.pixels.shape == (1, 3, side, side)
        assert sample.boxes.shape == (3, 4)
        assert len({pair.answer for pair in sample.pairs}) == len(sample.pairs) == 3
        for pair in sample.pairs:
            assert pair.region is not None
            box = sample.boxes[pair.region]
            assert torch.equal(box, torch.tensor(pair.box))
            found = painted(sample.pixels[0], COLORS[CAPTIONS.index(pair.answer)])
            # Half a pixel of rounding, and one of the filter's blur.
            torch.testing.assert_close(torch.tensor(found), box * side, rtol=0, atol=1.5)
        zoom = side / max(width, height)
        black = (sample.pixels[0] == 0).all(0)
        shown = (round(height * zoom), round(width * zoom))
        assert int((~black).sum()) == shown[0] * shown[1]


def test_mirroring_exchanges_left_and_right_of_pixels_and_boxes(tmp_path: Path) -> None:
    source = Shards(shards(tmp_path, SIZES))
    for i in range(len(SIZES)):
        plain, mirrored = (Preparer(TaskSampler(TASKS), 64, flip=flip)(source, i, 0) for flip in (0.0, 1.0))
        # A window of half a pixel may be cut on the other side: pixels agree up to that.
        assert (plain.pixels.flip(-1).int() - mirrored.pixels.int()).abs().float().mean() < 8
        x0, y0, x1, y1 = plain.boxes.unbind(1)
        assert plain.boxes.shape == mirrored.boxes.shape == (3, 4)
        torch.testing.assert_close(mirrored.boxes, torch.stack([1 - x1, y0, 1 - x0, y1], 1), rtol=0, atol=0.5 / 64)


def test_text_is_never_mirrored(tmp_path: Path) -> None:
    source = Shards(shards(tmp_path, SIZES, kind="ocr"))
    for i in range(len(SIZES)):
        plain, mirrored = (
            Preparer(TaskSampler(TASKS), 64, "mixed", flip=flip, seed=4)(source, i, 1) for flip in (0.0, 1.0)
        )
        assert torch.equal(plain.pixels, mirrored.pixels)
        assert torch.equal(plain.boxes, mirrored.boxes)
        assert plain.pairs == mirrored.pairs
        assert plain.kind == mirrored.kind == "ocr"


def test_the_share_of_mirrored_images_is_the_one_asked_for() -> None:
    source, prepare = Numbered(0, 1000), Preparer(TaskSampler(TASKS), 8, flip=0.3, seed=random.randrange(1000))
    count = sum(int(prepare(source, i, epoch).pixels[0, 2, 0, 0]) for epoch in range(2) for i in range(1000))
    assert abs(count - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_a_region_that_is_mostly_out_of_the_frame_is_left_out() -> None:
    class Half:
        """The right half of every image."""

        def __len__(self) -> int:
            return 1

        name, asks = "half", False

        def identity(self) -> dict[str, Any]:
            return {"half": 1}

        def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
            boxes = [(0.0, 0.0, 0.4, 1.0), (0.3, 0.0, 0.56, 0.5), (0.1, 0.25, 0.7, 0.75), (0.6, 0.5, 0.8, 1.0)]
            regions = tuple(Region(box, name) for box, name in zip(boxes, CAPTIONS, strict=False))
            pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
            record = Record("half", 2 * size, size, "test", "natural", None, regions)
            return Shown(record, pixels, BoxTransform.crop((size, 2 * size), (size, 0, 2 * size, size)))

    sample = Preparer(TaskSampler({"bbox_to_caption": 1}), 64)(Half(), 0, 0)
    boxes = {pair.answer: sample.boxes[pair.region].tolist() for pair in sample.pairs if pair.region is not None}
    assert boxes.keys() == {"three", "four"}
    assert boxes["three"] == pytest.approx([0.0, 0.25, 0.4, 0.75], abs=1e-6)
    assert boxes["four"] == pytest.approx([0.2, 0.5, 0.6, 1.0], abs=1e-6)


# ---- prompts --------------------------------------------------------------------------------------------------------

ASKED = Templates(
    bbox_to_caption=("What is in {box}, in short?", "{box}: what is it?"), caption_to_bbox=("Where is {caption}?",)
)


def coordinates(box: Sequence[float], style: str, side: int) -> str:
    if style == "relative":
        return "[" + ", ".join(f"{x:.3f}" for x in box) + "]"
    return "[" + ", ".join(str(round(x * (1000 if style == "thousandths" else side))) for x in box) + "]"


def asked_with(sample: Sample, style: str, side: int) -> list[str]:
    """How each Bbox2Caption of a sample names its region; every question has to be one of the wordings, exactly."""
    kinds = []
    for pair in sample.pairs:
        if pair.task == "global_caption":
            assert pair.question == ASKED.global_caption[0]
            continue
        assert pair.box is not None
        text = coordinates(pair.box, style, side)
        if pair.task == "caption_to_bbox":
            assert pair.answer == text
            assert pair.question.startswith("Where is ")
            continue
        names = {"text": text, "box": "<box>", "region": "<region>"}
        questions = {
            wording.format(box=name): kind for kind, name in names.items() for wording in ASKED.bbox_to_caption
        }
        kinds.append(questions[pair.question])
    return kinds


@pytest.mark.parametrize("style", ["relative", "thousandths", "pixels"])
@pytest.mark.parametrize("prompt", ["text", "box", "region", "mixed"])
def test_prompts_replace_the_coordinates_and_nothing_else(prompt: str, style: str) -> None:
    sampler = TaskSampler(TASKS, style=style, templates=ASKED, seed=random.randrange(1000))
    prepare = Preparer(sampler, 200, prompt, seed=random.randrange(1000))
    kinds = Counter(k for i in range(60) for k in asked_with(prepare(Numbered(0, 60), i, 0), style, 200))
    if prompt != "mixed":
        assert set(kinds) == {prompt}
    else:
        assert set(kinds) == {"text", "region"}
        assert abs(kinds["text"] - kinds["region"]) < 5 * sum(kinds.values()) ** 0.5


def test_the_same_seed_and_epoch_give_the_same_sample() -> None:
    source = Numbered(0, 5)

    def made(seed: int, epoch: int) -> list[object]:
        prepare = Preparer(TaskSampler(TASKS, regions=2, seed=seed), 32, "mixed", 0.5, seed)
        samples = [prepare(source, i, epoch) for i in range(5)]
        return [(sample.pairs, sample.boxes.tolist(), sample.pixels.tolist()) for sample in samples]

    assert made(1, 1) == made(1, 1)
    assert made(1, 1) != made(1, 2)
    assert made(1, 1) != made(2, 1)


# ---- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_tiles_come_behind_the_overview_and_boxes_stay_on_it(tmp_path: Path, flip: float) -> None:
    source = Shards(shards(tmp_path, SIZES))
    side = 64
    plain, tiled = (Preparer(TaskSampler(TASKS), side, "region", flip, tiles=tiles) for tiles in (0, 6))
    frames = []
    for i in range(len(SIZES)):
        alone, sample = plain(source, i, 0), tiled(source, i, 0)
        assert torch.equal(sample.pixels[:1], alone.pixels)
        assert torch.equal(sample.boxes, alone.boxes)
        assert sample.pairs == alone.pairs
        frames.append(len(sample.pixels))
    assert frames == [7, 7, 5, 7, 7, 7]  # two rows of three or three of two, and of the square two of two
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    batch = pack([tiled(source, i, 0) for i in range(len(SIZES))], Prompts(tokenizer), 4, 900)
    starts = torch.tensor([0, *batch.frames[:-1]]).cumsum(0)
    assert set(batch.image_index.tolist()) <= set(starts.tolist())
    assert torch.equal(batch.pixels[starts], torch.cat([plain(source, i, 0).pixels for i in batch.order]))
