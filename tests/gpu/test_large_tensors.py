"""Tensors of more than 2^31 elements: what lies at their end is computed as if it lay alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from granvit.ops import box_embedding, region_attention, region_distill_loss, roi_align
from tests.support import kernels, random_boxes

if not torch.cuda.is_available():
    pytest.skip("these need a CUDA device", allow_module_level=True)

GIBIBYTE = 2**30
CHANNELS, SIDE = 1152, 800
IMAGES = 2**31 // (CHANNELS * SIDE * SIDE) + 2  # the last one begins beyond the limit
NEEDED = 40 * GIBIBYTE
pytestmark = [
    pytest.mark.skipif(
        torch.cuda.get_device_properties(0).total_memory < NEEDED, reason=f"these take {NEEDED // GIBIBYTE} GiB"
    ),
    pytest.mark.xdist_group("large tensors"),  # one after another
]


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def on_cuda(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("impl", [impl for device, impl in kernels(op) if device == "cuda"])


def maps(*trailing: int) -> Tensor:
    """Random tokens of all images, in bfloat16."""
    return torch.empty(IMAGES, SIDE * SIDE, *trailing, device="cuda", dtype=torch.bfloat16).normal_()


def regions(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, their image: the last one of all, and the only one."""
    boxes = random_boxes(count).cuda()
    return boxes, torch.full((count,), IMAGES - 1, device="cuda"), torch.zeros(count, dtype=torch.long, device="cuda")


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        out, leaves, torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype)
    )


def assert_last_only(whole: Tensor, alone: Tensor) -> None:
    assert torch.equal(whole[-1:], alone)
    assert not any(image.any() for image in whole[:-1])


@on_cuda("roi_align")
def test_roi_align(impl: str) -> None:
    boxes, last, only = regions(20)
    tokens = maps(CHANNELS).requires_grad_()
    alone = tokens.detach()[-1:].clone().requires_grad_()
    whole_cells = roi_align(tokens, boxes, last, SIDE, 7, impl=impl)
    cells = roi_align(alone, boxes, only, SIDE, 7, impl=impl)
    assert torch.equal(whole_cells, cells)
    assert_last_only(gradients(whole_cells, [tokens])[0], gradients(cells, [alone])[0])


@on_cuda("roi_align")
def test_roi_align_to_many_cells(impl: str) -> None:
    tokens = torch.randn(1, 16, CHANNELS, device="cuda").bfloat16()
    boxes, _, only = regions(IMAGES)
    cells = roi_align(tokens, boxes, only, 4, SIDE, impl=impl)
    assert cells.numel() > 2**31
    assert torch.equal(cells[-1:], roi_align(tokens, boxes[-1:], only[-1:], 4, SIDE, impl=impl))


@on_cuda("region_distill")
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_region_distill(impl: str, loss: str) -> None:
    boxes, last, only = regions(5)
    teacher = torch.randn(5, 49, CHANNELS, device="cuda").bfloat16()
    student = maps(CHANNELS).requires_grad_()
    alone = student.detach()[-1:].clone().requires_grad_()
    whole_loss = region_distill_loss(student, teacher, boxes, last, SIDE, 7, loss=loss, impl=impl)
    value = region_distill_loss(alone, teacher, boxes, only, SIDE, 7, loss=loss, impl=impl)
    assert torch.equal(whole_loss, value)
    assert_last_only(gradients(whole_loss, [student])[0], gradients(value, [alone])[0])


@on_cuda("region_distill")
def test_region_distill_from_a_large_teacher(impl: str) -> None:
    boxes, _, only = regions(IMAGES)
    teacher = maps(CHANNELS)
    student = torch.randn(1, 1024, CHANNELS, device="cuda").bfloat16().requires_grad_()
    losses = region_distill_loss(student, teacher, boxes, only, 32, SIDE, reduction="none", impl=impl)
    arguments = (teacher[-1:].clone(), boxes[-1:], only[-1:], 32, SIDE)
    last = region_distill_loss(student, *arguments, reduction="none", impl=impl)
    torch.testing.assert_close(losses[-1:], last)
    pick = torch.zeros_like(losses)
    pick[-1] = 1
    (grad,), (grad_last,) = torch.autograd.grad(losses, student, pick), torch.autograd.grad(last, student, pick[-1:])
    torch.testing.assert_close(grad, grad_last, rtol=1e-2, atol=1e-2 * float(grad_last.abs().max()))


@on_cuda("region_attention")
@pytest.mark.parametrize("queries", [1, 16])
def test_region_attention(impl: str, queries: int) -> None:
    heads, dim = 16, CHANNELS // 16
    boxes, last, only = regions(5)
    key, value = (maps(heads, dim).requires_grad_() for _ in range(2))
    alone = [t.detach()[-1:].clone().requires_grad_() for t in (key, value)]
    query = torch.randn(5, queries, heads, dim, device="cuda").bfloat16().requires_grad_()
    whole = region_attention(query, key, value, boxes, last, SIDE, impl=impl)
    out = region_attention(query, *alone, boxes, only, SIDE, impl=impl)
    assert torch.equal(whole, out)
    grads, expected = gradients(whole, [query, key, value]), gradients(out, [query, *alone])
    assert torch.equal(grads[0], expected[0])
    for got, want in zip(grads[1:], expected[1:], strict=True):
        assert_last_only(got, want)


@on_cuda("box_embedding")
def test_box_embedding_at_the_end_of_a_long_sequence(impl: str) -> None:
    width = 1536
    length = 2**31 // width + 200
    weights = [
        torch.randn(*size, device="cuda").bfloat16() / 16 for size in ((256, 64), (256,), (width, 256), (width,))
    ]
    boxes, frequencies = random_boxes(100).cuda(), torch.randn(4, 32, device="cuda")
    index = torch.arange(length - 100, length, device="cuda")
    expected = box_embedding(boxes, frequencies, *weights, impl=impl)
    out = torch.zeros(length, width, device="cuda", dtype=torch.bfloat16)
    written = box_embedding(boxes, frequencies, *weights, out=out, index=index, impl=impl)
    assert torch.equal(written[-100:], expected)
    assert not written[:-100].any()
    with torch.no_grad():
        box_embedding(boxes, frequencies, *weights, out=out, index=index, inplace=True, impl=impl)
    assert torch.equal(out[-100:], expected)
    assert not out[:-100].any()


@on_cuda("box_embedding")
def test_box_embedding_of_many_boxes(impl: str) -> None:
    width = 1536
    count = 2**31 // width + 200
    weights = [torch.randn(*size, device="cuda").bfloat16() / 16 for size in ((64, 16), (64,), (width, 64), (width,))]
    weights = [w.requires_grad_() for w in weights]
    boxes, frequencies = torch.rand(count, 4, device="cuda").sort(1).values, torch.randn(4, 8, device="cuda")
    out = box_embedding(boxes, frequencies, *weights, impl=impl)
    last = box_embedding(boxes[-200:], frequencies, *weights, impl=impl)
    torch.testing.assert_close(out[-200:], last, rtol=1e-2, atol=1e-2)
    grad = torch.zeros_like(out)
    grad[-200:] = 1
    for got, want in zip(
        torch.autograd.grad(out, weights, grad), torch.autograd.grad(last, weights, grad[-200:]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
