"""Curves of a run as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from granvit.eval.picture import new_figure
from granvit.train.meters import TERMS

Points = Sequence[tuple[float, float]]
# Told apart by those who do not see red or green, and on a light ground as well as on a dark one.
_COLOURS = ("#2f7fc1", "#d97706", "#2a9d6f", "#b05cc6", "#d9485f", "#8a8a82")
_INK, _LINE = "#010203", "#040506"  # stand for the page's own
_SIZE = (4.6, 2.9)


class Series(NamedTuple):
    """A curve.

    Attributes:
        label: in the legend.
        points: x and y.
        dots: single measurements, in place of a line.
    """

    label: str
    points: Points
    dots: bool = False


def chart(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    y: str,
    log: bool = False,
    zero: bool = False,
    grounded: bool = False,
) -> str:
    """A chart as a figure of HTML; "" where no series has a point.

    Args:
        name: unique on the page, of letters, digits and ``-``.
        title: over it, and what a screen reader says with the first and last value of each series.
        series: drawn in this order.
        y: name of the axis.
        log: logarithmic y, where values span more than a decade.
        zero: a line at 0.
        grounded: y begins at 0.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    figure = new_figure(*_SIZE)
    import matplotlib as mpl
    from matplotlib.ticker import LogLocator

    theme = {"text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    theme |= {"axes.edgecolor": _LINE, "grid.color": _LINE, "svg.fonttype": "none", "svg.hashsalt": name}
    with mpl.rc_context({**theme, "font.size": 10, "font.family": "sans-serif"}):
        panel = figure.subplots()
        for i, one in enumerate(series):
            colour, x = _COLOURS[i % len(_COLOURS)], [point[0] for point in one.points]
            style: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 5} if one.dots else {}
            panel.plot(x, [point[1] for point in one.points], color=colour, label=one.label, linewidth=1.7, **style)
        if zero:
            panel.axhline(0, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        values = [value for one in series for _, value in one.points]
        if log and min(values) > 0 and max(values) / min(values) > 10:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        if grounded:
            panel.set_ylim(bottom=0)
        panel.set(xlabel="step", ylabel=y)
        panel.grid(visible=True, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = _svg(file.getvalue(), name, title, series)
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{drawn}</figure>'


def _svg(text: str, name: str, title: str, series: Sequence[Series]) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # All charts of a page share one space of names.
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    ends = "; ".join(f"{one.label} from {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}" for one in series)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(f"{title}: {ends}")}"', 1)


def run_charts(metrics: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> dict[str, list[str]]:
    """The charts of a run by subject, each with one chart for each stage that has something of it."""
    found: dict[str, list[str]] = {}
    for number, stage in enumerate(stages):
        lines = [line for line in metrics if line["stage"] == stage]
        for subject, (series, options) in _subjects(lines).items():
            made = chart(
                f"c{number}-{len(found)}-{subject.replace(' ', '-')}", f"{stage}: {subject}", series, **options
            )
            if made:
                found.setdefault(subject, []).append(made)
    order = list(_subjects([]))  # a stage that lacks one must not move it behind the others
    return {subject: found[subject] for subject in order if subject in found}


def _subjects(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[Series], dict[str, Any]]]:
    def of(name: str, label: str, dots: bool = False) -> Series:
        return Series(label, [(line["step"], line[name]) for line in lines if name in line], dots)

    names = dict.fromkeys(name for line in lines for name in line)
    losses = [of(name, name) for name in TERMS]
    losses += [of(f"heldout/{name}", f"{name}, held out", True) for name in ("caption", "contrastive")]
    by_task = [of(name, name.removeprefix("by/caption/")) for name in names if _parts(name, "by/caption/") == 1]
    by_task += [
        of(name, name.removeprefix("heldout/caption/") + ", held out", True)
        for name in names
        if _parts(name, "heldout/caption/") == 1
    ]
    by_size = [of(name, name.removeprefix("by/caption/")) for name in names if _parts(name, "by/caption/") == 2]
    distilled = [of(name, name.rpartition("/")[2]) for name in names if _parts(name, "by/distillation/") == 1]
    gap = [of("wrong_image/caption", "in training"), of("heldout/wrong_image/caption", "held out", True)]
    return {
        "loss": (losses, {"y": "loss", "log": True}),
        "loss by task": (by_task if len(by_task) > 2 else [], {"y": "loss"}),
        "loss by task and box size": (by_size, {"y": "loss"}),
        "distillation by box size": (distilled, {"y": "loss", "log": True}),
        "what the wrong image costs": (gap, {"y": "loss", "zero": True}),
        "learning rate": ([of("learning_rate", "learning rate")], {"y": "learning rate"}),
        "throughput": ([of("images_per_second", "images a second")], {"y": "images / s", "grounded": True}),
    }


def _parts(name: str, prefix: str) -> int:
    """Names behind a prefix; 0 without it."""
    return name.removeprefix(prefix).count("/") + 1 if name.startswith(prefix) else 0
