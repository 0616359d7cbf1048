"""Runs the benchmark suites of a source checkout and reports them: what ``granvit bench`` calls.

The suites live in ``benchmarks/`` beside the package and are pytest-benchmark tests; this module starts them in a
process of their own, follows them, and reports the JSON that they leave.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from granvit import _bench_pipelines, _bench_report, _bench_rows
from granvit.errors import MissingDependencyError, UserError

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "matplotlib": "matplotlib",
    "torchvision": "torchvision",
}
NEEDED_BY = {"train_step": {"transformers": "transformers"}}
INTERRUPTED, WRONG_USAGE, NOTHING_SELECTED = 2, 4, 5  # exit statuses of pytest


def run(
    suite: str = "cpu",
    *,
    select: str | None = None,
    dtypes: Sequence[str] = (),
    device: str | None = None,
    output: str | Path = "out/bench",
    list_only: bool = False,
    plots: bool = True,
    console: Console | None = None,
) -> int:
    """Runs a suite, prints its tables, draws its plots and says whether the targets held.

    Args:
        suite: ``"cpu"`` (the CPU targets and the sweeps), ``"gpu"``, ``"sweep"``, ``"data"`` (reading shards),
            ``"train_step"`` (a step of stage 1, on a GPU at the size of the paper) or ``"smoke"`` (seconds, tiny
            shapes).
        select: a pytest ``-k`` expression over case names such as ``page.b2.q1-bfloat16-full-granvit-0``.
        dtypes: only these dtypes (``"float32"``, ``"bfloat16"``, ``"float16"``); empty means the suite's.
        device: ``"cpu"`` or ``"cuda"``; None leaves it to the suite.
        output: folder for the JSON, the log and the plots; it is created.
        list_only: print the names of the cases and run none.
        plots: draw the plots.
        console: where to print; None means standard output.

    Returns:
        0 where every case of ours ran and matched the reference; 1 where one did not, or pytest failed; 130 where the
        run was interrupted (what had finished is reported all the same).

    Raises:
        UserError: the suites are not there, a package is missing, or nothing was selected.
    """
    # Piped output has no width of its own, and the tables need more than the 80 columns that rich would assume.
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    suites = require(suite)
    options = ["--suite", suite, *(f"--dtype={dtype}" for dtype in dtypes)]
    options += ["--device", device] if device else []
    options += ["-k", select] if select else []
    if list_only:
        return _list(suites, options, console)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder.resolve() / f"{suite}-{datetime.now():%Y%m%d-%H%M%S}"
    status = _measure(suites, options, stem, console)
    path = Path(f"{stem}.json")
    if not path.exists():
        if status == INTERRUPTED:
            return 130
        if status == NOTHING_SELECTED:
            raise UserError(f"bench: no case of suite {suite!r} matches the selection; list_only shows what there is")
        if status == WRONG_USAGE:
            raise UserError(f"bench: {_complaint(Path(f'{stem}.log').read_text())}")
        raise UserError(f"bench: pytest ended with status {status} and left no results; its output is in {stem}.log")
    report = json.loads(path.read_text())
    if _bench_pipelines.is_pipeline(report):
        failed = _bench_pipelines.show(report, console)
        drawn = _bench_pipelines.plot(report, stem) if plots else []
    else:
        failed = _bench_report.show(report, console)
        cases = _bench_rows.rows(report)
        ops = _bench_report.ops(report) if plots else []
        named = {op: Path(f"{stem}-{op}.png") for op in ops}
        drawn = [file for op, file in named.items() if _bench_report.plot(op, cases, file)]
    for file in [path, *drawn]:
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)
    if status == INTERRUPTED:
        console.print("interrupted: the tables hold what had finished", style="yellow")
        return 130
    if status != 0:
        console.print(f"pytest ended with status {status}; its output is in {stem}.log", style="red", soft_wrap=True)
    return 1 if failed or status != 0 else 0


def require(suite: str = "") -> Path:
    """The folder of the suites, where everything that they need is there, and what the one of that name needs beside.

    Raises:
        UserError: it is not; MissingDependencyError where packages are missing.
    """
    folder = ROOT / "benchmarks"
    if not (folder / "conftest.py").exists():
        raise UserError(
            "bench: the benchmark suites are not part of the installed package; run this from a source checkout, "
            "installed with `pip install -e .[bench]`"
        )
    own = NEEDED_BY.get(suite, {})
    missing = [package for module, package in {**NEEDED, **own}.items() if importlib.util.find_spec(module) is None]
    if missing:
        extras = "bench,train" if own else "bench"
        raise MissingDependencyError(
            f"bench: {', '.join(missing)} not installed; `pip install granvit[{extras}]` brings what is missing"
        )
    return folder


def _command(suites: Path, options: list[str]) -> tuple[list[str], dict[str, str]]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # A surrounding pytest-xdist would switch pytest-benchmark off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return [sys.executable, "-m", "pytest", str(suites), *options], {**environment, "PYTHONPATH": path}


def _list(suites: Path, options: list[str], console: Console) -> int:
    command, environment = _command(suites, [*options, "--collect-only", "-q"])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == NOTHING_SELECTED:
        raise UserError("bench: no case matches the selection")
    if done.returncode != 0:
        raise UserError(f"bench: {_complaint(done.stdout + done.stderr)}")
    for line in done.stdout.splitlines():
        if "::" in line:
            console.print(line.partition("::")[2], highlight=False, markup=False, soft_wrap=True)
    return 0


def _complaint(text: str) -> str:
    """What pytest says is wrong with its arguments."""
    errors = [line for line in text.splitlines() if "error: " in line.lower()]
    return errors[-1].partition(": ")[2].removeprefix("error: ") if errors else text.strip()


def _measure(suites: Path, options: list[str], stem: Path, console: Console) -> int:
    """Runs pytest in a process of its own and follows it; its exit status."""
    events = Path(f"{stem}.events")
    events.touch()
    command, environment = _command(
        suites, [*options, f"--benchmark-json={stem}.json", "--benchmark-quiet", f"--events={events}", "-q"]
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # In a session of its own: Ctrl-C reaches only this process, which passes it on once, and the suites can write what
    # they have.
    with Path(f"{stem}.log").open("w") as log, Progress(*columns, console=console, transient=True) as progress:
        child = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        bar = progress.add_task("measuring the machine", total=None)
        try:
            with events.open() as stream:
                while child.poll() is None:
                    _follow(stream.readlines(), progress, bar)
                    time.sleep(0.2)
        except KeyboardInterrupt:
            progress.update(bar, description="stopping")
            child.send_signal(signal.SIGINT)
            child.wait()
        finally:
            if child.poll() is None:  # a second Ctrl-C, or an error of ours
                child.kill()
            events.unlink()
    return child.returncode


def _follow(lines: list[str], progress: Progress, bar: Any) -> None:
    for line in lines:
        event = json.loads(line)
        if event["event"] == "collected":
            progress.update(bar, total=event["count"])
        elif event["event"] == "start":
            progress.update(bar, description=escape(event["name"].partition("::")[2]))
        else:
            progress.advance(bar)
