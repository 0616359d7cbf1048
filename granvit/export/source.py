"""The model that is to be exported, and the run that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from granvit.export.weights import ExportError
from granvit.model.checkpoint import SETTINGS
from granvit.recipe import Recipe, load
from granvit.train.checkpoints import MODEL, RESOLVED


@dataclass(frozen=True)
class Found:
    """A model on disk.

    Attributes:
        model: folder that :func:`granvit.model.checkpoint.save` wrote.
        run: folder of the run it is from; None where the model lies elsewhere.
        recipe: of that run.
        stage: of that run after which the model was written.
    """

    model: Path
    run: Path | None = None
    recipe: Recipe | None = None
    stage: str | None = None

    @property
    def dtype(self) -> str:
        """That of the run's arithmetic; float32 where that is not known."""
        return "float32" if self.recipe is None else self.recipe.model.dtype


def find(checkpoint: str | Path) -> Found:
    """The model that a path means: itself, or in the folder of a run that of the last finished stage.

    Raises:
        ExportError: it is neither, or the run has no finished stage.
        RecipeError: the run's recipe cannot be read.
    """
    folder = Path(checkpoint)
    if (folder / SETTINGS).is_file():
        run = folder.resolve().parent.parent
        if folder.resolve().name == MODEL and (run / RESOLVED).is_file():
            recipe, stage = load(run / RESOLVED), folder.resolve().parent.name
            if any(known.name == stage for known in recipe.stages):
                return Found(folder, run, recipe, stage)
        return Found(folder)
    if not (folder / RESOLVED).is_file():
        raise ExportError(f"{folder}: neither a model that granvit wrote nor the folder of a run")
    recipe = load(folder / RESOLVED)
    for stage in reversed([stage.name for stage in recipe.stages]):
        if (folder / stage / MODEL / SETTINGS).is_file():
            return Found(folder / stage / MODEL, folder, recipe, stage)
    raise ExportError(f"{folder}: no stage of this run is finished, so it has no model yet")
