"""roi_align: resample the tokens under each box; "full" adds the gradient of the tokens."""

from collections.abc import Callable

import torch

from benchmarks import floors, workloads
from benchmarks.harness import Op, Problem
from benchmarks.peers.roi_align import ROI_ALIGN
from benchmarks.providers import ours
from granvit import ops, reference


def problem(workload: workloads.Regions, dtype: torch.dtype, device: torch.device, mode: str) -> Problem:
    boxes, image_index = (t.to(device) for t in workload.regions())
    tokens = workload.tokens(workload.images, workload.grid, dtype, device, salt=0)
    return Problem((tokens, boxes, image_index, workload.grid, workload.output), leaves=(0,))


OP = Op("roi_align", problem, ours("roi_align", ops.roi_align), reference.roi_align, ROI_ALIGN, floors.roi_align)


def test_roi_align(measure: Callable[[Op], None]) -> None:
    measure(OP)
