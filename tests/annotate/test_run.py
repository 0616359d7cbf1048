"""Whole runs: what is written, and that stopping, killing and starting again changes nothing of it."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from granvit.annotate import AnnotationError, Detection, Filters, TextLine, annotate, engines, stages
from granvit.annotate.detectors import SelectiveSearchDetector
from granvit.annotate.inputs import list_images
from granvit.annotate.journal import JournalError
from granvit.annotate.stages import Plan
from granvit.cli import app
from granvit.data.record import Record, Region
from granvit.data.shards import Shard, read_index, verify
from tests.annotate.killed import SETTINGS
from tests.annotate.support import ROOT, FixedDetector, NumberCaptioner, SlowOCR, contents, make_images, page
from tests.annotate.test_inputs import BROKEN, encoded

DETECTOR = FixedDetector(
    (
        Detection((0.1, 0.1, 0.6, 0.6), 0.9, "cat"),
        Detection((0.1, 0.1, 0.6, 0.61), 0.8, "dog"),
        Detection((-0.1, 0.5, 0.5, 1.2), 0.7, "sofa"),
        Detection((0.4, 0.4, 0.5, 0.5), 0.9, "toy"),
        Detection((0.3, 0.3, 0.9, 0.9), 0.1, "ghost"),
    )
)


def samples(folder: Path) -> list[tuple[Record, bytes, str]]:
    verify(folder)
    return [sample for info in read_index(folder) for sample in Shard(folder / info.name)]


def test_natural_images_become_shards(tmp_path: Path) -> None:
    images = make_images(tmp_path / "in", 5, form="jpg")
    report = annotate([images], tmp_path / "out", detector=DETECTOR, captioner=NumberCaptioner(), shard_samples=2)
    written = samples(tmp_path / "out")
    assert [info.samples for info in read_index(tmp_path / "out")] == [2, 2, 1]
    assert [record.key for record, _, _ in written] == [f"{i:04d}" for i in range(5)]
    for number, (record, image, extension) in enumerate(written):
        assert image == (images / f"{number:04d}.jpg").read_bytes()
        assert extension == "jpg"
        assert record == Record(
            f"{number:04d}", 500, 460, "in", "natural", record.caption,
            (Region((0.1, 0.1, 0.6, 0.6), "box at 0.1", 0.9, "fixed"),),
            {"file": f"{number:04d}.jpg", "captioner": "numbers"},
        )  # fmt: skip
        assert record.caption is not None
        assert abs(int(record.caption.removeprefix("number ")) - number) <= 1  # of a JPEG
    dropped = Counter(duplicate=5, box_area=5, score=5, empty_caption=5)
    assert (report.images, report.samples, report.found, report.regions) == (5, 5, 25, 5)
    assert report.dropped == Counter()
    assert report.boxes_dropped == dropped
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert Counter({k: v for k, v in saved["boxes_dropped"].items() if v}) == dropped


def test_without_a_captioner_labels_are_captions(tmp_path: Path) -> None:
    annotate([make_images(tmp_path / "in", 1)], tmp_path / "out", detector=DETECTOR)
    ((record, _, _),) = samples(tmp_path / "out")
    assert [(region.caption, region.box) for region in record.regions] == [
        ("cat", (0.1, 0.1, 0.6, 0.6)),
        ("sofa", (0.0, 0.5, 0.5, 1.0)),  # cut at the image's edges
    ]
    assert record.caption is None


def test_images_of_every_kind(tmp_path: Path) -> None:
    """Broken ones are dropped with their reason, small and long ones counted, unusual ones shown as they should be."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (data, _) in BROKEN.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    for name, size in (("small.png", (448, 900)), ("long.png", (1500, 460))):
        Image.new("RGB", size, "teal").save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {
        "cmyk.jpg": encoded(Image.new("CMYK", (500, 460), (9, 9, 9, 9)), "JPEG"),
        "deep.png": encoded(Image.new("I;16", (500, 460), 9999), "PNG"),
        "moving.gif": encoded(
            Image.new("RGB", (500, 460), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (500, 460))]
        ),
        "turned.jpg": encoded(Image.new("RGB", (500, 460)), "JPEG", exif=exif),
    }
    for name, data in good.items():
        (folder / name).write_bytes(data)
    report = annotate([folder], tmp_path / "out", detector=DETECTOR, batch_size=3)
    broken = {name for name in BROKEN if not name.endswith(".eps")} | {"gone.jpg"}
    assert report.dropped == Counter(unreadable=len(broken), image_side=1, image_ratio=1)
    written = samples(tmp_path / "out")
    assert [record.meta["file"] for record, _, _ in written] == sorted(good)
    assert {record.meta["file"]: (record.width, record.height) for record, _, _ in written} == {
        **dict.fromkeys(good, (500, 460)),
        "turned.jpg": (460, 500),
    }
    assert [(extension, data == good[record.meta["file"]]) for record, data, extension in written] == [
        ("jpg", True),
        ("png", True),
        ("png", False),
        ("jpg", True),
    ]
    lines = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()[1:]
    entries = [entry for line in lines for entry in json.loads(line)["images"]]
    reasons = {entry["key"]: entry["detail"] for entry in entries if entry.get("dropped") == "unreadable"}
    assert len(reasons) == len(broken)
    assert all(str(folder) in reason for reason in reasons.values())
    assert "the file is empty" in reasons["empty"]


def test_an_image_without_regions_is_dropped(tmp_path: Path) -> None:
    images = make_images(tmp_path / "in", 3)
    report = annotate([images], tmp_path / "out", detector=SelectiveSearchDetector())
    assert report.dropped == Counter(no_regions=3)
    assert read_index(tmp_path / "out") == []


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.annotate.killed"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as process:
        assert line_of(process) == "ready"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def start(process: subprocess.Popen[str], **order: Any) -> int:
    """The pid of a run."""
    assert process.stdin is not None
    process.stdin.write(
        json.dumps({name: str(value) if name != "limit" else value for name, value in order.items()}) + "\n"
    )
    process.stdin.flush()
    return int(line_of(process))


def journalled(folder: Path) -> list[int]:
    """The numbers of the images in whole lines of a journal."""
    path = folder / "journal.jsonl"
    whole = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [int(entry["key"]) for line in whole for entry in json.loads(line)["images"]]


def test_killed_at_ten_moments_it_writes_what_an_unkilled_run_writes(
    tmp_path: Path, forks: subprocess.Popen[str]
) -> None:
    count, rng = 100, random.Random()
    images = make_images(tmp_path / "in", count)
    annotate([images], tmp_path / "whole", ocr=SlowOCR(log=os.devnull), **SETTINGS)
    expected = contents(tmp_path / "whole")
    out, log = tmp_path / "out", tmp_path / "log"
    states = []
    for _ in range(10):
        before = journalled(out)
        seen = log.stat().st_size if log.exists() else 0
        pid = start(forks, images=images, out=out, log=log)
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert line_of(forks) in ("ended -9", "ended 0")
        after = journalled(out)
        assert after[: len(before)] == before
        read = [int(line) for line in log.read_text()[seen:].split()] if log.exists() else []
        assert not set(read) & set(before), "an image was done again"
        assert set(after) - set(before) <= set(read), "an image was journalled that was not read"
        assert len(read) - (len(after) - len(before)) <= 2, "more than the batch at work was lost"
        states.append((len(after), len(list(out.glob("*.tar")))))
    assert any(0 < done < count for done, _ in states), f"no kill came while images were annotated: {states}"
    pid = start(forks, images=images, out=out, log=log)
    assert line_of(forks) == "ended 0"
    assert contents(out) == expected
    assert sorted(journalled(out)) == list(range(count))


def test_killed_while_shards_are_written(tmp_path: Path, forks: subprocess.Popen[str]) -> None:
    images = make_images(tmp_path / "in", 40)
    log = tmp_path / "log"
    start(forks, images=images, out=tmp_path / "whole", log=log)
    assert line_of(forks) == "ended 0"
    expected = contents(tmp_path / "whole")
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    log.unlink()
    out = tmp_path / "out"
    out.mkdir()
    (out / "journal.jsonl").write_bytes(journal)
    shards = []
    for delay in (0.02, 0.05, 0.08, 0.11):
        pid = start(forks, images=images, out=out, log=log)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        line_of(forks)
        shards.append(len(list(out.glob("*.tar"))))
    assert shards == sorted(shards)
    start(forks, images=images, out=out, log=log)
    assert line_of(forks) == "ended 0"
    assert contents(out) == expected
    assert (out / "journal.jsonl").read_bytes() == journal
    assert not log.exists(), "an image was read again"


def test_where_the_disk_ends_nothing_finished_is_lost(tmp_path: Path, forks: subprocess.Popen[str]) -> None:
    images, out, log = make_images(tmp_path / "in", 30), tmp_path / "out", tmp_path / "log"
    start(forks, images=images, out=out, log=log, limit=3000)
    message, code = line_of(forks), line_of(forks)
    assert code == "ended 1"
    done = journalled(out)
    assert 0 < len(done) < 30
    assert f"cannot be written: File too large; {len(done) // 2} finished batches are safe" in message
    start(forks, images=images, out=out, log=log)
    assert line_of(forks) == "ended 0"
    assert Counter(log.read_text().split()).most_common(1)[0][1] <= 2
    assert not {number for number in done if log.read_text().split().count(str(number)) > 1}
    start(forks, images=images, out=tmp_path / "whole", log=log)
    assert line_of(forks) == "ended 0"
    assert contents(out) == contents(tmp_path / "whole")


def test_other_images_settings_or_pixels_are_refused(tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "in", 4), tmp_path / "out"
    annotate([images], out, kind="ocr", ocr=SlowOCR())
    before = contents(out)
    assert annotate([images], out, kind="ocr", ocr=SlowOCR()).samples == 4  # there is nothing left to do
    assert contents(out) == before
    for change in ({"ocr": SlowOCR(name="other")}, {"filters": Filters(score=0.4)}, {"batch_size": 4}):
        with pytest.raises(JournalError, match="made with other settings"):
            annotate([images], out, **{"kind": "ocr", "ocr": SlowOCR(), **change})
    make_images(images, 5)
    with pytest.raises(JournalError, match="made with other settings .images: 4 there, 5 now"):
        annotate([images], out, kind="ocr", ocr=SlowOCR())
    (images / "0004.png").unlink()
    for name in ("000000.tar", "index.json"):
        (out / name).unlink()
    Image.new("RGB", (500, 460), "white").save(images / "0002.png")
    with pytest.raises(AnnotationError, match=r"0002\.png: was changed after it was annotated"):
        annotate([images], out, kind="ocr", ocr=SlowOCR())
    (out / "index.json").write_text("{}")
    (out / "journal.jsonl").unlink()
    with pytest.raises(AnnotationError, match="holds shards that no annotation made"):
        annotate([images], out, kind="ocr", ocr=SlowOCR())


class DeadlyOCR(SlowOCR):
    def read(self, images: Any) -> list[list[TextLine]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_worker_that_dies_is_a_sentence(tmp_path: Path) -> None:
    images = make_images(tmp_path / "in", 3)
    with pytest.raises(AnnotationError, match=r"a worker process died, .* at work were 0000.png, 0001.png, .*safe"):
        annotate([images], tmp_path / "out", ocr=DeadlyOCR(), workers=1, **SETTINGS)


WORKERS = """
import sys
from granvit.annotate import annotate
from tests.annotate.killed import SETTINGS
from tests.annotate.support import SlowOCR
if __name__ == "__main__":
    annotate([sys.argv[1]], sys.argv[2], ocr=SlowOCR(0.05), workers=2, **SETTINGS)
"""


def test_workers_end_with_a_killed_run_and_change_nothing(tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "in", 60), tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    command = [sys.executable, str(script), str(images), str(out)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while len(journalled(out)) < 30:
            assert process.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker goes on without its parent"
        time.sleep(0.05)
    assert 30 <= len(journalled(out)) < 60
    annotate([images], out, ocr=SlowOCR(), **SETTINGS)
    annotate([images], tmp_path / "alone", ocr=SlowOCR(), **SETTINGS)
    assert contents(out) == contents(tmp_path / "alone")


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ray_changes_nothing(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    images = make_images(tmp_path / "in", 23)
    (images / "broken.png").write_bytes(b"")
    annotate([images], tmp_path / "alone", detector=DETECTOR, captioner=NumberCaptioner(), batch_size=2)
    # A process that runs on the cluster finds the tests' annotators where this one does.
    ray.init(
        num_cpus=3, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        options: dict[str, Any] = {"engine": "ray", "workers": 1, "batch_size": 2}  # one for each step
        report = annotate([images], tmp_path / "ray", detector=DETECTOR, captioner=NumberCaptioner(), **options)
        with pytest.raises(AnnotationError, match="engine ray: 9 workers need 19 CPU, the cluster has 3"):
            annotate([images], tmp_path / "a", detector=DETECTOR, captioner=NumberCaptioner(), engine="ray", workers=9)
    finally:
        ray.shutdown()
    assert report.dropped == Counter(unreadable=1)
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")


class Wrong(FixedDetector):
    def detect(self, images: Any) -> list[list[Detection]]:
        return []


def test_an_error_passes_through_the_steps_on_ray(tmp_path: Path) -> None:
    plan = Plan("natural", Wrong(()))
    row = {"number": 4, "items": pickle.dumps(list_images([make_images(tmp_path / "in", 2)]))}
    for stage in (
        engines._RayStage(plan, [stages.read], first=True),
        engines._RayActor(engines._RayStage(plan, [stages.find])),
        engines._RayActor(engines._RayStage(plan, [stages.caption], last=True)),
    ):
        row = stage(row)
    assert row["number"] == 4
    with pytest.raises(AnnotationError, match="fixed: expected a result for each of 2 images, got 0"):
        engines._unpacked(row)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "scan"}, "kind: expected one of natural, ocr, got 'scan'"),
        ({}, "kind natural: expected a detector and no OCR"),
        ({"detector": DETECTOR, "ocr": SlowOCR()}, "kind natural: expected a detector and no OCR"),
        ({"kind": "ocr"}, "kind ocr: expected an OCR and neither detector nor captioner"),
        ({"kind": "ocr", "ocr": SlowOCR(), "detector": DETECTOR}, "kind ocr: expected an OCR and neither"),
        ({"detector": DETECTOR, "engine": "slurm"}, "engine: expected one of local, ray, got 'slurm'"),
        ({"detector": DETECTOR, "workers": -1}, "workers: expected at least 0, got -1"),
        ({"detector": DETECTOR, "engine": "ray"}, "workers: expected at least 1, got 0"),
        ({"detector": DETECTOR, "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"detector": object()}, "object: expected a dataclass, whose fields are the settings of an annotator"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(AnnotationError, match=text):
        annotate([make_images(tmp_path / "in", 1)], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    (tmp_path / "in").mkdir()
    page(["The first line", "And the second"])[0].save(tmp_path / "in" / "page.png")
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    command = ["data", "annotate", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--ocr", "rapidocr"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "unreadable" in result.output
    again = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (again["images"], again["samples"], again["dropped"]["unreadable"]) == (2, 1, 1)
    ((record, _, _),) = samples(tmp_path / "out")
    assert [region.caption for region in record.regions] == ["The first line", "And the second"]
    for wrong, text in (
        ("--detector", "expected selective-search"),
        ("--captioner", "vllm:MODEL"),
        ("--ocr", "rapidocr"),
    ):
        detector = ["--detector", "selective-search"] if wrong == "--captioner" else []
        failed = CliRunner().invoke(app, [*command[:5], *detector, wrong, "nobody"])
        assert failed.exit_code == 1
        assert text in str(failed.exception)
