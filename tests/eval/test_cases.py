"""How answers fail, which are shown, and what chance and intervals say of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from granvit.eval.cases import OUTCOMES, best_typical_worst, dealt, intervals, outcome, outcomes
from granvit.eval.metrics import wilson
from granvit.eval.scores import Answer, score

BOX = (0.2, 0.2, 0.4, 0.4)


def said(text: str, *references: str, image: int = 0, region: int = 0) -> Answer:
    return Answer(
        0, "s", image, f"k{image}", "bbox_to_caption", "what?", references or ("a red fox",), text, region, BOX
    )


def found(box: tuple[float, float, float, float] | None, *, image: int = 0, region: int = 0, true=BOX) -> Answer:
    return Answer(0, "s", image, f"k{image}", "caption_to_bbox", "where: fox", ("[]",), "", region, true, box)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("A red  fox.", "right"),
        ("", "nothing"),
        (" .", "other words"),
        ("a red dog", "near"),  # two words of three
        ("a redfix", "near"),  # two letters of nine
        ("blue whale", "another region"),
        ("the sun", "other words"),
        ("[0.1, 0.2, 0.3, 0.4]", "a box"),
        ("(3, 4, 5", "a box"),
    ],
)
def test_outcomes_of_captions(text: str, kind: str) -> None:
    company = [said("", "blue whale", region=1), said("", "the sun", region=0)]
    assert outcome(said(text), company) == kind


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        (None, "no box"),
        (BOX, "right"),
        ((0.2, 0.2, 0.4, 0.31), "right"),
        ((0.1, 0.1, 0.6, 0.6), "too large"),
        ((0.2, 0.2, 0.28, 0.28), "too small"),
        ((0.3, 0.3, 0.5, 0.5), "beside"),
        ((0.5, 0.5, 0.6, 0.6), "elsewhere"),
        ((0.4, 0.2, 0.6, 0.4), "elsewhere"),  # they touch
        ((0.7, 0.7, 0.9, 0.9), "another region"),
        ((0.5, 0.5, 0.5, 0.5), "elsewhere"),  # without an area
    ],
)
def test_outcomes_of_boxes(box: tuple | None, kind: str) -> None:
    company = [found(None, region=1, true=(0.7, 0.7, 0.9, 0.88)), found(None, region=0, true=(0.5, 0.5, 0.6, 0.6))]
    assert outcome(found(box), company) == kind


def test_outcomes_of_questions_and_of_whole_images() -> None:
    ask = Answer(0, "s", 0, "k", "question", "when?", ("1984", "in 1984"), "1984.")
    assert outcome(ask) == "right"
    assert outcome(replace(ask, answer="1985")) == "near"
    assert outcome(replace(ask, answer="never")) == "other words"
    assert outcome(replace(ask, task="global_caption")) == ""


def test_company_is_of_the_same_image_and_task() -> None:
    other = replace(said("x", "blue whale", region=1), image=1)
    assert outcomes([said("blue whale"), other]) == ["other words", "other words"]
    assert outcomes([said("blue whale"), replace(other, image=0)]) == ["another region", "other words"]
    assert all(kind in OUTCOMES["caption_to_bbox"] for kind in outcomes([found(BOX), found(None)]))


def test_best_typical_and_worst() -> None:
    scores = [random.random() for _ in range(31)]
    ranked = sorted(scores, reverse=True)
    chosen = best_typical_worst(scores, 3)
    assert [scores[i] for i in chosen["best"]] == ranked[:3]
    assert [scores[i] for i in chosen["worst"]] == ranked[:-4:-1]
    assert [scores[i] for i in chosen["typical"]] == ranked[14:17]
    assert best_typical_worst([], 3) == {"best": [], "typical": [], "worst": []}
    for count in range(1, 9):
        numbers = [i for part in best_typical_worst([0.0] * count, 2).values() for i in part]
        assert len(set(numbers)) == len(numbers) >= min(count, 3)
    draws = {tuple(best_typical_worst([1.0] * 20, 2, seed)["best"]) for seed in range(9)}
    assert len(draws) > 1


def test_chance_is_what_answers_of_other_images_are_worth() -> None:
    names = [f"name{i % 4}" for i in range(400)]
    answers = [said(name, name, image=i) for i, name in enumerate(names)]
    assert dealt(answers)["exact_match"] == pytest.approx(0.25, abs=0.08)  # 3.7 standard deviations
    same = [said("fox", "fox", image=i // 3, region=i) for i in range(9)]
    assert dealt(same) == {"rouge_l": 1.0, "exact_match": 1.0}
    assert dealt([said("fox", "fox", region=i) for i in range(3)]) == {}  # of one image
    boxes = [found(BOX if i % 2 else None, image=i) for i in range(300)]
    assert dealt(boxes)["no_box"] == pytest.approx(0.5, abs=0.11)


def test_intervals() -> None:
    rng = random.Random(1)
    answers = [found((0.2, 0.2, 0.2 + 0.2 * rng.random(), 0.4), image=i // 2, region=i) for i in range(80)]
    known = intervals(answers)
    right = sum(score(answer)["accuracy_50"] for answer in answers)
    assert known["accuracy_50"] == wilson(int(right), 80)
    mean = sum(score(answer)["mean_iou"] for answer in answers) / 80
    low, high = known["mean_iou"]
    assert low < mean < high
    assert known == intervals(answers)
    # What an image repeats tells nothing new.
    again = [replace(answer, region=answer.region + 100 * i) for i in range(9) for answer in answers]
    wide = intervals(again)["mean_iou"]
    assert wide[1] - wide[0] == pytest.approx(high - low, rel=1e-9)
