"""The picture: each photograph with its boxes, and what the pooling query of each box looks at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from granvit.reference.region_attention import cell_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from granvit.quickstart.photographs import Regions

# Okabe and Ito's palette, told apart with every common form of colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7")
CAPTION = (
    "Region-pooled attention over the tokens under each box: which tokens look like the one at the centre (+)? "
    "Bright is high, scaled to each box's maximum.\nThe ViT has random weights, so likeness is colour and texture only."
)


def attention_weights(query: Tensor, key: Tensor, box: Tensor, grid_size: tuple[int, int], scale: float) -> Tensor:
    """Weights of ``region_attention`` for one region, ``(Q, heads, H, W)``: zero outside the box, sum 1.

    Args:
        query: ``(Q, heads, dim)`` of the region.
        key: ``(H*W, heads, dim)`` of its image.
        box: ``(4,)`` relative to the image.
        grid_size: ``(H, W)``.
        scale: factor of the scores.
    """
    scores = scale * torch.einsum("qhd,nhd->qhn", query, key)
    cover = cell_weights(box.double(), *grid_size).flatten().to(scores.dtype)
    return (scores + cover.log()).softmax(-1).unflatten(-1, grid_size)


def draw(path: Path, regions: Regions, weights: Tensor) -> None:
    """Writes a row for each photograph: its boxes, then for every box the cut-out under its weights.

    Args:
        path: where the picture goes.
        regions: photographs and boxes.
        weights: ``(R, H, W)`` attention of each region over its image's grid.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(regions.images), len(regions.labels) // len(regions.images)
    figure = Figure(figsize=(13, 2.55 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    axes = figure.subplots(rows, 1 + columns, squeeze=False, width_ratios=[1.25] + [1] * columns)
    for row, (name, image) in enumerate(zip(regions.names, regions.images, strict=True)):
        _photograph(axes[row, 0], name, image, regions.sizes[row])
        members = (regions.image_index == row).nonzero().flatten().tolist()
        for column, region in enumerate(members):
            colour = COLOURS[column % len(COLOURS)]
            box = regions.boxes[region]
            _outline(axes[row, 0], box * image.width, colour)
            _cut_out(axes[row, 1 + column], image, box, weights[region], regions.labels[region], colour)
    figure.supxlabel(CAPTION, fontsize=10, color="#333333")
    figure.savefig(path, dpi=110, facecolor="white")


def _photograph(ax: Any, name: str, image: Image, size: tuple[int, int]) -> None:
    width, height = size
    ax.imshow(image)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_title(name, fontsize=11, fontweight="bold")
    ax.set_axis_off()


def _outline(ax: Any, pixels: Tensor, colour: str) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = pixels.tolist()
    # A dark line under the coloured one keeps it visible on any background.
    for width, edge in ((4.0, "black"), (2.0, colour)):
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=width, edgecolor=edge))


def _cut_out(ax: Any, image: Image, box: Tensor, weights: Tensor, label: str, colour: str) -> None:
    size = image.width
    x0, y0, x1, y1 = (box * size).tolist()
    grey = image.convert("L")
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
    shown = (weights / weights.max()).numpy()
    ax.imshow(shown, cmap="inferno", alpha=0.7, vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="nearest")
    ax.plot((x0 + x1) / 2, (y0 + y1) / 2, "+", color="white", markersize=10, markeredgewidth=2)
    ax.set_xlim(x0, x1)
    ax.set_ylim(y1, y0)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(edgecolor=colour, linewidth=3)
    ax.set_title(label, fontsize=11)
