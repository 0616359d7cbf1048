"""Which images a run reads, and what they are called."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from granvit.annotate.interfaces import AnnotationError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_KEY_LENGTH = 80  # a record's key may have 90; the rest is for a number behind it


@dataclass(frozen=True)
class ImageFile:
    """An image to annotate.

    Attributes:
        key: of its record; from `name`, legal and unique among the images of a run.
        name: its path relative to the folder that was given.
        path: where it lies.
        source: the name of that folder.
    """

    key: str
    name: str
    path: Path
    source: str


def list_images(inputs: Iterable[str | Path]) -> list[ImageFile]:
    """The images of files, folders (with all below them, by extension) and glob patterns, each file once.

    The order is that of the relative names, then of the paths, and does not depend on the file system.

    Raises:
        AnnotationError: an input does not exist, a pattern matches nothing, or no image is found at all.
    """
    found: dict[str, ImageFile] = {}
    for given in inputs:
        for name, path, source in _expand(str(given)):
            found.setdefault(os.path.abspath(path), ImageFile("", name, path, source))
    if not found:
        raise AnnotationError("no images: the folders given hold no file that ends in " + ", ".join(EXTENSIONS))
    ordered = [found[place] for place in sorted(found, key=lambda place: (found[place].name, place))]
    taken: dict[str, int] = {}
    return [replace(image, key=_unique(_key(image.name), taken)) for image in ordered]


def digest(images: Iterable[ImageFile]) -> str:
    """Of the keys and names in their order, in hexadecimal digits: the same for the same list of images."""
    hashed = hashlib.sha256()
    for image in images:
        hashed.update(f"{image.key}\0{image.name}\0{image.source}\n".encode(errors="surrogateescape"))
    return hashed.hexdigest()


def _expand(given: str) -> Iterator[tuple[str, Path, str]]:
    """Name, path and source of every image behind one input."""
    path = Path(given)
    if path.is_dir():
        root = path.resolve()
        for folder, _, files in os.walk(path):
            for file in files:
                if file.lower().endswith(EXTENSIONS):
                    inside = Path(folder, file)
                    yield inside.relative_to(path).as_posix(), inside, root.name
    elif path.exists():
        yield path.name, path, path.resolve().parent.name
    elif glob.has_magic(given):
        matches = [Path(match) for match in glob.glob(given, recursive=True)]
        root = Path(*(part for part in _before_pattern(path.parts)))
        files_found = [match for match in matches if match.is_file()]
        if not files_found:
            raise AnnotationError(f"{given}: no file matches this pattern")
        for match in files_found:
            yield match.relative_to(root).as_posix(), match, root.resolve().name
    else:
        raise AnnotationError(f"{given}: no such file or folder")


def _before_pattern(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _key(name: str) -> str:
    """Letters, digits, ``_`` and ``-`` of a relative path; what they cannot hold goes into a hash behind them."""
    plain = name.rpartition(".")[0] or name
    legal = re.sub(r"[^A-Za-z0-9_-]+", "-", plain.replace("/", "-")).strip("-")
    if legal == plain and len(legal) <= _KEY_LENGTH:
        return legal
    mark = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:10]
    return f"{legal[: _KEY_LENGTH - 11]}-{mark}".lstrip("-")


def _unique(key: str, taken: dict[str, int]) -> str:
    """The key, with a number where an earlier image has it already."""
    unique = key
    while unique in taken:
        taken[key] += 1
        unique = f"{key}-{taken[key]}"
    taken[unique] = 1
    return unique
