"""Reads the JSON of a benchmark run and turns it into tables, plots and verdicts on the targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "granvit"
BUSY = 0.7  # running processes, by the system's one-minute average, beyond which other work is in the times
SWEEPS = {"boxes": "boxes", "grid": "grid side, tokens"}

# What the package claims on a CPU: (op, times as fast as torchvision, times as fast as the best stock form).
CPU_TARGETS = (("region_distill", 30.0, 5.0), ("region_attention", None, 5.0), ("box_embedding", None, 5.0))


@dataclass(frozen=True)
class Row:
    """All samples of one provider on one case.

    Attributes:
        seconds: every sample.
        facts: what the suite noted beside them (`extra_info`).
    """

    seconds: tuple[float, ...]
    facts: dict[str, Any]

    @property
    def op(self) -> str:
        """Name of the op."""
        return str(self.facts["op"])

    @property
    def provider(self) -> str:
        """``"granvit"``, ``"granvit_triton"`` or the name of a peer."""
        return str(self.facts["provider"])

    @property
    def stock(self) -> bool:
        """Whether it is a peer."""
        return bool(self.facts["stock"])

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return statistics.median(self.seconds)

    @property
    def match(self) -> bool:
        """Whether results and gradients agree with the float64 reference."""
        return bool(self.facts["match"])

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What providers are compared within: op, workload, dtype, mode."""
        return (self.op, self.facts["workload"], self.facts["dtype"], self.facts["mode"])

    def sweep(self) -> tuple[str, int] | None:
        """The sweep's name and the value on its axis, for a case of a sweep."""
        name, _, value = self.facts["workload"].partition(".")
        return (name, int(value)) if name in SWEEPS and value.isdigit() else None


def rows(report: dict[str, Any]) -> list[Row]:
    """The cases of a run's JSON, the samples of all passes together."""
    samples: dict[tuple[str, ...], list[float]] = {}
    facts: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        key = (info["op"], info["workload"], info["dtype"], info["mode"], info["provider"])
        samples.setdefault(key, []).extend(entry["stats"]["data"])
        facts.setdefault(key, info)
    return [Row(tuple(samples[key]), facts[key]) for key in samples]


def groups(cases: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Cases by what they compute, then by provider."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in cases:
        found.setdefault(row.group, {})[row.provider] = row
    return found


def best_stock(group: dict[str, Row]) -> Row | None:
    """The fastest peer whose results are right."""
    peers = [row for row in group.values() if row.stock and row.match]
    return min(peers, key=lambda row: row.median, default=None)


def speedup(group: dict[str, Row], peer: Row | None) -> float | None:
    """How many times as fast as `peer` ours is; None unless both gave the right results."""
    ours = group.get(OURS)
    if ours is None or peer is None or not ours.match or not peer.match:
        return None
    return peer.median / ours.median


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
    graph = [_ms(statistics.median(facts["graph_replay_seconds"]))] if facts["graph_replay_seconds"] else [""]
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


def targets(cases: list[Row]) -> list[tuple[str, bool | None]]:
    """A line on each CPU target of the cases that were run, and whether it held; None where the data cannot tell."""
    lines = []
    for op, over_torchvision, over_stock in CPU_TARGETS:
        for key, group in groups(row for row in cases if row.op == op and row.sweep() is None).items():
            if OURS not in group or (op == "region_distill" and key[3] != "full"):
                continue
            torchvision = group.get("torchvision") or group.get("torchvision_float32")
            wanted = [("the best stock form", best_stock(group), over_stock)]
            if over_torchvision is not None:
                wanted.insert(0, ("torchvision", torchvision, over_torchvision))
            for what, peer, factor in wanted:
                lines.append(_verdict(" ".join(key), what, peer, factor, speedup(group, peer)))
    return lines


_HELD = {True: "[green]held[/]  ", False: "[red]missed[/]", None: "[yellow]open[/]  "}


def _verdict(case: str, what: str, peer: Row | None, factor: float, ratio: float | None) -> tuple[str, bool | None]:
    if peer is None:
        return f"{case} against {what}: no such peer ran with the right results", None
    name = what if peer.provider == what else f"{what} ({peer.provider})"
    if ratio is None:
        return f"{case} against {name}: no green match, hence no speed-up", None
    return f"{case}: {ratio:.1f}x {name}, target {factor:g}x", ratio >= factor


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
    if machine["device"] == "CPU" and machine["suite"] == "cpu":
        for text, held in targets(cases):
            console.print(f"{_HELD[held]} {text}")
    wrong = [row for row in cases if not row.stock and not row.match]
    for row in wrong:
        console.print(f"[red]no match[/]: {' '.join(row.group)} {row.provider}, error {row.facts['error']:.2e}")
    return bool(wrong)


def ops(report: dict[str, Any]) -> list[str]:
    """Names of the ops in a run's JSON."""
    return list(dict.fromkeys(entry["extra_info"]["op"] for entry in report["benchmarks"]))
