"""What a stage trains: how fast each part of the model, and whether each of them does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from granvit.errors import UserError
from granvit.recipe import PARTS, Stage


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


def check_gradients(objective: nn.Module, stage: Stage, device: torch.device) -> None:
    """That what a stage trains has a gradient on some rank, and nothing else has.

    Raises:
        TrainingError: one of them is not so.
    """
    alive: Counter[str] = Counter()
    stray = []
    for name, parameter in objective.named_parameters():
        part = part_of(name)
        if parameter.grad is None:
            continue
        if not parameter.requires_grad or (part and part not in stage.train):
            stray.append(name)
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        alive[part] += int(bool(grad.any()))
    parts = [part for part in PARTS if part in stage.train]
    seen = torch.tensor([float(alive[part]) for part in parts], device=device)
    if dist.is_initialized():  # a rank may have had no region to prompt with, or hold no piece of a part
        dist.all_reduce(seen)
    dead = [part for part, count in zip(parts, seen.tolist(), strict=True) if not count]
    if stray:
        raise TrainingError(f"frozen and with a gradient all the same: {', '.join(stray[:3])}")
    if dead:
        raise TrainingError(
            f"{', '.join(dead)} should train in stage {stage.name} and got no gradient in its first step"
        )
