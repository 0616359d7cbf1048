"""Packing of variable-length sequences, so that a batch of crops or of answers pads little."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from granvit._extension import EXTENSION


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs sequences into bins of one capacity by best fit, longest first (Johnson et al. 1974).

    Uses at most 11/9 of the fewest possible bins, plus one. Runs in C++ where the extension is built (a million
    sequences a second) and gives the same bins without it.

    Args:
        lengths: tokens of every sequence, each 0 to `capacity`.
        capacity: tokens a bin holds.

    Returns:
        The bins in the order in which they were opened, each the ascending positions of its sequences.

    Raises:
        ValueError: the capacity is below 1, or a length is negative or above it.
    """
    lengths = [int(length) for length in lengths]
    core = EXTENSION.core
    bin_of = core.pack_sequences(lengths, capacity) if core is not None else _pack(lengths, capacity)
    bins: list[list[int]] = [[] for _ in range(max(bin_of, default=-1) + 1)]
    for position, index in enumerate(bin_of):
        bins[index].append(position)
    return bins


def _pack(lengths: list[int], capacity: int) -> list[int]:
    if capacity < 1:
        raise ValueError(f"pack: capacity: expected at least 1, got {capacity}")
    for position, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"pack: lengths: expected 0 to the capacity {capacity}, got {length} at position {position}"
            )
    room: list[tuple[int, int]] = []  # (free space, bin), ascending
    bin_of = [0] * len(lengths)
    bins = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = bisect.bisect_left(room, (lengths[position], -1))
        if fit == len(room):
            free, bin_of[position] = capacity, bins
            bins += 1
        else:
            free, bin_of[position] = room.pop(fit)
        bisect.insort(room, (free - lengths[position], bin_of[position]))
    return bin_of
