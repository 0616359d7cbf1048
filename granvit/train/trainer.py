"""Hugging Face's Trainer, told what a step of GranViT is and when to stop with a sentence."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from granvit.errors import UserError
from granvit.recipe import PARTS, Stage
from granvit.train.data import Loaded, TrainingData
from granvit.train.log import RunLog
from granvit.train.meters import Meters
from granvit.train.objective import Counts, Losses, Micro, Objective

WEIGHTS = "model.safetensors"


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
        log: where lines go.
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
        log: RunLog,
    ) -> None:
        self.objective, self.stage, self.run_log = objective, stage, log
        self._data, self._heldout, self._workers = data, heldout, workers
        super().__init__(model=objective, args=args, eval_dataset=heldout, callbacks=[_Steps(self)])
        self.remove_callback(PrinterCallback)  # the run's own log says it
        self.model_accepts_loss_kwargs = True  # so that nothing is divided by the number of micro-batches
        self._meters = Meters(args.device)
        self._finite = torch.ones((), dtype=torch.bool, device=args.device)
        self._terms: dict[str, Tensor] = {}
        self._last: Micro | None = None
        self._tally = Counter[str]()
        self._clock = 0.0
        self._stop_signal = 0

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    # ---- data -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As Trainer has it; stops early, with a checkpoint, on SIGTERM and SIGINT.

        Raises:
            TrainingError: a loss that is not finite, an exhausted device, a checkpoint that cannot be written, a part
                that should get a gradient and does not, or the other way round.
        """
        if resume_from_checkpoint:
            self._data.first = checkpoint_step(Path(resume_from_checkpoint)) * self.args.gradient_accumulation_steps
        with self._signals():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The endless run of micro-batches from where the checkpoint stopped."""
        return _Loader(self._data, self._workers, pin_memory=self.args.device.type == "cuda")

    def get_batch_samples(
        self, epoch_iterator: Iterator[Loaded], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and what its means run over, on all ranks."""
        micros = [self._counted(next(epoch_iterator)) for _ in range(num_batches)]
        sums = torch.tensor([sum(m.tokens for m in micros), sum(m.cells for m in micros)], dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(device, torch.float32)).cpu()
        return micros, Counts(*sums.tolist())

    def _counted(self, loaded: Loaded) -> Micro:
        self._tally["images"] += loaded.images
        for skip in loaded.skipped:
            self._tally["skipped"] += 1
            self.run_log.note(f"left out sample {skip.sample} of source {skip.source}: {skip.reason}")
        if loaded.batch is None:
            raise TrainingError(
                "no image of a whole micro-batch could be read; `granvit data verify` looks for the cause"
            )
        self._tally["tokens"] += int((loaded.batch.image >= 0).sum())
        for reason, count in loaded.batch.dropped.items():
            self._tally[f"dropped: {reason}"] += count
        return self.objective.micro(loaded.batch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the log has images and tokens a second, and the plan says what they cost."""
        return 0

    # ---- the step ---------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the device has no memory left for {inputs.batch.pixels.shape[0]} "
                f"frames and {inputs.batch.input_ids.numel()} tokens; a smaller micro_batch or max_length, or "
                f"gradient_checkpointing, needs less. {self._left()}"
            ) from error
        self._check_finite(loss, "the loss")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's loss, times the number of ranks, whose gradients are averaged."""
        losses: Losses = model(inputs, num_items_in_batch)
        self._last = inputs
        for name in ("caption", "distillation", "contrastive"):
            term = getattr(losses, name)
            if term is not None:
                self._terms[name] = self._terms.get(name, torch.zeros_like(term)) + term
        if losses.output is not None:
            self._meters.add_answers(losses.output.token_loss, losses.output.token_pair, inputs.batch.pairs)
        total = losses.total * self.args.world_size
        return (total, losses) if return_outputs else total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite(torch.as_tensor(norm), "the gradient")
        return norm

    def _check_finite(self, value: Tensor, what: str) -> None:
        """On the CPU at once; elsewhere, so that nothing waits, with the next line of the log or checkpoint."""
        finite = torch.isfinite(value)
        if value.device.type != "cpu":
            self._finite = self._finite & finite.to(self._finite.device)
        elif not bool(finite):
            self._finite = self._finite & finite
            self._require_finite(what)

    def _require_finite(self, what: str = "the loss or the gradient") -> None:
        if not bool(self._finite):
            raise TrainingError(
                f"step {self.state.global_step + 1}: {what} is not finite; a lower learning_rate, a longer warmup or a "
                f"smaller max_grad_norm helps where it grew slowly before. {self._left()}"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: a group for each part, matrices with weight decay and vectors without."""
        if self.optimizer is None:
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((part_of(name), parameter.dim() > 1), []).append(parameter)
            settings = [
                {
                    "params": parameters,
                    "lr": self.stage.rates.get(part, self.stage.learning_rate),
                    "weight_decay": self.stage.weight_decay if is_matrix else 0.0,
                }
                for (part, is_matrix), parameters in groups.items()
            ]
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(settings, lr=self.stage.learning_rate, fused=fused)
        return self.optimizer

    def check_gradients(self) -> None:
        """That what should train has a gradient, and nothing else has.

        Raises:
            TrainingError: one of them is not so.
        """
        alive: Counter[str] = Counter()
        stray = []
        for name, parameter in self.objective.named_parameters():
            part = part_of(name)
            if parameter.grad is None:
                continue
            if not parameter.requires_grad or (part and part not in self.stage.train):
                stray.append(name)
            alive[part] += int(bool(parameter.grad.any()))
        parts = [part for part in PARTS if part in self.stage.train]
        seen = torch.tensor([float(alive[part]) for part in parts], device=self.args.device)
        if self.args.world_size > 1:  # a rank may have had no region to prompt with, or hold no piece of a part
            seen = self.accelerator.reduce(seen)
        dead = [part for part, count in zip(parts, seen.tolist(), strict=True) if not count]
        if stray:
            raise TrainingError(f"frozen and with a gradient all the same: {', '.join(stray[:3])}")
        if dead:
            raise TrainingError(
                f"{', '.join(dead)} should train in stage {self.stage.name} and got no gradient in its first step"
            )

    # ---- the log ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line of training: every term, by task and box size, with the wrong image too, and the rates."""
        if "loss" in logs:
            self._require_finite()
            logs = self._line(logs)
        logs.pop("epoch", None)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _line(self, logs: dict[str, float]) -> dict[str, float]:
        steps = max(self._tally["steps"], 1)
        seconds = time.perf_counter() - self._clock
        terms = {name: self._sum(term) / steps for name, term in self._terms.items()}
        self._check_terms(terms)
        line = {"loss": sum(self._weight(name) * value for name, value in terms.items())}
        line |= terms | {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
        line |= {f"by/{name}": value for name, value in self._meters.means().items() if "/" in name}
        line |= self._look_again()
        line |= self._rates(seconds)
        self._restart()
        return line

    def _weight(self, term: str) -> float:
        distillation = self.stage.distillation
        return distillation.weight if term == "distillation" and distillation is not None else 1.0

    def _sum(self, term: Tensor) -> float:
        """Over the ranks, whose shares add up."""
        total = term.detach().float()
        return float(self.accelerator.reduce(total) if self.args.world_size > 1 else total)

    def _check_terms(self, terms: dict[str, float]) -> None:
        wanted = ["contrastive"] if self.objective.contrastive else ["caption"]
        wanted += ["distillation"] if self.stage.distillation is not None else []
        gone = [name for name in wanted if not terms.get(name)]
        if gone:
            raise TrainingError(
                f"step {self.state.global_step}: the loss term {' and '.join(gone)} was 0 since the last line of the "
                "log; the data may hold no regions or captions that the stage can use"
            )

    @torch.no_grad()
    def _look_again(self) -> dict[str, float]:
        """The last micro-batch with its images exchanged, and the distillation of its regions by size."""
        micro, found = self._last, {}
        if micro is None or self.objective.contrastive:
            return {}
        meters = Meters(self.args.device)
        if self.stage.wrong_image and self._enough_images(micro):
            own, other = (self.model_wrapped(micro, wrong_image=wrong).output for wrong in (False, True))
            means = []
            for output in (own, other):
                meters.add_answers(output.token_loss, output.token_pair, micro.batch.pairs)
                means.append(meters.means())
                meters.reset()
            found = {f"wrong_image/{name}": means[1][name] - value for name, value in means[0].items()}
        if self.stage.distillation is not None:
            regions = self.model_wrapped(micro, by_region=True).distillation
            meters.add_regions(regions, micro.batch.boxes.tolist())
            found |= {f"by/{name}": value for name, value in meters.means().items() if name.startswith("distill")}
        return found

    def _enough_images(self, micro: Micro) -> bool:
        """Whether the batch of every rank has two."""
        enough = torch.tensor(float(len(micro.batch.frames) > 1), device=self.args.device)
        if self.args.world_size > 1:
            enough = self.accelerator.reduce(enough) / self.args.world_size
        return float(enough) == 1.0

    def _rates(self, seconds: float) -> dict[str, float]:
        ranks = self.args.world_size
        rates = {f"{name}_per_second": ranks * self._tally[name] / seconds for name in ("images", "tokens")}
        rates["step_seconds"] = seconds / max(self._tally["steps"], 1)
        if self.args.device.type == "cuda":
            rates["memory_gib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**30
        lost = {name: count for name, count in self._tally.items() if name.startswith(("dropped", "skipped"))}
        return rates | {name: float(count) for name, count in lost.items() if count}

    def _restart(self) -> None:
        """Begins to count for the next line."""
        self._terms.clear()
        self._meters.reset()
        self._tally.clear()
        self._clock = time.perf_counter()

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Losses on the held-out images, by task and size, with the right image and with a wrong one.

        Returns:
            ``heldout/...`` by name; ``heldout/wrong_image/...`` is what the wrong image costs.
        """
        if self._heldout is None:
            return {}
        began = time.perf_counter()
        self.model_wrapped.eval()
        own, other = Meters(self.args.device), Meters(self.args.device)
        terms = torch.zeros(2, dtype=torch.float64)  # contrastive, weighted by micro-batches
        for number in range(math.ceil((self._heldout.length or 0) / self._heldout.micro_batch / self.args.world_size)):
            loaded = self._heldout.load(number)
            if loaded.batch is None:
                continue
            micro = self.objective.micro(loaded.batch).to(self.args.device)
            with self.compute_loss_context_manager():
                losses = self.model_wrapped(micro)
                if losses.output is not None:
                    own.add_answers(losses.output.token_loss, losses.output.token_pair, micro.batch.pairs)
                if losses.output is not None and len(micro.batch.frames) > 1:
                    wrong = self.model_wrapped(micro, wrong_image=True).output
                    other.add_answers(wrong.token_loss, wrong.token_pair, micro.batch.pairs)
            if losses.contrastive is not None:
                terms += torch.tensor([float(losses.contrastive), 1.0])
        found = {f"heldout/{name}": value for name, value in own.means().items()}
        found |= {
            f"heldout/wrong_image/{name}": value - found[f"heldout/{name}"]
            for name, value in other.means().items()
            if f"heldout/{name}" in found
        }
        if terms[1]:
            found["heldout/contrastive"] = float(terms[0] / terms[1])
        self.model_wrapped.train()
        self.log(found)
        self._clock += time.perf_counter() - began  # which is no time of training
        return found

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began = time.perf_counter()
        self._require_finite()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (folder / COMPLETE).touch()
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            # Each library reports a full disk in its own way; none of them is a reason to keep half a checkpoint.
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(f"{folder}: cannot be written: {error}. {self._left()}") from error
        self._clock += time.perf_counter() - began

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

    def _left(self) -> str:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        if last is None:
            return "There is no checkpoint of this stage yet."
        return f"The checkpoint of step {checkpoint_step(last)} is whole: the same command goes on from it."

    # ---- signals ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end training after the step at hand; the second Ctrl-C at once."""

        def asked(number: int, frame: FrameType | None) -> None:
            if self._stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop_signal = number

        before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def interrupted(self) -> int:
        """The signal that ended training early; 0 for none."""
        return self._stop_signal

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop."""
        if self.args.world_size == 1:
            return bool(self._stop_signal)
        asked = torch.tensor(float(self._stop_signal), device=self.args.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self._stop_signal = int(asked)
        return bool(self._stop_signal)


COMPLETE = "complete"


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint was written after, by its name."""
    return int(folder.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in the folder of a stage; None without any."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(whole, key=checkpoint_step, default=None)


def remove_unfinished(folder: Path) -> list[Path]:
    """Deletes the checkpoints of a stage that a kill left half written, and says which."""
    halves = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if not (path / COMPLETE).exists()]
    for path in halves:
        shutil.rmtree(path)
    return halves


class _Loader:
    """What the Trainer takes for a DataLoader without a length."""

    def __init__(self, data: TrainingData, workers: int, *, pin_memory: bool) -> None:
        self._data, self._workers, self._pin = data, workers, pin_memory

    def __iter__(self) -> Iterator[Loaded]:
        return self._data.loader(self._workers, pin_memory=self._pin)


class _Steps(TrainerCallback):
    """What has to happen at moments that the Trainer calls out."""

    def __init__(self, trainer: StageTrainer) -> None:
        self._trainer = trainer
        self._checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._trainer._restart()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the first gradients."""
        if not self._checked:
            self._trainer.check_gradients()
            self._checked = True

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
        self._trainer._tally["steps"] += 1
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
            self._trainer.run_log.write(state.global_step, logs)
