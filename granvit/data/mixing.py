"""An epoch over several sources, mixed by weight: which sample stands at any position, without playing the others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from granvit.errors import UserError

_ROUNDS = 6  # of the Feistel network; four make it a good permutation, two more are for tiny ranges


class MixtureError(UserError):
    """Sizes or weights that make no mixture."""


class Mixture:
    """A deterministic order of (source, sample) for every epoch.

    A pseudo-random permutation of the positions gives each position a place; each source owns a range of places in
    proportion to its weight, so an epoch holds exactly its share of every source, well shuffled. Where in its range a
    place lies tells which draw of the source it is. Draws go through the samples of a source in one random order after
    the other and go on over the epochs: after any number of whole epochs no sample was used more than once oftener than
    another of its source.

    Args:
        sizes: samples in each source.
        weights: how often each is drawn, relative to the others; by default as often as it has samples.
        length: positions in an epoch; by default all samples of all sources together.
        seed: of the order.

    Attributes:
        shares: positions of each source in an epoch; their sum is the length.

    Raises:
        MixtureError: lists of different lengths, nothing to draw, a weight that is negative or not finite, or a source
            that is to be drawn from and has no samples.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, length: int | None = None, seed: int = 0
    ) -> None:
        weights = [float(w) for w in (sizes if weights is None else weights)]
        length = sum(sizes) if length is None else length
        if len(sizes) != len(weights):
            raise MixtureError(f"mixture: weights: expected one for each of {len(sizes)} sources, got {len(weights)}")
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if not (math.isfinite(weight) and weight >= 0):
                raise MixtureError(f"mixture: weights[{i}]: expected a finite number of at least 0, got {weight}")
            if size < 0 or (size == 0 and weight > 0):
                raise MixtureError(f"mixture: sizes[{i}]: expected samples to draw with weight {weight}, got {size}")
        if not sum(weights) > 0:
            raise MixtureError("mixture: weights: expected at least one above 0")
        if not 1 <= length < 1 << 62:
            raise MixtureError(f"mixture: length: expected at least 1 and less than 2^62, got {length}")
        self.sizes, self.seed = tuple(sizes), seed
        self.shares = tuple(_apportion(length, weights))

    def __len__(self) -> int:
        return sum(self.shares)

    def positions(self, epoch: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """What stands from `start` to before `stop`; takes time for these positions only.

        Args:
            epoch: from 0.
            start: first position.
            stop: end of the positions, by default of the epoch.

        Returns:
            source ``(n,)`` and sample in it ``(n,)``, int64.

        Raises:
            MixtureError: positions that the epoch does not have.
        """
        stop = len(self) if stop is None else stop
        if epoch < 0 or not 0 <= start <= stop <= len(self):
            raise MixtureError(
                f"mixture: expected an epoch of at least 0 and 0 <= start <= stop <= {len(self)}, "
                f"got epoch {epoch}, start {start}, stop {stop}"
            )
        places = _permute(torch.arange(start, stop), len(self), self._key("epoch", epoch).expand(stop - start))
        ends = torch.tensor(self.shares).cumsum(0)
        source = torch.bucketize(places, ends, right=True)
        sample = torch.empty_like(source)
        for i, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            mine = source == i
            draws = places[mine] - (ends[i] - share) + epoch * share
            if draws.numel():
                keys = _mix(self._key("source", i) + draws // size)
                sample[mine] = _permute(draws % size, size, keys)
        return source, sample

    def _key(self, *parts: object) -> Tensor:
        digest = hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=8).digest()
        return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _apportion(length: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of a length in proportion to weights, by largest remainders; the first of equal ones wins."""
    exact = [length * Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted((i for i, w in enumerate(weights) if w > 0), key=lambda i: shares[i] - exact[i])
    for turn in range(length - sum(shares)):
        shares[by_remainder[turn % len(by_remainder)]] += 1
    return shares


def _permute(values: Tensor, size: int, keys: Tensor) -> Tensor:
    """Where a pseudo-random permutation of ``range(size)`` sends each value; the permutation is the one of its key.

    A Feistel network permutes the next power of two; a value that it sends outside the range is sent on until it is
    back inside, which less than two turns do on average.
    """
    bits = max(1, (size - 1).bit_length())
    right_bits = bits // 2
    masks = (1 << right_bits) - 1, (1 << (bits - right_bits)) - 1
    moved = values.clone()
    outside = torch.arange(values.numel())
    while outside.numel():
        value, key = moved[outside], keys[outside]
        right, left = value & masks[0], value >> right_bits
        for turn in range(_ROUNDS):
            left = left ^ (_mix(key + right * 2 * _ROUNDS + 2 * turn) & masks[1])
            right = right ^ (_mix(key + left * 2 * _ROUNDS + 2 * turn + 1) & masks[0])
        moved[outside] = value = (left << right_bits) | right
        outside = outside[value >= size]
    return moved


def _mix(x: Tensor) -> Tensor:
    """A 64-bit hash of each int64; products wrap around."""
    for multiplier, shift in ((-0x61C8864680B583EB, 32), (-0x4B47D0C5A1A6F1CB, 29), (0x165667B19E3779F9, 32)):
        x = x * multiplier
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # a logical shift: torch's keeps the sign
    return x
