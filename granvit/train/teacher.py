"""The teacher of self-distillation: a moving average of the student that looks at crops."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Teacher(nn.Module):
    """An exponential moving average of a vision tower.

    After each optimizer step ``teacher = decay * teacher + (1 - decay) * student``, for every floating parameter and
    buffer; others are copied. The average is kept in float32 whatever the student's dtype: at a decay of 0.9999 a step
    moves a weight by less than bfloat16 can tell apart. Arithmetic in another dtype is autocast's business.

    It is a module beside the student, without gradients, so whoever saves, moves or shards the one does so with the
    other.

    Args:
        student: the tower; the teacher starts as its copy.
        decay: 0 is the student of the last step, close to 1 a long memory.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"Teacher: decay: expected at least 0 and less than 1, got {decay}")
        self.decay = decay
        self.tower = copy.deepcopy(student).float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher has no dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Takes one step of the average; the student is the tower that the teacher was made from."""
        averages, currents = [], []
        for average, current in zip(_tensors(self.tower), _tensors(student), strict=True):
            if average.is_floating_point():
                averages.append(average)
                currents.append(current.to(average.dtype))
            else:
                average.copy_(current)
        torch._foreach_lerp_(averages, currents, 1 - self.decay)

    def extra_repr(self) -> str:
        """The decay."""
        return f"decay={self.decay}"


def _tensors(tower: nn.Module) -> list[Tensor]:
    """Parameters and buffers; of sharded ones the part that is here, which is the same part of both towers."""
    found = [*tower.parameters(), *tower.buffers()]
    return [t.to_local() if isinstance(t, DTensor) else t for t in found]
