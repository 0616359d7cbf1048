"""What the Trainer is handed: data without an end, and what has to happen at moments that it calls out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from granvit.train.data import Loaded, TrainingData
from granvit.train.log import LogError
from granvit.train.parts import TrainingError

if TYPE_CHECKING:
    from granvit.train.trainer import StageTrainer


class Arguments(TrainingArguments):
    """The Trainer's settings, with a CPU that every library knows by its name."""

    @property
    def device(self) -> torch.device:
        """As TrainingArguments has it, less the number that accelerate gives the CPU where there are several processes:
        torch.load, which the Trainer calls with it, refuses ``cpu:0``."""
        found: torch.device = super().device
        return torch.device("cpu") if found.type == "cpu" else found


class Loader:
    """What the Trainer takes for a DataLoader without a length."""

    def __init__(self, data: TrainingData, workers: int, *, pin_memory: bool) -> None:
        self._data, self._workers, self._pin = data, workers, pin_memory

    def __iter__(self) -> Iterator[Loaded]:
        return self._data.loader(self._workers, pin_memory=self._pin)


class Steps(TrainerCallback):
    """Passes the Trainer's moments on to a :class:`granvit.train.trainer.StageTrainer`."""

    def __init__(self, trainer: StageTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._trainer.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the learning rates and the first gradients."""
        self._trainer.note_learning_rates()
        self._trainer.check_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the teacher."""
        objective = self._trainer.objective
        if objective.teacher is not None:
            objective.teacher.update(objective.tower)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ends early, and with a checkpoint, when asked to."""
        self._trainer.count_step()
        if self._trainer.should_stop():
            control.should_save = control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hands a line on."""
        if state.is_world_process_zero and logs is not None:
            try:
                self._trainer.run_log.write(state.global_step, logs)
            except LogError as error:
                raise TrainingError(f"{error}. {self._trainer.left()}") from error
