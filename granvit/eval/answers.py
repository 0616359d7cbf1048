"""Answers on disk as they are made, and the configuration that a folder of them belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from granvit.data.shards import write_atomically
from granvit.errors import UserError, first_difference, why_not_written
from granvit.eval.scores import Answer

ANSWERS, CONFIG, EVALUATION = "answers.jsonl", "config.json", "evaluation.json"


class AnswerError(UserError):
    """A folder of answers that cannot be read, written, or gone on with; the text names the file."""


class AnswerFile:
    """The answers of one evaluation, open for one process.

    Lines after the last whole chunk are dropped when it is opened: of the last chunk that is there, nobody knows
    whether it is whole.

    Args:
        folder: of the evaluation; made where it does not exist.
        config: plain data as JSON gives it; a folder of another configuration is refused.
        overwrite: delete what an evaluation left there.

    Raises:
        AnswerError: another process has it open, it is of another configuration, or it cannot be read or written.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any], *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ANSWERS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise AnswerError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            self._lock()
            if overwrite:
                (self.folder / EVALUATION).unlink(missing_ok=True)
                (self.folder / CONFIG).unlink(missing_ok=True)
                self._file.truncate(0)
            self._claim(config)
            self._end, self._chunks = 0, set[int]()
            self._scan()
        except OSError as error:
            self._file.close()
            raise AnswerError(f"{self.folder}: {why_not_written(error)}") from error
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        import fcntl  # POSIX has it; the rest of the package does without

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnswerError(f"{self.path}: another evaluation is writing it") from None

    def _claim(self, config: dict[str, Any]) -> None:
        path = self.folder / CONFIG
        if not path.exists():
            if self.path.stat().st_size:
                raise AnswerError(f"{self.folder}: has answers and no {CONFIG}; choose another folder, or --overwrite")
            write_atomically(path, json.dumps(config, indent=1).encode())
            return
        try:
            there = json.loads(path.read_bytes())
        except ValueError:
            raise AnswerError(f"{path}: is no JSON; choose another folder, or --overwrite") from None
        if there != config:
            raise AnswerError(
                f"{self.folder}: holds another evaluation ({first_difference(there, config)}); "
                "choose another folder, or --overwrite"
            )

    def _scan(self) -> None:
        """Finds the whole chunks, and cuts off the rest."""
        starts: dict[int, int] = {}  # of chunks, in bytes
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    starts.setdefault(int(json.loads(line)["chunk"]), end)
                except (ValueError, KeyError, TypeError):
                    raise AnswerError(f"{self.path}: line {number}: no answer; --overwrite begins anew") from None
                end += len(line)
        if (self.folder / EVALUATION).exists():  # written when all chunks were there
            self._chunks, self._end = set(starts), end
            return
        last = max(starts, default=None)
        self._end = 0 if last is None else starts[last]
        self._chunks = set(starts) - {last}
        self._file.truncate(self._end)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._chunks

    def append(self, answers: Sequence[Answer]) -> None:
        """Puts the answers of a chunk on the disk.

        Raises:
            AnswerError: the disk is full or broken; whole chunks are safe.
        """
        lines = (json.dumps(answer.plain(), ensure_ascii=False) + "\n" for answer in answers)
        data = "".join(lines).encode("utf-8", "replace")  # a model may write half a surrogate pair
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            raise AnswerError(
                f"{self.path}: {why_not_written(error)}; the same command goes on after the answers that are there"
            ) from error
        self._chunks.update(answer.chunk for answer in answers)

    def read(self) -> list[Answer]:
        """All answers, in the order in which they were asked for."""
        return read_answers(self.folder)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_answers(folder: str | Path) -> list[Answer]:
    """The answers of an evaluation.

    Raises:
        AnswerError: there are none, or they are no answers.
    """
    path = Path(folder) / ANSWERS
    try:
        with path.open(encoding="utf-8") as file:
            return [Answer.of(json.loads(line)) for line in file]
    except OSError as error:
        raise AnswerError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnswerError(f"{path}: holds no answers of an evaluation: {error}") from None


def read_evaluation(folder: str | Path) -> dict[str, Any] | None:
    """What ``evaluation.json`` holds; None where it is not written yet.

    Raises:
        AnswerError: it is not JSON.
    """
    path = Path(folder) / EVALUATION
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AnswerError(f"{path}: cannot be read: {error}") from None
    return found


def write_evaluation(folder: str | Path, report: dict[str, Any]) -> None:
    """Writes ``evaluation.json``, whole or not at all.

    Raises:
        AnswerError: it cannot be written.
    """
    path = Path(folder) / EVALUATION
    try:
        write_atomically(path, json.dumps(report, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise AnswerError(f"{path}: {why_not_written(error)}") from error
