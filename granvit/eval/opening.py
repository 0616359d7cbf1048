"""What the commands are given, as models and sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from granvit.data.scenes.composer import SCENE_KINDS
from granvit.data.shards import INDEX
from granvit.errors import UserError
from granvit.eval.sources import Questions, Scenes, Shards, Source
from granvit.model.checkpoint import SETTINGS
from granvit.recipe import DataSource, Recipe, Stage, load
from granvit.train.run import MODEL, RESOLVED

SCENES = 200  # where nobody says how many


class OpeningError(UserError):
    """Something that is neither a model nor images to evaluate on; the text names it."""


class Trained(NamedTuple):
    """A model on disk, and the stage of the run that made it where that can be told."""

    folder: Path
    recipe: Recipe | None = None
    stage: Stage | None = None


def find_model(path: str | Path) -> Trained:
    """The model that a folder means: itself, or that of the last finished stage of a run.

    Raises:
        OpeningError: it is neither, or no stage is finished.
    """
    folder = Path(path)
    if (folder / SETTINGS).is_file():
        run = folder.parent.parent
        if folder.name == MODEL and (run / RESOLVED).is_file():
            recipe = load(run / RESOLVED)
            return Trained(folder, recipe, next((x for x in recipe.stages if x.name == folder.parent.name), None))
        return Trained(folder)
    if not (folder / RESOLVED).is_file():
        raise OpeningError(
            f"{folder}: expected a model or a run that granvit wrote; it has no {SETTINGS} or {RESOLVED}"
        )
    recipe = load(folder / RESOLVED)
    for stage in reversed(recipe.stages):
        if (folder / stage.name / MODEL).exists():
            return Trained(folder / stage.name / MODEL, recipe, stage)
    raise OpeningError(f"{folder}: no stage of this run is finished yet")


def open_sources(texts: Sequence[str], *, images: Path | None, seed: int, size: int) -> list[Source]:
    """The sources that a command line means, in its order.

    Args:
        texts: each a folder of shards, a recipe (its held-out sources), a file of questions (``.jsonl``), or
            ``scenes:KIND`` or ``scenes:KIND:COUNT`` for held-out scenes.
        images: folder that the paths in files of questions start from; None is that of the file.
        seed: of scenes.
        size: side of scenes in pixels; those of a recipe have its frame's.

    Raises:
        UserError: a text that is none of these, or what it names cannot be read.
    """
    found: list[Source] = []
    for text in texts:
        path = Path(text)
        if text.startswith("scenes:"):
            found.append(_scenes(text, seed, size))
        elif (path / INDEX).is_file():
            found.append(Shards(path))
        elif path.suffix == ".jsonl":
            found.append(Questions(path, path.parent if images is None else images))
        elif path.suffix in (".yaml", ".yml"):
            recipe = load(path)
            found += of_recipe(recipe, recipe.data.heldout)
        else:
            raise OpeningError(
                f"{text}: expected a folder of shards, a recipe (.yaml), a file of questions (.jsonl), "
                "or scenes:KIND:COUNT"
            )
    return found


def _scenes(text: str, seed: int, size: int) -> Scenes:
    kind, _, count = text.removeprefix("scenes:").partition(":")
    if kind not in SCENE_KINDS or (count and not (count.isascii() and count.isdigit() and int(count))):
        raise OpeningError(f"{text}: expected scenes:KIND or scenes:KIND:COUNT, of {', '.join(SCENE_KINDS)}")
    return Scenes(int(count or SCENES), kind=kind, seed=seed, size=size)


def of_recipe(recipe: Recipe, sources: Sequence[DataSource]) -> list[Source]:
    """Sources of a recipe.

    Raises:
        OpeningError: there are none, or they are conversations, which have no one answer.
    """
    found: list[Source] = []
    for source in sources:
        if source.scenes is not None:
            x = source.scenes
            found.append(
                Scenes(x.count, kind=x.kind, split=x.split, seed=x.seed, size=recipe.model.image_size, names=x.names)
            )
        elif source.shards is not None:
            found.append(Shards(source.shards))
        else:
            raise OpeningError(f"{source.llava}: conversations have no one answer; give a file of questions (.jsonl)")
    if not found:
        raise OpeningError(f"recipe {recipe.name}: data.heldout: expected something to evaluate on, got none")
    return found
