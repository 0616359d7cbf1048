"""Where a run's figures go: a line on the console, a line of JSON, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from granvit.errors import UserError, why_not_written
from granvit.train.meters import TERMS

METRICS = "metrics.jsonl"


class LogError(UserError):
    """A log that cannot be written; the text names the file."""


class RunLog:
    """The log of a run; one file for all its stages, to which a run that goes on appends.

    Args:
        folder: of the run.
        console: for people; None for a rank that says nothing.
        tensorboard: also write event files; needs the package tensorboard.

    Attributes:
        stage: that lines belong to.
        steps: that it has.
    """

    def __init__(self, folder: Path, console: Console | None, *, tensorboard: bool = False) -> None:
        self.stage, self.steps = "", 0
        self._path, self._console = folder / METRICS, console
        self._events = folder / "tensorboard" if console is not None and tensorboard else None
        self._writer: Any = None

    def start(self, stage: str, steps: int, step: int) -> None:
        """A stage begins, or goes on after `step`; lines that a killed run wrote beyond that are forgotten.

        Raises:
            LogError: the file cannot be written.
        """
        self.stage, self.steps = stage, steps
        if self._events is not None:
            from torch.utils.tensorboard import SummaryWriter

            with self._explained(self._events):
                self._close()
                # A folder a stage, since what is to be forgotten of a folder is told by the step alone.
                purge = step + 1 if step else 0
                self._writer = SummaryWriter(str(self._events / stage), purge_step=purge)
        if self._console is None or not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not self._repeated(line, step)]
        if len(kept) < len(lines):
            partial = self._path.with_suffix(".partial")
            with self._explained(self._path):
                partial.write_text("".join(kept), encoding="utf-8")
                partial.replace(self._path)

    def _repeated(self, line: str, step: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return True  # cut short by a kill
        if not line.endswith("\n"):
            return True  # likewise: the next line would be written behind it
        # From its beginning, a stage also measures again what it starts from.
        return entry["stage"] == self.stage and (entry["step"] > step or step == 0)

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(f"{path}: {why_not_written(error)}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A line of figures.

        Raises:
            LogError: the file cannot be written.
        """
        if self._console is None:
            return
        entry = {"stage": self.stage, "step": step, "time": time.time(), **values}
        with self._explained(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._writer is not None and self._events is not None:
            with self._explained(self._events):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()
        text = render(values)
        if text:
            line = f"[bold]{escape(self.stage)}[/] {step}/{self.steps}  {text}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _close(self) -> None:
        """Ends the event file of the stage."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def note(self, text: str) -> None:
        """A sentence."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def render(values: Mapping[str, float]) -> str:
    """The figures of a line that a person follows; "" where there are none."""
    found = []
    if "loss" in values:
        terms = [f"{name} {values[name]:.3f}" for name in TERMS if name in values]
        found.append(f"loss {values['loss']:.3f} ({', '.join(terms)})")
        if "contrastive/accuracy" in values:
            found.append(f"accuracy {values['contrastive/accuracy']:.1%}")
        if "wrong_image/caption" in values:
            found.append(f"wrong image {values['wrong_image/caption']:+.3f}")
        found.append(f"{values['images_per_second']:.1f} images/s, {values['tokens_per_second']:.0f} tokens/s")
        if "mfu" in values:
            found.append(f"MFU {values['mfu']:.0%}")
        if "memory_gib" in values:
            found.append(f"{values['memory_gib']:.1f} GiB")
    heldout = {name.removeprefix("heldout/"): value for name, value in values.items() if name.startswith("heldout/")}
    if heldout:
        shown = [
            f"{name.rpartition('/')[2]} {value:.3f}"
            for name, value in heldout.items()
            if name.startswith("contrastive") or (name.startswith("caption") and name.count("/") <= 1)
        ]
        gap = heldout.get("wrong_image/caption")
        found.append(f"held out: {', '.join(shown)}" + ("" if gap is None else f", wrong image {gap:+.3f}"))
    return "  ".join(found)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.

    Raises:
        ValueError: a line is not JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
