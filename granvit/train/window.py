"""What the next line of the log is about: everything since the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from granvit.model.packing import PackedBatch
from granvit.recipe import Stage
from granvit.train.evaluation import ACCURACY
from granvit.train.meters import TERMS, Meters
from granvit.train.objective import Losses
from granvit.train.tally import Tally


class Window:
    """Sums of the loss's terms, its means by task and box size, and the tally of what was done.

    Args:
        stage: of the recipe.
        device: of the losses.
        tally: restarted with the window.
    """

    def __init__(self, stage: Stage, device: torch.device, tally: Tally) -> None:
        self.tally = tally
        self._stage, self._device = stage, device
        self._meters = Meters(device)
        self._terms: dict[str, Tensor] = {}

    def restart(self) -> None:
        """Forgets everything."""
        self._terms.clear()
        self._meters.reset()
        self.tally.restart()

    def add(self, losses: Losses, batch: PackedBatch) -> None:
        """One micro-batch more."""
        found = {name: getattr(losses, name) for name in TERMS} | {ACCURACY: losses.accuracy}
        for name, term in found.items():
            if term is not None:
                self._terms[name] = self._terms.get(name, torch.zeros_like(term)) + term
        if losses.output is not None:
            self._meters.add_answers(losses.output.token_loss, losses.output.token_pair, batch.pairs)

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two lines."""
        return {"terms": self._terms, "meters": self._meters.state(), "tally": self.tally.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state` gave."""
        self._terms = {name: term.to(self._device) for name, term in state["terms"].items()}
        self._meters.load(state["meters"])
        self.tally.load(state["tally"])

    def losses(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The loss, its terms, each a mean over the steps, and ``by/...``: the same by task and box size.

        Args:
            total: adds up a number over the ranks.
        """
        terms = {name: float(total(term.detach().float())) / self.tally.steps for name, term in self._terms.items()}
        loss = sum(self._weight(name) * value for name, value in terms.items() if name != ACCURACY)
        by = {f"by/{name}": value for name, value in self._meters.means().items() if "/" in name}
        return {"loss": loss, **terms, **by}

    def _weight(self, term: str) -> float:
        distillation = self._stage.distillation
        return distillation.weight if term == "distillation" and distillation is not None else 1.0

    def fault(self, losses: Mapping[str, float]) -> str:
        """What is wrong with what :meth:`losses` gave, in a sentence without its full stop; "" where nothing is."""
        images = self.tally.steps * self._stage.batch_size
        if self.tally.skipped == images:
            return f"none of the {images} samples since the last line of the log could be read"
        wanted = ["contrastive"] if self._stage.objective == "contrastive" else ["caption"]
        wanted += ["distillation"] if self._stage.distillation is not None else []
        gone = [name for name in wanted if not losses.get(name)]
        if not gone:
            return ""
        return (
            f"the loss term {' and '.join(gone)} was 0 since the last line of the log; the data may hold no regions or "
            "captions that the stage can use"
        )
