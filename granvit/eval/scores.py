"""Answers on disk, what each is worth, and means over groups of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from granvit.eval.metrics import VQA_LEAST, Box, anls, exact_match, iou, rouge_l, vqa_accuracy

# Of a metric, what a table calls it.
HEADINGS = {
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "accuracy_50": "IoU ≥ 0.5",
    "accuracy_75": "IoU ≥ 0.75",
    "mean_iou": "mean IoU",
    "no_box": "no box",
    "anls": "ANLS",
    "vqa_accuracy": "VQA accuracy",
}
# Of groups that have one; others stand by the alphabet.
_ORDER = ("small", "medium", "large", "1", "2-4", "5-9", "10+", "none", "below half", "half or more")


@dataclass(frozen=True)
class Answer:
    """One line of ``answers.jsonl``.

    Attributes:
        chunk: number of the images that were answered together.
        source: name of the source.
        image: number of the image in its source.
        key: of the record.
        task: one of :data:`granvit.data.tasks.TASKS`, or ``"question"``.
        question: as it was asked.
        references: the right answers.
        answer: what the model wrote.
        region: number of the region in the record; None for the whole image.
        box: of the region, relative to the image.
        found: that the model meant, relative to the image; None where none was asked for or none can be read.
        groups: of which it is a part, by what they are made.
        number: ``question_id`` of a file of questions.
        wrong_image: key of the image that was shown in place of its own.
    """

    chunk: int
    source: str
    image: int
    key: str
    task: str
    question: str
    references: tuple[str, ...]
    answer: str
    region: int | None = None
    box: Box | None = None
    found: Box | None = None
    groups: dict[str, str] = field(default_factory=dict)
    number: str | None = None
    wrong_image: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Answer:
        """What :meth:`plain` wrote, after JSON."""
        tuples = {name: None if plain[name] is None else tuple(plain[name]) for name in ("references", "box", "found")}
        return cls(**{**plain, **tuples})


def score(answer: Answer) -> dict[str, float]:
    """What an answer is worth, by metric.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    if answer.task == "caption_to_bbox":
        assert answer.box is not None
        overlap = 0.0 if answer.found is None else iou(answer.box, answer.found)
        return {
            "accuracy_50": float(overlap >= 0.5),
            "accuracy_75": float(overlap >= 0.75),
            "mean_iou": overlap,
            "no_box": float(answer.found is None),
        }
    exact = {"exact_match": exact_match(answer.answer, answer.references)}
    if answer.task != "question":
        return {"rouge_l": rouge_l(answer.answer, answer.references), **exact}
    found = {"anls": anls(answer.answer, answer.references), **exact}
    if len(answer.references) >= VQA_LEAST:
        found["vqa_accuracy"] = vqa_accuracy(answer.answer, answer.references)
    return found


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Means by task, over all answers (``all``) and over each group (``by``: what groups are made by, group).

    Each has ``count``, the number of answers, and the metrics of :data:`HEADINGS`. VQA accuracy is over those questions
    that people answered often enough, ``vqa_count``. Groups are ``source``, and those of :attr:`Answer.groups`.
    """
    scored = [(answer, score(answer)) for answer in answers]
    found: dict[str, Any] = {}
    for task in dict.fromkeys(answer.task for answer in answers):
        of_task = [(answer, values) for answer, values in scored if answer.task == task]
        by: dict[str, dict[str, list[dict[str, float]]]] = {}
        for answer, values in of_task:
            for dimension, group in {"source": answer.source, **answer.groups}.items():
                by.setdefault(dimension, {}).setdefault(group, []).append(values)
        found[task] = {
            "all": _means([values for _, values in of_task]),
            "by": {name: {x: _means(groups[x]) for x in sorted(groups, key=_rank)} for name, groups in by.items()},
        }
    return found


def _rank(group: str) -> tuple[int, str]:
    return (_ORDER.index(group) if group in _ORDER else len(_ORDER), group)


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    means: dict[str, float] = {"count": len(scores)}
    for name in HEADINGS:
        values = [score[name] for score in scores if name in score]
        if values:
            means[name] = sum(values) / len(values)
            if name == "vqa_accuracy":
                means["vqa_count"] = len(values)
    return means
