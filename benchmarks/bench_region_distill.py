"""region_distill_loss: the loss of the aligned student against the teacher; "full" adds the student's gradient."""

from collections.abc import Callable

import torch

from benchmarks import floors, workloads
from benchmarks.harness import Op, Problem
from benchmarks.peers.roi_align import REGION_DISTILL
from benchmarks.providers import ours
from granvit import ops, reference


def problem(workload: workloads.Regions, dtype: torch.dtype, device: torch.device, mode: str) -> Problem:
    boxes, image_index = (t.to(device) for t in workload.regions())
    student = workload.tokens(workload.images, workload.grid, dtype, device, salt=0)
    teacher = workload.tokens(workload.num_regions, workload.output, dtype, device, salt=1)
    return Problem((student, teacher, boxes, image_index, workload.grid, workload.output), leaves=(0,))


OP = Op(
    "region_distill",
    problem,
    ours("region_distill", ops.region_distill_loss),
    reference.region_distill_loss,
    REGION_DISTILL,
    floors.region_distill,
)


def test_region_distill(measure: Callable[[Op], None]) -> None:
    measure(OP)
