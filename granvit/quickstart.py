"""``granvit quickstart``: the whole recipe in miniature on scenes composed here, evaluated, reported and exported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from granvit.data.progress import progress_bar
from granvit.errors import UserError
from granvit.recipe import Recipe, load

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "miniature" / "cpu.yaml"
TASKS = {"bbox_to_caption": ("rouge_l", "exact_match"), "caption_to_bbox": ("accuracy_50", "mean_iou")}
_CONTROL = "-wrong-image"
_ASKED = 12  # held-out images
_TOKENS = 32  # of an answer, room for a box
_PROBED = 200  # training images that the linear probe learns from


def run(
    overrides: Sequence[str] = (), *, overwrite: bool = False, recipe: Path = RECIPE, console: Console | None = None
) -> int:
    """Trains the miniature recipe, asks its models about held-out scenes, writes a page about it, and exports it.

    A second call goes on where the first stopped.

    Args:
        overrides: ``key=value`` of the recipe.
        overwrite: begin anew.
        recipe: the YAML file.
        console: where to print.

    Returns:
        0, or what :func:`granvit.train.run.run` gives when it is stopped early.

    Raises:
        UserError: the recipe is not there, or something cannot be trained, read or written.
    """
    from granvit.eval.report import write_report
    from granvit.export.run import export
    from granvit.train.run import run as train

    console = console or Console(width=None)
    if not recipe.exists():
        raise UserError(
            "quickstart: the recipes are not part of the installed package; run this from a source checkout"
        )
    loaded = load(recipe, overrides)
    folder = Path(loaded.output)
    began = time.perf_counter()
    status = train(loaded, overwrite=overwrite, console=console)
    if status:
        return status
    evaluations = _evaluate(loaded, folder, console)
    console.print(_table(evaluations))
    _probe(loaded, folder, console)
    with _bar("report") as tell:
        page = write_report(folder, progress=lambda name, done, total: tell(done, total))
    exported = folder / "llava"
    if not exported.exists():
        export(folder, "llava", output=exported, verify=True, console=console)
    for what, path in (("what was trained, in figures and pictures", page), ("for plain transformers", exported)):
        console.print(f"{path}: {what}", highlight=False, soft_wrap=True)
    console.print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    return 0


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    with progress_bar() as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _evaluate(recipe: Recipe, folder: Path, console: Console) -> dict[str, dict[str, Any]]:
    """What the model answers before training, after each stage that asks, and after the last with the wrong image."""
    from granvit.eval.answers import read_evaluation
    from granvit.eval.opening import of_recipe
    from granvit.eval.questions import Asking
    from granvit.eval.report_run import BEFORE, EVALUATION
    from granvit.eval.runner import Settings, evaluate
    from granvit.train.checkpoints import MODEL
    from granvit.train.run import save_start

    stages = [stage for stage in recipe.stages if stage.objective == "caption"]
    first = stages[0]
    asking = Asking(tuple(TASKS), first.regions, first.prompt, first.style)
    models = {BEFORE: folder / BEFORE} | {stage.name: folder / stage.name / MODEL for stage in stages}
    models[stages[-1].name + _CONTROL] = models[stages[-1].name]
    found = {}
    for name, model in models.items():
        place = folder / EVALUATION / name
        report = read_evaluation(place)
        if report is None:
            console.print(f"held-out questions: {_shown(name)}", highlight=False)
            if name == BEFORE:
                save_start(recipe, model)
            settings = Settings(
                asking, _ASKED, wrong_image=name.endswith(_CONTROL), max_new_tokens=_TOKENS, device=_device()
            )
            with _bar("images") as tell:
                report = evaluate(model, of_recipe(recipe), settings, place, progress=tell)
            if name == BEFORE:
                shutil.rmtree(model)  # as large as any, and made again by its seed
        found[name] = report
    return found


def _probe(recipe: Recipe, folder: Path, console: Console) -> None:
    """What the tower alone can tell apart, before training and after each stage that trains it."""
    from granvit.eval.comparison import ProbeSettings, compare, table
    from granvit.eval.features import Tower
    from granvit.eval.opening import of_recipe, open_tower
    from granvit.eval.report_run import BEFORE, EVALUATION
    from granvit.train.checkpoints import MODEL, RESOLVED

    def tower(name: str, place: Path) -> Tower:
        return replace(open_tower(str(place)), name=name)

    stages = [stage.name for stage in recipe.stages if "vision" in stage.train]
    towers = {BEFORE: folder / RESOLVED} | {name: folder / name / MODEL for name in stages}
    train, heldout = (of_recipe(recipe, split, unique=False) for split in ("train", "heldout"))
    settings = ProbeSettings(train_images=_PROBED, images=None, device=_device())
    with _bar("probes") as tell:
        report = compare(
            [partial(tower, *item) for item in towers.items()],
            train,
            heldout,
            settings,
            folder / EVALUATION,
            max_broken=recipe.data.max_broken,
            progress=lambda name, done, total: tell(done, total),
        )
    console.print(table(report))


def _shown(name: str) -> str:
    return name.removesuffix(_CONTROL) + (", wrong image" if name.endswith(_CONTROL) else "")


def _table(evaluations: dict[str, dict[str, Any]]) -> Table:
    from granvit.eval.scores import HEADINGS

    made = Table("held-out questions", title_justify="left")
    for metrics in TASKS.values():
        for metric in metrics:
            made.add_column(HEADINGS[metric], justify="right")
    for name, report in evaluations.items():
        cells = [
            f"{report['metrics'][task]['all'][metric]:.3f}" for task, metrics in TASKS.items() for metric in metrics
        ]
        made.add_row(_shown(name), *cells)
    return made
