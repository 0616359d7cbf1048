"""JSON lines: granvit's own records, each with the path of its image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from granvit.data.importers.base import Sample, field, json_lines, relative_box
from granvit.data.record import MAX_CAPTION, Record


def jsonl(annotations: Path, images: Path, drops: Counter[str]) -> Iterator[Sample]:
    """Samples of a file with a record a line, as :meth:`granvit.data.record.Record.to_json` writes it, plus ``image``.

    Args:
        annotations: the file.
        images: folder that the paths under ``image`` start from.
        drops: counts boxes and captions that are left out, by reason.

    Raises:
        AnnotationError, RecordError: a line that is no record, or tells no image.
    """
    for plain, where in json_lines(annotations):
        file = field(plain, "image", str, where)
        fields = {name: value for name, value in plain.items() if name != "image"}
        if isinstance(fields.get("regions"), list):
            places = ((region, f"{where}: regions[{i}]") for i, region in enumerate(fields["regions"]))
            fields["regions"] = [kept for region, place in places if (kept := _mended(region, drops, place))]
        if _too_long(fields.get("caption"), drops):
            fields["caption"] = None
        yield Sample(Record.from_json(json.dumps(fields), where), images / file)


def _mended(region: Any, drops: Counter[str], where: str) -> Any:
    """The region with its box cut at the edges of the image; None where nothing of it is left, or it says too much."""
    box = relative_box(field(region, "box", list, where), (1, 1), drops, f"{where}: box")
    return {**region, "box": list(box)} if box and not _too_long(region.get("caption"), drops) else None


def _too_long(caption: Any, drops: Counter[str]) -> bool:
    """Whether a record cannot hold a caption for its length, which is counted."""
    if not isinstance(caption, str) or len(caption) <= MAX_CAPTION:
        return False
    drops["caption too long"] += 1
    return True
