"""Attention and similarity of query points, drawn over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from granvit.data.images import ImageError, decode
from granvit.errors import UserError, why_not_written
from granvit.eval.attention import Cell, query_attention, query_similarity
from granvit.eval.features import Tower
from granvit.eval.picture import new_figure
from granvit.geometry import BoxTransform
from granvit.model.tower import blocks_of, grid_of, normalise, patch_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
ATTENTION, SIMILARITY = "share of attention", "cosine similarity"
_COLOURS = {ATTENTION: "inferno", SIMILARITY: "viridis"}
_COLUMNS = 4
_WIDTH = 2.1  # of a panel, in inches
_OPACITY = 0.66
_CLIPPED = 0.995  # of the values are within the scale: a few tokens that all others look at must not darken the rest


class LookError(UserError):
    """A picture that cannot be made; the text says why."""


@dataclass(frozen=True)
class Looked:
    """Maps of one tower over one image.

    Attributes:
        title: of the tower.
        maps: ``(panels, rows, columns)``.
        captions: of each panel.
        points: the query of each panel, x and y relative to the image.
        extent: of the maps in pixels of the image: left, right, bottom, top. What the tower sees as a frame around the
            image leads out of it.
        unit: :data:`ATTENTION` or :data:`SIMILARITY`.
    """

    title: str
    maps: Tensor
    captions: tuple[str, ...]
    points: tuple[Point, ...]
    extent: tuple[float, float, float, float]
    unit: str


def look(
    tower: Tower,
    image: Tensor,
    points: Sequence[Point],
    *,
    title: str,
    layers: Sequence[int] = (-1,),
    heads: bool = False,
    similarity: bool = False,
) -> Looked:
    """What a tower makes of the tokens at some points.

    The image is letterboxed, as for training.

    Args:
        tower: to look at.
        image: uint8 ``(3, H, W)``.
        points: x and y relative to the image, 0 to 1.
        title: of the tower.
        layers: as for :func:`granvit.eval.attention.query_attention`; several need a single point.
        heads: each head apart, of one point and layer, in place of their mean.
        similarity: of features, in place of attention.

    Raises:
        LookError: points outside of the image, or more than one panel each way can show.
        ValueError: a layer that the tower lacks.
    """
    if (len(layers) > 1 or heads) and len(points) > 1:
        raise LookError(f"query: expected one point where layers or heads are drawn apart, got {len(points)}")
    if heads and (similarity or len(layers) > 1):
        raise LookError("heads: expected attention of one layer")
    for x, y in points:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise LookError(f"query: expected x and y relative to the image, 0 to 1, got {x:g},{y:g}")
    size = (tower.size, tower.size)
    transform = BoxTransform.letterbox((image.shape[1], image.shape[2]), size)
    pixels = normalise(transform.pixels(image)[None], tower.mean, tower.std, tower.module.dtype)
    cells = [_cell(tower, transform, point) for point in points]
    count = len(blocks_of(tower.module))
    numbers = [layer if layer >= 0 else count + 1 + layer for layer in layers]
    extent = _extent(tower, transform)
    if similarity:
        maps = query_similarity(tower.module, pixels, cells, layers).flatten(0, 1)
        captions = [_caption(numbers, number, q) for number in numbers for q in range(len(points))]
        unit = SIMILARITY
    else:
        found = query_attention(tower.module, pixels, cells, layers)
        maps, prefix = found.patches, found.prefix
        if heads:
            captions = [f"head {i + 1}" for i in range(maps.shape[1])]
            maps, prefix = maps[0, :, 0], prefix[0, :, 0]
        else:
            captions = [_caption(numbers, number, q) for number in numbers for q in range(len(points))]
            maps, prefix = maps.mean(1).flatten(0, 1), prefix.mean(1).flatten()
        outside = maps.masked_fill(_inside(transform, maps.shape[1:], extent), 0.0).sum((-1, -2))
        captions = [
            "\n".join(filter(None, (caption, _elsewhere(float(p), float(o)))))
            for caption, p, o in zip(captions, prefix, outside, strict=True)
        ]
        unit = ATTENTION
    shown = tuple(points) * (len(maps) // len(points))
    return Looked(title, maps.cpu(), tuple(captions), shown, extent, unit)


def read_image(path: Path) -> Tensor:
    """An image file, upright and in RGB: uint8 ``(3, H, W)``.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return torch.from_numpy(np.array(decode(data, name=str(path)))).permute(2, 0, 1)


def _caption(numbers: Sequence[int], number: int, query: int) -> str:
    return f"layer {number}" if len(numbers) > 1 else f"query {query + 1}"


def _elsewhere(prefix: float, outside: float) -> str:
    """Where the attention went that the picture does not show."""
    parts = [("class, registers", prefix), ("black frame", outside)]
    return ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005)


def _cell(tower: Tower, transform: BoxTransform, point: Point) -> Cell:
    """The patch under a point of the image; the nearest, where the grid ends before the frame does."""
    rows, columns = grid_of(tower.module, transform.target)
    height, width = patch_of(tower.module)
    x, y, _, _ = transform.boxes(torch.tensor([*point, *point], dtype=torch.float64)).tolist()
    row, column = int(y * transform.target[0] // height), int(x * transform.target[1] // width)
    return min(row, rows - 1), min(column, columns - 1)


def _extent(tower: Tower, transform: BoxTransform) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the grid in pixels of the image."""
    rows, columns = grid_of(tower.module, transform.target)
    height, width = patch_of(tower.module)
    corner = (columns * width / transform.target[1], rows * height / transform.target[0])
    box = transform.inverse().boxes(torch.tensor([0.0, 0.0, *corner], dtype=torch.float64)).tolist()
    image_height, image_width = transform.source
    return box[0] * image_width, box[2] * image_width, box[3] * image_height, box[1] * image_height


def _inside(transform: BoxTransform, grid: Sequence[int], extent: Sequence[float]) -> Tensor:
    """Of the patches, those that show some of the image."""
    left, right, bottom, top = extent
    height, width = transform.source
    y0, x0 = (torch.arange(n, dtype=torch.float64) / n for n in grid)
    tall, wide = (bottom - top) / grid[0], (right - left) / grid[1]
    near = 1e-6  # of a pixel, which rounding must not turn into a patch that shows something
    rows = ((top + y0 * (bottom - top)) < height - near) & ((top + y0 * (bottom - top) + tall) > near)
    columns = ((left + x0 * (right - left)) < width - near) & ((left + x0 * (right - left) + wide) > near)
    return rows[:, None] & columns


def draw_looks(image: Tensor, looks: Sequence[Looked], out: Path | BinaryIO, *, title: str = "") -> None:
    """The image with its query points, and beside it a panel for each map, on one scale for all.

    Args:
        image: uint8 ``(3, H, W)``.
        looks: of one unit; each begins a row of its own.
        out: a PNG.
        title: over all of it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        LookError: it cannot be written.
    """
    pixels = image.permute(1, 2, 0).numpy()
    columns = 1 + min(_COLUMNS - 1, max(len(each.maps) for each in looks))
    rows = [math.ceil(len(each.maps) / (columns - 1)) for each in looks]
    tall = _WIDTH * min(2.0, max(0.4, pixels.shape[0] / pixels.shape[1])) + 0.5
    figure = new_figure(_WIDTH * columns + 1.15, tall * sum(rows) + (0.4 if title else 0.0))
    panels = figure.subplots(sum(rows), columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    scale = _scale(looks)
    shown: Any = None
    top = 0
    for each, count in zip(looks, rows, strict=True):
        first = panels[top][0]
        first.imshow(pixels)
        first.set_title(each.title, fontsize=11, loc="left")
        for number, point in enumerate(dict.fromkeys(each.points), 1):
            _mark(first, point, pixels.shape, str(number))
        for i, (values, caption, point) in enumerate(zip(each.maps, each.captions, each.points, strict=True)):
            panel = panels[top + i // (columns - 1)][1 + i % (columns - 1)]
            shown = _overlay(panel, pixels, values, each, scale)
            panel.set_title(caption, fontsize=11, loc="left")
            _mark(panel, point, pixels.shape, "")
        top += count
    bar = figure.colorbar(shown, ax=panels.ravel().tolist(), shrink=0.85, aspect=25, pad=0.02)
    bar.set_label(looks[0].unit, fontsize=11)
    bar.ax.tick_params(labelsize=10)
    if looks[0].unit == ATTENTION:
        _mark_uniform(bar, looks[0].maps[0].numel())
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    try:
        if isinstance(out, Path):
            out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format="png")
    except OSError as error:
        raise LookError(f"{out}: {why_not_written(error)}") from error


def _scale(looks: Sequence[Looked]) -> tuple[float, float]:
    values = torch.cat([each.maps.flatten() for each in looks]).double()
    if looks[0].unit == SIMILARITY:
        return float(values.min()), 1.0
    return 0.0, max(float(np.quantile(values.numpy(), _CLIPPED)), 1e-12)


def _overlay(panel: Axes, pixels: Any, values: Tensor, look: Looked, scale: tuple[float, float]) -> Any:
    """A map over the image in grey, cut at its edges."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    left, right, bottom, top = (edge - 0.5 for edge in look.extent)  # imshow's pixels are around whole numbers
    panel.imshow(grey, cmap="gray", vmin=0, vmax=255)
    shown = panel.imshow(
        values.numpy(),
        cmap=_COLOURS[look.unit],
        vmin=scale[0],
        vmax=scale[1],
        extent=(left, right, bottom, top),
        alpha=_OPACITY,
        interpolation="nearest",
    )
    panel.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))
    return shown


def _mark(panel: Axes, point: Point, shape: Sequence[int], label: str) -> None:
    x, y = point[0] * shape[1] - 0.5, point[1] * shape[0] - 0.5
    # Two rings, so that one of them stands out of any ground.
    panel.plot(x, y, marker="o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3.2)
    panel.plot(x, y, marker="o", markersize=11, markerfacecolor="none", markeredgecolor="#4df0ff", markeredgewidth=1.6)
    if label:
        right = point[0] < 0.85
        panel.annotate(
            label,
            (x, y),
            xytext=(9 if right else -9, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=10,
            fontweight="bold",
            color="black",
            bbox={"facecolor": "#4df0ff", "edgecolor": "black", "linewidth": 0.6, "pad": 1.4},
        )


def _mark_uniform(bar: Any, patches: int) -> None:
    """On the scale, what every patch would have if all had the same."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    low, high = bar.mappable.get_clim()
    if low < 1 / patches < high:
        bar.ax.axhline(1 / patches, color="#4df0ff", linewidth=1.6)
        bar.ax.text(
            -0.3, 1 / patches, "even", transform=bar.ax.get_yaxis_transform(), fontsize=10, ha="right", va="center"
        )
