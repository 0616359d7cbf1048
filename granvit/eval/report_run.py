"""What lies in the folder of a run, read for its report."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.data.sources import Source
from granvit.errors import UserError
from granvit.eval.answers import read_answers, read_evaluation
from granvit.eval.scores import Answer
from granvit.eval.sources import of_identity
from granvit.recipe import Recipe, load
from granvit.train.checkpoints import MODEL, RESOLVED
from granvit.train.log import METRICS, read_metrics

EVALUATION, BEFORE, PROBES = "evaluation", "before", "probes.json"
_PARTS = {
    "vision_tower": "vision",
    "multi_modal_projector": "projector",
    "language_model": "language",
    "lm_head": "language",
}


class ReportError(UserError):
    """A run that there is nothing to report of, or a page that cannot be written; the text names the file."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of one model of the run.

    Attributes:
        name: of its folder: a stage, or :data:`BEFORE`.
        report: what ``evaluation.json`` holds.
        answers: all of them.
    """

    name: str
    report: dict[str, Any]
    answers: list[Answer]

    def of(self, task: str) -> list[Answer]:
        """The answers of a task."""
        return [answer for answer in self.answers if answer.task == task]


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: of the run.
        recipe: as it was resolved.
        metrics: the lines of its log; empty where there is none.
        evaluations: in the order of training.
        controls: evaluations with the wrong image, by the name of the evaluation that they belong to.
        probes: what ``probes.json`` holds; None where there is none.
        missing: sentences about what is not there.
    """

    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluated]
    controls: dict[str, Evaluated]
    probes: dict[str, Any] | None
    missing: list[str]

    def model(self, stage: str) -> Path:
        """Folder of the model that a stage left."""
        return self.folder / stage / MODEL


def read_run(folder: str | Path) -> Run:
    """Reads what is there of a run; what is not is named in :attr:`Run.missing`.

    Evaluations lie under ``evaluation/<stage>``, one of the model before training under ``evaluation/before``; one
    with the wrong image may have any other name that begins with the name of its stage. Probes lie in
    ``evaluation/probes.json``.

    Raises:
        UserError: no run, or a file of it that is no such file.
    """
    folder = Path(folder)
    if not (folder / RESOLVED).is_file():
        raise ReportError(f"{folder}: expected the folder of a run; it has no {RESOLVED}")
    recipe, missing = load(folder / RESOLVED), []
    metrics: list[dict[str, Any]] = []
    if (folder / METRICS).is_file():
        try:
            metrics = read_metrics(folder / METRICS)
        except ValueError as error:
            raise ReportError(f"{folder / METRICS}: is no log of a run: {error}") from error
    else:
        missing.append(f"no {METRICS}: there are no curves")
    stages = [stage.name for stage in recipe.stages]
    missing += [f"stage {name} is not finished" for name in stages if not (folder / name / MODEL).exists()]
    found = _evaluations(folder / EVALUATION)
    plain = {name: one for name, one in found.items() if not one.report["config"].get("wrong_image")}
    controls: dict[str, Evaluated] = {}
    for name, one in found.items():
        # The longest name that fits: stage-2 is no control of stage.
        owners = [owner for owner in (*stages, BEFORE) if name.startswith(owner)]
        if name not in plain and owners:
            controls[max(owners, key=len)] = one
    order = [BEFORE, *stages]
    answering = [BEFORE, *(stage.name for stage in recipe.stages if stage.objective == "caption")]
    missing += [f"no evaluation {_whose(name)}" for name in answering if name not in plain]
    rest = [name for name in plain if name not in order]
    evaluations = [plain[name] for name in (*order, *rest) if name in plain]
    probes = _json(folder / EVALUATION / PROBES)
    if probes is None:
        missing.append("no probes")
    return Run(folder, recipe, metrics, evaluations, controls, probes, missing)


def _whose(name: str) -> str:
    return "before training" if name == BEFORE else f"after stage {name}"


def _evaluations(folder: Path) -> dict[str, Evaluated]:
    found = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        report = read_evaluation(place)
        if report is not None:
            found[place.name] = Evaluated(place.name, report, read_answers(place))
    return found


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    return found


def parameters(run: Run) -> dict[str, int]:
    """Numbers of the last finished model by part, from the heads of its files; empty where none is finished."""
    from safetensors import safe_open

    for stage in reversed(run.recipe.stages):
        if not run.model(stage.name).exists():
            continue
        found: dict[str, int] = defaultdict(int)
        for path in sorted(run.model(stage.name).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = file.keys()
                for name in names:
                    part = next((_PARTS[key] for key in _PARTS if key in name), "prompts")
                    found[part] += math.prod(file.get_slice(name).get_shape())
        return dict(found)
    return {}


def sources_of(report: dict[str, Any]) -> dict[str, Source]:
    """The sources that an evaluation asked about, by name, those that are still there."""
    found: dict[str, Source] = {}
    for plain in report["config"]["sources"]:
        try:
            source = of_identity(plain)
        except UserError:
            continue  # it is not there any more; the page says which pictures it lacks
        if json.loads(json.dumps(source.identity())) == plain:
            found[source.name] = source
    return found
