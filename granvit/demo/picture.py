"""The picture: each photograph with its boxes, and what the pooling query of each box looks at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from granvit.reference.region_attention import cell_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from granvit.demo.photographs import Regions

# Okabe and Ito's palette, told apart with every common form of colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7")
HEAT = "inferno"  # perceptually uniform, and in order in grey
CAPTION = (
    "Region-pooled attention over the tokens under each box; the query asks which of them look like the one at the "
    "centre (+).\nThe ViT has random weights, so likeness here is colour and texture only."
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
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows, columns = len(regions.images), len(regions.labels) // len(regions.images)
    figure = Figure(figsize=(14, 2.3 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    axes = figure.subplots(rows, 1 + columns, squeeze=False, width_ratios=[1.7] + [1] * columns)
    for row, (name, image) in enumerate(zip(regions.names, regions.images, strict=True)):
        _photograph(axes[row, 0], name, image, regions.sizes[row])
        members = (regions.image_index == row).nonzero().flatten().tolist()
        for column, region in enumerate(members):
            colour = COLOURS[column % len(COLOURS)]
            box = regions.boxes[region]
            _outline(axes[row, 0], box * image.width, colour)
            _cut_out(axes[row, 1 + column], image, box, weights[region], regions.labels[region], colour)
    scale = ScalarMappable(Normalize(0, 1), cmap=HEAT)
    label = "weight, as a share of the box's largest"
    figure.colorbar(scale, ax=axes, aspect=40, shrink=0.6, pad=0.01, panchor=False, label=label)
    figure.supxlabel(CAPTION, fontsize=11, color="#333333")
    figure.savefig(path, dpi=110, facecolor="white")


def _photograph(ax: Any, name: str, image: Image, size: tuple[int, int]) -> None:
    width, height = size
    ax.imshow(image)
    ax.set(xlim=(0, width), ylim=(height, 0), anchor="N")
    ax.set_title(name, fontsize=12, fontweight="bold")
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
    everywhere = (0, size, size, 0)
    share = (weights / weights.max()).numpy()
    ax.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255, extent=everywhere)
    # Tokens without weight leave the photograph as it is.
    ax.imshow(share, cmap=HEAT, vmin=0, vmax=1, alpha=0.3 + 0.45 * share, extent=everywhere, interpolation="nearest")
    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
    for width, ink in ((4, "black"), (2, "white")):
        ax.plot(*centre, "+", color=ink, markersize=6 + 2 * width, markeredgewidth=width)
    ax.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], anchor="N")
    for spine in ax.spines.values():
        spine.set(edgecolor=colour, linewidth=3)
    ax.set_title(label, fontsize=12)
