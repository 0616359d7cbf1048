"""The cases of a benchmark run, read back from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OURS = "granvit"
SWEEPS = {"boxes": "boxes", "grid": "grid side, tokens"}


@dataclass(frozen=True)
class Row:
    """All samples of one provider on one case.

    Attributes:
        seconds: every sample.
        facts: what the suite noted beside them (`extra_info`).
    """

    seconds: tuple[float, ...]
    facts: dict[str, Any]

    @property
    def op(self) -> str:
        """Name of the op."""
        return str(self.facts["op"])

    @property
    def provider(self) -> str:
        """``"granvit"``, one of its implementations (``"granvit_cuda"``) or the name of a peer."""
        return str(self.facts["provider"])

    @property
    def stock(self) -> bool:
        """Whether it is a peer."""
        return bool(self.facts["stock"])

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return statistics.median(self.seconds)

    @property
    def replay(self) -> float | None:
        """Median of the samples of a CUDA graph's replay, in seconds."""
        samples = self.facts["graph_replay_seconds"]
        return statistics.median(samples) if samples else None

    @property
    def match(self) -> bool:
        """Whether results and gradients agree with the float64 reference."""
        return bool(self.facts["match"])

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What providers are compared within: op, workload, dtype, mode."""
        return (self.op, self.facts["workload"], self.facts["dtype"], self.facts["mode"])

    def sweep(self) -> tuple[str, int] | None:
        """The sweep's name and the value on its axis, for a case of a sweep."""
        name, _, value = self.facts["workload"].partition(".")
        return (name, int(value)) if name in SWEEPS and value.isdigit() else None


def rows(report: dict[str, Any]) -> list[Row]:
    """The cases of a run's JSON, the samples of all passes together."""
    samples: dict[tuple[str, ...], list[float]] = {}
    facts: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        key = (info["op"], info["workload"], info["dtype"], info["mode"], info["provider"])
        samples.setdefault(key, []).extend(entry["stats"]["data"])
        facts.setdefault(key, info)
    return [Row(tuple(samples[key]), facts[key]) for key in samples]


def groups(cases: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Cases by what they compute, then by provider."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in cases:
        found.setdefault(row.group, {})[row.provider] = row
    return found


def best_stock(group: dict[str, Row]) -> Row | None:
    """The fastest peer whose results are right."""
    peers = [row for row in group.values() if row.stock and row.match]
    return min(peers, key=lambda row: row.median, default=None)


def speedup(group: dict[str, Row], peer: Row | None) -> float | None:
    """How many times as fast as `peer` ours is; None unless both gave the right results."""
    ours = group.get(OURS)
    if ours is None or peer is None or not ours.match or not peer.match:
        return None
    return peer.median / ours.median
