"""Mixing sources: exact shares, even use, and any position at once."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from granvit.data.mixing import Mixture, MixtureError


def epoch_of(mixture: Mixture, epoch: int) -> list[tuple[int, int]]:
    source, sample = mixture.positions(epoch)
    return list(zip(source.tolist(), sample.tolist(), strict=True))


def test_without_weights_an_epoch_is_every_sample_once() -> None:
    mixture = Mixture([5, 1, 130, 17])
    everything = {(s, i) for s, n in enumerate((5, 1, 130, 17)) for i in range(n)}
    orders = [epoch_of(mixture, epoch) for epoch in range(4)]
    for order in orders:
        assert len(order) == len(mixture) == 153
        assert set(order) == everything
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 1000, 4097])
def test_shares_follow_the_weights_exactly(length: int) -> None:
    weights = [3.0, 0.5, 0.0, 1.5]
    mixture = Mixture([10, 7, 0, 1000], weights, length=length, seed=4)
    assert sum(mixture.shares) == length
    assert all(abs(s - length * w / 5) < 1 for s, w in zip(mixture.shares, weights, strict=True))
    counted = Counter(source for source, _ in epoch_of(mixture, 2))
    assert tuple(counted[s] for s in range(4)) == mixture.shares


def test_samples_of_a_source_are_used_evenly_over_all_epochs() -> None:
    sizes = (7, 40, 333)
    mixture = Mixture(sizes, [5, 3, 2], length=101)
    used: Counter[tuple[int, int]] = Counter()
    for epoch in range(23):
        used.update(epoch_of(mixture, epoch))
        for source, size in enumerate(sizes):
            counts = [used[source, i] for i in range(size)]
            assert max(counts) - min(counts) <= 1
    assert min(used[0, i] for i in range(7)) > 100  # so that the source went round many times


def test_any_position_stands_alone() -> None:
    mixture = Mixture([900, 50, 3000], [1, 1, 2], length=2500, seed=9)
    whole = epoch_of(mixture, 6)
    for start, stop in ((0, 1), (1234, 1300), (2499, 2500), (0, 2500), (77, 77)):
        source, sample = mixture.positions(6, start, stop)
        assert list(zip(source.tolist(), sample.tolist(), strict=True)) == whole[start:stop]
    assert epoch_of(Mixture([900, 50, 3000], [1, 1, 2], length=2500, seed=9), 6) == whole
    assert epoch_of(Mixture([900, 50, 3000], [1, 1, 2], length=2500, seed=10), 6) != whole


def test_the_order_is_written_down() -> None:
    """The same in every version and on every machine: a run that goes on elsewhere reads the same samples."""
    assert epoch_of(Mixture([4, 3], [2, 1], length=6, seed=1), 0) == [(1, 2), (0, 2), (1, 1), (0, 0), (0, 1), (0, 3)]


def test_positions_far_into_a_huge_epoch_cost_no_more() -> None:
    mixture = Mixture([29_510_000, 10**12, 10**15], [1, 1, 1], length=10**15)
    start = time.perf_counter()
    source, sample = mixture.positions(1000, 10**15 - 4096)
    assert time.perf_counter() - start < 2
    assert source.bincount().min() > 1000
    assert (sample < torch.tensor(mixture.sizes)[source]).all()
    assert sample[source == 2].unique().numel() == (source == 2).sum()


@pytest.mark.parametrize("size", [2, 3, 5, 8, 100, 1023])
def test_every_sample_comes_as_often_at_every_position(size: int) -> None:
    runs = 400
    seed = int(torch.randint(1 << 40, ()))
    firsts = torch.cat([Mixture([size], seed=seed + i).positions(0, 0, 1)[1] for i in range(runs)])
    # Chi-square with few classes; its mean is classes - 1 and its variance twice that.
    classes = min(size, 10)
    counts = (firsts * classes // size).bincount(minlength=classes).double()
    width = torch.tensor([len([x for x in range(size) if x * classes // size == c]) for c in range(classes)]).double()
    expected = runs * width / size
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < (classes - 1) + 6 * (2 * (classes - 1)) ** 0.5 + 20


def test_neighbours_in_the_order_are_no_neighbours_in_the_source() -> None:
    _, sample = Mixture([100_000], seed=int(torch.randint(1 << 40, ()))).positions(0)
    steps = sample.diff().abs().double()
    assert 32_000 < steps.mean() < 34_700  # a third of the range for independent draws
    following = torch.corrcoef(torch.stack([sample[:-1].double(), sample[1:].double()]))[0, 1]
    assert abs(following) < 0.02


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([3, 4], [1.0]), "weights: expected one for each of 2 sources, got 1"),
        (([3, 4], [1.0, -1.0]), r"weights\[1\]: expected a finite number of at least 0, got -1.0"),
        (([3, 4], [float("nan"), 1.0]), r"weights\[0\]: expected a finite number"),
        (([3, 0], [1.0, 1.0]), r"sizes\[1\]: expected samples to draw with weight 1.0, got 0"),
        (([3, 4], [0.0, 0.0]), "weights: expected at least one above 0"),
        (([], []), "weights: expected at least one above 0"),
    ],
)
def test_what_makes_no_mixture_is_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(MixtureError, match=text):
        Mixture(*arguments)


def test_positions_outside_the_epoch_are_refused() -> None:
    with pytest.raises(MixtureError, match="length: expected at least 1"):
        Mixture([3], length=0)
    for epoch, start, stop in ((0, 0, 4), (0, -1, 2), (0, 2, 1), (-1, 0, 1)):
        with pytest.raises(MixtureError, match=f"got epoch {epoch}, start {start}, stop {stop}"):
            Mixture([3]).positions(epoch, start, stop)
