"""What a stage trains: how fast each part of the model, and whether each of them does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from granvit.errors import UserError
from granvit.recipe import PARTS, Stage
from granvit.train.objective import Micro


class TrainingError(UserError):
    """Training cannot go on; the text says why and what is left."""


def part_of(name: str) -> str:
    """Which of the recipe's parts a parameter of an :class:`Objective` belongs to; ``""`` for the teacher and the
    contrastive loss."""
    if name.startswith("model.llava.model.vision_tower."):
        return "vision"
    if name.startswith("model.llava.model.multi_modal_projector."):
        return "projector"
    if name.startswith("model.llava."):
        return "language"
    return "prompts" if name.startswith("model.") else ""


def optimizer_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Parameters for AdamW: a group for each part, matrices with weight decay and vectors without; which part it is,
    under ``part``."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.dim() > 1), []).append(parameter)
    return [
        {
            "part": part,
            "params": parameters,
            "lr": stage.rates.get(part, stage.learning_rate),
            "weight_decay": stage.weight_decay if is_matrix else 0.0,
        }
        for (part, is_matrix), parameters in groups.items()
    ]


def food(micro: Micro, contrastive: bool) -> list[float]:
    """How much there is in a micro-batch that each of :data:`PARTS` learns from, on the CPU: answers about an image for
    the tower and the projector, any answers for the language model, prompts that stand for a region. 0 is none: its
    gradient is then 0 though nothing is wrong."""
    batch = micro.batch
    if contrastive:
        found = {"vision": micro.cells, "projector": micro.cells, "prompts": micro.cells}
    else:
        with_image = torch.tensor(batch.frames)[batch.image.flatten()[batch.supervised]] > 0
        about = float(with_image.sum())
        found = {"vision": about, "projector": about, "prompts": float(len(batch.prompt_place))}
    found["language"] = micro.tokens
    return [found[part] for part in PARTS]


class GradientCheck:
    """Looks whether what a stage trains has a gradient on some rank, and nothing else has.

    Each part is judged at the first step that holds something that it learns from, and where there is none for long,
    that is said.

    Args:
        objective: what trains.
        stage: which parts should.
        device: of the objective.
        patience: steps until each part should have had something to learn from; None waits on.
    """

    def __init__(self, objective: nn.Module, stage: Stage, device: torch.device, patience: int | None) -> None:
        self._objective, self._stage, self._device, self._patience = objective, stage, device, patience
        self._waiting = [part for part in PARTS if part in stage.train]
        self._steps = 0

    def look(self, fed: Container[str]) -> None:
        """At the gradients of a step.

        Args:
            fed: parts that it held something for, on any rank.

        Raises:
            TrainingError: a part that trains has none, or another has one.
        """
        if not self._waiting:
            return
        self._steps += 1
        alive = self._alive()
        due = [part for part in self._waiting if part in fed]
        dead = [part for part in due if not alive[part]]
        if dead:
            raise TrainingError(
                f"{', '.join(dead)} should train in stage {self._stage.name} and got no gradient in the first step "
                "with something to learn from"
            )
        self._waiting = [part for part in self._waiting if part not in due]
        if self._waiting and self._steps == self._patience:
            raise TrainingError(
                f"{', '.join(self._waiting)} should train in stage {self._stage.name}, and in {self._steps} steps the "
                "data held nothing to learn from: no answer about an image for vision and projector, no <box> or "
                "<region> for prompts"
            )

    def _alive(self) -> dict[str, bool]:
        """Which parts that wait have a gradient."""
        alive: Counter[str] = Counter()
        stray = []
        for name, parameter in self._objective.named_parameters():
            part = part_of(name)
            if parameter.grad is None:
                continue
            if not parameter.requires_grad or (part and part not in self._stage.train):
                stray.append(name)
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            alive[part] += int(bool(grad.any()))
        if stray:
            raise TrainingError(f"frozen and with a gradient all the same: {', '.join(stray[:3])}")
        seen = torch.tensor([float(alive[part]) for part in self._waiting], device=self._device)
        if dist.is_initialized():  # a rank may have had no region to prompt with, or hold no piece of a part
            dist.all_reduce(seen)
        return {part: bool(count) for part, count in zip(self._waiting, seen.tolist(), strict=True)}
