"""The judge of the op tests: it has to see what is wrong, and to let bad luck pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support import Comparison, assert_within_budget


def errors(ours: Callable[[], float], stock: Callable[[], float]) -> Callable[[], Iterator[Comparison]]:
    """Comparisons of one number, 0, with these errors."""

    def draw() -> Iterator[Comparison]:
        exact = torch.zeros(1, dtype=torch.float64)
        yield "number", torch.tensor([ours()]), torch.tensor([stock()]), exact

    return draw


def test_errors_like_those_of_stock_pass() -> None:
    assert_within_budget(errors(lambda: 1.9e-3, lambda: 1e-3))


def test_a_larger_error_on_average_fails() -> None:
    with pytest.raises(AssertionError, match="^number: errors of "):
        assert_within_budget(errors(lambda: 2.1e-3, lambda: 1e-3))


def test_one_wrong_draw_of_all_fails() -> None:
    count = iter(range(1000))
    with pytest.raises(AssertionError, match="^number: errors of "):
        assert_within_budget(errors(lambda: 1.0 if next(count) == 5 else 0.0, lambda: 1e-3))


def test_a_first_look_with_bad_luck_gets_a_second() -> None:
    count = iter(range(1000))
    assert_within_budget(errors(lambda: 3e-3 if next(count) < 8 else 1e-3, lambda: 1e-3))


@pytest.mark.parametrize(("ours", "stock"), [(torch.nan, 1e-3), (1e-3, torch.nan)])
def test_nan_fails(ours: float, stock: float) -> None:
    with pytest.raises(AssertionError, match="^number: "):
        assert_within_budget(errors(lambda: ours, lambda: stock))


def test_an_ulp_is_free() -> None:
    def draw() -> Iterator[Comparison]:
        exact: Tensor = torch.tensor([1.5], dtype=torch.float64)
        yield "number", torch.tensor([1.5 + 2**-23]), torch.tensor([1.5]), exact

    assert_within_budget(draw)


def test_float64_has_to_be_near() -> None:
    def draw() -> Iterator[Comparison]:
        exact = torch.ones(3, dtype=torch.float64)
        yield "number", exact + 1e-9, exact, exact

    with pytest.raises(AssertionError, match="number: "):
        assert_within_budget(draw)
