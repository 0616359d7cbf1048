"""Figures for pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("pictures need matplotlib: pip install 'granvit[view]'") from None
    return Figure(figsize=(width, height), layout="constrained")
