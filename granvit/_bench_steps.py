"""Reports the suite of training steps: rates, memory, where the time of a step goes, and verdicts on the targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SUITE = "train_step"
STOCK = "stock"
# On an H100 with the paper's model: (what, the forms that may do it, images a second, GiB).
TARGETS = (
    ("the same mathematics", ("granvit", "granvit_compiled"), 28.0, 30.0),
    ("native-resolution teacher crops", ("granvit_native", "granvit_native_compiled"), 40.0, 28.0),
)
_HELD = {True: "[green]held[/]  ", False: "[red]missed[/]", None: "[yellow]open[/]  "}


@dataclass(frozen=True)
class Form:
    """All passes of one form of the step.

    Attributes:
        name: of the form.
        stock: whether it is a peer.
        match: whether its losses were the expected ones in every pass.
        rates: images a second, of every sample.
        parts: median seconds of each part of a step.
        peak: bytes, at most; None where it was not measured.
    """

    name: str
    stock: bool
    match: bool
    rates: tuple[float, ...]
    parts: dict[str, float]
    peak: int | None

    @property
    def rate(self) -> float:
        """Median of the rates."""
        return statistics.median(self.rates)


def forms(entries: Iterable[dict[str, Any]]) -> dict[str, Form]:
    """The forms of one workload, from the entries of a run's JSON."""
    of_form: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        of_form.setdefault(entry["extra_info"]["provider"], []).append(entry)
    return {name: _form(name, passes) for name, passes in of_form.items()}


def _form(name: str, passes: list[dict[str, Any]]) -> Form:
    facts = [entry["extra_info"] for entry in passes]
    parts = {part: [s for fact in facts for s in fact["parts"][part]] for part in facts[0]["parts"]}
    peaks = [fact["peak_bytes"] for fact in facts if fact["peak_bytes"] is not None]
    return Form(
        name,
        bool(facts[0]["stock"]),
        all(fact["match"] for fact in facts),
        tuple(entry["extra_info"]["items"] / seconds for entry in passes for seconds in entry["stats"]["data"]),
        {part: statistics.median(seconds) for part, seconds in parts.items()},
        max(peaks, default=None),
    )


def _workloads(report: dict[str, Any]) -> dict[str, dict[str, Form]]:
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in report["benchmarks"]:
        entries.setdefault(entry["extra_info"]["workload"], []).append(entry)
    return {workload: forms(own) for workload, own in entries.items()}


def show(report: dict[str, Any], console: Console) -> bool:
    """Prints the tables of a run's JSON and the verdicts; True where losses of ours were not the expected ones."""
    machine = report["machine_info"]["granvit"]
    console.print(f"{machine['device']}, torch {machine['torch']}")
    wrong = False
    for workload, found in _workloads(report).items():
        console.print(_rates(workload, found))
        console.print(_parts(workload, found))
        wrong |= any(not form.match for form in found.values() if not form.stock)
        if workload == "paper":
            for text, held in verdicts(found):
                console.print(f"{_HELD[held]} {text}", soft_wrap=True, highlight=False)
    skips = {(skip["workload"], skip["provider"]): skip["reason"] for skip in reversed(report.get("skipped", []))}
    for (workload, provider), reason in sorted(skips.items()):  # of several passes, the first one's
        console.print(f"skipped {provider} of {workload}: {reason}", style="dim", markup=False, highlight=False)
    return wrong


def _rates(workload: str, found: dict[str, Form]) -> Table:
    table = Table("form", title=f"{SUITE}, {workload}", title_justify="left")
    for name in ("images/s", "lowest", "highest", f"over {STOCK}", "peak GiB", "Match"):
        table.add_column(name, justify="right")
    stock = found.get(STOCK)
    for name, form in found.items():
        compared = stock is not None and form is not stock and form.match and stock.match
        table.add_row(
            name,
            *(f"{rate:.1f}" for rate in (form.rate, min(form.rates), max(form.rates))),
            f"{form.rate / stock.rate:.2f}x" if compared and stock else "",
            "" if form.peak is None else f"{form.peak / 2**30:.1f}",
            "[green]yes[/]" if form.match else "[red]no[/]",
        )
    return table


def _parts(workload: str, found: dict[str, Form]) -> Table:
    table = Table("ms", title=f"where a step's time goes, {workload}", title_justify="left")
    names = dict.fromkeys(part for form in found.values() for part in form.parts)
    for name in names:
        table.add_column(name, justify="right")
    for form in found.values():
        table.add_row(form.name, *(f"{1e3 * form.parts.get(name, 0.0):.1f}" for name in names))
    return table


def verdicts(found: dict[str, Form]) -> list[tuple[str, bool | None]]:
    """A line on the rate and one on the memory of each target, for the fastest form that may hold it."""
    lines: list[tuple[str, bool | None]] = []
    for what, names, least, most in TARGETS:
        able = [found[name] for name in names if name in found and found[name].match]
        if not able:
            lines.append((f"{what}: no form with a green match, targets {least:g} images/s and {most:g} GiB", None))
            continue
        best = max(able, key=lambda form: form.rate)
        lines.append(
            (f"{what} ({best.name}): {best.rate:.1f} images/s, target on an H100 {least:g}", best.rate >= least)
        )
        if best.peak is None:
            lines.append((f"{what} ({best.name}): memory was not measured, target {most:g} GiB", None))
        else:
            peak = best.peak / 2**30
            lines.append((f"{what} ({best.name}): {peak:.1f} GiB, target {most:g}", peak <= most))
    return lines


def plot(report: dict[str, Any], stem: Path) -> list[Path]:
    """Draws a bar a form, of the parts of a step, for each workload; the files that were written."""
    from matplotlib.figure import Figure

    written = []
    for workload, found in _workloads(report).items():
        figure = Figure(figsize=(9.0, 1.2 + 0.5 * len(found)), layout="constrained")
        panel = figure.subplots()
        names = list(dict.fromkeys(part for form in found.values() for part in form.parts))
        rows = list(found.values())[::-1]  # the first one on top
        begin = [0.0] * len(rows)
        for name in names:
            width = [1e3 * form.parts.get(name, 0.0) for form in rows]
            panel.barh([form.name for form in rows], width, left=begin, label=name)
            begin = [a + b for a, b in zip(begin, width, strict=True)]
        panel.set(xlabel="ms", title=f"one step, {workload}, {report['machine_info']['granvit']['device']}")
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        written.append(Path(f"{stem}-{workload}.png"))
        figure.savefig(written[-1], dpi=130)
    return written
