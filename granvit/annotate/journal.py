"""What is annotated already: one line of JSON for each batch, on the disk before the next one counts as done."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from granvit.annotate.interfaces import AnnotationError
from granvit.errors import first_difference, why_not_written

JOURNAL = "journal.jsonl"
FORMAT = "granvit annotation 1"

Entry = dict[str, Any]  # of one image, see stages.entry_of


class JournalError(AnnotationError):
    """A journal that cannot be used or written; the text names the file."""


class Journal:
    """The journal of a folder, open for one run.

    A batch is one line, so that a line which was cut by a kill takes whole batches with it: what is done again is done
    in the same company, and gives the same result also with models whose results depend a little on the batch.

    Args:
        folder: of the shards; made where it does not exist.
        settings: plain data; a journal that has batches of other settings is refused.

    Raises:
        JournalError: another run has it open, it is broken, or its settings are others.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(folder) / JOURNAL
        settings = json.loads(json.dumps(settings))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            self._lock()
            self._offsets: dict[int, int] = {}
            self._end = 0
            found = self._scan()
            if self._offsets and found != settings:
                raise JournalError(
                    f"{self.path}: was made with other settings ({first_difference(found, settings)}); "
                    "take the same ones, or another folder"
                )
            if not self._offsets:
                self._restart(settings)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, batch: int) -> bool:
        return batch in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, batch: int, entries: list[Entry]) -> None:
        """Puts a batch on the disk.

        Raises:
            JournalError: the disk is full or broken; what was there before is safe.
        """
        if batch in self._offsets:
            raise ValueError(f"Journal.append: batch {batch} is there already")
        self._offsets[batch] = self._write({"batch": batch, "images": entries})

    def entries(self, batches: int) -> Iterator[Entry]:
        """The entries of batches 0 to `batches` in their order, read from the disk one batch at a time."""
        with self.path.open("rb") as file:
            for batch in range(batches):
                file.seek(self._offsets[batch])
                yield from json.loads(file.readline())["images"]

    def close(self) -> None:
        """Lets another run have it."""
        self._file.close()

    def _lock(self) -> None:
        import fcntl  # POSIX has it; the rest of the package does without

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self.path}: another run is writing it") from None
        except OSError as error:
            raise JournalError(f"{self.path}: this file system cannot lock it: {error.strerror}") from error

    def _scan(self) -> Any:
        """Finds the batches and cuts off a last line that was not finished; the settings, or None."""
        settings = None
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    plain = json.loads(line)
                    if number == 1:
                        if plain["format"] != FORMAT:
                            raise JournalError(f"{self.path}: expected format {FORMAT!r}, got {plain['format']!r}")
                        settings = plain["settings"]
                    else:
                        self._offsets[plain["batch"]] = self._end
                except (ValueError, KeyError, TypeError) as error:
                    raise JournalError(f"{self.path}: line {number}: no line of a journal: {error!r}") from None
                self._end += len(line)
        self._file.truncate(self._end)
        return settings

    def _restart(self, settings: dict[str, Any]) -> None:
        """A journal without batches takes any settings."""
        self._file.truncate(0)
        self._end = 0
        self._write({"format": FORMAT, "settings": settings})
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self, plain: dict[str, Any]) -> int:
        """Appends a line; its offset."""
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        start = self._end
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # a line that stays in part is cut off at the next start
                self._file.truncate(start)
            raise JournalError(
                f"{self.path}: {why_not_written(error)}; {len(self)} finished batches are safe, "
                "and the same command goes on from there"
            ) from error
        self._end += len(line)
        return start

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
