"""Reads the JSON of a benchmark run and turns it into tables, plots and verdicts on the targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from granvit import _bench_targets
from granvit._bench_rows import OURS, SWEEPS, Row, best_stock, groups, rows, speedup

BUSY = 0.7  # running processes, by the system's one-minute average, beyond which other work is in the times

_HELD = {True: "[green]held[/]  ", False: "[red]missed[/]", None: "[yellow]open[/]  "}


def table(op: str, report: dict[str, Any], cases: list[Row]) -> Table:
    """Every provider of every case of one op that is no sweep."""
    bandwidth = report["machine_info"]["granvit"]["copy_bytes_per_second"]
    on_gpu = any(row.facts["graph_replay_seconds"] or row.facts["graph_replay_skipped"] for row in cases)
    t = Table(title=op, title_justify="left")
    t.add_column("case / provider", no_wrap=True)
    names = ("ms", *(["graph ms"] if on_gpu else []), "speed-up", "Match", "peak MiB", "% of copy", "floor ms")
    for name in names:
        t.add_column(name, justify="right")
    for key, group in groups(row for row in cases if row.op == op and row.sweep() is None).items():
        t.add_section()
        t.add_row(f"[bold]{' '.join(key[1:])}[/]")
        best = best_stock(group)
        for row in group.values():
            t.add_row(*_cells(row, group, best, bandwidth, on_gpu))
    return t


def _cells(row: Row, group: dict[str, Row], best: Row | None, bandwidth: float, on_gpu: bool) -> list[str]:
    facts = row.facts
    name = f"{row.provider} ({facts['impl']})" if facts["impl"] else row.provider
    name = f"  [green]{name}, best stock form[/]" if row is best else f"  {name}"
    ratio = speedup(group, row) if row.stock else None
    other = "[yellow]other result[/]" if not facts["same_result"] else "[red]no[/]"
    peak = "" if facts["peak_bytes"] is None else f"{facts['peak_bytes'] / 2**20:.1f}"
    graph = ["" if row.replay is None else _ms(row.replay)]
    return [
        name,
        _ms(row.median),
        *(graph if on_gpu else []),
        "" if ratio is None else f"{ratio:.2f}x",
        "[green]yes[/]" if row.match else other,
        peak,
        f"{100 * facts['floor_bytes'] / row.median / bandwidth:.0f}",
        _ms(facts["floor_seconds"]),
    ]


def skipped(report: dict[str, Any]) -> list[str]:
    """A line for each peer of each op that could not run, and why; the cases of one reason together."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for skip in report["skipped"]:
        cases = where.setdefault((skip["op"], skip["provider"], skip["reason"]), [])
        cases.append(f"{skip['dtype']} {skip['mode']}")
    return [
        f"skipped {provider} of {op} in {', '.join(dict.fromkeys(cases))}: {reason}"
        for (op, provider, reason), cases in where.items()
    ]


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def sweep_table(cases: list[Row]) -> Table:
    """One line for each case of the sweeps."""
    t = Table("op", "case", "granvit ms", "best stock form", "its ms", "speed-up", "floor ms", title="sweeps")
    t.title_justify = "left"
    for key, group in groups(row for row in cases if row.sweep() is not None).items():
        ours, best = group.get(OURS), best_stock(group)
        ratio = speedup(group, best)
        any_row = next(iter(group.values()))
        t.add_row(
            key[0],
            " ".join(key[1:]),
            "" if ours is None else _ms(ours.median) + ("" if ours.match else " [red]no match[/]"),
            "" if best is None else best.provider,
            "" if best is None else _ms(best.median),
            "" if ratio is None else f"{ratio:.1f}x",
            _ms(any_row.facts["floor_seconds"]),
        )
    return t


def plot(op: str, cases: list[Row], path: Path) -> bool:
    """Draws time against boxes and against the grid, log-log, with the floor; False where no sweep of `op` was run."""
    from matplotlib.figure import Figure

    found = [(row, row.sweep()) for row in cases if row.op == op]
    swept = [(row, *at) for row, at in found if at is not None]
    if not swept:
        return False
    axes_names = [name for name in SWEEPS if any(sweep == name for _, sweep, _ in swept)]
    kinds = sorted({row.group[2:] for row, _, _ in swept})
    figure = Figure(figsize=(5.2 * len(axes_names), 4.0 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(axes_names), squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        for panel, name in zip(line, axes_names, strict=True):
            chosen = [(row, x) for row, sweep, x in swept if sweep == name and row.group[2:] == kind]
            _draw(panel, chosen)
            panel.set(xlabel=SWEEPS[name], ylabel="ms", title=f"{op}, {kind[0]}, {kind[1]}")
    figure.savefig(path, dpi=130)
    return True


def _draw(panel: Any, chosen: list[tuple[Row, int]]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    floor = sorted({(x, row.facts["floor_seconds"] * 1e3) for row, x in chosen})
    for provider in dict.fromkeys(row.provider for row, _ in chosen):
        points = sorted((x, row.median * 1e3) for row, x in chosen if row.provider == provider and row.match)
        if points:
            ours = provider.startswith(OURS)
            panel.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if ours else 1.2, label=provider)
    panel.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="floor")
    ticks = [x for x, _ in floor]
    panel.set_xticks(ticks, [str(x) for x in ticks])
    panel.grid(visible=True, which="major", alpha=0.3)
    panel.legend()


def show(report: dict[str, Any], console: Console) -> bool:
    """Prints the tables of a run's JSON and the verdicts; True where a result of ours did not match."""
    cases = rows(report)
    machine = report["machine_info"]["granvit"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine["matmul_flops_per_second"].items())
    console.print(
        f"{machine['device']}, {machine['threads']} threads, kernels for {machine['isa']}, torch {machine['torch']}; "
        f"copy {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s, matmul {rates}"
    )
    if machine["load"] > BUSY:
        console.print(
            f"the machine was busy before the run (load {machine['load']:.1f}): trust no time of it",
            style="bold yellow",
        )
    for op in ops(report):
        if any(row.op == op and row.sweep() is None for row in cases):
            console.print(table(op, report, cases))
    if any(row.sweep() is not None for row in cases):
        console.print(sweep_table(cases))
    for line in skipped(report):
        console.print(line, style="dim", markup=False, highlight=False)
    verdicts = {"cpu": _bench_targets.on_cpu, "gpu": _bench_targets.on_gpu}.get(machine["suite"])
    if verdicts is not None and (machine["device"] == "CPU") == (machine["suite"] == "cpu"):
        for text, held in verdicts(cases):
            console.print(f"{_HELD[held]} {text}")
    wrong = [row for row in cases if not row.stock and not row.match]
    for row in wrong:
        console.print(f"[red]no match[/]: {' '.join(row.group)} {row.provider}, error {row.facts['error']:.2e}")
    return bool(wrong)


def ops(report: dict[str, Any]) -> list[str]:
    """Names of the ops in a run's JSON."""
    return list(dict.fromkeys(entry["extra_info"]["op"] for entry in report["benchmarks"]))
