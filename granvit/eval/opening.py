"""What the commands are given, as models and sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from granvit.data.scenes.composer import SCENE_KINDS
from granvit.data.shards import INDEX
from granvit.data.sources import Questions, Scenes, Shards, Source
from granvit.errors import UserError
from granvit.eval.features import Tower
from granvit.model.assemble import assemble_tower
from granvit.model.checkpoint import SETTINGS
from granvit.model.checkpoint import load as load_checkpoint
from granvit.recipe import Recipe, Stage, load
from granvit.recipe import Source as PartSource
from granvit.train.checkpoints import MODEL, RESOLVED

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


def open_sources(
    texts: Sequence[str],
    *,
    images: Path | None = None,
    seed: int = 0,
    size: int = 256,
    split: str = "heldout",
    unique: bool = True,
) -> list[Source]:
    """The sources that a command line means, in its order.

    Args:
        texts: each a folder of shards, a recipe, a file of questions (``.jsonl``), or ``scenes:KIND`` or
            ``scenes:KIND:COUNT``.
        images: folder that the paths in files of questions start from; None is that of the file.
        seed: of scenes.
        size: side of scenes in pixels; those of a recipe have its frame's.
        split: of scenes and recipes, ``heldout`` or ``train``.
        unique: whether scenes tell things of one name apart by their captions.

    Raises:
        UserError: a text that is none of these, or what it names cannot be read.
    """
    found: list[Source] = []
    for text in texts:
        path = Path(text)
        if text.startswith("scenes:"):
            kind, count = _scenes(text)
            found.append(Scenes(count, kind=kind, split=split, seed=seed, size=size, unique=unique))
        elif (path / INDEX).is_file():
            found.append(Shards(path))
        elif path.suffix == ".jsonl":
            found.append(Questions(path, path.parent if images is None else images))
        elif path.suffix in (".yaml", ".yml"):
            found += of_recipe(load(path), split, unique)
        else:
            raise OpeningError(
                f"{text}: expected a folder of shards, a recipe (.yaml), a file of questions (.jsonl), "
                "or scenes:KIND:COUNT"
            )
    return found


def _scenes(text: str) -> tuple[str, int]:
    kind, _, count = text.removeprefix("scenes:").partition(":")
    if kind not in SCENE_KINDS or (count and not (count.isascii() and count.isdigit() and int(count))):
        raise OpeningError(f"{text}: expected scenes:KIND or scenes:KIND:COUNT, of {', '.join(SCENE_KINDS)}")
    return kind, int(count or SCENES)


def of_recipe(recipe: Recipe, split: str = "heldout", unique: bool = True) -> list[Source]:
    """Sources of a recipe; `split` and `unique` as for :func:`open_sources`.

    Raises:
        OpeningError: there are none, or they are conversations, which have no one answer.
    """
    found: list[Source] = []
    for source in recipe.data.train if split == "train" else recipe.data.heldout:
        if source.scenes is not None:
            x, size = source.scenes, recipe.model.image_size
            found.append(
                Scenes(x.count, kind=x.kind, split=x.split, seed=x.seed, size=size, names=x.names, unique=unique)
            )
        elif source.shards is not None:
            found.append(Shards(source.shards))
        else:
            raise OpeningError(f"{source.llava}: conversations have no one answer; give a file of questions (.jsonl)")
    if not found:
        raise OpeningError(f"recipe {recipe.name}: data.{split}: expected something to evaluate on, got none")
    return found


def open_tower(text: str, size: int | None = None) -> Tower:
    """The vision tower that a text means, float32: of a folder of a model or a run, of a recipe before it trains
    (``.yaml``), or of a folder or hub name that transformers knows.

    Args:
        text: which.
        size: side of the square frame in pixels; None is the model's own.

    Raises:
        UserError: it cannot be had, in one sentence.
    """
    path = Path(text)
    if (path / SETTINGS).is_file() or (path / RESOLVED).is_file():
        return _of_checkpoint(text, find_model(path).folder, size)
    if path.suffix in (".yaml", ".yml"):
        recipe = load(path)
        if recipe.start is not None:
            return _of_checkpoint(text, Path(recipe.start), size)
        return _of_source(text, recipe.model.vision, size or recipe.model.image_size, recipe.seed)
    return _of_source(text, PartSource(name=text), size, 0)


def _of_checkpoint(name: str, folder: Path, size: int | None) -> Tower:
    loaded = load_checkpoint(folder)
    llava = loaded.model.llava
    layer = llava.config.vision_feature_layer
    return Tower(name, llava.model.vision_tower, loaded.model.mean, loaded.model.std, size or loaded.image_size, layer)


def _of_source(name: str, source: PartSource, size: int | None, seed: int) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = assemble_tower(source, size, "tower")
    side = size or found.tower.config.image_size
    return Tower(name, found.tower, found.mean, found.std, side)
