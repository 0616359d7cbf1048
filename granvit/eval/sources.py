"""What an evaluation is made on: of which source which images, and of which model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from granvit.data.shards import sha256
from granvit.data.sources import Questions, Scenes, Shards, Shown, Source
from granvit.errors import MissingDependencyError, UserError


def of_identity(plain: Mapping[str, Any]) -> Source:
    """The source that an evaluation was made with, from the ``config`` of its ``evaluation.json``.

    Raises:
        UserError: its files are not there any more.
        ValueError: it is no identity of a source.
    """
    if "shards" in plain:
        return Shards(plain["shards"])
    if "scenes" in plain:
        settings = plain["scenes"]
        return Scenes(plain["count"], **{**settings, "names": tuple(settings["names"] or ())})
    if "questions" in plain:
        return Questions(plain["questions"], plain["images"])
    raise ValueError(f"of_identity: expected shards, scenes or questions, got {sorted(plain)}")


def chosen(source: Source, count: int | None, seed: int) -> list[int]:
    """Numbers of the images to take of a source, in order: all, or so many drawn at random."""
    everything = range(len(source))
    if count is None or count >= len(everything):
        return list(everything)
    return sorted(random.Random(seed).sample(everything, count))


def readable(source: Source, numbers: Sequence[int], size: int, tiles: int = 0) -> tuple[dict[int, Shown], list[str]]:
    """The images that can be read, by number, and why each of the others cannot."""
    found, reasons = {}, []
    for i in numbers:
        try:
            found[i] = source.read(i, size, tiles=tiles)
        except MissingDependencyError:
            raise
        except UserError as error:
            reasons.append(str(error))
    return found, reasons


def checksum(folder: Path) -> str:
    """One checksum of a model's folder: of the names and contents of its weights and settings."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()
