"""Losses that nothing is learnt from: of held-out images, and with the images exchanged.

Whatever the ranks hold, each of them calls the model equally often, since sharded weights are gathered in every call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from granvit.train.data import TrainingData
from granvit.train.meters import Meters
from granvit.train.objective import Losses, Micro, Objective

ACCURACY = "contrastive/accuracy"  # among the captions of a micro-batch, so larger ones make it harder


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def on_all_ranks(yes: bool, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    if not dist.is_initialized():
        return yes
    votes = torch.tensor(float(yes), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def of_all_ranks(own: list[str]) -> list[str]:
    """What each rank has to say, in the order of the ranks."""
    if not dist.is_initialized():
        return own
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [text for part in found for text in part]


class _Gap:
    """What the wrong image costs, over the micro-batches that have another image to show."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own, self._other = Meters(device), Meters(device)

    def add(self, model: nn.Module, micro: Micro, own: Losses, counts: bool = True) -> None:
        if not on_all_ranks(not counts or sum(map(bool, micro.batch.frames)) > 1, self._device):
            return
        other = model(micro, wrong_image=True)
        if counts:
            _add(self._own, micro, own)
            _add(self._other, micro, other)

    def values(self) -> dict[str, float]:
        own, other = self._own.means(), self._other.means()
        return {f"wrong_image/{name}": other[name] - value for name, value in own.items()}


def _add(meters: Meters, micro: Micro, losses: Losses) -> None:
    assert losses.output is not None
    meters.add_answers(losses.output.token_loss, losses.output.token_pair, micro.batch.pairs)


def heldout_losses(
    model: nn.Module, objective: Objective, data: TrainingData, device: torch.device, *, wrong_image: bool
) -> tuple[dict[str, float], list[str]]:
    """Means over all images of a finite run that can be read, of all ranks together.

    Args:
        model: the objective as it is called: sharded, or with gradients exchanged.
        objective: itself.
        data: finite.
        device: of the model.
        wrong_image: also what a wrong image costs.

    Returns:
        ``caption``, ``caption/<task>``, ``caption/<task>/<size>`` and the same behind ``wrong_image/``; of a
        contrastive objective ``contrastive``, the mean of its micro-batches, and ``alignment`` and
        ``contrastive/accuracy``, of its regions. Then why images could not be read.
    """
    own, gap = Meters(device), _Gap(device)
    contrastive = torch.zeros(5, dtype=torch.float64, device=device)  # losses, micro-batches; distances, hits, regions
    broken: list[str] = []
    with _evaluating(model):
        for number in range(math.ceil((data.length or 0) / (data.micro_batch * data.world_size))):
            loaded = data.load(number)
            broken += [skip.reason for skip in loaded.skipped]
            counts = loaded.images > 0
            assert loaded.batch is not None
            micro = objective.micro(loaded.batch).to(device)
            losses = model(micro)
            if losses.contrastive is not None and losses.alignment is not None and losses.accuracy is not None:
                if counts:
                    shares = (float(losses.alignment) * micro.cells, float(losses.accuracy) * micro.cells, micro.cells)
                    sums = [float(losses.contrastive), 1.0, *shares]
                    contrastive += torch.tensor(sums, dtype=torch.float64, device=device)
                continue
            if counts:
                _add(own, micro, losses)
            if wrong_image:
                gap.add(model, micro, losses, counts)
    if dist.is_initialized():
        dist.all_reduce(contrastive)
    found, broken = own.means() | gap.values(), of_all_ranks(broken)
    total, count, *sums, regions = contrastive.tolist()
    if not count:
        return found, broken
    alignment, accuracy = (x / max(regions, 1.0) for x in sums)
    return found | {"contrastive": total / count, "alignment": alignment, ACCURACY: accuracy}, broken


def look_again(model: nn.Module, micro: Micro, device: torch.device, *, wrong_image: bool) -> dict[str, float]:
    """What a micro-batch says when nothing is learnt from it: ``wrong_image/...`` is what its images exchanged cost,
    ``by/distillation/...`` the distillation by size of the region."""
    gap, regions = _Gap(device), Meters(device)
    with _evaluating(model):
        own = model(micro, by_region=True)
        if own.distillation is not None:
            regions.add_regions(own.distillation, micro.batch.boxes.tolist())
        if wrong_image:
            gap.add(model, micro, own)
    return gap.values() | {f"by/{name}": value for name, value in regions.means().items()}
