"""Reports suites that time a whole pipeline, not an op: how much each provider gets through in a second."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from granvit import _bench_steps


def is_pipeline(report: dict[str, Any]) -> bool:
    """Whether a run's JSON is of such a suite."""
    return any("pipeline" in entry["extra_info"] for entry in report["benchmarks"])


def _of_steps(report: dict[str, Any]) -> bool:
    return any(entry["extra_info"].get("pipeline") == _bench_steps.SUITE for entry in report["benchmarks"])


def plot(report: dict[str, Any], stem: Path) -> list[Path]:
    """Draws what the suite has to show beside its tables; the files, whose names start with `stem`."""
    return _bench_steps.plot(report, stem) if _of_steps(report) else []


def show(report: dict[str, Any], console: Console) -> bool:
    """Prints the rates of a run's JSON; True where a provider of ours did not give the expected result."""
    if _of_steps(report):
        return _bench_steps.show(report, console)
    machine = report["machine_info"]["granvit"]
    console.print(f"{machine['device']}, torch {machine['torch']}")
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for entry in report["benchmarks"]:
        facts = entry["extra_info"]
        providers = groups.setdefault((facts["pipeline"], facts["workload"]), {})
        providers.setdefault(facts["provider"], []).append(entry)
    table = Table("case / provider", title=", ".join(dict.fromkeys(key[0] for key in groups)), title_justify="left")
    for name in ("items/s", "lowest", "highest", "granvit against it", "Match"):
        table.add_column(name, justify="right")
    wrong = False
    for (_, workload), providers in groups.items():
        rates = {name: _rates(entries) for name, entries in providers.items()}
        match = {name: all(entry["extra_info"]["match"] for entry in entries) for name, entries in providers.items()}
        ours = [name for name, entries in providers.items() if not entries[0]["extra_info"]["stock"]]
        wrong |= not all(match[name] for name in ours)
        table.add_section()
        table.add_row(f"[bold]{workload}[/]")
        for name, found in rates.items():
            middle = statistics.median(found)
            other = next((n for n in ours if n != name), None)
            compared = other is not None and name not in ours and match[name] and match[other]
            ratio = f"{statistics.median(rates[other]) / middle:.2f}x" if compared and other else ""
            table.add_row(
                f"  {name}",
                *(f"{rate:.0f}" if rate >= 10 else f"{rate:.2f}" for rate in (middle, min(found), max(found))),
                ratio,
                "[green]yes[/]" if match[name] else "[red]no[/]",
            )
    console.print(table)
    return wrong


def _rates(entries: list[dict[str, Any]]) -> list[float]:
    return [entry["extra_info"]["items"] / seconds for entry in entries for seconds in entry["stats"]["data"]]
