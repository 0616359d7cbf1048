"""Streams, graphs, devices and waiting: how kernels live on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from granvit.ops import _dispatch
from tests.ops.calls import Call, make, on_kernels

if not torch.cuda.is_available():
    pytest.skip("these need a CUDA device", allow_module_level=True)

EVERY_KERNEL = pytest.mark.parametrize(("name", "device", "impl"), on_kernels("cuda"))
SLEEP_CYCLES = 100_000_000  # tens of milliseconds


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


def refill(call: Call, other: Call) -> None:
    with torch.no_grad():
        for t, value in zip(call.arguments, other.arguments, strict=True):
            t.copy_(value)


@EVERY_KERNEL
def test_runs_on_the_current_stream(name: str, device: str, impl: str) -> None:
    """The inputs are filled late, on a stream of their own: a launch on another would not see them."""
    call = make(name).on(device, impl)
    expected = call.run()
    late = call.on(device, impl)
    with torch.no_grad():
        for t in late.leaves:
            t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        refill(late, call)
        results = late.run()
    stream.synchronize()
    assert_same(results, expected)


@EVERY_KERNEL
def test_replays_as_a_graph(name: str, device: str, impl: str) -> None:
    call = make(name).on(device, impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run()
    if "packed" not in name:
        refill(call, make(name).on(device, impl))
    for _ in range(2):
        for t in results:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, call.run())


@EVERY_KERNEL
def test_waits_for_nothing(name: str, device: str, impl: str) -> None:
    call = make(name).on(device, impl)
    call.run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_KERNEL
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this needs two GPUs")
def test_runs_where_its_tensors_are(name: str, device: str, impl: str) -> None:
    first = make(name).on("cuda:0", impl)
    second = first.on("cuda:1", impl)
    assert torch.cuda.current_device() == 0
    for got, want in zip(second.run(), first.run(), strict=True):
        assert got.device.index == 1
        assert torch.equal(got.cpu(), want.cpu())
    assert torch.cuda.current_device() == 0


@EVERY_KERNEL
def test_values_are_checked_where_that_is_asked_for(
    name: str, device: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(name).on(device, impl)
    boxes = next(t for t in call.arguments if t.shape[1:] == (4,))
    with torch.no_grad():
        boxes[0, 2] = torch.nan
    call.run()
    monkeypatch.setattr(_dispatch, "CHECK_VALUES", True)
    with pytest.raises(ValueError, match="boxes: expected finite"):
        call.run()


def test_what_is_chosen_is_the_first_that_was_built() -> None:
    for op in ("roi_align", "region_distill", "region_attention", "box_embedding"):
        first = "cuda" if _dispatch.unavailable(op, "cuda", "cuda") is None else "triton"
        assert _dispatch.choose(op, None, "cuda", torch.bfloat16) == first
        assert _dispatch.choose(op, None, "cuda", torch.float64) == "reference"
