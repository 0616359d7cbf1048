"""Records and shards: what goes in comes out, and nothing that is finished is ever lost."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from granvit.data.record import Record, RecordError, Region
from granvit.data.shards import Shard, ShardError, ShardWriter, read_index, verify
from tests.data.support import encoded, some_record


def fill(folder: Path, numbers: range, **options: Any) -> None:
    with ShardWriter(folder, **options) as writer:
        for number in numbers:
            writer.add(some_record(number), encoded(color=(number % 256, 0, 0)), "jpg")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    fill(tmp_path, range(25), samples=10)
    shards = read_index(tmp_path)
    assert [(s.name, s.samples, s.regions) for s in shards] == [
        ("000000.tar", 10, 30),
        ("000001.tar", 10, 30),
        ("000002.tar", 5, 15),
    ]
    assert shards[0].kinds == {"natural": 5, "ocr": 5}
    assert shards[0].sources == {"colours": 10}
    number = 0
    for info in shards:
        with Shard(tmp_path / info.name) as shard:
            for record, image, extension in shard:
                assert record == some_record(number)
                assert image == encoded(color=(number, 0, 0))
                assert extension == "jpg"
                number += 1
    assert number == 25
    verify(tmp_path)


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    fill(tmp_path, range(7), samples=7)
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:06d}" for i in range(7)]
    assert [Record.from_json(s["json"]) for s in samples] == [some_record(i) for i in range(7)]
    assert samples[3]["jpg"] == encoded(color=(3, 0, 0))


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(12), samples=5)
    time.sleep(1.1)  # a tar file that kept dates would differ now
    fill(tmp_path / "b", range(12), samples=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_appending_goes_on_after_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path, range(10), samples=5)
    with pytest.raises(ShardError, match=r"holds 10 samples in 2 finished shards already; choose .*\(--append\), or d"):
        fill(tmp_path, range(10, 12))
    fill(tmp_path, range(10, 13), samples=5, append=True)
    assert [s.samples for s in read_index(tmp_path)] == [5, 5, 3]
    verify(tmp_path)


def test_an_error_leaves_finished_shards_and_nothing_else(tmp_path: Path) -> None:
    def write_twice() -> None:
        with ShardWriter(tmp_path, samples=4) as writer:
            for number in (0, 1, 2, 3, 4, 4):
                writer.add(some_record(number), encoded(), "jpg")

    with pytest.raises(RecordError, match="key: this shard holds it already"):
        write_twice()
    assert sorted(contents(tmp_path)) == ["000000.tar", "index.json"]
    assert [s.samples for s in read_index(tmp_path)] == [4]


FULL = "the disk is full; 3 samples in 1 finished shards are safe; mend that, and append to them"


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_says_what_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, samples=3)
    for number in range(4):
        writer.add(some_record(number), encoded(), "jpg")
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(ShardError, match=f"^{tmp_path}: {FULL}"):
        writer.add(some_record(4), encoded(), "jpg")
    assert sorted(contents(tmp_path)) == ["000000.tar", "index.json"]
    verify(tmp_path)


@pytest.mark.parametrize("write", ["shards.write_atomically", "shards.os.fsync"])
def test_what_the_index_could_not_take_is_not_called_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    writer = ShardWriter(tmp_path, samples=3)
    for number in range(5):
        writer.add(some_record(number), encoded(color=(number, 0, 0)), "jpg")
    with monkeypatch.context() as patched:
        patched.setattr(f"granvit.data.{write}", full)
        with pytest.raises(ShardError, match=FULL):
            writer.add(some_record(5), encoded(color=(5, 0, 0)), "jpg")
    assert [s.samples for s in read_index(tmp_path)] == [3]
    with ShardWriter(tmp_path, samples=3, append=True) as again:
        for number in range(again.written, 8):
            again.add(some_record(number), encoded(color=(number, 0, 0)), "jpg")
    fill(tmp_path / "whole", range(8), samples=3)
    assert contents(tmp_path / "whole") == contents(tmp_path)


def test_a_folder_that_cannot_be_made_or_read_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    text = "file: cannot be written: File exists; 0 samples in 0 finished shards are safe"
    with pytest.raises(ShardError, match=text):
        ShardWriter(tmp_path / "file")
    with pytest.raises(ShardError, match=r"file/index\.json: Not a directory"):
        read_index(tmp_path / "file")
    fill(tmp_path, range(2))

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Shard(tmp_path / "000000.tar") as shard:
        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(ShardError, match=r"000000\.tar: cannot be read: Input/output error"):
            shard.image(0)
    monkeypatch.setattr("granvit.data.shards.sha256", failing)
    with pytest.raises(ShardError, match=r"000000\.tar: cannot be read: Input/output error"):
        verify(tmp_path)


WRITER = """
import itertools, sys
from pathlib import Path
from granvit.data.shards import ShardWriter
from tests.data.support import encoded, some_record
writer = ShardWriter(Path(sys.argv[1]), samples=20)
print("ready", flush=True)
for number in itertools.count():
    writer.add(some_record(number), encoded(), "jpg")
"""


def test_a_disk_that_ends_is_a_sentence(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert "cannot be written: File too large; 0 samples in 0 finished shards are safe" in run.stderr
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_the_folder_is_readable(tmp_path: Path) -> None:
    rng = random.Random()
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
        if (folder / "index.json").exists():
            verify(folder)
            assert all(s.samples == 20 for s in read_index(folder))
        with ShardWriter(folder, samples=20, append=True) as writer:
            number = writer.written
            writer.add(some_record(number), encoded(), "jpg")
        verify(folder)
        assert not list(folder.glob(".*"))


def test_broken_shards_are_named(tmp_path: Path) -> None:
    fill(tmp_path, range(6), samples=3)
    path = tmp_path / "000000.tar"
    whole = path.read_bytes()
    for size in (0, 100, 700, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises((ShardError, RecordError), match="000000.tar: "):
            list(Shard(path))
        with pytest.raises(ShardError, match="000000.tar: its checksum is not the one in the index"):
            verify(tmp_path)
    path.unlink()
    with pytest.raises(ShardError, match="000000.tar: No such file"):
        Shard(path)
    with pytest.raises(ShardError, match="000000.tar: is in the index and not in the folder"):
        verify(tmp_path)
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("lonely.json")
        tar.addfile(info)
    with pytest.raises(ShardError, match="sample lonely has json, expected an image and json"):
        Shard(path)


def test_broken_indices_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="index.json: no such file; a folder of shards has an index"):
        read_index(tmp_path)
    for text in ("", "[]", "{}", '{"format": "granvit shards 1", "shards": [{"name": 1}]}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ShardError, match="index.json: not an index of shards"):
            read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other 2", "shards": []}')
    with pytest.raises(ShardError, match="expected format 'granvit shards 1', got 'other 2'"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"key": ""}, "key: expected 1 to 90 letters"),
        ({"key": "a/b"}, "key: expected 1 to 90 letters"),
        ({"key": "a" * 91}, "key: expected 1 to 90 letters"),
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
        ({"height": 1.5}, "height: expected an integer of at least 1, got 1.5"),
        ({"kind": "scan"}, "kind: expected one of natural, ocr, got 'scan'"),
        ({"source": None}, "source: expected a string, got None"),
        ({"caption": "x" * 5000}, "caption: expected at most 4096 characters, got 5000"),
        ({"caption": "\ud800"}, "caption: expected text that UTF-8 can hold"),
        ({"source": "\ud800"}, "source: expected text that UTF-8 can hold"),
        ({"meta": {"a": "\ud800"}}, "record a: meta: expected what JSON in UTF-8 can hold"),
        ({"meta": {"a": float("nan")}}, "record a: meta: expected what JSON in UTF-8 can hold"),
        ({"meta": {"a": b"bytes"}}, "record a: meta: expected what JSON in UTF-8 can hold"),
        ({"regions": (Region((0.0, 0.0, 1.0, 1.0), "", None, "\ud800"),)}, r"regions\[0\]: origin: expected text that"),
        ({"regions": (Region((0.5, 0.0, 0.4, 1.0)),)}, r"regions\[0\]: box: expected 0 <= x0 <= x1 <= 1"),
        ({"regions": (Region((0.0, 0.0, 1.2, 1.0)),)}, r"regions\[0\]: box: expected 0 <= x0 <= x1 <= 1"),
        ({"regions": (Region((0.0, 0.0, float("nan"), 1.0)),)}, r"regions\[0\]: box: expected 0 <= x0"),
        ({"regions": (Region((0.0, 0.0, 1.0, 1.0), 3),)}, r"regions\[0\]: caption: expected a string, got 3"),
        ({"regions": (Region((0.0, 0.0, 1.0, 1.0), "", float("inf")),)}, r"regions\[0\]: score: expected a finite"),
    ],
)
def test_impossible_records_are_refused(change: dict, text: str) -> None:
    record = Record(**{"key": "a", "width": 4, "height": 4, "source": "s", **change})
    with pytest.raises(RecordError, match=text):
        record.to_json()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff\xfe{", "shard 1: expected UTF-8 text"),
        (b"{", "shard 1: expected JSON"),
        (b"[]", "shard 1: expected an object with regions"),
        (b'{"regions": [], "colour": 1}', "fields missing: .*'key'.*, unknown: .*'colour'"),
        (
            b'{"key":"a","width":1,"height":1,"source":"","kind":"ocr","regions":[{"box":[0,1]}]}',
            "expected four numbers",
        ),
        (
            b'{"key":"a","width":1,"height":1,"source":"","kind":"ocr","regions":[{"box":[0,0,1,1%s]}]}' % (b"0" * 400),
            "expected four numbers",
        ),
        (b'{"key":"a","width":1,"height":1,"source":"","kind":"ocr","regions":[3]}', "expected an object of box"),
        (b'{"key":"a","width":1,"height":1,"source":"","kind":"ocr","regions":[{"box":[0,0,NaN,1]}]}', "box: expected"),
    ],
)
def test_unreadable_records_are_named(data: bytes, text: str) -> None:
    with pytest.raises(RecordError, match=text):
        Record.from_json(data, "shard 1")


def test_a_record_is_plain_json() -> None:
    record = some_record(3)
    assert json.loads(record.to_json())["regions"][0]["caption"] == "region 0 of 3 豆"
    assert Record.from_json(record.to_json()) == record
