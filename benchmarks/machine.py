"""What this machine can do at most, and what it is: measured once a run, because floors and per cents stand on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

import granvit
from granvit import _memory

LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # of others: taken before anything runs


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; the CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_time(function: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Seconds of the fastest of several calls."""
    function()
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    count = (1 << 30) if device.type == "cuda" else (1 << 28)  # well beyond the last cache
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / best_time(lambda: target.copy_(source), device, 8)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matmul."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / best_time(lambda: a @ a, device, 4)


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and what runs the kernels, for the JSON of a run."""
    core = granvit.EXTENSION.core
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "granvit": granvit.__version__,
        "threads": torch.get_num_threads(),
        "load": LOAD,
        "isa": core.cpu_isa() if core is not None else None,
        "core": granvit.EXTENSION.core_reason or "loaded",
    }


class PeakMemory:
    """The most memory that a call holds beyond what was held before it.

    On a GPU the caching allocator counts; on the CPU :func:`granvit._memory.peak_growth`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def unavailable(self) -> str | None:
        """Why it cannot be measured here, or None."""
        return None if self.device.type == "cuda" else _memory.unavailable()

    def of(self, function: Callable[[], Any]) -> int:
        """Bytes, its results included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            function()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        return _memory.peak_growth(function)
