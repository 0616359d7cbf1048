"""Time, peak memory and agreement of two ways to compute the same thing."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from granvit import _memory
from granvit.errors import UserError


class AgreementError(UserError, RuntimeError):
    """The fused op and its stock counterpart gave different numbers."""


def relative_difference(ours: Tensor, stock: Tensor) -> float:
    """``|ours - stock| / |stock|`` in Euclidean norms; infinite where only one of them is zero."""
    ours, stock = ours.detach().double(), stock.detach().double()
    difference = (ours - stock).norm()
    return float(difference / stock.norm()) if difference else 0.0


def check_agreement(what: str, difference: float, limit: float) -> None:
    """Raises AgreementError where a relative difference is above its limit, or not a number."""
    if not difference <= limit:
        raise AgreementError(
            f"demo: {what}: granvit is off by {difference:.1e} of the size of the result, more than the "
            f"{limit:.1e} that rounding explains"
        )


def median_times(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way. They take turns, so that a slow spell of the machine does not fall on one alone."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def peak_memory(way: Callable[[], object], repeats: int = 3) -> float | None:
    """MiB by which the process grows at its peak while `way` runs, the median of several runs; None off Linux."""
    if _memory.unavailable() is not None:
        return None
    way()
    return statistics.median(_memory.peak_growth(way) for _ in range(repeats)) / 2**20


def describe_cpu() -> str:
    """Architecture, vector instructions in use and number of threads."""
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {vectors}, {threads} thread{'s' if threads > 1 else ''}"
