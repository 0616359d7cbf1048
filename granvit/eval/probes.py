"""What features are good for, by closed forms alone: nearest neighbours and a linear classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from granvit.eval.features import Features
from granvit.eval.metrics import wilson

_SHRINKAGE = 0.1
# Ridge penalties, as shares of the mean eigenvalue of the features' scatter.
PENALTIES = tuple(10.0**x for x in range(-4, 3))
_ROWS = 512  # queries at a time


class Whitening(NamedTuple):
    """Makes features of mean 0 and covariance near 1: ``(x - mean) @ matrix``."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, C)`` to ``(N, C)`` float64."""
        return (x.double() - self.mean) @ self.matrix


def whitening(x: Tensor) -> Whitening:
    """By the features of a training split.

    The covariance is shrunk first, a tenth of the way to the multiple of the identity with its trace: fewer features
    than channels leave directions in which nothing is known. The root is symmetric (ZCA).

    Args:
        x: ``(N, C)`` floating, N of at least 1.
    """
    wide = x.double()
    mean = wide.mean(0)
    centred = wide - mean
    covariance = centred.T @ centred / max(len(wide), 1)
    level = covariance.diagonal().mean().clamp(min=1e-12)  # constant features stay what they are, at 0
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * level * torch.eye(len(mean), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    return Whitening(mean, vectors @ torch.diag(values.rsqrt()) @ vectors.T)


def retrieve(x: Tensor, names: Sequence[str], image: Tensor) -> dict[str, float]:
    """Whether the regions most like one, among those of all other images, have its name.

    By the cosine. Queries are the regions whose name is in another image too; each sees all regions but those of its
    own image.

    Args:
        x: ``(R, C)`` floating.
        names: of the regions.
        image: ``(R,)`` integer.

    Returns:
        ``recall_at_1`` with ``low`` and ``high`` of its 95 % interval (Wilson), ``map`` (mean average precision),
        ``chance`` (the recall at 1 of a random order) and ``queries``; only ``queries`` where there are none.
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    label = torch.tensor([number[name] for name in names], dtype=torch.int64)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    right, precisions, chances = 0, [], []
    for begin in range(0, len(unit), _ROWS):
        part = slice(begin, begin + _ROWS)
        others = image[part, None] != image[None]
        same = (label[part, None] == label[None]) & others
        asked = same.any(1)
        if not asked.any():
            continue
        likeness = (unit[part] @ unit.T).masked_fill(~others, -torch.inf)[asked]
        order = likeness.argsort(dim=1, descending=True, stable=True)
        hits = same[asked].gather(1, order).double()
        right += int(hits[:, 0].sum())
        rank = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
        precisions.append((hits.cumsum(1) / rank * hits).sum(1) / hits.sum(1))
        chances.append(same[asked].sum(1) / others[asked].sum(1))
    queries = sum(map(len, precisions))
    if not queries:
        return {"queries": 0}
    low, high = wilson(right, queries)
    mean_precision, chance = (float(torch.cat(x).mean()) for x in (precisions, chances))
    return {
        "recall_at_1": right / queries,
        "low": low,
        "high": high,
        "map": mean_precision,
        "chance": chance,
        "queries": queries,
    }


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Least squares with a penalty on the weights, chosen among :data:`PENALTIES` by the leave-one-out error.

    That error is exact and needs no refitting: the residual of row i over ``1 - h_i``, with h the diagonal of the hat
    matrix, the intercept's ``1 / N`` in it (Allen's PRESS, 1974).

    Args:
        x: ``(N, C)`` float64.
        y: ``(N, K)`` float64.

    Returns:
        Weights ``(C, K)``, intercept ``(K,)`` and the penalty.
    """
    middle, level = x.mean(0), y.mean(0)
    u, s, vt = torch.linalg.svd(x - middle, full_matrices=False)
    projected = u.T @ (y - level)
    scale = float((s**2).sum()) / x.shape[1] or 1.0
    errors = []
    for penalty in PENALTIES:
        shrunk = s**2 / (s**2 + penalty * scale)
        leverage = (u**2 * shrunk).sum(1) + 1 / len(x)
        residual = y - level - u @ (shrunk[:, None] * projected)
        errors.append(float((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean()))
    best = PENALTIES[min(range(len(errors)), key=errors.__getitem__)] * scale
    weights = vt.T @ ((s / (s**2 + best))[:, None] * projected)
    return weights, level - middle @ weights, best


def classify(train: Tensor, train_names: Sequence[str], test: Tensor, test_names: Sequence[str]) -> dict[str, float]:
    """Accuracy of a linear classifier: ridge regression onto one-hot names, the largest wins.

    Names that the training split has less than twice are left out, and so is what has them in the test split.

    Args:
        train: ``(N, C)`` floating.
        train_names: N of them.
        test: ``(M, C)`` floating.
        test_names: M of them.

    Returns:
        ``accuracy`` with ``low`` and ``high`` of its 95 % interval (Wilson), ``majority`` (the share of the name that
        is the most frequent in training), ``classes``, ``train`` and ``test`` (regions); without the first four where
        there are less than two names or nothing to test.
    """
    often = Counter(train_names)
    known = {name: i for i, name in enumerate(sorted(name for name, count in often.items() if count > 1))}
    rows, test_rows = ([i for i, name in enumerate(x) if name in known] for x in (train_names, test_names))
    counts = {"classes": len(known), "train": len(rows), "test": len(test_rows)}
    if len(known) < 2 or not test_rows:
        return {**counts}
    label = torch.tensor([known[train_names[i]] for i in rows])
    truth = torch.tensor([known[test_names[i]] for i in test_rows])
    weights, intercept, _ = ridge(train[rows].double(), torch.nn.functional.one_hot(label).double())
    said = (test[test_rows].double() @ weights + intercept).argmax(1)
    right = int((said == truth).sum())
    low, high = wilson(right, len(truth))
    most = float((truth == label.bincount().argmax()).double().mean())
    return {"accuracy": right / len(truth), "low": low, "high": high, "majority": most, **counts}


def find_images(whole: Tensor, views: Tensor) -> dict[str, float]:
    """How often a view's nearest image, by the cosine, is the one that it is a view of.

    Args:
        whole: ``(N, C)`` floating.
        views: ``(N, C)`` floating.

    Returns:
        ``recall_at_1`` with ``low`` and ``high`` of its 95 % interval (Wilson), ``chance`` and ``queries``.
    """
    a, b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (whole, views))
    right = int(((b @ a.T).argmax(1) == torch.arange(len(a))).sum())
    low, high = wilson(right, len(a))
    return {"recall_at_1": right / len(a), "low": low, "high": high, "chance": 1 / len(a), "queries": len(a)}


def probe(train: Features, heldout: Features) -> dict[str, Any]:
    """All probes of a tower; every feature is whitened by the training split.

    Returns:
        ``regions``: by pool, ``retrieval`` (see :func:`retrieve`) and ``linear`` (see :func:`classify`); ``images``
        (see :func:`find_images`).
    """
    regions: dict[str, Any] = {}
    for pool, values in train.regions.items():
        if not len(values):
            continue
        white = whitening(values)
        x, y = white(values), white(heldout.regions[pool])
        regions[pool] = {
            "retrieval": retrieve(y, heldout.names, heldout.image),
            "linear": classify(x, train.names, y, heldout.names),
        }
    white = whitening(train.whole)
    return {"regions": regions, "images": find_images(white(heldout.whole), white(heldout.views))}
