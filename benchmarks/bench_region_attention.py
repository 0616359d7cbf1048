"""region_attention: queries of each region over the tokens under its box; "full" adds the three gradients."""

from collections.abc import Callable

import torch

from benchmarks import floors, workloads
from benchmarks.harness import Op, Problem
from benchmarks.peers.region_attention import REGION_ATTENTION
from benchmarks.providers import ours
from granvit import ops, reference


def problem(workload: workloads.Regions, dtype: torch.dtype, device: torch.device, mode: str) -> Problem:
    boxes, image_index = (t.to(device) for t in workload.regions())
    heads = (workload.heads, workload.channels // workload.heads)
    query = workload.tokens(workload.num_regions, (workload.queries, 1), dtype, device, salt=0).unflatten(2, heads)
    key, value = (
        workload.tokens(workload.images, workload.grid, dtype, device, salt=salt).unflatten(2, heads) for salt in (1, 2)
    )
    return Problem((query, key, value, boxes, image_index, workload.grid), leaves=(0, 1, 2))


OP = Op(
    "region_attention",
    problem,
    ours("region_attention", ops.region_attention),
    reference.region_attention,
    REGION_ATTENTION,
    floors.region_attention,
)


def test_region_attention(measure: Callable[[Op], None]) -> None:
    measure(OP)
