"""JSON lines: granvit's own records, each with the path of its image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from granvit.data.importers.base import Sample, field, json_lines, relative_box
from granvit.data.record import Record


def jsonl(annotations: Path, images: Path, drops: Counter[str]) -> Iterator[Sample]:
    """Samples of a file with a record a line, as :meth:`granvit.data.record.Record.to_json` writes it, plus ``image``.

    Args:
        annotations: the file.
        images: folder that the paths under ``image`` start from.
        drops: counts boxes that are left out, by reason.

    Raises:
        AnnotationError, RecordError: a line that is no record, or tells no image.
    """
    for plain, where in json_lines(annotations):
        file = field(plain, "image", str, where)
        fields = {name: value for name, value in plain.items() if name != "image"}
        if isinstance(fields.get("regions"), list):
            places = ((region, f"{where}: regions[{i}]") for i, region in enumerate(fields["regions"]))
            fields["regions"] = [kept for region, place in places if (kept := _mended(region, drops, place))]
        yield Sample(Record.from_json(json.dumps(fields), where), images / file)


def _mended(region: Any, drops: Counter[str], where: str) -> Any:
    """The region with its box cut at the edges of the image; None where nothing of it is left."""
    box = relative_box(field(region, "box", list, where), (1, 1), drops, f"{where}: box")
    return {**region, "box": list(box)} if box else None
