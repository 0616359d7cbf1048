"""Raw images to shards, in a run that may be killed and started again at any moment."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from granvit.annotate import engines
from granvit.annotate.filters import BOX_REASONS, IMAGE_REASONS, Filters
from granvit.annotate.inputs import ImageFile, digest, list_images
from granvit.annotate.interfaces import OCR, AnnotationError, Captioner, Detector, batches
from granvit.annotate.journal import JOURNAL, Entry, Journal
from granvit.annotate.reading import for_shard, read_file
from granvit.annotate.stages import Plan
from granvit.data.record import Record
from granvit.data.shards import INDEX, ShardWriter, write_atomically
from granvit.errors import why_not_written

REPORT = "report.json"
ENGINES = ("local", "ray")


@dataclass
class Report:
    """What became of the images and of their boxes.

    Attributes:
        images: that were given.
        samples: in the shards.
        dropped: images, by the filter's name.
        found: boxes, of all images that a detector or OCR saw.
        regions: in the shards.
        boxes_dropped: by the filter's name; a box that went with its image is not among them.
    """

    images: int = 0
    samples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    found: int = 0
    regions: int = 0
    boxes_dropped: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        """Counts an image."""
        self.images += 1
        self.found += entry["found"]
        self.boxes_dropped.update(entry["boxes_dropped"])
        if "dropped" in entry:
            self.dropped[entry["dropped"]] += 1
        else:
            self.samples += 1
            self.regions += len(entry["record"]["regions"])

    def to_json(self) -> bytes:
        """The counts, every filter by name."""
        plain = asdict(self)
        plain["dropped"] = {name: self.dropped[name] for name in IMAGE_REASONS}
        plain["boxes_dropped"] = {name: self.boxes_dropped[name] for name in BOX_REASONS}
        return json.dumps(plain, indent=1).encode()


def annotate(
    images: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    kind: str = "natural",
    detector: Detector | None = None,
    captioner: Captioner | None = None,
    ocr: OCR | None = None,
    filters: Filters | None = None,
    batch_size: int = 8,
    shard_samples: int = 1000,
    engine: str = "local",
    workers: int = 0,
    gpus: float = 0.0,
    ray_address: str | None = None,
    progress: bool = False,
) -> Report:
    """Annotates images and writes them with their records as shards, in the order of their relative names.

    Every finished batch goes to ``journal.jsonl`` in `out` at once. Started again with the same images and settings, a
    run goes on where it was stopped, and its shards are those of a run that was not, byte for byte, where the
    annotators give the same result for the same batch. How many images and boxes each filter took is in
    ``report.json``.

    Args:
        images: one or more files, folders and glob patterns, see :func:`granvit.annotate.inputs.list_images`.
        out: folder of the shards.
        kind: of the images, ``"natural"`` or ``"ocr"``.
        detector: for natural images.
        captioner: for natural images; without one a region's caption is the detector's label.
        ocr: for ocr images.
        filters: what is left out; the paper's limits where None.
        batch_size: images that annotators see together, and that a kill may cost.
        shard_samples: images of a shard at most.
        engine: ``"local"`` or ``"ray"``.
        workers: local processes, 0 for this one; with Ray the actors of each step that runs a model, at least 1.
        gpus: of each such actor.
        ray_address: of a running cluster.
        progress: shows a bar on stderr.

    Raises:
        AnnotationError: images, settings or a journal that cannot be used; what is finished is safe.
        ShardError: the shards cannot be written; finished ones are safe.
        MissingDependencyError: an annotator's or the engine's package is not installed.
    """
    if engine not in ENGINES:
        raise AnnotationError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    least = {"batch_size": (batch_size, 1), "shard_samples": (shard_samples, 1), "workers": (workers, engine == "ray")}
    for name, (value, low) in least.items():
        if value < low:
            raise AnnotationError(f"{name}: expected at least {int(low)}, got {value}")
    plan = Plan(kind, detector, captioner, ocr, filters or Filters()).check()
    folder = Path(out)
    if (folder / INDEX).exists() and not (folder / JOURNAL).exists():
        raise AnnotationError(f"{folder}: holds shards that no annotation made; choose another folder")
    files = list_images([images] if isinstance(images, (str, Path)) else images)
    settings = {
        **plan.settings(),
        "images": len(files),
        "images_sha256": digest(files),
        "batch_size": batch_size,
        "shard_samples": shard_samples,
    }
    parts = batches(files, batch_size)
    with Journal(folder, settings) as journal:
        todo = ((number, part) for number, part in enumerate(parts) if number not in journal)
        if engine == "ray":
            results = engines.run_ray(plan, todo, workers, gpus, ray_address)
        else:
            results = engines.run_local(plan, todo, workers)
        done = sum(len(part) for number, part in enumerate(parts) if number in journal)
        for number, entries in _shown(results, len(files), done, progress):
            journal.append(number, entries)
        report = _assemble(files, journal, len(parts), folder, shard_samples)
    try:
        write_atomically(folder / REPORT, report.to_json())
    except OSError as error:
        text = f"{folder / REPORT}: {why_not_written(error)}; all shards are safe, and the same command writes it"
        raise AnnotationError(text) from error
    return report


def _shown(
    results: Iterator[tuple[int, list[Entry]]], total: int, done: int, progress: bool
) -> Iterator[tuple[int, list[Entry]]]:
    """The results themselves, with a bar that counts them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[dropped]} dropped"), TimeRemainingColumn())
    with Progress("images", *columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("images", total=total, completed=done, dropped=0)
        dropped = 0
        for number, entries in results:
            yield number, entries
            dropped += sum("dropped" in entry for entry in entries)
            bar.update(task, advance=len(entries), dropped=dropped)


def _assemble(files: list[ImageFile], journal: Journal, parts: int, folder: Path, shard_samples: int) -> Report:
    """Writes the shards that are not there yet, and counts everything."""
    report = Report()
    goes_on = "the same command goes on from there"
    with ShardWriter(folder, samples=shard_samples, append=True, after_error=goes_on) as writer:
        there = writer.written
        for file, entry in zip(files, journal.entries(parts), strict=True):
            report.add(entry)
            if "dropped" in entry or report.samples <= there:
                continue
            record = Record.from_json(json.dumps(entry["record"]), f"{journal.path}: {file.key}")
            data = read_file(file.path)
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise AnnotationError(f"{file.path}: was changed after it was annotated; put it back, or start anew")
            writer.add(record, *for_shard(data, file.path))
    return report
