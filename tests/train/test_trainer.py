"""The Trainer's steps, against plain torch and against other ways through the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granvit.nn import RegionAttentionPool
from granvit.train.objective import Objective
from granvit.train.teacher import Teacher
from granvit.train.trainer import StageTrainer, TrainingError
from tests.train.support import (
    Tree,
    metrics,
    stage1,
    train,
    tree,
    weights,
)


@pytest.mark.parametrize("settings", [{"micro_batch": 1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("crops", ["resize", "native"])
def test_another_way_through_the_same_batch(tmp_path: Path, settings: Tree, crops: str) -> None:
    """Gradient accumulation and checkpointing change nothing but rounding."""
    ways: list[tuple[list[Tree], dict[str, Tensor]]] = []
    for name, more in (("plain", {}), ("other", settings)):
        first = stage1(batch_size=4, distillation={"crops": crops}, save_every=4, **more)
        plain = tree(tmp_path, first, output=str(tmp_path / name))
        plain["model"]["language"]["config"]["attention_dropout"] = 0.0
        train(plain)
        ways.append((metrics(plain["output"]), weights(tmp_path / name / "first" / "checkpoint-4")))
    (lines, ours), (other_lines, theirs) = ways
    for line, other in zip(lines, other_lines, strict=True):
        for name in ("loss", "caption", "distillation", "grad_norm"):
            assert (name in other) == (name in line)
            assert other.get(name, 0.0) == pytest.approx(line.get(name, 0.0), rel=1e-5), name
    for name, value in ours.items():  # the teacher among them
        if not name.endswith("k_proj.bias"):  # its gradient is 0 but for rounding, which AdamW makes steps of
            torch.testing.assert_close(
                theirs[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_step_is_adamw_on_the_mean_gradient_and_then_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's own AdamW in float64, fed with the gradients that the first micro-batches left."""
    seen: dict[str, Any] = {"teacher": 0}
    check, update = StageTrainer.check_gradients, Teacher.update

    def before_step(self: StageTrainer) -> None:
        seen["params"] = {n: p.detach().clone() for n, p in self.objective.named_parameters()}
        seen["grads"] = {n: p.grad.clone() for n, p in self.objective.named_parameters() if p.grad is not None}
        seen["rates"] = {
            id(p): group["lr"]
            for group in self.optimizer.param_groups
            for p in group["params"]  # type: ignore[union-attr]
        }
        seen["ids"] = {n: id(p) for n, p in self.objective.named_parameters()}
        check(self)

    def count(self: Teacher, student: nn.Module) -> None:
        seen["teacher"] += 1
        update(self, student)

    monkeypatch.setattr(StageTrainer, "check_gradients", before_step)
    monkeypatch.setattr(Teacher, "update", count)
    first = stage1(
        steps=1,
        batch_size=4,
        micro_batch=1,
        warmup=0,
        weight_decay=0.1,
        rates={"vision": 1e-2},
        save_every=1,
        schedule="constant",
        max_grad_norm=None,
        distillation={"decay": 0.75},
    )
    train(tree(tmp_path, first))
    assert seen["teacher"] == 1  # once for four micro-batches
    after = weights(tmp_path / "out" / "first" / "checkpoint-1")
    for name, before in seen["params"].items():
        if name.startswith("teacher."):
            continue
        oracle = nn.Parameter(before.double())
        if name in seen["grads"]:
            rate = 1e-2 if "vision_tower" in name else 3e-3
            assert seen["rates"][seen["ids"][name]] == rate
            oracle.grad = seen["grads"][name].double()
            torch.optim.AdamW([oracle], lr=rate, weight_decay=0.1 if before.dim() > 1 else 0.0).step()
        torch.testing.assert_close(
            after[name].double(), oracle.detach(), rtol=0, atol=2e-5 if name in seen["grads"] else 0
        )
        twin = f"teacher.tower.{name.partition('vision_tower.')[2]}"
        if twin in after:
            expected = 0.75 * before.double() + 0.25 * after[name].double()
            torch.testing.assert_close(after[twin].double(), expected, rtol=1e-6, atol=1e-7)


def test_the_rate_of_the_log_is_that_of_the_stage(tmp_path: Path) -> None:
    """Of the step that the line is about, whatever the first of the parts has."""
    first = stage1(steps=4, warmup=2, schedule="linear", learning_rate=1e-3, rates={"vision": 1e-2})
    train(tree(tmp_path, first))
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    for line, share in zip(lines, (0, 0.5, 1, 0.5), strict=True):
        assert line["learning_rate"] == pytest.approx(1e-3 * share)
        assert line["learning_rate/vision"] == pytest.approx(1e-2 * share)
        assert line["learning_rate/prompts"] == pytest.approx(1e-3 * share)


def test_teacher_moves_once_a_step_with_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    update = Teacher.update
    monkeypatch.setattr(Teacher, "update", lambda self, student: (moved.append(1), update(self, student))[1])
    train(tree(tmp_path, stage1(steps=3, batch_size=4, micro_batch=1)))
    assert len(moved) == 3


def test_a_frozen_part_with_a_gradient_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = StageTrainer.check_gradients

    def thawed(self: StageTrainer) -> None:
        head = self.objective.model.llava.lm_head.weight
        head.grad = torch.zeros_like(head)
        check(self)

    monkeypatch.setattr(StageTrainer, "check_gradients", thawed)
    with pytest.raises(TrainingError, match=r"frozen and with a gradient all the same: model\.llava\.lm_head\.weight"):
        train(tree(tmp_path, stage1(steps=1)))


def test_a_trained_part_without_a_gradient_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region head is cut off."""
    pool = RegionAttentionPool.forward
    monkeypatch.setattr(RegionAttentionPool, "forward", lambda self, *args: pool(self, *args) * 0)
    with pytest.raises(
        TrainingError, match="^prompts should train in stage first and got no gradient in the first step with something"
    ):
        train(tree(tmp_path, stage1(steps=1, prompt="region", tasks={"bbox_to_caption": 1})))


def test_a_part_that_has_nothing_to_learn_from_is_one_sentence(tmp_path: Path) -> None:
    """What the region head is for is never drawn."""
    with pytest.raises(
        TrainingError, match="^prompts should train in stage first, and in 2 steps the data held nothing to learn from"
    ):
        train(tree(tmp_path, stage1(steps=2, prompt="region", tasks={"caption_to_bbox": 1, "bbox_to_caption": 1e-9})))


def test_a_term_that_vanishes_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "distill", lambda self, micro, tokens, *_: tokens.sum() * 0)
    with pytest.raises(TrainingError, match="step 1: the loss term distillation was 0 since the last line of the log"):
        train(tree(tmp_path, stage1(steps=1)))


def test_contrastive_stage(tmp_path: Path) -> None:
    """Trains, is evaluated, and goes on as another."""
    warm = {
        "name": "warm",
        "train": ["vision", "prompts"],
        "objective": "contrastive",
        "prompt": "region",
        "regions": 3,
        "steps": 40,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "log_every": 3,
    }
    plain = tree(tmp_path, warm, stage1(steps=1))
    train(plain)
    lines = [line for line in metrics(plain["output"]) if line["stage"] == "warm"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert lines[-1]["heldout/contrastive"] > 0
    for line in lines:
        accuracy = line["contrastive/accuracy" if "loss" in line else "heldout/contrastive/accuracy"]
        regions = 3 * 12 if "loss" in line else 15  # of three steps, of all held-out images
        assert 0 <= accuracy <= 1
        assert accuracy * regions == pytest.approx(round(accuracy * regions), abs=1e-4)
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["contrastive"] + line["alignment"])


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    """Autocast and rounded frozen weights; what trains stays float32."""
    plain = tree(tmp_path, stage1(), output=str(tmp_path / "wide"))
    train(plain)
    half = {**plain, "model": {**plain["model"], "dtype": "bfloat16"}, "output": str(tmp_path / "narrow")}
    train(half)
    for ours, theirs in zip(metrics(half["output"]), metrics(plain["output"]), strict=True):
        for name in ("loss", "heldout/caption"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=0.02)
    saved = weights(tmp_path / "narrow" / "first" / "model")
    kinds = {name: value.dtype for name, value in saved.items()}
    assert kinds["multi_modal_projector.linear_1.weight"] == torch.float32
    assert {kind for name, kind in kinds.items() if name.startswith("language_model.")} == {torch.bfloat16}
