"""The files of a run, and the folders that a stage can be taken up from."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

RESOLVED, MODEL = "recipe.yaml", "model"  # in the folder of a run, and in that of a finished stage
COMPLETE = "complete"
WEIGHTS = "model.safetensors"
WINDOW = "log_{rank}.pt"


def checkpoint_folder(stage: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return stage / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint was written after, by its name."""
    return int(folder.name.rpartition("-")[2])


def last_checkpoint(stage: Path) -> Path | None:
    """The newest whole checkpoint in the folder of a stage; None without any."""
    whole = [path.parent for path in stage.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(whole, key=checkpoint_step, default=None)


def rotate(stage: Path, keep: int) -> None:
    """Deletes whole checkpoints but the newest. The mark goes first, so that none passes for whole half deleted."""
    whole = sorted((path.parent for path in stage.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")), key=checkpoint_step)
    for path in whole[:-keep]:
        (path / COMPLETE).unlink()
        shutil.rmtree(path)


def remove_unfinished(stage: Path) -> list[Path]:
    """Deletes the checkpoints of a stage that a kill left half written, and says which."""
    halves = [path for path in stage.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if not (path / COMPLETE).exists()]
    for path in halves:
        shutil.rmtree(path)
    return halves
