"""Hugging Face's Trainer, told what a step of GranViT is and when to stop with a sentence."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments

from granvit.data.sources import Broken, SourceError
from granvit.recipe import PARTS, Stage
from granvit.train._counting import Costs, work_of
from granvit.train.checkpoints import (
    COMPLETE,
    WEIGHTS,
    WINDOW,
    checkpoint_folder,
    checkpoint_step,
    last_checkpoint,
    rotate,
)
from granvit.train.data import Loaded, TrainingData
from granvit.train.evaluation import heldout_losses, look_again, of_all_ranks
from granvit.train.hooks import Loader, Steps
from granvit.train.log import RunLog
from granvit.train.objective import Counts, Losses, Micro, Objective
from granvit.train.parts import GradientCheck, TrainingError, food, optimizer_groups
from granvit.train.stopping import Stop
from granvit.train.tally import Tally
from granvit.train.window import Window

_KEPT = 2  # checkpoints of a stage
_PATIENCE = 100  # steps within which each part that trains should have had something to learn from


class StageTrainer(Trainer):
    """Trains one stage.

    Data arrives packed, in an order that depends on the step alone, so a checkpoint need not hold it. Losses are
    divided by what the whole step holds, on all ranks and in all micro-batches. The Trainer's own part is the loop,
    mixed precision, DDP and FSDP2, the schedule, checkpoints and their rotation.

    Args:
        objective: the model with its loss; what trains in it has ``requires_grad``.
        stage: of the recipe.
        args: of the Trainer.
        data: what to train on.
        heldout: what to evaluate on, finite; None for nothing.
        workers: processes that read ahead.
        max_broken: share of the samples that may be unreadable, see :class:`granvit.data.sources.Broken`.
        log: where lines go.
        stop: who is asked after each step whether to end early.
        costs: of what a micro-batch holds.
        peak: FLOP/s of a device, of which the log says the share that was reached; None where it is not known.
    """

    def __init__(
        self,
        objective: Objective,
        stage: Stage,
        args: TrainingArguments,
        data: TrainingData,
        heldout: TrainingData | None,
        *,
        workers: int,
        max_broken: float,
        log: RunLog,
        stop: Stop,
        costs: Costs,
        peak: float | None,
    ) -> None:
        self._stop, self._stop_signal = stop, 0
        self.objective, self.stage, self.run_log = objective, stage, log
        self._data, self._heldout, self._workers = data, heldout, workers
        self._max_broken, self._broken = max_broken, Broken(max_broken)
        self._said: set[str] = set()
        self._costs = costs
        super().__init__(model=objective, args=args, eval_dataset=heldout, callbacks=[Steps(self)])
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's rounds what goes in, boxes too, the losses that come out, and the sums of gradients.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=plugin.mixed_precision_policy.param_dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            )
        self.remove_callback(PrinterCallback)  # the run's own log says it
        self.model_accepts_loss_kwargs = True  # so that nothing is divided by the number of micro-batches
        self._finite = torch.ones((), dtype=torch.bool, device=args.device)
        self._last: Micro | None = None
        self._tally = Tally(args.device, args.world_size, peak)
        self._window = Window(stage, args.device, self._tally)
        self._resumed: Path | None = None
        self._fed: set[str] = set()
        self._group_parts: list[str] = []
        self._learning_rates: dict[str, float] = {}

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    # ---- data -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As Trainer has it; stops early, with a checkpoint, when asked to.

        Raises:
            TrainingError: a loss that is not finite, an exhausted device, a checkpoint or a log that cannot be written,
                a part that should get a gradient and does not, or the other way round.
        """
        if resume_from_checkpoint:
            self._resumed = Path(resume_from_checkpoint)
            self._data.first = checkpoint_step(self._resumed) * self.args.gradient_accumulation_steps
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the device has no memory left{self._size()}; a smaller "
                f"micro_batch or max_length, or gradient_checkpointing, needs less. {self.left()}"
            ) from error
        self._require_finite()
        return result

    def _size(self) -> str:
        if self._last is None:
            return ""
        batch = self._last.batch
        return f" for {batch.pixels.shape[0]} frames and {batch.input_ids.numel()} tokens"

    def _run_epoch(self, **kwargs: Any) -> None:
        # Taken up after the last step, the Trainer would train another one before it looked at max_steps.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def get_train_dataloader(self) -> Any:
        """The endless run of micro-batches from where the checkpoint stopped."""
        return Loader(self._data, self._workers, pin_memory=self.args.device.type == "cuda")

    def get_batch_samples(
        self, epoch_iterator: Iterator[Loaded], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and what its means run over, on all ranks."""
        loaded = [next(epoch_iterator) for _ in range(num_batches)]
        micros = [self._counted(x) for x in loaded]
        reasons = [skip.reason for x in loaded for skip in x.skipped]
        sums = torch.tensor(
            [
                sum(m.tokens for m in micros),
                sum(m.cells for m in micros),
                len(reasons),
                float(self._stop.signal == signal.SIGTERM),
                float(self._stop.signal == signal.SIGINT),
                *(sum(x) for x in zip(*(food(m, self.objective.contrastive) for m in micros), strict=True)),
            ],
            dtype=torch.float64,
        )
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(device)).cpu()
        tokens, cells, broken, terminated, interrupted, *fed = sums.tolist()
        self._fed = {part for part, amount in zip(PARTS, fed, strict=True) if amount}
        # Agreed on here, since all ranks have to stop after the same step.
        self._stop_signal = int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)
        # Counted on all ranks alike, which end together.
        reasons = of_all_ranks(reasons) if broken else []
        self._tally.add_skipped(len(reasons))
        self._leave_out(reasons, self.stage.batch_size, self._broken)
        return micros, Counts(tokens, cells)

    def _leave_out(self, reasons: Sequence[str], wanted: int, broken: Broken) -> None:
        """Says once of each sample why it cannot be read, and ends the run where there are too many of them."""
        for reason in reasons:
            if reason not in self._said:
                self._said.add(reason)
                self.run_log.note(f"left out: {reason}")
        try:
            broken.add(wanted, reasons)
        except SourceError as error:
            raise TrainingError(f"data: {error}. {self.left()}") from error

    def _counted(self, loaded: Loaded) -> Micro:
        assert loaded.batch is not None
        micro = self.objective.micro(loaded.batch)
        self._tally.add(loaded, self._costs.needed(work_of(self.objective, micro)))
        return micro

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the run's own log counts them."""
        return 0

    def count_step(self) -> None:
        """One more since the last line of the log."""
        self._tally.add_step()

    def note_learning_rates(self) -> None:
        """Keeps for the log what the step at hand is taken with; afterwards the schedule has gone on."""
        assert self.optimizer is not None
        groups = zip(self._group_parts, self.optimizer.param_groups, strict=True)
        rates = {part: float(group["lr"]) for part, group in groups if part}
        # The schedule moves all groups alike, and what is logged as the rate is the stage's.
        first = self.optimizer.param_groups[0]
        main = self.stage.learning_rate * float(first["lr"] / first["initial_lr"])
        self._learning_rates = {"learning_rate": main} | {f"learning_rate/{part}": x for part, x in rates.items()}

    # ---- the step ---------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, "the loss")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's loss, times the number of ranks, whose gradients are averaged."""
        self._last = inputs
        losses: Losses = model(inputs, num_items_in_batch)
        self._window.add(losses, inputs.batch)
        total = losses.total * self.args.world_size
        return (total, losses) if return_outputs else total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self._check_finite(torch.as_tensor(norm), "the gradient")
        return norm

    def _check_finite(self, value: Tensor, what: str) -> None:
        """On the CPU at once; elsewhere, so that nothing waits, with the next line of the log or checkpoint."""
        finite = torch.isfinite(value)
        if value.device.type != "cpu":
            self._finite = self._finite & finite.to(self._finite.device)
        elif not bool(finite):
            self._raise_not_finite(f"step {self.state.global_step + 1}: {what}")

    def _require_finite(self) -> None:
        if not bool(self._finite):
            self._raise_not_finite(f"step {self.state.global_step} or shortly before: the loss or the gradient")

    def _raise_not_finite(self, what: str) -> None:
        raise TrainingError(
            f"{what} is not finite; a lower learning_rate, a longer warmup or a smaller max_grad_norm helps where it "
            f"grew slowly before. {self.left()}"
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: a group for each part, matrices with weight decay and vectors without."""
        if self.optimizer is None:
            groups = optimizer_groups(model or self.model, self.stage)
            self._group_parts = [group.pop("part") for group in groups]
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, lr=self.stage.learning_rate, fused=fused)
        return self.optimizer

    def check_gradients(self) -> None:
        """That what should train has a gradient, and nothing else has; see :class:`granvit.train.parts.GradientCheck`.

        Raises:
            TrainingError: one of them is not so.
        """
        self._gradients.look(self._fed)

    # ---- the log ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line of training: every term, by task and box size, with the wrong image too, and the rates."""
        if "loss" in logs:
            self._require_finite()
            logs = self._line(logs)
        elif "train_runtime" in logs:
            return  # the Trainer's summary, which counts from where the run was taken up
        logs.pop("epoch", None)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _line(self, logs: dict[str, float]) -> dict[str, float]:
        rates = self._tally.rates()
        losses = self._window.losses(self.accelerator.reduce if self.args.world_size > 1 else lambda term: term)
        fault = self._window.fault(losses)
        if fault:
            raise TrainingError(f"step {self.state.global_step}: {fault}. {self.left()}")
        line = losses | self._learning_rates | {name: logs[name] for name in ("grad_norm",) if name in logs}
        if self._last is not None and not self.objective.contrastive:
            line |= look_again(self.model_wrapped, self._last, self.args.device, wrong_image=self.stage.wrong_image)
        line |= rates
        self._window.restart()
        return line

    def begin(self) -> None:
        """Begins to count for the next line, or goes on where the checkpoint was written between two."""
        # A run that goes on may have few steps left, and those before are not known.
        patience = None if self._resumed else min(_PATIENCE, self.state.max_steps)
        self._gradients = GradientCheck(self.objective, self.stage, self.args.device, patience)
        self._window.restart()
        path = self._resumed and self._resumed / WINDOW.format(rank=self.args.process_index)
        if path is not None and path.exists():  # not where it was written by fewer processes
            self._window.load(torch.load(path, map_location="cpu", weights_only=True))
        # Of all ranks, and the same for each; there is always a first.
        first = self._resumed and self._resumed / WINDOW.format(rank=0)
        if first is not None:
            counts = torch.load(first, map_location="cpu", weights_only=True)
            self._broken.wanted, self._broken.count = counts["wanted"], counts["broken"]

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Losses on the held-out images, by task and size, with the right image and with a wrong one.

        Returns:
            ``heldout/...`` by name; ``heldout/wrong_image/...`` is what the wrong image costs.
        """
        if self._heldout is None:
            return {}
        with self._tally.pause():
            means, broken = heldout_losses(
                self.model_wrapped, self.objective, self._heldout, self.args.device, wrong_image=self.stage.wrong_image
            )
        wanted = self._heldout.length or 0
        self._leave_out(broken, wanted, Broken(self._max_broken))
        if len(broken) == wanted:
            raise TrainingError(f"data.heldout: none of the {wanted} samples could be read. {self.left()}")
        found = {f"heldout/{name}": value for name, value in means.items()}
        if broken:
            found["heldout/skipped"] = float(len(broken))
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._require_finite()
        folder = checkpoint_folder(Path(str(self.args.output_dir)), self.state.global_step)
        window = self._window.state() | {"wanted": self._broken.wanted, "broken": self._broken.count}
        with self._tally.pause():
            try:
                super()._save_checkpoint(model, trial)
                torch.save(window, folder / WINDOW.format(rank=self.args.process_index))
                self.accelerator.wait_for_everyone()  # each rank has files of its own in it
                if self.args.should_save:
                    (folder / COMPLETE).touch()
                    rotate(folder.parent, _KEPT)  # the Trainer's own goes by the clock, and before the new one is whole
            except (OSError, RuntimeError, safetensors.SafetensorError) as error:
                # Each library reports a full disk in its own way; none of them is a reason to keep half a checkpoint.
                shutil.rmtree(folder, ignore_errors=True)
                raise TrainingError(f"{folder}: cannot be written: {error}. {self.left()}") from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            safetensors.torch.save_model(self.objective, str(folder / WEIGHTS))
        # With FSDP the Trainer writes the weights itself, for loading into shards.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / WEIGHTS
        try:
            safetensors.torch.load_model(self.objective, path)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise TrainingError(f"{path}: cannot be loaded: {error}") from error

    def full_weights(self) -> dict[str, Tensor] | None:
        """The weights of the model, gathered on the first rank, where they are spread over all; to be called by all.
        None where each rank has them."""
        if not self.is_fsdp_enabled:
            return None
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {
            name.removeprefix("model."): value
            for name, value in whole.items()
            if name.startswith("model.") and isinstance(value, Tensor)
        }

    def left(self) -> str:
        """What a run that ends now can go on from, in a sentence."""
        last = last_checkpoint(Path(str(self.args.output_dir)))
        if last is None:
            return "There is no checkpoint of this stage yet."
        return f"The checkpoint of step {checkpoint_step(last)} is whole: the same command goes on from it."

    # ---- the end ----------------------------------------------------------------------------------------------------

    def should_stop(self) -> int:
        """The signal on which to end after this step, the same on all ranks; 0 to go on."""
        return self._stop.signal if self.args.world_size == 1 else self._stop_signal

    @property
    def finished(self) -> bool:
        """Whether the stage has had all its steps."""
        return bool(self.state.global_step >= self.state.max_steps)
