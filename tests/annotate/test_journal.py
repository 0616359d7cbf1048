"""The journal: whole lines stay, a torn one goes, and what does not belong is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from granvit.annotate.journal import Journal, JournalError


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path, {"a": 1}) as journal:
        journal.append(0, [{"key": "x"}])
        whole = journal.path.read_bytes()

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(JournalError, match="journal.jsonl: the disk is full; 1 finished batches are safe"):
                journal.append(1, [{"key": "y"}])
        assert journal.path.read_bytes() == whole
        journal.append(1, [{"key": "z"}])
        assert [entry["key"] for entry in journal.entries(2)] == ["x", "z"]


def test_a_torn_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    with Journal(tmp_path, {"a": 1}) as journal:
        journal.append(3, [{"key": "x"}, {"key": "é"}])
        start_of_last = journal.path.stat().st_size
        journal.append(1, [{"key": "y"}])
    whole = (tmp_path / "journal.jsonl").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "journal.jsonl").write_bytes(whole[:size])
        with Journal(tmp_path, {"a": 1}) as journal:
            assert 1 not in journal
            assert (3 in journal) == (size >= start_of_last)
            journal.append(1, [{"key": "y"}])
            if size >= start_of_last:
                assert journal.path.read_bytes() == whole


def test_journals_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(tmp_path, {"kind": "ocr", "filters": {"score": 0.5}}) as journal:
        with pytest.raises(JournalError, match="journal.jsonl: another run is writing it"):
            Journal(tmp_path, {})
        journal.append(0, [])
    text = r"made with other settings \(filters.score: 0.5 there, 0.4 now\); take the same ones, or another folder"
    with pytest.raises(JournalError, match=text):
        Journal(tmp_path, {"kind": "ocr", "filters": {"score": 0.4}})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"rubbish\n" + lines[1])
    with pytest.raises(JournalError, match="journal.jsonl: line 2: no line of a journal"):
        Journal(tmp_path, {})
    path.write_bytes(b'{"format":"other"}\n')
    with pytest.raises(JournalError, match="expected format 'granvit annotation 1', got 'other'"):
        Journal(tmp_path, {})
    path.unlink()
    with Journal(tmp_path, {"a": 1}):
        pass
    with Journal(tmp_path, {"a": 2}):  # of a run that found nothing to begin with
        pass
