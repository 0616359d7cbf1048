"""Probes on features whose answer is known, and closed forms against scikit-learn and plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeCV
from sklearn.metrics import average_precision_score

from granvit.eval.features import Features
from granvit.eval.probes import PENALTIES, classify, find_images, probe, retrieve, ridge, whitening


def separable(images: int, classes: int, channels: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Each class around a direction of its own, in an image with others."""
    centres = torch.eye(channels)[:classes] * 9
    label = torch.arange(images * classes) % classes
    return (
        centres[label] + 0.1 * torch.randn(len(label), channels),
        [f"class {i}" for i in label.tolist()],
        torch.arange(images).repeat_interleave(classes),
    )


def features_of(x: torch.Tensor, names: list[str], image: torch.Tensor, whole: torch.Tensor) -> Features:
    return Features({"region_attention": x, "roi_align": x + 1}, names, image, whole, whole + 0.01)


def test_what_can_be_told_apart_is() -> None:
    train, heldout = (features_of(*separable(n, 5, 12), torch.randn(n, 12)) for n in (30, 20))
    found = probe(train, heldout)
    for pool in ("region_attention", "roi_align"):
        assert found["regions"][pool]["retrieval"]["recall_at_1"] == 1.0
        assert found["regions"][pool]["retrieval"]["map"] == pytest.approx(1.0)
        assert found["regions"][pool]["retrieval"]["queries"] == 100
        linear = found["regions"][pool]["linear"]
        assert (linear["accuracy"], linear["classes"], linear["train"], linear["test"]) == (1.0, 5, 150, 100)
        assert linear["high"] == 1.0
        assert linear["low"] < 1.0
        assert linear["majority"] == pytest.approx(0.2)
    assert found["images"]["recall_at_1"] == 1.0


def within(right: float, count: int, share: float) -> bool:
    """In all but one in a million draws."""
    low, high = binom.interval(1 - 1e-6, count, share)
    return bool(low <= round(right * count) <= high)


def test_noise_is_found_as_often_as_by_chance() -> None:
    train, heldout = (features_of(*separable(n, 4, 10), torch.randn(n, 10)) for n in (60, 100))
    for features in (train, heldout):
        features.regions["roi_align"][:] = torch.randn_like(features.regions["roi_align"])
        features.views[:] = torch.randn_like(features.views)
    found = probe(train, heldout)
    retrieval, linear = (found["regions"]["roi_align"][x] for x in ("retrieval", "linear"))
    assert retrieval["chance"] == pytest.approx(99 / 396)
    assert within(retrieval["recall_at_1"], 400, retrieval["chance"])
    assert abs(retrieval["map"] - 0.25) < 0.03
    assert within(linear["accuracy"], 400, 0.25)
    assert found["images"]["chance"] == 0.01
    assert within(found["images"]["recall_at_1"], 100, 0.01)


def test_retrieval_is_a_plain_loop() -> None:
    rng = random.Random()
    count = 40
    names = [rng.choice("abcdefgh") for _ in range(count)] + ["alone"]
    image = torch.tensor([rng.randrange(9) for _ in names])
    x = torch.randn(count + 1, 5)
    cosine = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1)
    first, precisions = [], []
    for i in range(len(names)):
        others = [j for j in range(len(names)) if image[j] != image[i]]
        truth = [names[j] == names[i] for j in others]
        if any(truth):
            scores = cosine[i, others].numpy()
            first.append(truth[int(np.argmax(scores))])
            precisions.append(average_precision_score(truth, scores))
    found = retrieve(x, names, image)
    assert found["queries"] == len(first)
    assert found["recall_at_1"] == pytest.approx(np.mean(first))
    assert found["map"] == pytest.approx(np.mean(precisions))
    assert retrieve(x, [str(i) for i in range(count + 1)], image) == {"queries": 0}
    assert retrieve(x[:0], [], image[:0]) == {"queries": 0}


@pytest.mark.parametrize(("rows", "channels"), [(50, 8), (12, 30)])
def test_ridge_is_scikit_learns(rows: int, channels: int) -> None:
    x, y = torch.randn(rows, channels, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    y[:, 0] += x[:, 0] * 2
    weights, intercept, penalty = ridge(x, y)
    theirs = Ridge(alpha=penalty).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(weights.T, torch.from_numpy(theirs.coef_))
    torch.testing.assert_close(intercept, torch.from_numpy(theirs.intercept_))
    scale = float((x - x.mean(0)).square().sum()) / channels
    alphas = [p * scale for p in PENALTIES]
    errors = []
    for alpha in alphas:  # leaving each out and fitting anew
        left = []
        for i in range(rows):
            rest = [j for j in range(rows) if j != i]
            fitted = Ridge(alpha=alpha).fit(x[rest].numpy(), y[rest].numpy())
            left.append(((fitted.predict(x[i : i + 1].numpy())[0] - y[i].numpy()) ** 2).mean())
        errors.append(np.mean(left))
    assert penalty == pytest.approx(alphas[int(np.argmin(errors))])
    assert penalty == pytest.approx(RidgeCV(alphas=alphas).fit(x.numpy(), y.numpy()).alpha_)


def test_the_classifier_is_scikit_learns() -> None:
    x, names, _ = separable(20, 3, 6)
    x += torch.randn_like(x) * 6
    test, test_names = torch.randn(50, 6) * 6, random.choices(["class 0", "class 1", "class 2"], k=50)
    found = classify(x, [*names[:-1], "once"], test, [*test_names[:-1], "once"])
    assert (found["classes"], found["train"], found["test"]) == (3, 59, 49)
    label = torch.nn.functional.one_hot(torch.tensor([int(name[-1]) for name in names[:-1]])).double()
    penalty = ridge(x[:-1].double(), label)[2]
    theirs = RidgeClassifier(alpha=penalty).fit(x[:-1].double().numpy(), names[:-1])
    assert found["accuracy"] == pytest.approx(theirs.score(test[:-1].double().numpy(), test_names[:-1]))


def test_names_that_never_repeat_leave_nothing_to_classify() -> None:
    x = torch.randn(6, 4)
    names = list("abcdef")
    assert classify(x, names, x, names) == {"classes": 0, "train": 0, "test": 0}
    found = probe(features_of(x, names, torch.arange(6), x), features_of(x, names, torch.arange(6), x))
    assert found["regions"]["roi_align"] == {
        "retrieval": {"queries": 0},
        "linear": {"classes": 0, "train": 0, "test": 0},
    }
    assert found["images"]["recall_at_1"] == 1.0
    none = Features({}, [], torch.empty(0, dtype=torch.int64), x, x)
    assert probe(none, none)["regions"] == {}


def test_whitening() -> None:
    x = torch.randn(4000, 6) @ torch.randn(6, 6) + 5
    white = whitening(x)
    assert white(x).mean(0).abs().max() < 1e-9
    covariance = (x - x.mean(0)).double().T @ (x - x.mean(0)).double() / len(x)
    shrunk = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    # Its inverse, since the matrix is the symmetric root.
    torch.testing.assert_close(
        white.matrix @ white.matrix @ shrunk, torch.eye(6, dtype=torch.float64), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(white.matrix, white.matrix.T)
    assert whitening(torch.ones(3, 4))(torch.ones(3, 4)).abs().max() == 0.0
    assert whitening(torch.randn(2, 9))(torch.randn(5, 9)).isfinite().all()


def test_find_images() -> None:
    x = torch.randn(7, 5)
    assert find_images(x, x * 3)["recall_at_1"] == 1.0
    assert find_images(x, x.flip(0))["recall_at_1"] == pytest.approx(1 / 7)
