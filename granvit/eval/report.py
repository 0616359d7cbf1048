"""``granvit report``: one self-contained page about a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from granvit.data.shards import write_atomically
from granvit.data.view import STYLE
from granvit.errors import why_not_written
from granvit.eval import report_sections as parts
from granvit.eval.report_run import ReportError, Run, parameters, read_run

TEMPLATE = Path(__file__).with_name("report.html")
PAGE = "report.html"


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    attention: bool = True,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Path:
    """Writes the page. What a run lacks is left out, and said so on the page.

    Args:
        folder: of the run.
        out: the HTML file, replaced as a whole; None is ``report.html`` in the folder.
        attention: load the towers and draw where they look.
        progress: is told the section at hand, how many are done, and how many there are.

    Returns:
        Where the page is.

    Raises:
        UserError: no run, a file of it that cannot be read, or a page that cannot be written.
    """
    run = read_run(folder)
    sections: dict[str, Callable[[Run], str]] = {
        "stages": parts.stages,
        "metrics": parts.metrics,
        "losses": parts.losses,
        "curves": parts.curves,
        "breakdown": parts.breakdown,
        "probes": parts.probes,
        "failures": parts.failures,
        "cases": parts.cases,
        "attention": parts.attention,
        "data": parts.data,
        "recipe": parts.recipe,
    }
    if not attention:
        del sections["attention"]
    made = []
    for i, (name, make) in enumerate(sections.items()):
        progress(name, i, len(sections))
        made.append(make(run))
    progress("writing", len(sections), len(sections))
    path = Path(folder) / PAGE if out is None else Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _page(run, [text for text in made if text]).encode())
    except OSError as error:
        raise ReportError(f"{path}: {why_not_written(error)}; a page that was there before is as it was") from error
    return path


def _page(run: Run, sections: list[str]) -> str:
    named = (re.match(r'<section id="(\w+)"><h2>(.*?)</h2>', text) for text in sections)
    links = "".join(f'<li><a href="#{found[1]}">{found[2]}</a></li>' for found in named if found)
    facts = [*parts.facts(run, parameters(run)), *_times(run)]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    missing = f'<p class="about">Not there: {escape("; ".join(run.missing))}.</p>' if run.missing else ""
    body = (
        f"<header><h1>{escape(run.recipe.name)}</h1><dl>{listed}</dl>{missing}"
        f'<nav aria-label="sections"><ul>{links}</ul></nav></header><main>{"".join(sections)}</main>'
        "<footer><p>Made by granvit report; the page holds all it shows and asks no server for anything.</p></footer>"
    )
    page = TEMPLATE.read_text(encoding="utf-8").replace("__STYLE__", STYLE.read_text(encoding="utf-8"))
    return page.replace("__TITLE__", escape(f"{run.recipe.name}: report of a run")).replace("__BODY__", body)


def _times(run: Run) -> list[tuple[str, str]]:
    """When the run was, and how long each stage was at work by its log."""
    if not run.metrics:
        return []
    begin = datetime.fromtimestamp(run.metrics[0]["time"], timezone.utc)
    minutes = []
    for stage in run.recipe.stages:
        times = [line["time"] for line in run.metrics if line["stage"] == stage.name]
        if len(times) > 1:
            minutes.append(f"{stage.name} {(times[-1] - times[0]) / 60:.1f} min")
    return [("began", begin.isoformat(sep=" ", timespec="minutes")), ("took", ", ".join(minutes) or "not known")]
