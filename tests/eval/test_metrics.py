"""Metrics against the libraries that define them, published examples, and figures worked by hand."""

from __future__ import annotations

import math
import random
import sys

import pytest
import torch
from nltk.metrics.distance import edit_distance
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest
from torchvision.ops import box_iou

from granvit.errors import MissingDependencyError
from granvit.eval import metrics
from granvit.eval.metrics import (
    anls,
    exact_match,
    iou,
    levenshtein,
    rouge_l,
    vqa_accuracy,
    vqa_normalised,
    wilson,
)
from tests.model.support import random_boxes


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("A  red\nFox.", "a red fox", 1.0),
        ("Straße!?", "STRASSE", 1.0),
        ("a red fox", "a red. fox", 0.0),
        ("3.5", "3.5", 1.0),
        ("35", "3.5", 0.0),
        (".5", "5", 0.0),
        ("", "fox", 0.0),
        ("", "...", 0.0),
        ("...", "...", 1.0),
    ],
)
def test_exact_match(answer: str, reference: str, right: float) -> None:
    assert exact_match(answer, [reference]) == right
    assert exact_match(answer, ["other", reference]) == right


def test_rouge_l_is_googles() -> None:
    rng = random.Random()
    words = ["two", "Dogs", "running,", "run", "over", "the", "kite's", "tails", "under", "a", "3.5-metre", "tree"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(50):
        answer, *references = (" ".join(rng.choices(words, k=rng.randint(0, 8))) for _ in range(3))
        expected = max(scorer.score(x, answer)["rougeL"].fmeasure for x in references)
        assert rouge_l(answer, references) == expected
    # 3 of 4 words and 3 of 6 in order: precision 3/4, recall 1/2, F = 2 * 3/4 * 1/2 / (5/4).
    assert rouge_l("police killed the gunman", ["the police did kill a gunman"]) == pytest.approx(0.6)
    assert rouge_l("dogs", ["a dog"]) == pytest.approx(2 / 3)  # the stemmer
    assert rouge_l("fox", []) == 0.0


def test_without_rouge_score_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingDependencyError, match=r"granvit\[eval\]"):
        rouge_l("a", ["a"])
    metrics.rouge_scorer.cache_clear()


def test_iou_is_torchvisions() -> None:
    a, b = random_boxes(300).double(), random_boxes(300).double()
    a[:20, 2] = a[:20, 0]  # without width
    b[10:30, 3] = b[10:30, 1]
    b[30:40] = a[30:40]
    b[40:50] = a[40:50] + 2  # apart
    expected = box_iou(a, b).diagonal().nan_to_num()  # of two boxes without area
    pairs = zip(map(tuple, a.tolist()), map(tuple, b.tolist()), strict=True)
    found = torch.tensor([iou(x, y) for x, y in pairs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[30:40].tolist() == pytest.approx([1.0] * 10)
    assert iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0.0


def test_edit_distance_is_nltks() -> None:
    rng = random.Random()
    for _ in range(200):
        a, b = ("".join(rng.choices("abcé ", k=rng.randint(0, 9))) for _ in range(2))
        assert levenshtein(a, b) == edit_distance(a, b)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Coca Cola", ["coca cola", "coca cola company"], 1.0),
        ("Coca  cola ", ["Coca cola"], 1.0),
        ("coca coal", ["coca cola"], 1 - 2 / 9),  # two letters exchanged
        ("cola", ["coca cola"], 0.0),  # 5 of 9 are missing: above the threshold
        ("ab", ["abcd"], 0.0),  # just half: NL must be below
        ("abc", ["abcd"], 0.75),
        ("coca coal", ["pepsi", "coca cola", "coca-cola"], 1 - 2 / 9),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("x", [], 0.0),
    ],
)
def test_anls(answer: str, references: list[str], expected: float) -> None:
    assert anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dogs.", "dogs"),
        ("an apple, a pear", "apple pear"),
        ("Two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("p.m.", "pm"),
        ("a\nb\tc", "b c"),
        ("dogs!", "dogs"),
        ("its", "its"),
        ("", ""),
    ],
)
def test_vqa_answers_are_compared_as_officially(text: str, expected: str) -> None:
    assert vqa_normalised(text) == expected


@pytest.mark.parametrize(
    ("same", "expected"),
    # With k of 10 people: k times min((k-1)/3, 1) and (10-k) times min(k/3, 1), by ten.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_hand(same: int, expected: float) -> None:
    people = ["Yes."] * same + ["no"] * (10 - same)
    random.shuffle(people)
    assert vqa_accuracy("yes", people) == pytest.approx(expected)


def test_vqa_accuracy_needs_people() -> None:
    assert vqa_accuracy("a", ["a"] * 4) == 1.0
    with pytest.raises(ValueError, match="expected at least 4, got 3"):
        vqa_accuracy("a", ["a"] * 3)


def test_wilson_is_scipys() -> None:
    for count in (1, 7, 500):
        for right in {0, 1, count // 3, count}:
            expected = binomtest(right, count).proportion_ci(method="wilson")
            low, high = wilson(right, count)
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert not math.isnan(wilson(3, 3)[0])
