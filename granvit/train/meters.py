"""Sums of losses by task and box size, kept on the device until a line of the log wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granvit.data.record import SIZES, Region
from granvit.data.tasks import TASKS
from granvit.model.packing import PairInfo

TERMS = ("caption", "distillation", "contrastive", "alignment")  # of the loss, as the log names them
TASK_NAMES = (*TASKS, "chat")
_SIZES = (*SIZES, "image")
GROUPS = tuple((task, size) for task in TASK_NAMES for size in _SIZES)


class Meters:
    """Means of token losses by task and box size, and of the distillation by box size.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._answers = torch.zeros(2, len(GROUPS), dtype=torch.float64, device=self._device)  # sums, counts
        self._regions = torch.zeros(2, len(SIZES), dtype=torch.float64, device=self._device)

    def add_answers(self, token_loss: Tensor, token_pair: Tensor, pairs: Sequence[PairInfo]) -> None:
        """Adds the losses of supervised tokens ``(N,)``, each of the pair in `token_pair`."""
        groups = [GROUPS.index((pair.task, pair.size or "image")) for pair in pairs]
        group = torch.tensor(groups, dtype=torch.int64, device=self._device)[token_pair]
        self._add(self._answers, group, token_loss)

    def add_regions(self, loss: Tensor, boxes: Sequence[Sequence[float]]) -> None:
        """Adds the distillation ``(R,)`` of the regions whose boxes are given, as they are on the CPU."""
        sizes = [SIZES.index(Region((box[0], box[1], box[2], box[3])).size()) for box in boxes]
        self._add(self._regions, torch.tensor(sizes, dtype=torch.int64, device=self._device), loss)

    def _add(self, sums: Tensor, group: Tensor, loss: Tensor) -> None:
        loss = loss.detach().to(sums.dtype)
        sums[0].index_add_(0, group, loss)
        sums[1].index_add_(0, group, torch.ones_like(loss))

    def state(self) -> Tensor:
        """The sums of this rank, for a checkpoint."""
        return torch.cat([self._answers, self._regions], dim=1)

    def load(self, state: Tensor) -> None:
        """Goes on from what :meth:`state` gave."""
        answers, regions = state.to(self._device).split([len(GROUPS), len(SIZES)], dim=1)
        self._answers, self._regions = answers.clone(), regions.clone()

    def means(self) -> dict[str, float]:
        """The means of all ranks, by name, of what was seen: ``caption``, ``caption/<task>``,
        ``caption/<task>/<size>``, ``distillation/<size>``. Waits for the device."""
        sums = self.state()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        totals, counts = sums.cpu()
        found: dict[str, list[float]] = {}
        for i, (task, size) in enumerate(GROUPS):
            names = ("caption", f"caption/{task}", f"caption/{task}/{size}")
            for name in names if size != "image" else names[:2]:
                total = found.setdefault(name, [0.0, 0.0])
                total[0] += float(totals[i])
                total[1] += float(counts[i])
        for i, size in enumerate(SIZES):
            place = len(GROUPS) + i
            found[f"distillation/{size}"] = [float(totals[place]), float(counts[place])]
        return {name: total / count for name, (total, count) in found.items() if count}
