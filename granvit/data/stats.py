"""Counts over a folder of shards: what is in it, and what looks wrong."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from granvit.data.record import SIZES
from granvit.data.shards import ShardError, open_shard, read_index

REPORT = "report.json"  # beside the index, where annotation made the shards: what each filter left out
CAPTION_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
REGION_STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
SIDE_STEPS = tuple(2**k / 512 for k in range(3, 10))


@dataclass
class Stats:
    """What :func:`collect` counts. Histograms map the lower edge of a step to a count.

    Attributes:
        samples: images.
        regions: of all images.
        bytes: of the shards.
        kinds: images of each kind.
        sources: images of each source.
        origins: regions by who found them.
        sizes: regions by size, see :meth:`granvit.data.record.Region.size`.
        regions_per_image: histogram.
        box_side: of the square root of a box's share of the image; histogram.
        caption_words: of region captions; histogram.
        without_caption: regions whose caption is empty.
        with_global_caption: images that have one.
        same_image: images whose bytes an earlier image has.
        same_region: regions with the box and caption of an earlier region of their image.
        drops: images and boxes that annotation left out, by the filter's name.
    """

    samples: int = 0
    regions: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    regions_per_image: Counter[float] = field(default_factory=Counter)
    box_side: Counter[float] = field(default_factory=Counter)
    caption_words: Counter[float] = field(default_factory=Counter)
    without_caption: int = 0
    with_global_caption: int = 0
    same_image: int = 0
    same_region: int = 0
    drops: dict[str, int] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it, histograms in order."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in plain.items():
            if isinstance(value, dict):
                plain[name] = {str(key): value[key] for key in sorted(value, key=lambda k: (isinstance(k, str), k))}
        return plain


def step(value: float, steps: tuple[float, ...]) -> float:
    """The last step that is not above the value; the first one for what is below all."""
    return max((s for s in steps if s <= value), default=steps[0])


def collect(folder: str | Path, progress: Callable[[int], None] = lambda samples: None) -> Stats:
    """Reads every shard of a folder once.

    Args:
        folder: with an index.
        progress: is told the number of samples that were read.

    Raises:
        ShardError, RecordError: something cannot be read, or a shard does not hold as many samples as the index says.
    """
    stats, seen = Stats(), set()
    for info in read_index(folder):
        stats.bytes += info.bytes
        with open_shard(folder, info) as shard:
            for record, image, _ in shard:
                stats.samples += 1
                stats.kinds[record.kind] += 1
                stats.sources[record.source] += 1
                stats.with_global_caption += bool(record.caption)
                stats.regions_per_image[step(len(record.regions), REGION_STEPS)] += 1
                digest = hashlib.blake2b(image, digest_size=16).digest()
                stats.same_image += digest in seen
                seen.add(digest)
                stats.same_region += len(record.regions) - len({(r.box, r.caption) for r in record.regions})
                for region in record.regions:
                    stats.regions += 1
                    stats.origins[region.origin] += 1
                    stats.sizes[region.size()] += 1
                    stats.box_side[step(math.sqrt(region.area()), SIDE_STEPS)] += 1
                    words = len(region.caption.split())
                    stats.without_caption += not words
                    if words:
                        stats.caption_words[step(words, CAPTION_STEPS)] += 1
        progress(stats.samples)
    stats.drops = _drops(Path(folder) / REPORT)
    return stats


def _drops(report: Path) -> dict[str, int]:
    """What annotation left out; nothing where no annotation made the shards."""
    if not report.exists():
        return {}
    try:
        plain = json.loads(report.read_bytes())
        parts = {what: dict(plain[name]) for what, name in (("image", "dropped"), ("box", "boxes_dropped"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{report}: no report of an annotation: {error!r}; annotate again, or delete it") from error
    return {f"{what}: {reason}": count for what, part in parts.items() for reason, count in part.items() if count}


def render(stats: Stats, folder: str | Path) -> Any:
    """A rich renderable: totals, then a table of bars for everything that is counted."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({100 * part / whole:.1f} %)" if whole else "0"

    totals = Table(title=escape(str(folder)), title_justify="left", show_header=False)
    totals.add_row("images", f"{stats.samples:,}")
    totals.add_row("regions", f"{stats.regions:,} ({stats.regions / max(stats.samples, 1):.2f} an image)")
    totals.add_row("bytes", f"{stats.bytes:,}")
    totals.add_row("images with a global caption", share(stats.with_global_caption, stats.samples))
    totals.add_row("images that repeat another", share(stats.same_image, stats.samples))
    totals.add_row("regions that repeat another", share(stats.same_region, stats.regions))
    totals.add_row("regions without a caption", share(stats.without_caption, stats.regions))
    bars = Table("what", "", "count", "", title_justify="left")
    bars.columns[2].justify = "right"
    ordered: tuple[tuple[str, list[tuple[str, int]]], ...] = (
        ("kind", stats.kinds.most_common()),
        ("source", stats.sources.most_common(20)),
        ("origin of regions", stats.origins.most_common(20)),
        ("size of regions", [(size, stats.sizes[size]) for size in SIZES]),
        ("regions an image, from", _steps(stats.regions_per_image)),
        ("box side of 512 pixels, from", [(f"{512 * float(k):.0f}", n) for k, n in sorted(stats.box_side.items())]),
        ("words of a caption, from", _steps(stats.caption_words)),
        ("dropped", sorted(stats.drops.items(), key=lambda item: -item[1])),
    )
    for what, counts in ordered:
        most = max((n for _, n in counts), default=0)
        for i, (name, n) in enumerate(counts):
            bars.add_row("" if i else what, escape(name), f"{n:,}", "█" * round(24 * n / most) if most else "")
        if counts:
            bars.add_section()
    return Group(totals, bars)


def _steps(histogram: Counter[float]) -> list[tuple[str, int]]:
    return [(f"{key:g}", histogram[key]) for key in sorted(histogram)]
