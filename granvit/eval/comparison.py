"""``granvit probe``: the same probes of several vision towers, say of one before and after training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granvit.data.shards import write_atomically
from granvit.data.sources import Broken, Source
from granvit.errors import UserError, why_not_written
from granvit.eval.features import Tower, features
from granvit.eval.probes import probe
from granvit.eval.provenance import device_name, versions
from granvit.eval.sources import chosen
from granvit.recipe import MAX_BROKEN

if TYPE_CHECKING:
    from rich.table import Table

PROBES = "probes.json"
FORMAT = "granvit probes 1"
Progress = Callable[[str, int, int], None]  # name of the tower, images that are done, of how many
_ROWS = (
    ("same name, recall@1", ("retrieval", "recall_at_1")),
    ("same name, mAP", ("retrieval", "map")),
    ("linear, accuracy", ("linear", "accuracy")),
)


class ProbeError(UserError):
    """Something that cannot be probed, or results that cannot be written; the text says why."""


@dataclass(frozen=True)
class ProbeSettings:
    """How towers are probed.

    Attributes:
        train_images: of each training source, drawn at random; None is all.
        images: of each held-out source, likewise.
        seed: of all draws.
        device: as torch names it.
    """

    train_images: int | None = 400
    images: int | None = 200
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("train_images", "images"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ProbeError(f"{name}: expected at least 2, got {value}")


def compare(
    towers: Sequence[Callable[[], Tower]],
    train: Sequence[Source],
    heldout: Sequence[Source],
    settings: ProbeSettings,
    folder: str | Path,
    *,
    max_broken: float = MAX_BROKEN,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Probes towers one after the other on the same images and writes ``probes.json``.

    Args:
        towers: each is made when it is its turn, so that one at a time is in memory.
        train: whose regions the whitening and the linear classifier are fitted to.
        heldout: whose regions and images are looked for.
        settings: how.
        folder: of the result, which is replaced.
        max_broken: share of the images that may be unreadable, see :class:`granvit.data.sources.Broken`; they are left
            out, and counted as ``not read``.
        progress: is told how far it is.
        note: is told of each image that cannot be read.

    Returns:
        What ``probes.json`` holds: for each tower its `name`, the `sha256` of its weights, its `size`, how many images
        were `not read`, and `probes`, see :func:`granvit.eval.probes.probe`.

    Raises:
        UserError: what cannot be read, probed or written, in one sentence.
    """
    splits = {
        name: [(source, chosen(source, count, settings.seed)) for source in sources]
        for name, sources, count in (("train", train, settings.train_images), ("heldout", heldout, settings.images))
    }
    for name, parts in splits.items():
        if sum(len(numbers) for _, numbers in parts) < 2:
            raise ProbeError(f"{name}: expected at least two images, got {sum(len(x) for _, x in parts)}")
        if any(source.asks for source, _ in parts):
            raise ProbeError(f"{name}: expected images with regions, got a file of questions")
    began = time.perf_counter()
    total = sum(len(numbers) for parts in splits.values() for _, numbers in parts)
    found: list[dict[str, Any]] = []
    for make in towers:
        tower = make()
        made, before, broken = {}, 0, Broken(max_broken)
        for name, parts in splits.items():

            def tell(done: int, before: int = before, name: str = tower.name) -> None:
                if progress is not None:
                    progress(name, before + done, total)

            made[name] = features(
                tower,
                parts,
                broken=broken,
                seed=settings.seed,
                device=settings.device,
                progress=tell,
                note=None if found else note,  # other towers are shown the same images
            )
            before += sum(len(numbers) for _, numbers in parts)
        result = probe(made["train"], made["heldout"])
        facts = {"name": tower.name, "sha256": tower.sha256(), "size": tower.size, "layer": tower.layer}
        found.append({**facts, "not read": broken.count, "probes": result})
    report = {
        "format": FORMAT,
        "towers": found,
        "config": {
            **asdict(settings),
            **{name: [source.identity() for source, _ in parts] for name, parts in splits.items()},
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(settings.device),
        **versions(),
        "seconds": round(time.perf_counter() - began, 3),
    }
    path, text = Path(folder) / PROBES, json.dumps(report, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise ProbeError(f"{path}: {why_not_written(error)}") from error
    plain: dict[str, Any] = json.loads(text)
    return plain


def table(report: dict[str, Any]) -> Table:
    """A column for each tower, with the 95 % intervals of shares; what chance gives stands first."""
    from rich.table import Table

    towers = report["towers"]
    made = Table("probe")
    for heading in ("by chance", *(tower["name"] for tower in towers)):
        made.add_column(heading, justify="right", overflow="fold", min_width=9)  # an interval in one line
    made.columns[0].no_wrap = True
    for pool in towers[0]["probes"]["regions"]:
        made.add_row(f"[bold]{pool}[/]")
        for label, (kind, name) in _ROWS:
            values = [tower["probes"]["regions"][pool][kind] for tower in towers]
            chance = values[0].get("majority" if kind == "linear" else "chance") if name != "map" else None
            made.add_row(label, _number(chance), *(_cell(value, name) for value in values))
    made.add_row("[bold]whole image[/]")
    values = [tower["probes"]["images"] for tower in towers]
    cells = (_cell(value, "recall_at_1") for value in values)
    made.add_row("same image, recall@1", _number(values[0]["chance"]), *cells)
    return made


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(values: dict[str, float], name: str) -> str:
    if name not in values:
        return "no names repeat"
    interval = "" if name == "map" else f"\n{values['low']:.2f}-{values['high']:.2f}"
    return f"{values[name]:.3f}{interval}"
