"""The least that an op can cost: bytes that must move, and arithmetic that must happen.

A floor counts a token once, however many boxes see it, and only if one does; results and gradients are written once,
zeros included. In "full" mode forward and backward are two calls with foreign work between them, so what the backward
needs is read again, except where the op's forward already produces the gradient (region_distill).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.workloads import Boxes, Regions
from granvit.reference.region_attention import cell_weights
from granvit.reference.roi_align import sampling_weights


@dataclass(frozen=True)
class Floor:
    """Bytes and floating-point operations (a multiply-add counts as two)."""

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The time below which no implementation can get, at `bandwidth` bytes and `rate` operations a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class _Aligned:
    tokens: int  # read by at least one region
    cells: int
    mix: int  # multiply-adds a channel: blend rows, then columns


def _aligned(workload: Regions) -> _Aligned:
    (height, width), (h, w) = workload.grid, workload.output
    boxes, image_index = workload.regions()
    seen = torch.zeros(workload.images, height, width, dtype=torch.bool)
    mix = 0
    for box, image in zip(boxes.double(), image_index.tolist(), strict=True):
        a_y = sampling_weights(box[1] * height, box[3] * height, h, height, 2) != 0
        a_x = sampling_weights(box[0] * width, box[2] * width, w, width, 2) != 0
        rows, columns = a_y.any(0), a_x.any(0)
        seen[image] |= rows[:, None] & columns
        mix += int(a_y.sum()) * int(columns.sum()) + h * int(a_x.sum())
    return _Aligned(int(seen.sum()), workload.num_regions * h * w, mix)


def roi_align(workload: Regions, dtype: torch.dtype, mode: str) -> Floor:
    """Tokens read, cells written; the backward reads the cells' gradient and writes every token's."""
    a = _aligned(workload)
    row = workload.channels * dtype.itemsize
    moved, mix = (a.tokens + a.cells) * row, 2 * a.mix * workload.channels
    if mode == "forward":
        return Floor(moved, mix)
    return Floor(moved + (a.cells + workload.num_tokens) * row, 2 * mix)


def region_distill(workload: Regions, dtype: torch.dtype, mode: str) -> Floor:
    """Tokens and teacher read once, and every token's gradient written in the same pass."""
    a = _aligned(workload)
    row = workload.channels * dtype.itemsize
    moved = (a.tokens + a.cells) * row
    mix = 2 * a.mix * workload.channels
    difference = 3 * a.cells * workload.channels  # subtract, square, add
    if mode == "forward":
        return Floor(moved, mix + difference)
    return Floor(moved + workload.num_tokens * row, 2 * mix + difference)


def covered_cells(workload: Regions) -> Tensor:
    """How many tokens each region's box touches, and at the end how many at least one box touches: (R + 1,)."""
    boxes, image_index = workload.regions()
    seen = torch.zeros(workload.images, *workload.grid, dtype=torch.bool)
    counts = []
    for box, image in zip(boxes.double(), image_index.tolist(), strict=True):
        cells = cell_weights(box, *workload.grid) > 0
        seen[image] |= cells
        counts.append(int(cells.sum()))
    return torch.tensor([*counts, int(seen.sum())])


def region_attention(workload: Regions, dtype: torch.dtype, mode: str) -> Floor:
    """Queries and covered keys and values read, outputs written; backward likewise, and every gradient written."""
    *per_region, covered = covered_cells(workload).tolist()
    row = workload.channels * dtype.itemsize
    queries = workload.num_regions * workload.queries
    matmul = 2 * workload.queries * workload.channels * sum(per_region)
    moved = (2 * queries + 2 * covered) * row  # query and output; key and value
    if mode == "forward":
        return Floor(moved, 2 * matmul)
    again = (2 * queries + 2 * covered) * row  # query and the output's gradient; key and value
    written = (queries + 2 * workload.num_tokens) * row
    return Floor(moved + again + written, 6 * matmul)


def box_embedding(workload: Boxes, dtype: torch.dtype, mode: str) -> Floor:
    """Weights read, tokens written; training copies the sequence and computes the gradients of all weights."""
    features = 2 * workload.frequencies
    count, hidden, width = workload.boxes, workload.hidden, workload.width
    weights = (features * hidden + hidden + hidden * width + width) * dtype.itemsize
    boxes = 4 * 4 * count + 4 * 4 * workload.frequencies
    rows = count * width * dtype.itemsize
    layers = 2 * count * (features * hidden + hidden * width)
    trigonometry = 2 * count * 4 * workload.frequencies
    if mode == "forward":
        return Floor(weights + boxes + rows, layers + trigonometry)
    kept = (workload.sequence - count) * width * dtype.itemsize  # rows of the sequence that are only copied
    # The second layer's weights are needed again for the gradient of the hidden units; nothing needs the first layer's.
    again = rows + hidden * width * dtype.itemsize + weights
    gradients = 2 * count * (2 * hidden * width + features * hidden)
    return Floor(weights + boxes + rows + 2 * kept + again, layers + trigonometry + gradients)
