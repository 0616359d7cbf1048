"""The CUDA kernels of roi_align, run by tests/cuda_emulation: no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from granvit import reference
from tests import cuda_emulation
from tests.ops.test_roi_align import stock_roi_align
from tests.support import Case, Comparison, assert_within_budget, awkward_boxes, dense_case, packed_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_emulation.load()


def arguments(case: Case, output_size: Any, sampling_ratio: int = 2) -> tuple[Any, ...]:
    """What both ops take after their first argument."""
    packed = isinstance(case.grid_size, Tensor)
    grids = (case.grid_size, 0, 0) if packed else (None, *case.grid_size)
    outs = (output_size, 0, 0) if isinstance(output_size, Tensor) else (None, *output_size)
    return (case.boxes, case.image_index, *grids, *outs, sampling_ratio)


def exact(tokens: Tensor, case: Case, output_size: Any, sampling_ratio: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = tokens.double().requires_grad_()
    out = reference.roi_align(
        x, case.boxes, case.image_index, case.grid_size, output_size, sampling_ratio=sampling_ratio
    )
    out.backward(grad.double())
    return out.detach(), x.grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("grid", "channels", "output_size", "sampling_ratio"),
    [((13, 17), 37, (7, 5), 2), ((1, 1), 16, (3, 3), 2), ((9, 12), 72, (14, 11), 2), ((5, 40), 1, (1, 9), 1),
     ((24, 9), 64, (4, 2), 0), ((9, 24), 24, (2, 3), 3), ((3, 4), 1800, (2, 2), 2), ((6, 7), 8, (3, 40), 11)],
)  # fmt: skip
def test_matches_the_float64_reference(
    ops: Any,
    dtype: torch.dtype,
    grid: tuple[int, int],
    channels: int,
    output_size: tuple[int, int],
    sampling_ratio: int,
) -> None:
    def draw() -> Iterator[Comparison]:
        case = dense_case(*grid)
        tokens = case.tokens(channels, dtype=dtype)
        grad = torch.randn(len(case.boxes), output_size[0] * output_size[1], channels).to(dtype)
        x = tokens.clone().requires_grad_()
        stock = stock_roi_align(x, case, output_size, sampling_ratio)
        stock.backward(grad)
        rest = arguments(case, output_size, sampling_ratio)
        ours, ours_grad = ops.roi_align(tokens, *rest), ops.roi_align_backward(grad, *rest, case.num_tokens)
        assert ours.dtype == ours_grad.dtype == dtype
        out, out_grad = exact(tokens, case, output_size, sampling_ratio, grad)
        yield "output", ours, stock.detach(), out
        yield "gradient of tokens", ours_grad, x.grad, out_grad

    assert_within_budget(draw)


def packed_comparison(ops: Any, dtype: torch.dtype, uniform: bool) -> Iterator[Comparison]:
    case = packed_case()
    tokens = case.tokens(40, dtype=dtype)
    sizes: Any = (3, 4) if uniform else torch.randint(1, 9, (len(case.boxes), 2))
    rest = arguments(case, sizes)
    ours = ops.roi_align(tokens, *rest)
    grad = torch.randn_like(ours)
    # Region by region through the dense form, for torchvision.
    x = tokens.clone().requires_grad_()
    maps = x.split([int(h * w) for h, w in case.grid_size])
    parts = []
    for r, image in enumerate(case.image_index.tolist()):
        one = Case(tuple(case.grid_size[image].tolist()), 1, case.boxes[r : r + 1], torch.zeros(1, dtype=torch.long))
        size = sizes if uniform else sizes[r].tolist()
        parts.append(stock_roi_align(maps[image][None], one, size)[0])
    stock = torch.cat(parts)
    stock.backward(grad.reshape_as(stock))
    out, out_grad = exact(tokens, case, sizes, 2, grad)
    yield "output", ours, stock.detach().reshape_as(out), out
    yield "gradient", ops.roi_align_backward(grad, *rest, case.num_tokens), x.grad, out_grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("uniform", [False, True], ids=["grid per region", "one grid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_tokens(ops: Any, dtype: torch.dtype, uniform: bool) -> None:
    assert_within_budget(lambda: packed_comparison(ops, dtype, uniform))


@pytest.mark.usefixtures("poisoned")
def test_grids_and_output_sizes_on_the_device(ops: Any) -> None:
    case = packed_case()
    tokens = case.tokens(16)
    sizes = torch.randint(1, 5, (len(case.boxes), 2))
    for size in (sizes, (2, 3)):
        rest = arguments(case, size)
        expected = ops.roi_align(tokens, *rest)
        expected_grad = ops.roi_align_backward(expected, *rest, case.num_tokens)
        with cuda_emulation.switched("integers_on_device"):
            assert torch.equal(ops.roi_align(tokens, *rest), expected)
            assert torch.equal(ops.roi_align_backward(expected, *rest, case.num_tokens), expected_grad)


def test_more_regions_than_a_block_looks_at_once(ops: Any) -> None:
    case = dense_case(6, 5, images=3, regions=700)
    tokens = case.tokens(8)
    rest = arguments(case, (2, 2))
    out = ops.roi_align(tokens, *rest)
    grad = torch.randn_like(out)
    expected, expected_grad = exact(tokens, case, (2, 2), 2, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad_tokens = ops.roi_align_backward(grad, *rest, case.num_tokens)
    torch.testing.assert_close(grad_tokens.double(), expected_grad, rtol=1e-5, atol=1e-4)
    sizes = torch.randint(1, 3, (700, 2))
    rest = arguments(case, sizes)
    out = ops.roi_align(tokens, *rest)
    grad = torch.randn_like(out)
    expected, expected_grad = exact(tokens, case, sizes, 2, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad_tokens = ops.roi_align_backward(grad, *rest, case.num_tokens)
    torch.testing.assert_close(grad_tokens.double(), expected_grad, rtol=1e-5, atol=1e-4)


def test_strided_tokens_and_boxes(ops: Any) -> None:
    case = dense_case(6, 7)
    rest = arguments(case, (3, 3))
    for dtype in DTYPES:
        with_class_token = torch.randn(3, 43, 24).to(dtype)
        fused = torch.randn(3, 42, 2, 24).to(dtype)
        odd_rows = torch.randn(3, 42, 25).to(dtype)
        broadcast = torch.randn(1, 42, 24).to(dtype).expand(3, -1, -1)
        for tokens in (with_class_token[:, 1:], fused[:, :, 1], odd_rows[:, :, 1:], broadcast):
            assert torch.equal(ops.roi_align(tokens, *rest), ops.roi_align(tokens.contiguous(), *rest))
    tokens = case.tokens(8)
    boxes = case.boxes.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    index = case.image_index.repeat_interleave(2)[::2]
    assert torch.equal(ops.roi_align(tokens, boxes, index, *rest[2:]), ops.roi_align(tokens, *rest))


def test_no_regions_no_images_no_channels(ops: Any) -> None:
    empty, none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    dense = (empty, none, None, 3, 4, None, 2, 3, 2)
    assert ops.roi_align(torch.randn(2, 12, 5), *dense).shape == (0, 6, 5)
    grad = ops.roi_align_backward(torch.randn(0, 6, 5), *dense, 24)
    assert torch.equal(grad, torch.zeros(2, 12, 5))
    sizes = torch.zeros(0, 2, dtype=torch.long)
    assert ops.roi_align(torch.randn(2, 12, 5), empty, none, None, 3, 4, sizes, 0, 0, 2).shape == (0, 5)
    assert ops.roi_align(torch.randn(0, 12, 5), *dense).shape == (0, 6, 5)
    packed = (empty, none, sizes, 0, 0, None, 2, 2, 2)
    assert ops.roi_align(torch.randn(0, 5), *packed).shape == (0, 4, 5)
    assert ops.roi_align_backward(torch.randn(0, 4, 5), *packed, 0).shape == (0, 5)
    case = dense_case(3, 4)
    assert ops.roi_align(case.tokens(0), *arguments(case, (2, 2))).shape == (12, 4, 0)


def hostile_arguments() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Values that a GPU op cannot reject, because it does not wait to see them."""
    case = dense_case(5, 6)
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan] * 4, [0.5, 0.5, nan, 0.7], [-inf, -inf, inf, inf], [0.8, 0.9, 0.1, 0.2], [1e30] * 4,
                          [inf, 0, inf, 1], [-1e30, 0, 1e30, 1], [-inf] * 4])  # fmt: skip
    index = torch.tensor([0, 7, -3, 2**40, -(2**62), 1, 2, 3])
    for ratio in (0, 2):
        yield "dense", (boxes, index, None, *case.grid_size, None, 3, 4, ratio)
    for grids in ([[5, 6], [5, 6], [5, 6]], [[0, 0], [-5, 6], [90, 1]], [[2**40, 2**40], [5, 6], [5, 12]],
                  [[1, 91], [1, 90], [2, 1]]):  # fmt: skip
        yield "packed", (boxes, index, torch.tensor(grids), 0, 0, None, 3, 4, 2)


def test_hostile_values_stay_inside_the_tensors(ops: Any) -> None:
    with cuda_emulation.switched("integers_on_device"):
        for kind, rest in hostile_arguments():
            tokens = torch.randn(3, 30, 8) if kind == "dense" else torch.randn(90, 8)
            out = ops.roi_align(tokens, *rest)
            assert out.isfinite().all()
            grad = ops.roi_align_backward(torch.ones_like(out), *rest, 90)
            if kind == "dense":
                assert grad.isfinite().all()


def test_the_same_bits_every_time(ops: Any) -> None:
    case = dense_case(9, 11, regions=30)
    tokens = case.tokens(70, dtype=torch.bfloat16)
    sizes = torch.randint(1, 6, (30, 2))
    for size in ((5, 5), sizes):
        rest = arguments(case, size)
        out = ops.roi_align(tokens, *rest)
        grad = ops.roi_align_backward(out, *rest, case.num_tokens)
        # Threads and blocks in the opposite order: what a missing barrier leaves to chance.
        with cuda_emulation.switched("reverse_order"):
            assert torch.equal(ops.roi_align(tokens, *rest), out)
            assert torch.equal(ops.roi_align_backward(out, *rest, case.num_tokens), grad)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(3, 41, 8)}, "roi_align: tokens: expected 42 tokens an image, got 41"),
        ({0: torch.zeros(3, 42, 16)[:, :, ::2]}, "tokens: expected contiguous dimensions"),
        ({0: torch.zeros(3, 42, 8).double()}, "tokens: expected float32, bfloat16 or float16"),
        ({1: torch.zeros(12, 5)}, r"boxes: expected shape \(R, 4\)"),
        ({2: torch.zeros(11, dtype=torch.long)}, r"image_index: expected an int64 tensor of shape \(12,\)"),
        ({3: torch.tensor([[6, 8]]), 0: torch.zeros(42, 8)}, "grid_size: expected grids of 42 tokens in all, got 48"),
        ({3: torch.tensor([[0, 8]]), 0: torch.zeros(0, 8)}, "grid_size: expected heights and widths of at least 1"),
        ({6: torch.zeros(12, 2, dtype=torch.long)}, "output_size: expected heights and widths of at least 1"),
        ({6: torch.ones(11, 2, dtype=torch.long)}, r"output_size: expected shape \(12, 2\)"),
    ],
)
def test_wrong_input_is_named(ops: Any, change: dict[int, Any], text: str) -> None:
    call = [torch.zeros(3, 42, 8), awkward_boxes(12), torch.zeros(12, dtype=torch.long), None, 6, 7, None, 3, 3, 2]
    for position, value in change.items():
        call[position] = value
    with pytest.raises(RuntimeError, match=f"granvit value error: .*{text}|{text}"):
        ops.roi_align(*call)
