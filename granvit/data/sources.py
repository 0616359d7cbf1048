"""Images by number, to train on and to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence

from granvit.errors import UserError

MAX_BROKEN = 0.01  # of the samples, where nobody says how many
_FROM = 1000  # samples that the share is taken of at least, so that chance decides nothing


class SourceError(UserError):
    """Something to train or to evaluate on that cannot be read; the text names it."""


class Broken:
    """Counts what cannot be read, and says when that is too much.

    A broken sample of a million is left out. More of them mean that the folder or the disk is what is wrong.

    Args:
        most: share of the samples that may be broken, at least 0 and less than 1; of 1,000 where fewer were wanted.

    Attributes:
        wanted: samples so far.
        count: of them that could not be read.
    """

    def __init__(self, most: float) -> None:
        if not 0 <= most < 1:
            raise SourceError(f"max_broken: expected a share of at least 0 and less than 1, got {most}")
        self._most = most
        self.wanted = self.count = 0

    def add(self, wanted: int, reasons: Sequence[str]) -> None:
        """More samples, and why some of them cannot be read.

        Raises:
            SourceError: it is too much.
        """
        self.wanted += wanted
        self.count += len(reasons)
        if reasons and self.count > self._most * max(self.wanted, _FROM):
            raise SourceError(
                f"{self.count} of {self.wanted} samples cannot be read, and max_broken allows {self._most:g} "
                f"(of {_FROM} or more); the last: {reasons[-1]}"
            )
