"""Time, peak memory and agreement of two ways to compute the same thing."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

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
            f"quickstart: {what}: granvit is off by {difference:.1e} of the size of the result, more than the "
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
    """MiB by which the process grows at its peak while `way` runs; None where the system cannot tell (not Linux).

    The kernel's own high-water mark of resident memory sees everything: tensors, and the working memory that kernels,
    ours included, take without torch's allocator. torch's profiler sees tensors alone. Freed heap memory is handed back
    to the system first, or its reuse would hide what is needed. Good to about a MiB.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    way()
    grown = []
    for _ in range(repeats):
        trim(0)
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the high-water mark restarts from what is resident now
        except OSError:
            return None
        before = _resident("VmRSS")
        way()
        grown.append(_resident("VmHWM") - before)
    return statistics.median(grown)


def _resident(field: str) -> float:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def describe_cpu() -> str:
    """Architecture, vector instructions in use and number of threads."""
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {vectors}, {threads} thread{'s' if threads > 1 else ''}"
