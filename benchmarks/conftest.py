"""Which cases run, how often, and what goes into the JSON beside the samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, machine, workloads
from benchmarks.harness import Op, Session

FIELDS = ("workload", "dtype", "mode", "provider", "turn")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("granvit")
    group.addoption("--suite", default="smoke", choices=sorted(workloads.SUITES), help="what to measure")
    group.addoption(
        "--dtype", action="append", choices=sorted(workloads.DTYPES), help="only this dtype; may be repeated"
    )
    group.addoption("--device", default=None, help="cpu or cuda; default: the suite's, else cuda where there is one")
    group.addoption(
        "--events", type=Path, default=None, help="append one JSON line for every case, as it starts and ends"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not set(FIELDS) <= set(metafunc.fixturenames):
        return
    suite = workloads.SUITES[metafunc.config.getoption("--suite")]
    cases = list(_cases(metafunc.module.OP, suite, metafunc.config))
    metafunc.parametrize(",".join(FIELDS), cases, ids=["-".join(map(str, case)) for case in cases])


def _cases(op: Op, suite: workloads.Suite, config: pytest.Config) -> Iterator[tuple[str, str, str, str, int]]:
    only, device = config.getoption("--dtype"), _device(config)
    seen = set()
    for selection in (s for s in suite.selections if s.op == op.name):
        providers = [
            p.name
            for p in op.providers
            if p.name not in selection.leave_out
            and (p.sweep or not p.stock or not selection.sweep)
            and (p.impl is None or device.type == "cuda")
        ]
        for workload in selection.workloads:
            for dtype in (d for d in selection.dtypes if not only or d in only):
                for mode in selection.modes:
                    for turn in range(suite.passes):  # providers take turns, so that drift meets them all alike
                        for case in ((workload, dtype, mode, provider, turn) for provider in providers):
                            if case not in seen:
                                seen.add(case)
                                yield case


def _device(config: pytest.Config) -> torch.device:
    asked = config.getoption("--device") or workloads.SUITES[config.getoption("--suite")].device
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """Measures the machine, then every case."""
    config = request.config
    device = _device(config)
    suite = workloads.SUITES[config.getoption("--suite")]
    bandwidth = machine.copy_bandwidth(device)
    needed = {dtype for selection in suite.selections for dtype in selection.dtypes}
    needed &= set(config.getoption("--dtype") or needed)
    rates = {dtype: machine.matmul_rate(device, workloads.DTYPES[dtype]) for dtype in sorted(needed)}
    config.stash[_SESSION] = Session(device, suite.passes, suite.seconds, bandwidth, rates)
    return config.stash[_SESSION]


_SESSION = pytest.StashKey[Session]()


@pytest.fixture
def measure(
    session: Session, benchmark: Any, workload: str, dtype: str, mode: str, provider: str, turn: int
) -> Callable[[Op], None]:
    """Measures the case at hand of an op; a provider that cannot run is skipped with its reason."""

    def run(op: Op) -> None:
        try:
            session.measure(op, benchmark, workload, dtype, mode, provider)
        except harness.SkippedProviderError as reason:
            pytest.skip(str(reason))

    return run


@pytest.fixture
def leave_out(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Skips a case of a pipeline, whose fields are given, for a reason that goes into the JSON."""

    def skip(reason: str, **fields: str) -> None:
        request.config.stash.setdefault(_LEFT_OUT, []).append({**fields, "reason": reason})
        pytest.skip(reason)

    return skip


_LEFT_OUT = pytest.StashKey[list[dict[str, str]]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A file that is a suite of its own runs where that suite is asked for, and nothing else does then.
    suite = config.getoption("--suite")
    own = any(getattr(item.module, "SUITE", None) == suite for item in items)
    chosen = [item for item in items if getattr(item.module, "SUITE", None) == (suite if own else None)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for item in [] if own else items:
        item.add_marker(pytest.mark.benchmark(timer=harness.CLOCK.read, disable_gc=True))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    session = config.stash.get(_SESSION, None)
    machine_info["granvit"] = {**machine.describe(_device(config)), "suite": config.getoption("--suite")}
    if session is not None:
        machine_info["granvit"] |= {
            "copy_bytes_per_second": session.bandwidth,
            "matmul_flops_per_second": session.rates,
        }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash.get(_SESSION, None)
    if session is None:
        output_json["skipped"] = config.stash.get(_LEFT_OUT, [])
        return
    names = ("op", "workload", "dtype", "mode", "provider")
    output_json["skipped"] = [
        {**dict(zip(names, case, strict=True)), "reason": reason} for case, reason in session.skipped.items()
    ]


def _event(config: pytest.Config, **fields: Any) -> None:
    path = config.getoption("--events")
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(fields) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    _event(session.config, event="collected", count=len(session.items))


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    _event(_CONFIG[0], event="start", name=nodeid)


def pytest_runtest_logfinish(nodeid: str, location: tuple[str, int | None, str]) -> None:
    _event(_CONFIG[0], event="end", name=nodeid)


_CONFIG: list[pytest.Config] = []  # the two hooks above are not given it


def pytest_configure(config: pytest.Config) -> None:
    _CONFIG[:] = [config]
    if _device(config).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("this needs a CUDA device, and torch sees none; with the device cpu it runs on the CPU")
