"""box_embedding: boxes as tokens, written into a sequence in place; "full" copies it, and adds weight gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import floors, workloads
from benchmarks.harness import Op, Problem
from benchmarks.peers.box_embedding import BOX_EMBEDDING
from benchmarks.providers import ours
from granvit import ops, reference


def problem(workload: workloads.Boxes, dtype: torch.dtype, device: torch.device, mode: str) -> Problem:
    generator = torch.Generator().manual_seed(workloads.SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    boxes = torch.rand(workload.boxes, 2, 2, generator=generator).sort(1).values.flatten(1)
    frequencies = draw(4, workload.frequencies)
    w1 = draw(workload.hidden, 2 * workload.frequencies) * (2 * workload.frequencies) ** -0.5
    w2 = draw(workload.width, workload.hidden) * workload.hidden**-0.5
    layers = (w1, 0.1 * draw(workload.hidden), w2, 0.1 * draw(workload.width))
    out = draw(workload.sequence, workload.width)
    index = torch.randperm(workload.sequence, generator=generator)[: workload.boxes]
    arguments = (boxes.to(device), frequencies.to(device), *(t.to(device, dtype) for t in layers))
    keywords = {"out": out.to(device, dtype), "index": index.to(device), "inplace": mode == "forward"}
    return Problem(arguments, leaves=(2, 3, 4, 5), keywords=keywords)


def specification(*arguments: Tensor, out: Tensor, index: Tensor, inplace: bool) -> Tensor:
    """The reference knows no in-place form; the values are the same."""
    return reference.box_embedding(*arguments, out=out, index=index)


OP = Op(
    "box_embedding",
    problem,
    ours("box_embedding", ops.box_embedding),
    specification,
    BOX_EMBEDDING,
    floors.box_embedding,
)


def test_box_embedding(measure: Callable[[Op], None]) -> None:
    measure(OP)
