"""The modules under DDP and FSDP2: two processes with half a batch each make the gradients of one with all."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.nn.support import KINDS, Harness, inputs
from tests.ranks import WORLD, needs_gloo, on_two

IMAGES, PER_IMAGE = 4, 3


def gradients(model, arguments):
    model(*arguments).backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def worker(rank: int, port: int, wrap: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        for kind in KINDS:
            check(kind, rank, wrap)
    finally:
        dist.destroy_process_group()


def check(kind: str, rank: int, wrap: str) -> None:
    torch.manual_seed(0)
    model, single = Harness(kind), Harness(kind)
    single.load_state_dict(model.state_dict())
    tokens, boxes, image_index, teacher = inputs(IMAGES, PER_IMAGE)
    expected = gradients(single, (tokens, boxes, image_index, teacher))

    own_images = slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
    own_regions = slice(own_images.start * PER_IMAGE, own_images.stop * PER_IMAGE)
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        if any(True for _ in model.region.parameters()):
            fully_shard(model.region, mesh=mesh)
        fully_shard(model, mesh=mesh)
    index = image_index[own_regions] - own_images.start
    found = gradients(model, (tokens[own_images], boxes[own_regions], index, teacher[own_regions]))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{kind} {wrap} {n}: {text}"
        )


@needs_gloo
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_processes_make_the_gradients_of_one(wrap):
    on_two(worker, wrap)
