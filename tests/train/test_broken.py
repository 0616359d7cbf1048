"""Runs on data of which some cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from granvit.train.checkpoints import WINDOW
from granvit.train.trainer import StageTrainer, TrainingError
from tests.train.support import Tree, assert_same, metrics, stage1, stage2, train, tree, weights, write_shards
from tests.train.test_distributed import compare, train_on_two

BROKEN = (1, 8, 13)
HELDOUT_BROKEN = (2,)


def plain_of(folder: Path, *stages: Tree, **data: Any) -> Tree:
    """A recipe on shards of which three images of twenty, and one of five held-out ones, are cut short."""
    if not (folder / "shards").exists():
        write_shards(folder / "shards", 20, broken=BROKEN)
        write_shards(folder / "heldout", 5, broken=HELDOUT_BROKEN)
    plain = tree(folder, *stages)
    plain["data"] |= data
    return plain


def stops(plain: Tree, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends before a step."""
    batches = StageTrainer.get_batch_samples

    def fails(self: StageTrainer, *args: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise TrainingError("stopped here")
        return batches(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "get_batch_samples", fails)
        with pytest.raises(TrainingError, match="stopped here"):
            train(plain)


def test_they_are_left_out_said_and_counted_and_a_run_that_goes_on_leaves_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage1(steps=10, save_every=2, log_every=5, micro_batch=2)  # two epochs; lines span checkpoints
    plain = plain_of(tmp_path, stage)
    _, said = train(plain)
    for i in BROKEN:
        assert said.count(f"left out: 00000{i // 7}.tar: {i:06d}: broken or cut short") == 1  # and not once an epoch
    for i in HELDOUT_BROKEN:
        assert said.count(f"left out: 000000.tar: {i:06d}: broken or cut short") == 1
    lines = metrics(plain["output"])
    assert [line["skipped"] for line in lines if "loss" in line] == [3, 3]
    assert [line["heldout/skipped"] for line in lines if "heldout/caption" in line] == [1, 1]
    again = {**plain, "output": str(tmp_path / "again")}
    stops(again, 4, monkeypatch)
    stops(again, 9, monkeypatch)
    train(again)
    assert metrics(again["output"]) == lines
    assert_same(weights(tmp_path / "again" / "first" / "model"), weights(tmp_path / "out" / "first" / "model"))
    for folder in ("out", "again"):
        window = torch.load(tmp_path / folder / "first" / "checkpoint-10" / WINDOW.format(rank=0), weights_only=True)
        assert (window["wanted"], window["broken"]) == (40, 6)


def test_more_of_them_than_are_allowed_end_the_run_also_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four are allowed, three an epoch are there, of which nobody knows the order."""
    plain = plain_of(tmp_path, stage1(steps=10, save_every=2, log_every=1), heldout=[], max_broken=0.0045)
    sentence = (
        r"data: [56] of \d+ samples cannot be read, and max_broken allows 0\.0045 \(of 1000 or more\); the last: "
    )
    with pytest.raises(
        TrainingError, match=sentence + r".*The checkpoint of step [4-8] is whole: the same command"
    ) as one:
        train(plain)
    again = {**plain, "output": str(tmp_path / "again")}
    stops(again, 4, monkeypatch)
    with pytest.raises(TrainingError) as two:
        train(again)
    assert str(one.value) == str(two.value)
    first = {**plain, "output": str(tmp_path / "strict"), "data": {**plain["data"], "max_broken": 0.0}}
    with pytest.raises(TrainingError, match=r"data: [123] of (4|8|12|16|20) samples cannot be read"):
        train(first)


def test_held_out_ones_are_counted_alone(tmp_path: Path) -> None:
    plain = plain_of(tmp_path, stage1(steps=1), max_broken=0.0)
    with pytest.raises(TrainingError, match=r"data: 1 of 5 samples cannot be read, and max_broken allows 0 "):
        train(plain)
    write_shards(tmp_path / "nothing", 2, broken=range(2))
    plain["data"] |= {"max_broken": 0.5, "heldout": [{"shards": str(tmp_path / "nothing")}]}
    plain["output"] = str(tmp_path / "other")
    with pytest.raises(TrainingError, match=r"data\.heldout: none of the 2 samples could be read"):
        train(plain)


def test_a_disk_that_goes_away_ends_the_run_however_many_may_be_broken(tmp_path: Path) -> None:
    write_shards(tmp_path / "nothing", 9, broken=range(9))
    plain = plain_of(tmp_path, stage2(steps=4, log_every=2), heldout=[], max_broken=0.9)
    plain["data"]["train"] = [{"shards": str(tmp_path / "nothing")}]
    with pytest.raises(
        TrainingError, match="step 2: none of the 8 samples since the last line of the log could be read"
    ):
        train(plain)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_rank_of_which_no_sample_can_be_read_takes_the_step_with_the_others(tmp_path: Path, parallel: str) -> None:
    """Micro-batches of one: each broken sample leaves a rank without any."""
    stages = [stage1(steps=5, micro_batch=2, distillation={"crops": "native"}), stage2(steps=5)]
    plain = plain_of(tmp_path, *stages)
    plain["parallel"] = parallel
    plain["model"]["language"]["config"]["attention_dropout"] = 0.0
    train(plain)
    assert sum(line.get("skipped", 0) for line in metrics(plain["output"])) == 6
    plain["output"] = str(tmp_path / "two")
    for stage in plain["stages"]:
        stage["micro_batch"] = 1
    train_on_two(plain)
    compare(tmp_path / "out", tmp_path / "two")
