"""Datasets in the structure in which they are published, small and with real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from granvit.data.record import Record
from tests.data.support import encoded


def written(path: Path, content: Any) -> Path:
    """A file: text and bytes as they are, whatever else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def image(path: Path, width: int = 64, height: int = 48, **options: Any) -> Path:
    return written(path, encoded(width, height, **options))


def told(record: Record) -> list[tuple[Any, str]]:
    """Box and caption of every region; a box compares as equal within rounding."""
    return [(pytest.approx(region.box, abs=1e-9), region.caption) for region in record.regions]
