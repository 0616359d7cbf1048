"""From a dataset's files to shards, through the function and through the command."""

from __future__ import annotations

import inspect
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

from granvit.data.images import ImageError
from granvit.data.importers import FORMATS, AnnotationError, ImportReport, import_dataset
from granvit.data.importers.cli import app
from granvit.data.record import Record, RecordError
from granvit.data.shards import Shard, ShardError, read_index, verify
from tests.data.importers.support import image, written
from tests.data.support import encoded

REGIONS = [{"box": [0.0, 0.0, 0.5, 1.0], "caption": "left"}]


def lines(tmp_path: Path, names: list[str], **change: Any) -> dict[str, Path]:
    plain = [
        {
            "key": f"k{i}",
            "width": 64,
            "height": 48,
            "source": "s",
            "kind": "natural",
            "regions": REGIONS,
            "image": name,
            **change,
        }
        for i, name in enumerate(names)
    ]
    return {"annotations": written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, plain))), "images": tmp_path}


def shards(folder: Path) -> list[tuple[Record, bytes, str]]:
    verify(folder)
    return [sample for info in read_index(folder) for sample in Shard(folder / info.name)]


def test_shards_hold_the_images_as_they_were(tmp_path: Path) -> None:
    files = [f"{i}.{form}" for i, form in enumerate(("jpg", "png", "webp", "jpg", "jpg"))]
    for i, name in enumerate(files):
        form = {"jpg": "JPEG"}.get(name[2:], name[2:].upper())
        image(tmp_path / name, color=(i, 0, 0), form=form)
    seen = []
    report = import_dataset(
        "jsonl",
        out=tmp_path / "out",
        samples_per_shard=2,
        progress=lambda r: seen.append((r.samples, r.regions)),
        **lines(tmp_path, files),
    )
    assert report == ImportReport(samples=5, regions=5)
    assert seen == [(i, i) for i in range(1, 6)]
    assert [info.samples for info in read_index(tmp_path / "out")] == [2, 2, 1]
    for i, (record, data, extension) in enumerate(shards(tmp_path / "out")):
        assert (record.key, record.regions[0].caption) == (f"k{i}", "left")
        assert data == (tmp_path / files[i]).read_bytes()
        assert extension == files[i][2:]


def test_names_and_foreign_formats_do_not_matter(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", form="PNG")
    image(tmp_path / "b.dat", form="GIF")
    report = import_dataset("jsonl", out=tmp_path / "out", **lines(tmp_path, ["a.jpg", "b.dat"]))
    assert report.counts == {"kept: image rewritten as PNG": 1}
    (_, first, extension), (_, second, other) = shards(tmp_path / "out")
    assert (extension, other) == ("png", "png")
    assert first == (tmp_path / "a.jpg").read_bytes()
    with Image.open(io.BytesIO(second)) as png, Image.open(tmp_path / "b.dat") as gif:
        assert (png.format, png.tobytes()) == ("PNG", gif.convert("RGB").tobytes())


def test_images_are_missing_or_broken_aloud(tmp_path: Path) -> None:
    image(tmp_path / "good.jpg")
    whole = encoded(300, 300, form="PNG")
    written(tmp_path / "cut.png", whole[: len(whole) - 30])
    written(tmp_path / "page.jpg", "<html>")
    written(tmp_path / "none.jpg", b"")
    image(tmp_path / "other.jpg", 48, 64)
    errors = {
        "gone.jpg": "No such file or directory",
        "cut.png": "broken or cut short",
        "page.jpg": "no image",
        "none.jpg": "the file is empty",
        "other.jpg": "is 48 x 64 pixels as it is shown, and was annotated at 64 x 48",
    }
    for number, (name, text) in enumerate(errors.items()):
        with pytest.raises(ImageError, match=f"{name}: {text}"):
            import_dataset("jsonl", out=tmp_path / f"out{number}", **lines(tmp_path, ["good.jpg", name]))
    names = ["gone.jpg", "cut.png", "good.jpg", "page.jpg", "none.jpg", "other.jpg"]
    report = import_dataset("jsonl", out=tmp_path / "out", skip_broken=True, **lines(tmp_path, names))
    assert (report.samples, report.regions) == (1, 1)
    assert report.counts == {"image missing": 1, "image broken": 3, "image of another shape": 1}
    assert [record.key for record, _, _ in shards(tmp_path / "out")] == ["k2"]


def test_the_size_is_that_of_the_image_as_it_is_shown(tmp_path: Path) -> None:
    image(tmp_path / "copy.jpg", 32, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "turned.jpg", exif=exif)  # shown as 64 x 48
    files = lines(tmp_path, ["copy.jpg", "turned.jpg"])
    report = import_dataset("jsonl", out=tmp_path / "out", **files)
    assert report.counts == {"kept: image of another size": 1}
    assert [(r.width, r.height) for r, _, _ in shards(tmp_path / "out")] == [(32, 24), (64, 48)]
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(ImageError, match=r"turned\.jpg: is 48 x 64 pixels as it is shown"):
        import_dataset("jsonl", out=tmp_path / "again", **files)


def test_sizes_that_annotations_do_not_tell_are_read(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", 77, 33)
    turns = [
        {"from": "human", "value": "<image>\nDescribe the region [0.1, 0.2, 0.3, 0.4]."},
        {"from": "gpt", "value": "a dog"},
    ]
    annotations = written(tmp_path / "a.json", [{"id": "1", "image": "a.jpg", "conversations": turns}])
    import_dataset("llava", out=tmp_path / "out", annotations=annotations, images=tmp_path)
    ((record, _, _),) = shards(tmp_path / "out")
    assert (record.width, record.height, record.key) == (77, 33, "1-0")
    assert (record.regions[0].box, record.regions[0].caption) == ((0.1, 0.2, 0.3, 0.4), "a dog")
    assert record.meta["conversations"] == turns


def test_nothing_to_import_is_an_error(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    with pytest.raises(
        AnnotationError, match="jsonl: found nothing to import; left out: image of which nothing is told: 2"
    ):
        import_dataset("jsonl", out=tmp_path / "out", **lines(tmp_path, ["a.jpg", "a.jpg"], regions=[]))
    with pytest.raises(AnnotationError, match="found nothing to import; left out: image missing: 1"):
        import_dataset("jsonl", out=tmp_path / "out", skip_broken=True, **lines(tmp_path, ["b.jpg"]))
    assert not (tmp_path / "out/index.json").exists()


def test_limit_and_append(tmp_path: Path) -> None:
    for i in range(5):
        image(tmp_path / f"{i}.jpg")
    files = lines(tmp_path, [f"{i}.jpg" for i in range(5)])
    assert import_dataset("jsonl", out=tmp_path / "out", limit=3, **files).samples == 3
    with pytest.raises(ShardError, match="holds 3 samples in 1 finished shards already; choose"):
        import_dataset("jsonl", out=tmp_path / "out", **files)
    import_dataset("jsonl", out=tmp_path / "out", append=True, **files)
    assert [info.samples for info in read_index(tmp_path / "out")] == [3, 5]
    twice = lines(tmp_path, ["0.jpg", "1.jpg"], key="same")
    with pytest.raises(RecordError, match="record same: key: this shard holds it already"):
        import_dataset("jsonl", out=tmp_path / "twice", **twice)


def test_wrong_formats_and_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="format: expected one of coco, refcoco, visual-genome, flickr30k, llava"):
        import_dataset("voc", out=tmp_path / "out")
    with pytest.raises(AnnotationError, match="coco: missing a required argument: 'instances'"):
        import_dataset("coco", out=tmp_path / "out", images=tmp_path)
    with pytest.raises(AnnotationError, match="jsonl: got an unexpected keyword argument 'colour'"):
        import_dataset("jsonl", out=tmp_path / "out", annotations=tmp_path, images=tmp_path, colour=3)
    assert not (tmp_path / "out").exists()


def granvit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "granvit.cli", "data", "import", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_writes_shards_and_prints_counts(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    boxes = [[0, 0, 32, 48], [5, 5, 0, 5]]
    content = {
        "images": [{"id": i, "file_name": f"{'ab'[i]}.jpg", "width": 64, "height": 48} for i in range(2)],
        "annotations": [{"id": i, "image_id": 0, "bbox": box, "category_id": 1} for i, box in enumerate(boxes)]
        + [{"id": 9, "image_id": 1, "bbox": boxes[0], "category_id": 1}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path = written(tmp_path / "instances.json", content)
    options = ("--instances", path, "--images", tmp_path, "--out", tmp_path / "out")
    failed = granvit("coco", *options)
    assert failed.returncode == 1
    assert failed.stderr.strip().endswith("b.jpg: No such file or directory")
    assert "Traceback" not in failed.stderr
    done = granvit("coco", *options, "--skip-broken")
    assert done.returncode == 0, done.stderr
    counts = [line.split("│")[1:3] for line in done.stdout.splitlines() if line.startswith("│")]
    assert {name.strip(): int(count) for name, count in counts} == {
        "images written": 1,
        "regions written": 1,
        "left out: box without area": 1,
        "left out: image missing": 1,
    }
    ((record, _, _),) = shards(tmp_path / "out")
    assert (record.key, record.regions[0].caption) == ("a", "dog")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_a_command(format: str) -> None:
    command = get_command(app).commands[format]
    offered = {parameter.name for parameter in command.params}
    needed = {name for name, p in inspect.signature(FORMATS[format]).parameters.items() if p.default is p.empty}
    assert needed - {"drops"} <= offered
    allowed = set(inspect.signature(FORMATS[format]).parameters) | set(inspect.signature(import_dataset).parameters)
    assert offered - allowed == set()
