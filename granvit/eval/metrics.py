"""What an answer is worth beside its references: text, boxes, and shares with an interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from granvit.errors import MissingDependencyError

Box = tuple[float, float, float, float]
_TRAILING = " .,;:!?"


def normalised(text: str) -> str:
    """Text as exact match compares it: without case, repeated white space, and punctuation at the end."""
    plain = " ".join(text.casefold().split())
    return plain.rstrip(_TRAILING) or plain  # a text of dots is no empty one


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where an answer is one of the references as :func:`normalised` has them, else 0."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004), the best over the references, 0 to 1.

    By Google's rouge-score with its Porter stemmer (``use_stemmer=True``), so "dogs" matches "dog". Its words are runs
    of the ASCII letters and digits: what is written in other alphabets counts for nothing.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    scorer = rouge_scorer()
    return float(max((scorer.score(x, answer)["rougeL"].fmeasure for x in references), default=0.0))


@cache
def rouge_scorer() -> Any:
    """What computes ROUGE-L.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingDependencyError("ROUGE-L needs rouge-score: pip install 'granvit[eval]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where neither has an area."""
    both = overlap(a, b)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


def overlap(a: Box, b: Box) -> float:
    """Area of the intersection of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity, the best over the references (ANLS of one question, Biten et al. 2019).

    ``1 - NL`` with NL the edit distance as a share of the longer text; 0 where NL is `threshold` or more. Case and
    repeated white space do not count.
    """
    said = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        true = " ".join(reference.lower().split())
        distance = levenshtein(said, true) / max(len(said), len(true), 1)
        if distance < threshold:
            best = max(best, 1 - distance)
    return best


def levenshtein(a: str, b: str) -> int:
    """Least number of characters to insert, delete or exchange to make one text of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


# As the VQA challenge's evaluation has them. It knows each contraction with one apostrophe forgotten.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_MENDED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(_DIGITS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def vqa_normalised(text: str) -> str:
    """An answer as the VQA challenge's evaluation compares it.

    Punctuation goes, or becomes a space where it stands between letters; then case, articles and white space go, number
    words to ten become digits, and forgotten apostrophes of contractions come back.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _PUNCTUATION:
        gone = f"{mark} " in text or f" {mark}" in text or _GROUPED.search(text)
        out = out.replace(mark, "" if gone else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", out).lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


VQA_LEAST = 4  # with fewer answers of people no answer could reach 1


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """How far people agree with an answer (Antol et al. 2015): the mean over all people left out one at a time of
    ``min(n / 3, 1)``, where n of the others gave it.

    All answers are compared as :func:`vqa_normalised` has them.

    Args:
        answer: of the model.
        answers: of people, ten by custom.

    Raises:
        ValueError: fewer than :data:`VQA_LEAST` answers of people.
    """
    if len(answers) < VQA_LEAST:
        raise ValueError(f"vqa_accuracy: answers: expected at least {VQA_LEAST}, got {len(answers)}")
    said = vqa_normalised(answer)
    same = [vqa_normalised(one) == said for one in answers]
    return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(same)


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share by Wilson (1927), 95 % where `z` is left out; it takes every case for independent.

    Args:
        right: how many of them.
        count: of all; where it is 0, nothing is known and the interval is 0 to 1.
        z: quantile of the normal distribution.
    """
    if not count:
        return 0.0, 1.0
    share = right / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
