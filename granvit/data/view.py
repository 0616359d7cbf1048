"""One self-contained page that shows samples of a folder of shards, with boxes, captions and filters."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from granvit.data.images import decode
from granvit.data.shards import write_atomically
from granvit.data.stream import RegionStream, Sample
from granvit.errors import UserError, why_not_written

TEMPLATE = Path(__file__).with_name("view.html")
STYLE = Path(__file__).with_name("page.css")  # of all pages
SIDE = 400  # of the pictures in the page, at most
QUALITY = 80


def write_page(
    folder: str | Path,
    out: str | Path,
    *,
    count: int = 200,
    seed: int = 0,
    title: str | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> int:
    """Writes the page.

    Args:
        folder: of shards.
        out: the HTML file; replaced as a whole.
        count: samples at most, drawn at random from all.
        seed: of the draw.
        title: of the page; the folder's name by default.
        progress: is told after each sample how many there are.

    Returns:
        How many samples it shows.

    Raises:
        UserError: a shard or an image cannot be read, the page cannot be written, or there are no samples.
    """
    stream = RegionStream(folder, 1, seed=seed, window=10**9, prepare=_plain)
    shown: list[dict[str, Any]] = []
    for batch in stream:
        shown += batch.samples
        progress(len(shown))
        if len(shown) == count:
            break
    if not shown:
        raise UserError(f"{folder}: holds no samples to look at")
    # In a script element nothing but its end tag has a meaning.
    data = json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = TEMPLATE.read_text()
    page = page.replace("__STYLE__", STYLE.read_text())
    page = page.replace("__TITLE__", html.escape(title or Path(folder).resolve().name)).replace("__DATA__", data)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out), page.encode())
    except OSError as error:
        raise UserError(f"{out}: {why_not_written(error)}; a page that was there before is as it was") from error
    return len(shown)


def _plain(sample: Sample) -> dict[str, Any]:
    record = sample.record
    picture, size = _picture(sample)
    licence, attribution = record.meta.get("licence"), record.meta.get("attribution")
    return {
        "key": record.key,
        "source": record.source,
        "licence": str(licence or ""),
        "attribution": [str(text) for text in attribution] if isinstance(attribution, list) else [],
        "kind": record.kind,
        "width": record.width,
        "height": record.height,
        "caption": record.caption,
        "image": picture,
        "shown": size,
        "regions": [
            {"box": r.box, "caption": r.caption, "score": r.score, "origin": r.origin, "size": r.size()}
            for r in record.regions
        ],
    }


def _picture(sample: Sample) -> tuple[str, tuple[int, int]]:
    """A small JPEG of the image as a data URL, and its width and height."""
    small = decode(sample.image, (SIDE, SIDE), f"sample {sample.record.key}")
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), small.size
