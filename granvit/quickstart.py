"""``granvit quickstart``: the whole recipe in miniature, on scenes composed here, with a report and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from granvit.errors import UserError
from granvit.recipe import Recipe, Stage, load

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "miniature" / "cpu.yaml"
TASKS = {"bbox_to_caption": "Bbox2Caption", "caption_to_bbox": "Caption2Bbox"}
SHOWN = 4  # held-out images in the picture
_ASKED = 16  # held-out images that are answered


@dataclass(frozen=True)
class Quickstart:
    """What a run left.

    Attributes:
        report: the figures, as ``report.json`` holds them.
        pictures: that were drawn.
    """

    report: dict[str, Any]
    pictures: tuple[Path, ...]


def run(
    overrides: Sequence[str] = (), *, overwrite: bool = False, recipe: Path = RECIPE, console: Console | None = None
) -> int:
    """Trains the miniature recipe, or goes on where it stopped, then answers held-out questions and draws them.

    Args:
        overrides: ``key=value`` of the recipe.
        overwrite: begin anew.
        recipe: the YAML file.
        console: where to print.

    Returns:
        0, or what :func:`granvit.train.run.run` gives when it is stopped early.

    Raises:
        UserError: the recipe is not there, or a stage cannot run.
    """
    from granvit.train.run import run as train

    console = console or Console(width=None)
    if not recipe.exists():
        raise UserError(
            "quickstart: the recipes are not part of the installed package; run this from a source checkout"
        )
    loaded = load(recipe, overrides)
    began = time.perf_counter()
    status = train(loaded, overwrite=overwrite, console=console)
    if status:
        return status
    made = report(loaded, console)
    console.print(_table(made.report))
    for path in [*made.pictures, Path(loaded.output) / "report.json"]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    return 0


def report(recipe: Recipe, console: Console) -> Quickstart:
    """Held-out losses before and after each stage, and what its model answers, in figures and pictures."""
    from granvit.eval.picture import draw_curves, draw_predictions, read_metrics
    from granvit.eval.predict import Answered, share_right

    folder = Path(recipe.output)
    metrics = read_metrics(folder / "metrics.jsonl")
    figures: dict[str, Any] = {"recipe": recipe.name, "stages": {}}
    columns: dict[str, list[Answered]] = {}
    for stage in recipe.stages:
        facts = figures["stages"][stage.name] = _losses(metrics, stage.name)
        for task, name in TASKS.items():
            if stage.tasks.get(task):
                console.print(f"{stage.name}: answering held-out questions of {name}")
                answered = _answers(recipe, stage, folder)
                share, count = share_right(answered, task)
                facts[f"{task}/right"], facts[f"{task}/asked"] = share, count
                columns[f"{name} after {stage.name}: {share:.0%} of {count} right"] = answered[:SHOWN]
    (folder / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw_curves(metrics, folder / "curves.png")
    draw_predictions(columns, folder / "predictions.png", title="held-out scenes; green is right, dashed is the truth")
    return Quickstart(figures, (folder / "curves.png", folder / "predictions.png"))


def _losses(metrics: Sequence[Mapping[str, Any]], stage: str) -> dict[str, float]:
    """The first and the last held-out figures of a stage."""
    lines = [line for line in metrics if line["stage"] == stage and any(name.startswith("heldout/") for name in line)]
    facts = {}
    for when, line in (("before", lines[:1]), ("after", lines[-1:])):
        for name in ("contrastive", "caption", "wrong_image/caption", *(f"caption/{task}" for task in TASKS)):
            for entry in line:
                if f"heldout/{name}" in entry:
                    facts[f"{name}/{when}"] = entry[f"heldout/{name}"]
    return facts


def _answers(recipe: Recipe, stage: Stage, folder: Path) -> list[Any]:
    from granvit.eval.predict import predict
    from granvit.model import checkpoint
    from granvit.model.prompts import Prompts
    from granvit.train.checkpoints import MODEL
    from granvit.train.run import heldout_samples

    loaded = checkpoint.load(folder / stage.name / MODEL)
    samples = heldout_samples(recipe, stage, _ASKED)
    return predict(loaded.model, Prompts(loaded.tokenizer), samples, style=stage.style)


def _table(figures: Mapping[str, Any]) -> Table:
    table = Table("stage", title="held out", title_justify="left")
    for heading in ("loss before", "after", "wrong image costs", "answered right"):
        table.add_column(heading, justify="right")
    for stage, facts in figures["stages"].items():
        term = "contrastive" if "contrastive/after" in facts else "caption"
        right = [
            f"{facts[f'{task}/right']:.0%} of {facts[f'{task}/asked']}" for task in TASKS if f"{task}/right" in facts
        ]
        table.add_row(
            stage,
            *(f"{facts[f'{term}/{when}']:.3f}" if f"{term}/{when}" in facts else "" for when in ("before", "after")),
            f"{facts['wrong_image/caption/after']:+.3f}" if "wrong_image/caption/after" in facts else "",
            ", ".join(right),
        )
    return table
