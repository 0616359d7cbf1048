"""How much memory a call needs on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def unavailable() -> str | None:
    """Why peak memory cannot be measured here, or None."""
    if not (_PROCESS / "clear_refs").exists():
        return "peak memory is read from /proc, which this system does not have"
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return "freed memory cannot be handed back to the system with this C library"
    return None


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the process grows at its peak while `function` runs, its results included.

    The kernel's own high-water mark of resident memory sees everything: tensors, and the working memory that kernels,
    ours included, take without torch's allocator. torch's profiler sees tensors alone. Good to about a MiB.

    Raises:
        RuntimeError: it cannot be measured here, see :func:`unavailable`.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    # Pages that the C library kept from earlier calls would be reused, and so not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5")  # the high-water mark restarts from what is resident now
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_PROCESS}/status has no {key}")
