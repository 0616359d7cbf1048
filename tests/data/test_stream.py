"""RegionStream: the same samples whatever the workers and wherever a run stops, and no silence about broken ones."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from granvit.data.shards import Shard, ShardError, ShardWriter, read_index
from granvit.data.stream import RegionLoader, RegionStream, Sample
from granvit.errors import UserError
from tests.data.support import encoded, some_record

COUNT = 53


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples=7) as writer:
        for number in range(COUNT):
            writer.add(some_record(number), encoded(), "jpg")
    return folder


def number_of(sample: Sample) -> int:
    return int(sample.record.key)


def loader(folder: Path, workers: int = 0, **options: Any) -> RegionLoader:
    options = {"batch_size": 4, "seed": 5, "window": 3, "prepare": number_of, **options}
    return RegionLoader(RegionStream(folder, options.pop("batch_size"), **options), workers)


def numbers(batches: Iterator[Any] | RegionLoader) -> list[list[int]]:
    return [batch.samples for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_holds_every_sample_once(shards: Path, shuffle: bool) -> None:
    read = flat(numbers(loader(shards, shuffle=shuffle)))
    assert sorted(read) == list(range(COUNT))
    assert (read == list(range(COUNT))) is not shuffle


def test_epochs_and_seeds_differ_and_repeat(shards: Path) -> None:
    one = loader(shards)
    epochs = [numbers(one) for _ in range(2)]
    assert epochs[0] != epochs[1]
    again = loader(shards)
    assert [numbers(again) for _ in range(2)] == epochs
    assert numbers(loader(shards, seed=6)) != epochs[0]


def test_samples_mix_over_a_window_of_shards(shards: Path) -> None:
    read = flat(numbers(loader(shards, window=2)))
    # Two shards of 7 at a time: samples of both, and of no other, among the first 14.
    assert len({number // 7 for number in read[:14]} | {7}) <= 3
    assert [number // 7 for number in read[:14]] != sorted(number // 7 for number in read[:14])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(shards: Path, workers: int) -> None:
    assert numbers(loader(shards, workers)) == numbers(loader(shards))


def test_ranks_share_an_epoch(shards: Path) -> None:
    parts = [flat(numbers(loader(shards, rank=rank, world_size=3))) for rank in range(3)]
    assert sorted(flat(parts)) == list(range(COUNT))
    whole = flat(numbers(loader(shards)))
    assert parts == [whole[rank::3] for rank in range(3)]
    same = [numbers(loader(shards, rank=rank, world_size=3, drop_last=True)) for rank in range(3)]
    assert [len(batches) for batches in same] == [COUNT // 3 // 4] * 3
    assert all(len(batch) == 4 for batches in same for batch in batches)


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_two_ranks_with_two_workers_resume_with_exactly_what_is_left(shards: Path, stop: int) -> None:
    """Stopped in the middle of an epoch, with batches that workers hold ready, through a checkpoint on disk."""
    seen = []
    for rank in range(2):
        options = {"rank": rank, "world_size": 2}
        uninterrupted = loader(shards, 2, **options)
        expected = [numbers(uninterrupted) for _ in range(2)]
        first = loader(shards, 2, **options)
        before = []
        batches = iter(first)
        for _ in range(stop):
            before.append(next(batches).samples)
        saved = pickle.dumps(first.state_dict())
        del batches
        second = loader(shards, 2, **options)
        second.load_state_dict(pickle.loads(saved))
        assert len(second) == len(expected[0]) - stop
        after = numbers(second)
        assert before + after == expected[0]
        assert numbers(second) == expected[1]
        seen += flat(before + after)
    assert Counter(seen) == Counter(range(COUNT))


def test_another_order_cannot_be_resumed(shards: Path, tmp_path: Path) -> None:
    state = loader(shards).state_dict()
    for change in ({"seed": 6}, {"batch_size": 5}, {"world_size": 2}, {"window": 4}, {"shuffle": False}):
        with pytest.raises(UserError, match=f"cannot resume the data: {next(iter(change))} differ"):
            loader(shards, **change).load_state_dict(state)
    with ShardWriter(tmp_path, samples=7) as writer:
        writer.add(some_record(1), encoded(), "jpg")
    with pytest.raises(UserError, match="cannot resume the data: shards differ"):
        loader(tmp_path).load_state_dict(state)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sizes_windows_and_ranks(tmp_path: Path, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    infos = [{"name": f"{i}.tar", "samples": n, "regions": 0, "bytes": 0, "sha256": ""} for i, n in enumerate(sizes)]
    (tmp_path / "index.json").write_text(json.dumps({"format": "granvit shards 1", "shards": infos}))
    world, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    options = {"shuffle": data.draw(st.booleans()), "window": data.draw(st.integers(1, 4)), "world_size": world}
    epoch = data.draw(st.integers(0, 3))
    places = []
    for rank in range(world):
        stream = RegionStream(tmp_path, batch, rank=rank, **options)
        stream.epoch = epoch
        places += [place for number in range(len(stream)) for place in stream.places(number)]
    assert sorted(places) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@pytest.fixture
def broken(shards: Path, tmp_path: Path) -> Path:
    """One shard is cut short, one is missing, one sample of another has a record that is no JSON."""
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "000001.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "000004.tar").unlink()
    path = tmp_path / "000002.tar"
    with Shard(path) as shard:
        offset, _ = shard.places[3].record
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_shards_and_samples_are_errors(broken: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*0000(01|02|04)\.tar: [^\n]+$"):
        numbers(loader(broken, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_or_they_are_skipped_and_named(broken: Path, workers: int) -> None:
    reading = loader(broken, workers, skip_broken=True)
    read = flat(numbers(reading))
    assert sorted(read) == [n for n in range(COUNT) if n // 7 not in (1, 4) and n != 17]
    assert Counter(skip.shard for skip in reading.skipped) == {"000001.tar": 7, "000004.tar": 7, "000002.tar": 1}
    (lonely,) = (skip for skip in reading.skipped if skip.shard == "000002.tar")
    assert lonely.sample == 3
    assert "000002.tar: 000017: expected JSON" in lonely.reason


def test_a_shard_that_is_not_what_the_index_says(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    last = read_index(shards)[-1].name
    (tmp_path / "000000.tar").write_bytes((shards / last).read_bytes())
    with pytest.raises(ShardError, match=r"000000.tar: holds 4 samples, and 7 by the index"):
        numbers(loader(tmp_path))


def test_settings_that_make_no_sense(shards: Path) -> None:
    for wrong in ({"batch_size": 0}, {"window": 0}, {"rank": 1}, {"rank": -1}):
        with pytest.raises(ValueError, match="RegionStream: expected batch_size and window of at least 1"):
            loader(shards, **wrong)
