"""What was done since the last line of the log, and how fast."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from granvit.train.data import Loaded


class Tally:
    """Counts of one rank, and the time that training took.

    Args:
        device: of the rank.
        ranks: that do the same.
        peak: FLOP/s of a device at the best; None where it is not known.
    """

    def __init__(self, device: torch.device, ranks: int, peak: float | None) -> None:
        self._device, self._ranks, self._peak = device, ranks, peak
        self.restart()

    def restart(self) -> None:
        """Begins to count."""
        self._counts, self._flops, self._began = Counter[str](), 0.0, time.perf_counter()

    @property
    def steps(self) -> int:
        """So far; at least 1, as a divisor."""
        return max(self._counts["steps"], 1)

    @property
    def skipped(self) -> int:
        """Samples of all ranks that could not be read."""
        return self._counts["skipped"]

    def add_step(self) -> None:
        """One step more."""
        self._counts["steps"] += 1

    def add(self, loaded: Loaded, flops: float) -> None:
        """One micro-batch more, and what it needs."""
        self._counts["images"] += loaded.images
        if loaded.batch is not None:
            self._counts["tokens"] += int((loaded.batch.image >= 0).sum())
            self._counts.update({f"dropped: {reason}": count for reason, count in loaded.batch.dropped.items()})
        self._flops += flops

    def add_skipped(self, count: int) -> None:
        """Samples of all ranks that could not be read."""
        self._counts["skipped"] += count

    @contextmanager
    def pause(self) -> Iterator[None]:
        """While it is entered, time is not that of training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain numbers."""
        return {"counts": dict(self._counts), "flops": self._flops, "seconds": time.perf_counter() - self._began}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state` gave."""
        self._counts, self._flops = Counter(state["counts"]), state["flops"]
        self._began = time.perf_counter() - state["seconds"]

    def rates(self) -> dict[str, float]:
        """For the log: images and tokens a second of all ranks together, TFLOP/s and memory of a device, the share of
        its peak where that is known, and what was left out of the data, if anything."""
        seconds = time.perf_counter() - self._began
        found = {f"{name}_per_second": self._ranks * self._counts[name] / seconds for name in ("images", "tokens")}
        found["step_seconds"] = seconds / self.steps
        found["tflops"] = self._flops / seconds / 1e12
        if self._peak is not None:
            found["mfu"] = self._flops / seconds / self._peak
        if self._device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        else:
            found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
        lost = {name: count for name, count in self._counts.items() if name.startswith(("dropped", "skipped"))}
        return found | {name: float(count) for name, count in lost.items() if count}
