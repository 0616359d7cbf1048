"""How many broken samples are too many."""

from __future__ import annotations

import pytest

from granvit.data.sources import Broken, SourceError


@pytest.mark.parametrize(
    ("most", "wanted", "allowed"), [(0.0, 4, 0), (0.01, 4, 10), (0.01, 1000, 10), (0.25, 6000, 1500)]
)
def test_the_share_is_of_a_thousand_samples_or_more(most: float, wanted: int, allowed: int) -> None:
    broken = Broken(most)
    broken.add(wanted, ["a.png: cut short"] * allowed)
    with pytest.raises(SourceError, match=rf"^{allowed + 1} of {wanted} samples cannot .* the last: b\.png: no image$"):
        broken.add(0, ["b.png: no image"])


def test_a_good_sample_ends_nothing() -> None:
    """As more of them lower the share."""
    broken = Broken(0.01)
    broken.add(1000, ["a"] * 10)
    for _ in range(100):
        broken.add(100, ["b"])
    assert (broken.wanted, broken.count) == (11_000, 110)
    with pytest.raises(SourceError, match="111 of 11000 samples cannot be read, and max_broken allows 0.01"):
        broken.add(0, ["c"])


@pytest.mark.parametrize("most", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(most: float) -> None:
    with pytest.raises(SourceError, match="max_broken: expected a share of at least 0 and less than 1"):
        Broken(most)
