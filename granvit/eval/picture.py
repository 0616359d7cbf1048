"""Predictions on their images, and the curves of a run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granvit.errors import MissingDependencyError
from granvit.eval.cases import best_typical_worst
from granvit.eval.metrics import iou, rouge_l
from granvit.eval.predict import Answered, Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, TRUE = "#1a7f37", "#c6362c", "#ffd33d"


def sorted_columns(answered: Sequence[Answered], task: str, count: int = 3) -> dict[str, list[Answered]]:
    """Columns for :func:`draw_predictions`: the best, typical and worst answers of a task, one in a picture.

    By IoU for Caption2Bbox, by ROUGE-L for other tasks; see :func:`granvit.eval.cases.best_typical_worst`.

    Args:
        answered: images and what was answered.
        task: whose answers.
        count: of each, at most.
    """
    found = [Answered(image.pixels, (one,)) for image in answered for one in image.predictions if one.pair.task == task]
    columns = best_typical_worst([_worth(image.predictions[0]) for image in found], count)
    return {name: [found[i] for i in numbers] for name, numbers in columns.items() if numbers}


def _worth(prediction: Prediction) -> float:
    if prediction.pair.task != "caption_to_bbox":
        return rouge_l(prediction.answer, [prediction.pair.answer])
    if prediction.box is None or prediction.pair.box is None:
        return 0.0
    return iou(prediction.box, prediction.pair.box)


def draw_predictions(columns: Mapping[str, Sequence[Answered]], path: Path, *, title: str = "") -> None:
    """Images row by row, a column for each of several models or tasks.

    A caption stands at its region; a predicted box is drawn over the true one, which is dashed. Green is right, red is
    wrong.

    Args:
        columns: headings, and the same number of images for each.
        path: of the picture, a PNG.
        title: over all of it.
    """
    rows = max((len(images) for images in columns.values()), default=0)
    figure = new_figure(3.4 * len(columns), 3.6 * rows + 0.5)
    panels = figure.subplots(rows, len(columns), squeeze=False)
    for column, (heading, images) in enumerate(columns.items()):
        for row in range(rows):
            panel = panels[row][column]
            panel.set_axis_off()
            if row == 0:
                panel.set_title(heading, fontsize=10)
            if row < len(images):
                _draw(panel, images[row])
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, image: Answered) -> None:
    pixels = image.pixels.permute(1, 2, 0).numpy()
    panel.imshow(pixels, interpolation="lanczos")
    size = (pixels.shape[1], pixels.shape[0])
    for prediction in image.predictions:
        colour = RIGHT if prediction.right else WRONG
        if prediction.pair.task == "caption_to_bbox":
            _boxes(panel, prediction, size, colour)
        elif prediction.pair.box is not None:
            box = prediction.pair.box
            _frame(panel, box, size, colour, "solid")
            _text(panel, (box[0], box[3]), size, prediction.answer or "(nothing)", colour, "top")


def _boxes(panel: Axes, prediction: Prediction, size: tuple[int, int], colour: str) -> None:
    true = prediction.pair.box
    if true is not None:
        _frame(panel, true, size, TRUE, "dashed")
    if prediction.box is not None:
        _frame(panel, prediction.box, size, colour, "solid")
    place = prediction.box or true
    if place is not None:
        asked = prediction.pair.question.rpartition(":")[2].strip()
        text = asked if prediction.box is not None else f"{asked}: no box in the answer"
        _text(panel, (place[0], place[1]), size, text, colour, "bottom")


def _frame(panel: Axes, box: Sequence[float], size: tuple[int, int], colour: str, style: Any) -> None:
    from matplotlib.patches import Rectangle

    x, y = box[0] * size[0] - 0.5, box[1] * size[1] - 0.5
    width, height = (box[2] - box[0]) * size[0], (box[3] - box[1]) * size[1]
    panel.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style))


def _text(panel: Axes, place: tuple[float, float], size: tuple[int, int], text: str, colour: str, anchor: str) -> None:
    panel.text(
        place[0] * size[0],
        place[1] * size[1],
        textwrap.shorten(text, 28, placeholder="…"),
        color="white",
        fontsize=7,
        verticalalignment=anchor,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
        clip_on=True,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each stage: every term of the loss against steps, and the held-out losses as points.

    Args:
        metrics: as :func:`read_metrics` gives them.
        path: of the picture, a PNG.
    """
    stages = list(dict.fromkeys(line["stage"] for line in metrics))
    figure = new_figure(4.2 * max(len(stages), 1), 3.4)
    panels = figure.subplots(1, max(len(stages), 1), squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=False):
        lines = [line for line in metrics if line["stage"] == stage]
        for name in ("contrastive", "caption", "distillation"):
            _curve(panel, lines, name, name, marker=None)
        for name in ("contrastive", "caption"):
            _curve(panel, lines, f"heldout/{name}", f"{name}, held out", marker="o")
        panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        panel.grid(visible=True, which="both", alpha=0.25)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _curve(panel: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str, marker: str | None) -> None:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
        style = "none" if marker else "solid"
        panel.plot(*zip(*points, strict=True), label=label, marker=marker, linestyle=style, linewidth=1.4)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("pictures need matplotlib: pip install 'granvit[view]'") from None
    return Figure(figsize=(width, height), layout="constrained")
