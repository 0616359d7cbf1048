"""Meters: the means of losses made by hand."""

from __future__ import annotations

import math
import multiprocessing
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from granvit.model.packing import PairInfo
from granvit.train.meters import TASK_NAMES, Meters

CPU = torch.device("cpu")
SIDES = {"small": (0.001, 0.0624), "medium": (0.0626, 0.187), "large": (0.188, 0.999)}  # of squares, by COCO's bounds


def test_means_by_task_and_size_of_losses_made_by_hand() -> None:
    meters = Meters(CPU)
    pairs = [
        PairInfo("global_caption", None, "natural", None),
        PairInfo("bbox_to_caption", "small", "natural", 0),
        PairInfo("bbox_to_caption", "large", "ocr", 1),
        PairInfo("caption_to_bbox", "small", "natural", 0),
    ]
    meters.add_answers(torch.tensor([1.0, 2.0, 4.0, 5.0, 7.0, 9.0, 10.0]), torch.tensor([0, 1, 1, 2, 2, 2, 3]), pairs)
    meters.add_answers(torch.tensor([8.0]), torch.tensor([0]), [PairInfo("chat", None, "natural", None)])
    assert meters.means() == {
        "caption": 46 / 8,
        "caption/global_caption": 1.0,
        "caption/bbox_to_caption": 27 / 5,
        "caption/bbox_to_caption/small": 3.0,
        "caption/bbox_to_caption/large": 7.0,
        "caption/caption_to_bbox": 10.0,
        "caption/caption_to_bbox/small": 10.0,
        "caption/chat": 8.0,
    }
    assert meters.means()["caption"] == 46 / 8  # asking changes nothing
    meters.reset()
    assert meters.means() == {}


def test_random_losses_over_many_batches_are_the_means_of_lists() -> None:
    meters, seen = Meters(CPU), defaultdict(list)
    for _ in range(20):
        pairs = []
        for _ in range(int(torch.randint(1, 6, ()))):
            task = TASK_NAMES[int(torch.randint(len(TASK_NAMES), ()))]
            whole = task in ("global_caption", "chat")
            size = None if whole else tuple(SIDES)[int(torch.randint(3, ()))]
            pairs.append(PairInfo(task, size, "natural", None if whole else 0))
        token_pair = torch.randint(len(pairs), (int(torch.randint(0, 30, ())),))
        losses = torch.rand(len(token_pair)) * 5
        meters.add_answers(losses.clone().requires_grad_(), token_pair, pairs)
        for loss, pair in zip(losses.tolist(), token_pair.tolist(), strict=True):
            names = ["caption", f"caption/{pairs[pair].task}", f"caption/{pairs[pair].task}/{pairs[pair].size}"]
            for name in names if pairs[pair].size else names[:2]:
                seen[name].append(loss)
    found = meters.means()
    assert found.keys() == seen.keys()
    for name, values in seen.items():
        assert found[name] == pytest.approx(math.fsum(values) / len(values), rel=1e-12), name


def test_distillation_by_size_of_the_box() -> None:
    meters, seen = Meters(CPU), defaultdict(list)
    for _ in range(5):
        boxes, losses = [], torch.rand(7)
        for loss in losses.tolist():
            size = tuple(SIDES)[int(torch.randint(3, ()))]
            low, high = SIDES[size]
            side = low + float(torch.rand(())) * (high - low)
            x, y = (float(torch.rand(())) * (1 - side) for _ in range(2))
            boxes.append([x, y, x + side, y + side])
            seen[f"distillation/{size}"].append(loss)
        meters.add_regions(losses, boxes)
    meters.add_regions(torch.empty(0), [])
    found = meters.means()
    assert found.keys() == seen.keys()
    for name, values in seen.items():
        assert found[name] == pytest.approx(math.fsum(values) / len(values), rel=1e-12), name


def test_a_long_line_loses_nothing_to_rounding() -> None:
    """In bfloat16, or float32, a sum of this many would stand still."""
    meters, pairs = Meters(CPU), [PairInfo("global_caption", None, "natural", None)]
    for _ in range(40):
        meters.add_answers(
            torch.full((1000,), 0.0996, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long), pairs
        )
    assert meters.means()["caption"] == float(torch.tensor(0.0996, dtype=torch.bfloat16))


def _rank(rank: int, meeting: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    meters = Meters(CPU)
    size = ("small", "large")[rank]
    pairs = [PairInfo("bbox_to_caption", size, "natural", 0)]
    meters.add_answers(torch.full((1 + 2 * rank,), 2.0 + rank), torch.zeros(1 + 2 * rank, dtype=torch.long), pairs)
    answers.put(meters.means())
    torch.distributed.destroy_process_group()


def test_ranks_are_averaged_by_what_they_saw(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    meeting = str(tmp_path / "meeting")
    ranks = [context.Process(target=_rank, args=(rank, meeting, answers), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    expected = {
        "caption": 11 / 4,
        "caption/bbox_to_caption": 11 / 4,
        "caption/bbox_to_caption/small": 2.0,
        "caption/bbox_to_caption/large": 3.0,
    }
    assert found == [expected, expected]
