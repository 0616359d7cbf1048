"""Answers one by one: how each failed, which ones to show, and what answers are worth that belong to other images."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from granvit.eval.metrics import anls, exact_match, levenshtein, normalised, overlap, rouge_l, wilson
from granvit.eval.scores import Answer, score

# By task, what answers come to, from right to wrong, and what each means.
OUTCOMES: dict[str, dict[str, str]] = {
    "bbox_to_caption": {
        "right": "the words of a reference",
        "near": "half of the words (ROUGE-L of 0.5), or most of the letters",
        "another region": "the caption of another region of the same image",
        "a box": "coordinates in place of words",
        "other words": "none of these",
        "nothing": "an empty answer",
    },
    "caption_to_bbox": {
        "right": "IoU of at least 0.5",
        "another region": "IoU of at least 0.5 with the box of another region of the image",
        "too large": "holds most of the region, and more than half of it is something else",
        "too small": "lies mostly in the region and leaves out half of it or more",
        "beside": "overlaps with the region, less than half",
        "elsewhere": "does not touch the region",
        "no box": "no box can be read in the answer",
    },
    "question": {
        "right": "the words of a reference",
        "near": "less than half of the letters differ from a reference",
        "other words": "none of these",
        "nothing": "an empty answer",
    },
}
# The metric that tells a better answer from a worse one.
LEADING = {
    "global_caption": "rouge_l",
    "bbox_to_caption": "rouge_l",
    "caption_to_bbox": "mean_iou",
    "question": "anls",
}
SHARES = ("exact_match", "accuracy_50", "accuracy_75", "no_box")  # metrics whose every value is 0 or 1
_COORDINATES = re.compile(r"\s*[\[(]?\s*\d*\.?\d+\s*,\s*\d*\.?\d+\s*,")
_MOST = 0.8  # of a box
_LETTERS = 0.3  # that may differ of a near name
_DEALT = 1000  # answers at most that are dealt to other questions
_DRAWS = 1000  # of a bootstrap


def outcomes(answers: Sequence[Answer]) -> list[str]:
    """What each answer came to, one of :data:`OUTCOMES` of its task; "" for tasks that have none."""
    company: dict[tuple[str, int, str], list[Answer]] = {}
    for answer in answers:
        company.setdefault((answer.source, answer.image, answer.task), []).append(answer)
    return [outcome(answer, company[answer.source, answer.image, answer.task]) for answer in answers]


def outcome(answer: Answer, company: Sequence[Answer] = ()) -> str:
    """What an answer came to.

    Args:
        answer: of one of the tasks of :data:`OUTCOMES`; "" is returned for another.
        company: answers of the same task about the same image; it may be among them.
    """
    if answer.task == "caption_to_bbox":
        return _of_box(answer, [other for other in company if other.region != answer.region])
    if answer.task not in OUTCOMES:
        return ""
    if not normalised(answer.answer):
        return "nothing"
    if exact_match(answer.answer, answer.references):
        return "right"
    if answer.task == "question":
        return "near" if anls(answer.answer, answer.references) else "other words"
    if any(exact_match(answer.answer, other.references) for other in company if other.region != answer.region):
        return "another region"
    if rouge_l(answer.answer, answer.references) >= 0.5 or _spelt_like(answer):
        return "near"
    return "a box" if _COORDINATES.match(answer.answer) else "other words"


def _spelt_like(answer: Answer) -> bool:
    said = normalised(answer.answer)
    for reference in map(normalised, answer.references):
        if levenshtein(said, reference) <= _LETTERS * max(len(said), len(reference)):
            return True
    return False


def _of_box(answer: Answer, others: Sequence[Answer]) -> str:
    if answer.found is None:
        return "no box"
    if score(answer)["accuracy_50"]:
        return "right"
    assert answer.box is not None
    if any(score(replace(other, found=answer.found))["accuracy_50"] for other in others):
        return "another region"
    both = overlap(answer.box, answer.found)
    true, found = (overlap(box, box) for box in (answer.box, answer.found))
    if both <= 0:
        return "elsewhere"
    if both >= _MOST * true:
        return "too large"
    return "too small" if both >= _MOST * found else "beside"


def best_typical_worst(scores: Sequence[float], count: int, seed: int = 0) -> dict[str, list[int]]:
    """Numbers of the best, the median and the worst of some scores; none is in two of the lists.

    Among equal scores the draw decides, so that what is shown is not the first of a folder.

    Args:
        scores: larger is better.
        count: of each list, at most; fewer where there are not enough.
        seed: of the draw.
    """
    order = list(range(len(scores)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -scores[i])
    count = min(count, len(order) // 3) or (1 if order else 0)
    best, worst = order[:count], order[count:][::-1][:count]
    rest = order[count : len(order) - len(worst)]
    middle = max(0, (len(rest) - count) // 2)
    return {"best": best, "typical": rest[middle : middle + count], "worst": worst}


def dealt(answers: Sequence[Answer], seed: int = 0) -> dict[str, float]:
    """What the answers of one task are worth when each is given to a question about another image.

    That is what can be had without looking: by answering in the right form, and with what is asked for often.

    Args:
        answers: of one task, of two images at least.
        seed: of the draw.

    Returns:
        Means by metric; empty where there is no other image.
    """
    drawn = list(answers)
    rng = random.Random(seed)
    rng.shuffle(drawn)
    found: dict[str, list[float]] = {}
    for answer in drawn[:_DEALT]:
        for _ in range(20):
            other = rng.choice(drawn)
            if (other.source, other.image) != (answer.source, answer.image):
                for name, value in score(replace(answer, answer=other.answer, found=other.found)).items():
                    found.setdefault(name, []).append(value)
                break
    return {name: sum(values) / len(values) for name, values in found.items()}


def intervals(answers: Sequence[Answer], seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % intervals of the means of one task, by metric.

    Shares by Wilson's formula, which takes answers for independent; other means by a bootstrap over images, whose
    answers are not.

    Args:
        answers: of one task.
        seed: of the bootstrap.
    """
    values: dict[str, dict[tuple[str, int], list[float]]] = {}
    for answer in answers:
        for name, value in score(answer).items():
            values.setdefault(name, {}).setdefault((answer.source, answer.image), []).append(value)
    found = {}
    rng = np.random.default_rng(seed)
    for name, images in values.items():
        if name in SHARES:
            everything = [value for image in images.values() for value in image]
            found[name] = wilson(round(sum(everything)), len(everything))
            continue
        sums = np.array([(sum(image), len(image)) for image in images.values()])
        times = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), _DRAWS)  # [draws, images]
        totals = times @ sums
        low, high = np.quantile(totals[:, 0] / totals[:, 1], (0.025, 0.975))
        found[name] = (float(low), float(high))
    return found
