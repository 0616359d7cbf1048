"""WebDataset shards: tar files of images with a JSON record beside each, and an index of them.

A folder holds ``000000.tar``, ``000001.tar``, ... and ``index.json``. A shard gets its name only when it is whole and
on the disk, and the index follows it, so that a folder is readable whenever its writer stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from granvit.data.record import Record, RecordError
from granvit.errors import UserError, why_not_written

INDEX = "index.json"
FORMAT = "granvit shards 1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class ShardError(UserError):
    """A shard or an index that cannot be read or written; the text names the file."""


@dataclass(frozen=True)
class ShardInfo:
    """What the index knows of a shard.

    Attributes:
        name: of the file.
        samples: images in it.
        regions: of all of them.
        bytes: of the file.
        sha256: of the file.
        kinds: samples of each kind.
        sources: samples of each source.
    """

    name: str
    samples: int
    regions: int
    bytes: int
    sha256: str
    kinds: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)


def read_index(folder: str | Path) -> list[ShardInfo]:
    """The shards of a folder, in order.

    Raises:
        ShardError: no index, or one that another program wrote.
    """
    path = Path(folder) / INDEX
    try:
        plain = json.loads(path.read_bytes())
        if plain["format"] != FORMAT:
            raise ShardError(f"{path}: expected format {FORMAT!r}, got {plain['format']!r}")
        return [ShardInfo(**shard) for shard in plain["shards"]]
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; a folder of shards has an index") from None
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not an index of shards: {error!r}") from None


class ShardWriter:
    """Writes samples in order, a new shard every so many.

    Args:
        folder: made where it does not exist; where it holds shards, new ones follow only with `append`.
        samples: of a shard at most.
        append: go on after the shards that are there.
        after_error: what an error of the disk says can be done once the disk is mended.

    Raises:
        ShardError: the folder holds shards already, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        samples: int = 1000,
        append: bool = False,
        after_error: str = "mend that, and append to them",
    ) -> None:
        if samples < 1:
            raise ValueError(f"ShardWriter: samples: expected at least 1, got {samples}")
        self.folder = Path(folder)
        self.shards: list[ShardInfo] = []
        self._samples, self._after_error = samples, after_error
        self._open: _OpenShard | None = None
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            there = (self.folder / INDEX).exists()
            self.shards = read_index(self.folder) if there else []
            if there and not append:
                raise ShardError(
                    f"{self.folder}: holds {self.written} samples in {len(self.shards)} finished shards already; "
                    "choose another folder, append to them (--append), or delete the folder to begin anew"
                )
            for left in self.folder.glob(".*.partial"):  # of a writer that was killed: never whole
                left.unlink()

    @property
    def written(self) -> int:
        """Samples in finished shards."""
        return sum(shard.samples for shard in self.shards)

    def add(self, record: Record, image: bytes, extension: str) -> None:
        """Adds a sample.

        Args:
            record: of the image.
            image: the encoded file, kept as it is.
            extension: ``"jpg"``, ``"png"`` or ``"webp"``.

        Raises:
            RecordError: the record holds what it cannot, or its key is in this shard already.
            ShardError: the disk is full or broken; finished shards are whole.
        """
        if extension not in IMAGE_EXTENSIONS:
            raise ValueError(f"ShardWriter.add: extension: expected one of {IMAGE_EXTENSIONS}, got {extension!r}")
        data = record.to_json()
        with self._explained():
            if self._open is None:
                self._open = _OpenShard(self.folder / f"{len(self.shards):06d}.tar")
            self._open.add(record, data, image, extension)
            if self._open.samples == self._samples:
                self._finish()

    def close(self) -> None:
        """Finishes the last shard and the index."""
        with self._explained():
            if self._open is not None:
                self._finish()
            write_atomically(self.folder / INDEX, _index(self.shards))

    def _finish(self) -> None:
        assert self._open is not None
        info = self._open.finish()
        write_atomically(self.folder / INDEX, _index([*self.shards, info]))
        self.shards.append(info)  # not before: a shard that the index does not hold is overwritten by the next writer
        self._open = None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of the disk into a sentence that says what is safe."""
        try:
            yield
        except OSError as error:
            self.discard()
            safe = f"{self.written} samples in {len(self.shards)} finished shards are safe"
            raise ShardError(f"{self.folder}: {why_not_written(error)}; {safe}; {self._after_error}") from error

    def discard(self) -> None:
        """Drops the shard that is not finished."""
        if self._open is not None:
            self._open.discard()
            self._open = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class _OpenShard:
    """A shard under a name of its own until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.samples = self.regions = 0
        self.kinds: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._file = self.partial.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, record: Record, data: bytes, image: bytes, extension: str) -> None:
        if record.key in self._keys:
            raise RecordError(f"record {record.key}: key: this shard holds it already")
        self._keys.add(record.key)
        for name, content in ((f"{record.key}.{extension}", image), (f"{record.key}.json", data)):
            info = tarfile.TarInfo(name)  # without a date or an owner: the same samples are the same bytes
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self.samples += 1
        self.regions += len(record.regions)
        self.kinds[record.kind] += 1
        self.sources[record.source] += 1

    def finish(self) -> ShardInfo:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size, digest = self.partial.stat().st_size, sha256(self.partial)
        self.partial.replace(self.path)
        counts = dict(sorted(self.kinds.items())), dict(sorted(self.sources.items()))
        return ShardInfo(self.path.name, self.samples, self.regions, size, digest, *counts)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what the disk did not take is thrown away with the rest
            self._file.close()
        self.partial.unlink(missing_ok=True)


def _index(shards: list[ShardInfo]) -> bytes:
    totals = {name: sum(getattr(s, name) for s in shards) for name in ("samples", "regions", "bytes")}
    plain = {"format": FORMAT, **totals, "shards": [asdict(s) for s in shards]}
    return json.dumps(plain, indent=1).encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file by whole new contents that are on the disk, or leaves it as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a sample's parts lie in its shard, in bytes."""

    key: str
    extension: str
    image: tuple[int, int]  # offset and size
    record: tuple[int, int]


class Shard:
    """A shard that is open for reading samples in any order.

    Raises:
        ShardError: the file is missing, cut short or no tar file, or a sample lacks one of its parts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise ShardError(f"{self.path}: {error.strerror}") from None
        try:
            self.places = self._scan()
        except tarfile.TarError as error:
            self._file.close()
            raise ShardError(f"{self.path}: not a whole tar file: {error}") from None
        except ShardError:
            self._file.close()
            raise

    def _scan(self) -> list[Place]:
        parts: dict[str, dict[str, tuple[int, int]]] = {}
        end = self.path.stat().st_size
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not member.isfile():
                    continue
                if member.offset_data + member.size > end:
                    raise ShardError(f"{self.path}: cut short in {member.name}")
                parts.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
        places = []
        for key, found in parts.items():
            extension = next((e for e in IMAGE_EXTENSIONS if e in found), "")
            if not extension or "json" not in found:
                raise ShardError(f"{self.path}: sample {key} has {', '.join(found)}, expected an image and json")
            places.append(Place(key, extension, found[extension], found["json"]))
        return places

    def __len__(self) -> int:
        return len(self.places)

    def record(self, i: int) -> Record:
        """The record of sample i.

        Raises:
            RecordError: it cannot be read.
        """
        return Record.from_json(self._bytes(self.places[i].record), f"{self.path.name}: {self.places[i].key}")

    def image(self, i: int) -> bytes:
        """The encoded image of sample i."""
        return self._bytes(self.places[i].image)

    def _bytes(self, place: tuple[int, int]) -> bytes:
        try:
            return os.pread(self._file.fileno(), place[1], place[0])
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be read: {error.strerror}") from error

    def __iter__(self) -> Iterator[tuple[Record, bytes, str]]:
        for i, place in enumerate(self.places):
            yield self.record(i), self.image(i), place.extension

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shard(folder: str | Path, info: ShardInfo) -> Shard:
    """A shard of a folder, with as many samples as the index says: one cut between two samples is a whole tar file.

    Raises:
        ShardError: as for :class:`Shard`, or the number is another.
    """
    shard = Shard(Path(folder) / info.name)
    if len(shard) != info.samples:
        shard.close()
        raise ShardError(f"{shard.path}: holds {len(shard)} samples, and {info.samples} by the index")
    return shard


def verify(folder: str | Path) -> None:
    """Compares every shard of a folder with its checksum.

    Raises:
        ShardError: one is missing, cannot be read or was changed.
    """
    for info in read_index(folder):
        path = Path(folder) / info.name
        if not path.exists():
            raise ShardError(f"{path}: is in the index and not in the folder")
        try:
            found = sha256(path)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
        if found != info.sha256:
            raise ShardError(f"{path}: its checksum is not the one in the index")
