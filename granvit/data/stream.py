"""Reads shards for training: shuffled, split over ranks and workers, resumed where it stopped.

The order of an epoch depends on the seed and the epoch alone. Rank r of w takes every w-th sample of it, and cuts what
it takes into batches; batches, not samples, are dealt out to workers. So neither the number of workers nor a restart
changes which samples a step sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from granvit.data.record import Record
from granvit.data.shards import Shard, ShardInfo, open_shard, read_index
from granvit.errors import UserError


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one image.

    Attributes:
        record: size, caption, regions.
        image: the encoded file.
        extension: of it.
    """

    record: Record
    image: bytes
    extension: str


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, and why."""

    shard: str
    sample: int
    reason: str


@dataclass
class Batch:
    """What a step gets.

    Attributes:
        samples: as `prepare` and `collate` made them.
        count: how many.
        skipped: what should have been among them.
        error: why a worker process could not go on; :class:`RegionLoader` raises it.
    """

    samples: Any
    count: int
    skipped: list[Skipped] = field(default_factory=list)
    error: str = ""


def _unchanged(x: Any) -> Any:
    return x


class RegionStream(IterableDataset[Batch]):
    """Batches of the samples in a folder of shards.

    Args:
        folder: with ``index.json``.
        batch_size: samples a batch of one rank.
        shuffle: shards among each other, and samples among `window` shards; else in the order of the index.
        seed: of the order.
        window: shards that are read at the same time; more mix better and keep more files open.
        rank: of this process.
        world_size: processes that share an epoch.
        drop_last: leave out the samples that do not fill a batch on every rank; else ranks may differ by a batch.
        prepare: makes a training sample of a :class:`Sample`, in the worker.
        collate: makes a batch of a list of them, in the worker.
        skip_broken: leave out samples that cannot be read or prepared (those that raise a :class:`UserError`), and
            say so in the batch; else the error is raised.

    Raises:
        ShardError: no index.
        ValueError: settings that make no sense.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        window: int = 8,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prepare: Callable[[Sample], Any] = _unchanged,
        collate: Callable[[list[Any]], Any] = _unchanged,
        skip_broken: bool = False,
    ) -> None:
        if batch_size < 1 or window < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "RegionStream: expected batch_size and window of at least 1 and 0 <= rank < world_size, "
                f"got {batch_size}, {window}, {rank} and {world_size}"
            )
        self.folder = Path(folder)
        self.shards = read_index(folder)
        self.batch_size, self.shuffle, self.seed, self.window = batch_size, shuffle, seed, window
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.prepare, self.collate, self.skip_broken = prepare, collate, skip_broken
        self.epoch = 0
        self.first_batch = 0  # of the epoch, that the next iteration begins with
        self._sizes = np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Of all ranks."""
        return int(self._sizes.sum())

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        if self.drop_last:
            return self.num_samples // self.world_size // self.batch_size
        own = len(range(self.rank, self.num_samples, self.world_size))
        return -(-own // self.batch_size)

    def places(self, batch: int) -> list[tuple[int, int]]:
        """(shard, sample in it) of each sample of a batch of this epoch."""
        order = _order(tuple(self._sizes.tolist()), self.shuffle, self.seed, self.window, self.epoch)
        first = batch * self.batch_size
        positions = self.rank + self.world_size * np.arange(first, first + self.batch_size)
        return [order.place(int(p)) for p in positions[positions < self.num_samples]]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        files = _OpenShards(self.folder, self.window + 1)
        try:
            # DataLoader takes batches from its workers in turns, beginning with the first.
            for number in range(self.first_batch + own, len(self), workers):
                yield self._batch(files, number)
        except UserError as error:
            if worker is None:
                raise
            yield Batch(None, 0, error=str(error))  # raised here, it would reach the user as a traceback of the worker
        finally:
            files.close()

    def _batch(self, files: _OpenShards, number: int) -> Batch:
        samples, skipped = [], []
        for shard, i in self.places(number):
            try:
                samples.append(self.prepare(files.sample(self.shards[shard], i)))
            except UserError as error:
                if not self.skip_broken:
                    raise
                skipped.append(Skipped(self.shards[shard].name, i, str(error)))
        return Batch(self.collate(samples), len(samples), skipped)


class RegionLoader:
    """A DataLoader over a stream that knows how far it is.

    :meth:`state_dict` counts the batches that were handed out, not those that workers hold ready, so a run that is
    stopped anywhere and begun again sees each sample of the epoch once.

    Args:
        stream: what to read.
        num_workers: processes that read and prepare.
        options: of ``torch.utils.data.DataLoader``.
    """

    def __init__(self, stream: RegionStream, num_workers: int = 0, **options: Any) -> None:
        self.stream, self.num_workers, self.options = stream, num_workers, options
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        """Batches that are left of the epoch."""
        return len(self.stream) - self.stream.first_batch

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch; the next call begins the next epoch."""
        stream = self.stream
        for batch in DataLoader(stream, batch_size=None, num_workers=self.num_workers, **self.options):
            if batch.error:
                raise UserError(batch.error)
            stream.first_batch += 1  # workers have a copy of the stream
            self.skipped.extend(batch.skipped)
            yield batch
        stream.epoch, stream.first_batch = stream.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is, and what the order depends on."""
        stream = self.stream
        return {"epoch": stream.epoch, "batches": stream.first_batch, **self._order()}

    def _order(self) -> dict[str, Any]:
        stream = self.stream
        names = ("shuffle", "seed", "window", "world_size", "batch_size", "drop_last")
        shards = [[shard.name, shard.samples, shard.sha256] for shard in stream.shards]
        return {**{name: getattr(stream, name) for name in names}, "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another loader was.

        Raises:
            UserError: that one had other shards or settings, so the rest of its epoch is not the rest of ours.
        """
        different = [name for name, value in self._order().items() if state.get(name) != value]
        if different:
            raise UserError(
                f"cannot resume the data: {', '.join(different)} differ from the run that stopped; "
                "resume with the same shards and settings, or start an epoch anew"
            )
        self.stream.epoch, self.stream.first_batch = state["epoch"], state["batches"]


class _Order:
    """An epoch's order: groups of shards one after another, samples mixed within a group."""

    def __init__(self, sizes: tuple[int, ...], shuffle: bool, seed: int, window: int, epoch: int) -> None:
        self._shuffle, self._key = shuffle, (seed, epoch)
        shards = np.arange(len(sizes))
        if shuffle:
            shards = np.random.default_rng(self._key).permutation(shards)
        self._groups = [shards[i : i + window] for i in range(0, len(shards), window)]
        self._sizes = np.array(sizes, dtype=np.int64)
        self._starts = np.cumsum([0, *(int(self._sizes[group].sum()) for group in self._groups)])
        self._mixed: tuple[int, np.ndarray] | None = None  # the group at hand and its order

    def place(self, position: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, position, side="right")) - 1
        shards, within = self._groups[group], position - int(self._starts[group])
        if self._shuffle:
            if self._mixed is None or self._mixed[0] != group:
                count = int(self._starts[group + 1] - self._starts[group])
                self._mixed = group, np.random.default_rng((*self._key, group)).permutation(count)
            within = int(self._mixed[1][within])
        ends = np.cumsum(self._sizes[shards])
        i = int(np.searchsorted(ends, within, side="right"))
        return int(shards[i]), within - int(ends[i] - self._sizes[shards[i]])


@lru_cache(maxsize=2)
def _order(sizes: tuple[int, ...], shuffle: bool, seed: int, window: int, epoch: int) -> _Order:
    return _Order(sizes, shuffle, seed, window, epoch)


class _OpenShards:
    """The shards that were read last."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._open: OrderedDict[str, Shard] = OrderedDict()

    def sample(self, info: ShardInfo, i: int) -> Sample:
        shard = self._open.pop(info.name, None) or open_shard(self._folder, info)
        self._open[info.name] = shard
        if len(self._open) > self._limit:
            self._open.popitem(last=False)[1].close()
        return Sample(shard.record(i), shard.image(i), shard.places[i].extension)

    def close(self) -> None:
        for shard in self._open.values():
            shard.close()
        self._open.clear()
