"""What the world holds, through the whole way: import, statistics, page, stream; nothing lost, one sentence each."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from granvit.annotate.audit import shard_samples
from granvit.data.images import decode
from granvit.data.importers import AnnotationError, import_dataset
from granvit.data.record import MAX_CAPTION, Record, Region
from granvit.data.shards import Shard, ShardWriter, read_index, verify
from granvit.data.stats import REPORT, collect
from granvit.data.stream import RegionLoader, RegionStream, Sample
from granvit.data.view import write_page
from granvit.errors import UserError
from tests.annotate.test_inputs import BROKEN
from tests.data.support import encoded, some_record


def lines(folder: Path, names: list[str], **change: Any) -> dict[str, Path]:
    """JSON lines with a region for each image, as the importer takes them."""
    plain = {"width": 64, "height": 48, "source": "s", "kind": "natural"}
    rows = [
        {"key": f"k{i}", **plain, "regions": [{"box": [0, 0, 0.5, 1], "caption": "left"}], "image": name, **change}
        for i, name in enumerate(names)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"annotations": folder / "a.jsonl", "images": folder}


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def unusual() -> dict[str, bytes]:
    """Images that are shown as 64 x 48 pixels of red, or of the grey 100."""
    red, turned = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (48, 64), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue")]}
    return {
        "cmyk.jpg": saved(Image.new("CMYK", (64, 48), (0, 255, 255, 0)), "JPEG"),
        "deep.png": saved(Image.new("I;16", (64, 48), 257 * 100), "PNG"),
        "moving.gif": saved(red, "GIF", **frames),
        "moving.webp": saved(red, "WEBP", lossless=True, **frames),
        "turned.jpg": saved(turned, "JPEG", exif=exif),
        "turned.png": saved(turned, "PNG", exif=exif),
    }


def test_unusual_images_go_all_the_way(tmp_path: Path) -> None:
    names = unusual()
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    report = import_dataset("jsonl", out=tmp_path / "out", **lines(tmp_path, list(names)))
    assert report.samples == len(names)
    assert report.counts == {"kept: image rewritten as PNG": 1}  # the GIF
    assert collect(tmp_path / "out").samples == len(names)
    assert write_page(tmp_path / "out", tmp_path / "page.html") == len(names)
    stream = RegionStream(tmp_path / "out", 1, shuffle=False, prepare=lambda s: decode(s.image).getpixel((30, 20)))
    for name, batch in zip(names, stream, strict=True):
        wanted = (100, 100, 100) if name.startswith("deep") else (255, 0, 0)
        assert all(abs(a - b) < 6 for a, b in zip(batch.samples[0], wanted, strict=True)), name


def test_broken_images_are_counted_or_named_all_the_way(tmp_path: Path) -> None:
    for name, (data, _) in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.jpg").write_bytes(encoded())
    names = ["good.jpg", *BROKEN]
    report = import_dataset("jsonl", out=tmp_path / "out", skip_broken=True, **lines(tmp_path, names))
    assert report.counts == {"image broken": len(BROKEN)}
    with ShardWriter(tmp_path / "bad") as writer:  # by a program that does not look at images
        for i, (data, _) in enumerate(BROKEN.values()):
            writer.add(Record(f"b{i}", 64, 48, "s", regions=(Region((0, 0, 1, 1), "all"),)), data, "jpg")
    assert collect(tmp_path / "bad").samples == len(BROKEN)
    with pytest.raises(UserError, match=r"sample b\d: "):
        write_page(tmp_path / "bad", tmp_path / "page.html")

    def pixels(sample: Sample) -> Any:
        return decode(sample.image, name=sample.record.key)

    reading = RegionLoader(RegionStream(tmp_path / "bad", 2, shuffle=False, prepare=pixels, skip_broken=True))
    assert sum(batch.count for batch in reading) == 0
    assert [skip.sample for skip in reading.skipped] == list(range(len(BROKEN)))
    for skip, (_, text) in zip(reading.skipped, BROKEN.values(), strict=True):
        assert re.search(text, skip.reason)


def test_a_shard_cut_anywhere_is_named_by_all_who_read_it(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples=3) as writer:
        for number in range(6):
            writer.add(some_record(number), encoded(), "jpg")
    path = tmp_path / "000001.tar"
    whole = path.read_bytes()
    with Shard(path) as shard:
        place = shard.places[-1].record
    for size in range(0, place[0] + place[1], 256):  # behind it is only padding
        path.write_bytes(whole[:size])
        for read in (collect, lambda folder: list(shard_samples(folder)), lambda folder: list(RegionStream(folder, 4))):
            with pytest.raises(UserError, match=r"000001\.tar: [^\n]+$"):
                read(tmp_path)
        loader = RegionLoader(RegionStream(tmp_path, 4, skip_broken=True))
        assert sum(batch.count for batch in loader) == 3
        assert Counter(skip.shard for skip in loader.skipped) == {"000001.tar": 3}
        assert sorted(skip.sample for skip in loader.skipped) == [0, 1, 2]
    path.write_bytes(whole[: place[0] + 5])
    with pytest.raises(UserError, match=r"000001\.tar: cut short in 000005\.json"):
        collect(tmp_path)


def test_long_captions_stay_and_longer_ones_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded())
    longest, longer = "x" * MAX_CAPTION, "y " * MAX_CAPTION
    regions = [{"box": [0, 0, 1, 1], "caption": text} for text in (longest, longer, "short")]
    files = lines(tmp_path, ["a.jpg"], regions=regions, caption=longer)
    report = import_dataset("jsonl", out=tmp_path / "out", **files)
    assert report.counts == {"caption too long": 2}
    with Shard(tmp_path / "out" / "000000.tar") as shard:
        record = shard.record(0)
    assert record.caption is None
    assert [region.caption for region in record.regions] == [longest, "short"]
    stats = collect(tmp_path / "out")
    assert (stats.regions, stats.without_caption, stats.caption_words) == (2, 0, {1: 2})
    write_page(tmp_path / "out", tmp_path / "page.html")
    assert longest in (tmp_path / "page.html").read_text()


def test_a_report_that_is_none_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add(some_record(0), encoded(), "jpg")
    for content in (b"", b"\xff\xfe", b"[]", b'{"dropped": 3, "boxes_dropped": {}}'):
        (tmp_path / REPORT).write_bytes(content)
        with pytest.raises(UserError, match=r"report\.json: no report of an annotation: .*; annotate again, or delete"):
            collect(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add(some_record(0), encoded(), "jpg")
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(UserError, match=r"page\.html/a\.html: cannot be written: File exists; a page that was there"):
        write_page(tmp_path / "shards", page / "a.html")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("granvit.data.shards.os.fsync", full)
    with pytest.raises(UserError, match=r"page\.html: the disk is full; a page that was there before is as it was"):
        write_page(tmp_path / "shards", page)
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "shards"]


# The command with shards of five images.
IMPORT = """
import sys
from granvit.cli import main
sys.argv = ["granvit", "data", "import", "jsonl", "--samples-per-shard", "5", *sys.argv[1:]]
print("ready", flush=True)
main()
"""


def importing(folder: Path, out: Path, count: int) -> list[str]:
    if not (folder / "a.jpg").exists():
        (folder / "a.jpg").write_bytes(encoded(640, 480))
        lines(folder, ["a.jpg"] * count)
    options = ["--annotations", str(folder / "a.jsonl"), "--images", str(folder), "--out", str(out)]
    return [sys.executable, "-c", IMPORT, *options]


def test_a_killed_import_leaves_whole_shards_and_says_how_to_begin_anew(tmp_path: Path) -> None:
    out, count = tmp_path / "out", 2000
    command = importing(tmp_path, out, count)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (out / "000001.tar").exists():
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    verify(out)
    shards = read_index(out)
    assert shards
    assert all(info.samples == 5 for info in shards)
    there = sum(info.samples for info in shards)
    assert there < count
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == (
        f"granvit: {out}: holds {there} samples in {len(shards)} finished shards already; choose another folder, "
        "append to them (--append), or delete the folder to begin anew"
    )
    assert read_index(out) == shards
    shutil.rmtree(out)
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert sum(info.samples for info in read_index(out)) == count
    verify(out)


def test_an_import_onto_a_disk_that_ends_is_one_sentence(tmp_path: Path) -> None:
    command = importing(tmp_path, tmp_path / "out", 30)
    subprocess.run([*command[:-1], str(tmp_path / "whole")], capture_output=True, timeout=120, check=True)
    limit = read_index(tmp_path / "whole")[0].bytes - 1
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"granvit: {tmp_path / 'out'}: cannot be written: File too large; 0 samples in 0 finished shards are safe; "
        "make room and import again into an empty folder"
    )
    assert list((tmp_path / "out").iterdir()) == []


LATIN = "caf\xe9".encode("latin-1")


@pytest.mark.parametrize(
    ("format", "files", "options", "text"),
    [
        ("jsonl", {"a": b'{"image": "%s"}\n' % LATIN}, {"annotations": "a"}, r"a: line 1: no JSON: .*utf-8"),
        ("llava", {"a.jsonl": b'\n["%s"]' % LATIN}, {"annotations": "a.jsonl"}, r"a\.jsonl: line 2: no JSON: .*utf-8"),
        ("llava", {"a.json": b'[{"id": "%s"}]' % LATIN}, {"annotations": "a.json"}, r"a\.json: no JSON after 0 .*UTF"),
        (
            "coco",
            {"a": b'{"images": [], "categories": [{"id": 1, "name": "%s"}]}' % LATIN},
            {"instances": "a"},
            "a: no JSON after 0 elements of categories: .*UTF",
        ),
        (
            "refcoco",
            {"r.json": b'[{"split": "%s"}]' % LATIN, "i": b"{}"},
            {"refs": "r.json", "instances": "i", "split": "val"},
            r"r\.json: no JSON after 0 .*UTF",
        ),
        (
            "refcoco",
            {"r.p": b"\x80\x02](U\x04" + LATIN + b"e.", "i": b"{}"},
            {"refs": "r.p", "instances": "i", "split": "val"},
            r"r\.p: no pickle of refs: .*utf-8",
        ),
        (
            "visual-genome",
            {"d": b"[]", "i": b'[{"image_id": 1, "url": "%s"}]' % LATIN},
            {"descriptions": "d", "image_data": "i"},
            "i: no JSON after 0 .*UTF",
        ),
        ("flickr30k", {"1.txt": LATIN, "1.xml": None}, {}, r"1\.txt: .*utf-8"),
        (
            "flickr30k",
            {"1.txt": b"A dog .", "1.xml": b"<a>%s au lait</a>" % LATIN},
            {},
            r"1\.xml: no XML: not well-formed",
        ),
        (
            "flickr30k",
            {"1.txt": b"A dog .", "1.xml": b'<?xml version="1.0" encoding="klingon"?><a/>'},
            {},
            r"1\.xml: no XML: unknown encoding: klingon",
        ),
        (
            "llava",
            {"a.json": "\ufeff[]".encode()},
            {"annotations": "a.json"},
            r"a\.json: expected UTF-8 without a byte",
        ),
        ("llava", {"a.json": "[]".encode("utf-16")}, {"annotations": "a.json"}, r"a\.json: expected UTF-8 without a"),
    ],
)
def test_text_that_is_not_utf8_is_named(
    tmp_path: Path, format: str, files: dict[str, bytes | None], options: dict[str, str], text: str
) -> None:
    xml = b"<annotation><size><width>9</width><height>9</height></size></annotation>"
    for name, content in files.items():
        (tmp_path / name).write_bytes(xml if content is None else content)
    given: dict[str, Any] = {k: v if k == "split" else tmp_path / v for k, v in options.items()}
    if format == "flickr30k":
        given = {"sentences": tmp_path, "annotations": tmp_path}
    with pytest.raises(AnnotationError, match=text) as caught:
        import_dataset(format, out=tmp_path / "out", images=tmp_path, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "index.json").exists()


def test_half_a_character_in_a_conversation_is_named(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is at [0.1, 0.2, 0.3, 0.4]: \ud83d"}, {"from": "gpt", "value": "a dog"}]
    (tmp_path / "a.jpg").write_bytes(encoded())
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "7", "image": "a.jpg", "conversations": turns}))
    with pytest.raises(UserError, match="record 7-0: meta: expected what JSON in UTF-8 can hold"):
        import_dataset("llava", out=tmp_path / "out", annotations=tmp_path / "a.jsonl", images=tmp_path)
