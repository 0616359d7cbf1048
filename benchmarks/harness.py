"""Runs one provider on one workload: checks its results against float64, then measures its time and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import Floor
from benchmarks.machine import PeakMemory
from benchmarks.providers import Provider, Setting
from benchmarks.workloads import DTYPES, Workload, find
from granvit.ops import _dispatch

# How far a peer may be from the exact result, as a share of the largest exact value: enough to tell rounding from
# another function. Ours has a much tighter budget, see Group.match.
PEER_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-10}
MAX_SAMPLES = 50
GRAPH_SAMPLES = 50
PLANNING_SECONDS = 0.1
FLUSH_BYTES = 1 << 28  # more than any GPU's last-level cache


@dataclass(frozen=True)
class Problem:
    """The arguments of one call.

    Attributes:
        arguments: positional arguments; tensors among them in the dtype that is measured.
        leaves: positions of the arguments whose gradient "full" computes.
        keywords: keyword arguments.
    """

    arguments: tuple[Any, ...]
    leaves: tuple[int, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    def double(self) -> Problem:
        """The same values in float64."""

        def widen(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return Problem(
            tuple(widen(a) for a in self.arguments), self.leaves, {k: widen(v) for k, v in self.keywords.items()}
        )


@dataclass(frozen=True)
class Op:
    """One op as the suites see it."""

    name: str
    problem: Callable[[Workload, torch.dtype, torch.device, str], Problem]
    ours: tuple[Provider, ...]
    reference: Callable[..., Tensor]
    peers: tuple[Provider, ...]
    floor: Callable[[Any, torch.dtype, str], Floor]

    @property
    def providers(self) -> tuple[Provider, ...]:
        return (*self.ours, *self.peers)


class SkippedProviderError(Exception):
    """A provider cannot run a case; the text says why."""


@dataclass
class Entry:
    """A provider that runs, with what one look at it told."""

    call: Callable[[], tuple[Tensor, ...]]
    seconds: float
    match: bool
    error: float
    peak: int | None
    samples_graph: list[float] = field(default_factory=list)
    graph_reason: str = ""


class Group:
    """Providers that compute the same thing on the same inputs."""

    def __init__(self, op: Op, workload: str, dtype: str, mode: str, device: torch.device) -> None:
        self.op, self.mode = op, mode
        self.workload = find(op.name, workload)
        self.dtype = DTYPES[dtype]
        self.device = device
        self.floor = op.floor(self.workload, self.dtype, mode)
        self._problem = op.problem(self.workload, self.dtype, device, mode)
        self._exact: tuple[Tensor, ...] = ()
        self._allowed: list[float] = []
        self._checked: dict[str, tuple[bool, float]] = {}
        self._entries: dict[str, Entry] = {}
        self._skipped: dict[str, str] = {}

    def entry(self, provider: Provider) -> Entry:
        """The provider, run once and checked.

        Raises:
            SkippedProviderError: it cannot run here.
        """
        if provider.name not in self._entries and provider.name not in self._skipped:
            try:
                self._entries[provider.name] = self._look(provider)
            except SkippedProviderError as reason:
                self._skipped[provider.name] = str(reason)
        if provider.name in self._skipped:
            raise SkippedProviderError(self._skipped[provider.name])
        return self._entries[provider.name]

    def _look(self, provider: Provider) -> Entry:
        if not self._exact:
            self._prepare()
        call = self._caller(provider.build(), self._problem)
        if provider.name not in self._checked:
            self._checked[provider.name] = self.match(provider, self._try(provider, call))
        match, error = self._checked[provider.name]
        # The fastest of a few calls plans the number of samples; a slow provider is not called more often than needed.
        spent: list[float] = []
        memory = PeakMemory(self.device)
        peak = memory.of(lambda: spent.append(timed(call, self.device))) if memory.unavailable() is None else None
        while not spent or (sum(spent) < PLANNING_SECONDS and len(spent) < 5):
            spent.append(timed(call, self.device))
        return Entry(call, min(spent), match, error, peak)

    def _try(self, provider: Provider, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The results of a peer, or the reason why it has none. What ours raises is an error."""
        reason = provider.unavailable(Setting(self.device, self.dtype, self.mode))
        if reason is not None:
            raise SkippedProviderError(reason)
        if not provider.stock:
            return call()
        try:
            return call()
        except RuntimeError as error:  # also what lacks a kernel, and what does not compile
            first = str(error).strip().splitlines() or [""]
            raise SkippedProviderError(f"{type(error).__name__}: {first[0][:200]}") from None

    def _caller(self, function: Callable[..., Tensor], problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
        if self.mode == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (function(*problem.arguments, **problem.keywords),)

            return forward
        arguments = list(problem.arguments)
        for i in problem.leaves:
            arguments[i] = arguments[i].detach().requires_grad_()
        leaves = [arguments[i] for i in problem.leaves]
        seeds: list[Tensor | None] = []

        def full() -> tuple[Tensor, ...]:
            out = function(*arguments, **problem.keywords)
            if not seeds:
                seeds.append(_seed_gradient(out) if out.dim() else None)
            return (out.detach(), *torch.autograd.grad(out, leaves, seeds[0]))

        return full

    def _prepare(self) -> None:
        """The exact results, and the error of the best plain form in this dtype."""
        self._exact = self._caller(self.op.reference, self._problem.double())()
        errors = []
        for provider in (p for p in self.op.peers if p.same_result and not p.compiled):
            try:
                results = self._try(provider, self._caller(provider.build(), self._problem))
            except SkippedProviderError:
                continue
            self._checked[provider.name] = self.match(provider, results)
            if self._checked[provider.name][0]:
                errors.append([_worst(r, e) for r, e in zip(results, self._exact, strict=True)])
        if not errors:
            results = self._caller(self.op.reference, self._problem)()
            errors.append([_worst(r, e) for r, e in zip(results, self._exact, strict=True)])
        self._allowed = [2 * min(column) for column in zip(*errors, strict=True)]

    def _close(self, result: Tensor, exact: Tensor) -> bool:
        return _worst(result, exact) <= PEER_TOLERANCE[self.dtype] * float(exact.abs().max())

    def match(self, provider: Provider, results: tuple[Tensor, ...]) -> tuple[bool, float]:
        """Whether results and gradients are right, and the largest error as a share of the largest exact value.

        Ours: every value within twice the largest error of the best uncompiled stock form in the same dtype, plus one
        ulp. A peer: within PEER_TOLERANCE.
        """
        right, share = True, 0.0
        for i, (result, exact) in enumerate(zip(results, self._exact, strict=True)):
            worst = _worst(result, exact)
            share = max(share, worst / max(float(exact.abs().max()), 1e-300))
            right &= (
                self._close(result, exact) if provider.stock else _within(result, exact, self._allowed[i], self.dtype)
            )
        return right, share

    def replay(self, entry: Entry) -> None:
        """Samples of the call as a replayed CUDA graph, once a group: without the host's share."""
        if self.device.type != "cuda" or entry.samples_graph or entry.graph_reason:
            return
        try:
            graph = _capture(entry.call)
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            entry.graph_reason = f"cannot be captured: {str(error).strip().splitlines()[0][:200]}"
            return
        entry.samples_graph = [timed(graph.replay, self.device) for _ in range(GRAPH_SAMPLES)]


def _seed_gradient(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(out.numel())
    seed = torch.randn(out.shape, generator=generator).to(torch.bfloat16)  # the same values in every dtype
    return seed.to(out.device, out.dtype)


def _worst(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape or not exact.numel():
        return 0.0 if result.shape == exact.shape else float("inf")
    worst = float((result.detach().double() - exact.detach()).abs_().max())
    return worst if worst == worst else float("inf")


def _within(result: Tensor, exact: Tensor, allowed: float, dtype: torch.dtype) -> bool:
    if result.shape != exact.shape:
        return False
    error = (result.double() - exact).abs_()
    beyond = ~(error <= allowed)  # NaN is beyond
    if not bool(beyond.any()):
        return True
    error, exact = error[beyond], exact[beyond]
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=torch.finfo(dtype).tiny)))) * torch.finfo(dtype).eps
    return bool((error <= allowed + ulp).all())


_flush: dict[torch.device, Tensor] = {}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call. On a GPU between events, with a cold cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    if device not in _flush:
        _flush[device] = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush[device].zero_()  # the host runs ahead while it is written, as in a training step
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class Clock:
    """pytest-benchmark's timer: stands still but for what `advance` adds, so that samples come from `timed`."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


class Session:
    """Keeps the group at hand and what was left out; one for a pytest run."""

    def __init__(
        self, device: torch.device, passes: int, seconds: float, bandwidth: float, rates: dict[str, float]
    ) -> None:
        self.device, self.passes, self.seconds = device, passes, seconds
        self.bandwidth, self.rates = bandwidth, rates
        self.skipped: dict[tuple[str, ...], str] = {}
        self._key: tuple[str, ...] = ()
        self._group: Group | None = None

    def group(self, op: Op, workload: str, dtype: str, mode: str) -> Group:
        """The group of a case; the one before it is dropped, with its compiled graphs."""
        key = (op.name, workload, dtype, mode)
        if self._group is None or key != self._key:
            self._group = None
            torch._dynamo.reset()
            gc.collect()
            self._group, self._key = Group(op, workload, dtype, mode, self.device), key
        return self._group

    def measure(self, op: Op, benchmark: Any, workload: str, dtype: str, mode: str, provider: str) -> None:
        """One provider's samples of one pass, with everything a table needs in `extra_info`.

        Raises:
            SkippedProviderError: the provider cannot run here.
        """
        chosen = next(p for p in op.providers if p.name == provider)
        group = self.group(op, workload, dtype, mode)
        try:
            entry = group.entry(chosen)
        except SkippedProviderError as reason:
            self.skipped[op.name, workload, dtype, mode, provider] = str(reason)
            raise
        group.replay(entry)
        benchmark.extra_info.update(self._facts(op, group, chosen, entry), workload=workload, dtype=dtype, mode=mode)
        rounds = min(MAX_SAMPLES, max(1, int(self.seconds / max(entry.seconds, 1e-9))))
        try:
            benchmark.pedantic(lambda: CLOCK.advance(timed(entry.call, self.device)), rounds=rounds, warmup_rounds=0)
        except KeyboardInterrupt:
            benchmark.has_error = True  # leaves this case out of the JSON, and keeps the finished ones in
            raise

    def _facts(self, op: Op, group: Group, provider: Provider, entry: Entry) -> dict[str, Any]:
        workload = group.workload
        rate = self.rates[str(group.dtype).removeprefix("torch.")]
        ours = not provider.stock
        return {
            "op": op.name,
            "provider": provider.name,
            "stock": provider.stock,
            "compiled": provider.compiled,
            "same_result": provider.same_result,
            "impl": _dispatch.choose(op.name, provider.impl, group.device.type, group.dtype) if ours else None,
            "regions": workload.num_regions,
            "grid": list(workload.grid) if hasattr(workload, "grid") else None,
            "match": entry.match,
            "error": entry.error,
            "peak_bytes": entry.peak,
            "floor_bytes": group.floor.bytes,
            "floor_flops": group.floor.flops,
            "floor_seconds": group.floor.seconds(self.bandwidth, rate),
            "graph_replay_seconds": entry.samples_graph,
            "graph_replay_skipped": entry.graph_reason,
        }
