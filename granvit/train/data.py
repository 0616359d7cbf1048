"""What a training step reads: images from several sources with questions about them, packed, in an order that can be
taken up anywhere."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from granvit.data.conversations import Conversations
from granvit.data.mixing import Mixture
from granvit.data.record import Record, Region
from granvit.data.sources import Source
from granvit.data.tasks import Pair, TaskSampler
from granvit.errors import MissingDependencyError, UserError
from granvit.geometry import BoxTransform, clip, format_box
from granvit.model.packing import PackedBatch, Sample, pack
from granvit.model.prompts import Prompts

PLACEHOLDERS = {"box": "<box>", "region": "<region>"}
_KEPT = 0.25  # of a region's area has to be in the frame


@dataclass(frozen=True)
class Preparer:
    """Makes of a record and its image what the model is shown and asked; the same for the same seed and epoch.

    Attributes:
        sampler: draws the questions.
        size: side of the frames in pixels.
        prompt: how Bbox2Caption names its region: ``text``, ``box``, ``region``, or ``mixed`` for a draw between text
            and region.
        flip: share of the natural images that are mirrored; text is not, and neither is what conversations are about,
            whose words may say left and right.
        seed: of the draws that are not the sampler's.
        tiles: of an image beside the overview, at most.
    """

    sampler: TaskSampler
    size: int
    prompt: str = "text"
    flip: float = 0.0
    seed: int = 0
    tiles: int = 0

    def __call__(self, source: Source | Conversations, i: int, epoch: int) -> Sample:
        """The sample of an image of a source. Boxes and coordinates are those of the overview, the first frame.

        A region of which less than a quarter is left in the frame is left out. A conversation asks its own questions.
        """
        if isinstance(source, Conversations):
            conversation, pixels = source.read(i, self.size, self.tiles)
            return Sample(pixels, [conversation])
        rng = random.Random(f"{self.seed} {epoch} {i}")
        mirrored = rng.random() < self.flip
        image = source.read(i, self.size, flip=mirrored, tiles=self.tiles)
        if mirrored and image.record.kind != "natural":
            image = source.read(i, self.size, tiles=self.tiles)
        shown = self._as_shown(image.record, image.transform)
        pairs = self.sampler(shown, epoch).pairs
        regions = list(dict.fromkeys(pair.region for pair in pairs if pair.region is not None))
        row = {region: row for row, region in enumerate(regions)}
        boxes = torch.tensor([shown.regions[region].box for region in regions], dtype=torch.float32).reshape(-1, 4)
        asked = [self._prompted(pair, shown, rng) for pair in pairs]
        return Sample(
            image.frames,
            [replace(pair, region=None if pair.region is None else row[pair.region]) for pair in asked],
            boxes,
            kind=image.record.kind,
        )

    def _as_shown(self, record: Record, transform: BoxTransform) -> Record:
        """The record of the frame: its size, and the regions where they are in it."""
        corners = torch.tensor([region.box for region in record.regions], dtype=torch.float64).reshape(-1, 4)
        boxes, kept = clip(transform.boxes(corners))
        regions = tuple(
            Region((box[0], box[1], box[2], box[3]), region.caption, region.score, region.origin)
            for region, box, share in zip(record.regions, boxes.tolist(), kept.tolist(), strict=True)
            if share >= _KEPT
        )
        return replace(record, width=self.size, height=self.size, regions=regions)

    def _prompted(self, pair: Pair, record: Record, rng: random.Random) -> Pair:
        """The pair with a special token in place of its coordinates, where that is wanted."""
        prompt = rng.choice(("text", "region")) if self.prompt == "mixed" else self.prompt
        if pair.task != "bbox_to_caption" or pair.box is None or prompt == "text":
            return pair
        text = format_box(pair.box, self.sampler.style, (record.height, record.width))
        return replace(pair, question=pair.question.replace(text, PLACEHOLDERS[prompt]))


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read, and why."""

    source: int
    sample: int
    reason: str


@dataclass
class Loaded:
    """What the trainer gets for a micro-batch.

    Attributes:
        batch: packed; one without images or tokens where no sample could be read, or none is left. None after an error.
        images: in it.
        skipped: what should have been in it.
        error: why a worker process could not go on.
    """

    batch: PackedBatch | None
    images: int
    skipped: list[Skipped] = field(default_factory=list)
    error: str = ""

    def pin_memory(self) -> Loaded:
        """For ``DataLoader(pin_memory=True)``."""
        return replace(self, batch=self.batch and self.batch.pin_memory())


class TrainingData(IterableDataset[Loaded]):
    """A run of packed micro-batches without an end; which samples are in number n depends on the settings and n alone.

    Epoch follows epoch without a seam. Of the samples of micro-batch n of all ranks, rank r has every w-th. So a run
    that stopped goes on with :attr:`first`, and the number of workers changes nothing. What cannot be read is left out,
    and the micro-batch says so.

    Args:
        sources: what is read.
        weights: how often each is drawn, relative to the others; None is by its samples.
        prepare: makes a sample.
        prompts: makes tokens.
        tokens_per_frame: that the vision tower makes of a frame.
        max_length: tokens of a row, at most.
        micro_batch: images of one rank in one micro-batch.
        rank: of this process.
        world_size: processes.
        seed: of the order.
        length: images of all ranks after which it ends; None is never.
        pad_to_multiple_of: see :func:`granvit.model.packing.pack`.
    """

    def __init__(
        self,
        sources: Sequence[Source | Conversations],
        weights: Sequence[float] | None,
        prepare: Preparer,
        prompts: Prompts,
        *,
        tokens_per_frame: int,
        max_length: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        length: int | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        if micro_batch < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "TrainingData: expected a micro_batch of at least 1 and 0 <= rank < world_size, "
                f"got {micro_batch}, {rank} and {world_size}"
            )
        self.sources, self.prepare, self.prompts = tuple(sources), prepare, prompts
        self.mixture = Mixture([len(source) for source in sources], weights, seed=seed)
        self.tokens_per_frame, self.max_length = tokens_per_frame, max_length
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.length, self.pad_to_multiple_of = length, pad_to_multiple_of
        self.first = 0  # micro-batch that the next iteration begins with

    def __iter__(self) -> Iterator[Loaded]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        number = self.first + own  # DataLoader takes from its workers in turns
        while self.length is None or number * self.micro_batch * self.world_size < self.length:
            try:
                yield self.load(number)
            except UserError as error:
                if worker is None:
                    raise
                yield Loaded(None, 0, error=str(error))  # raised here it would be a traceback of the worker
            number += workers

    def places(self, number: int) -> list[tuple[int, int, int]]:
        """(epoch, source, sample in it) of each image of a micro-batch."""
        step = self.micro_batch * self.world_size
        position, end = number * step, (number + 1) * step
        if self.length is not None:
            end = min(end, self.length)
        found: list[tuple[int, int, int]] = []
        while position < end:  # once, or more often where an epoch ends within
            epoch, within = divmod(position, len(self.mixture))
            count = min(end - position, len(self.mixture) - within)
            chosen = (x.tolist() for x in self.mixture.positions(epoch, within, within + count))
            found += [(epoch, *place) for place in zip(*chosen, strict=True)]
            position += count
        return found[self.rank :: self.world_size]

    def load(self, number: int) -> Loaded:
        """Micro-batch `number`.

        Raises:
            UserError: a row is too short for an image, or a package that reads images is missing.
        """
        samples, skipped = [], []
        for epoch, source, i in self.places(number):
            try:
                samples.append(self.prepare(self.sources[source], i, epoch))
            except MissingDependencyError:
                raise
            except UserError as error:
                skipped.append(Skipped(source, i, str(error)))
        nothing = Sample(torch.empty(0, 3, self.prepare.size, self.prepare.size, dtype=torch.uint8), [])
        batch = pack(
            samples or [nothing],  # so that this rank takes the step that the others take
            self.prompts,
            self.tokens_per_frame,
            self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        return Loaded(batch, len(samples), skipped)

    def loader(self, workers: int, *, pin_memory: bool = False) -> Iterator[Loaded]:
        """The micro-batches from :attr:`first` on, read ahead by worker processes.

        Raises:
            UserError: what stopped a worker.
        """
        options: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _outlive_signals} if workers else {}
        # With a generator of its own: from the global one it would draw a seed, and a run that is taken up would go on
        # with other dropout.
        options["generator"] = torch.Generator()
        for loaded in DataLoader(self, batch_size=None, num_workers=workers, pin_memory=pin_memory, **options):
            if loaded.error:
                raise UserError(loaded.error)
            yield loaded


def _outlive_signals(worker: int) -> None:
    """What asks a run to stop goes to all its processes, and the step at hand still needs its data."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
