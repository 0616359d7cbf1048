"""Packing: nothing lost, nothing too full, few bins, the same with and without the extension."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import granvit
from granvit import packing

lengths_and_capacity = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(0, capacity), max_size=80), st.just(capacity))
)


@given(lengths_and_capacity)
def test_packs_everything_once_into_few_bins(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    bins = packing.pack(lengths, capacity)
    assert sorted(position for group in bins for position in group) == list(range(len(lengths)))
    loads = [sum(lengths[position] for position in group) for group in bins]
    assert all(load <= capacity for load in loads)
    fewest = max(math.ceil(sum(lengths) / capacity), sum(2 * length > capacity for length in lengths))
    # The bound of 11/9 + 1 is on the optimum, which is at least this; two bins at most half full never coexist.
    assert sum(2 * load <= capacity for load in loads) <= 1
    assert len(bins) >= fewest


def test_known_packing() -> None:
    # The longest first; 3 goes to the bin it fills, not to the emptier one.
    assert packing.pack([3, 5, 7, 4], 10) == [[0, 2], [1, 3]]
    assert packing.pack([], 10) == []


@given(lengths_and_capacity)
def test_python_and_cpp_agree(drawn: tuple[list[int], int]) -> None:
    core = granvit.EXTENSION.core
    assert core is not None, granvit.EXTENSION.core_reason
    assert core.pack_sequences(*drawn) == packing._pack(*drawn)


@pytest.mark.parametrize(
    ("lengths", "capacity", "text"),
    [
        ([1], 0, "pack: capacity: expected at least 1, got 0"),
        ([1, 11], 10, "pack: lengths: expected 0 to the capacity 10, got 11 at position 1"),
        ([-1], 10, "pack: lengths: expected 0 to the capacity 10, got -1 at position 0"),
    ],
)
def test_wrong_input(lengths: list[int], capacity: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        packing.pack(lengths, capacity)
    with pytest.raises(ValueError, match=text):
        packing._pack(lengths, capacity)
