"""The CUDA kernels of region_distill, run by tests/cuda_emulation: no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from granvit import reference
from tests import cuda_emulation
from tests.ops.test_region_distill import keep_inside, stock_loss
from tests.support import Case, Comparison, assert_within_budget, awkward_boxes, dense_case, packed_case, random_boxes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = ("mse", "cosine")
# What a block may have on sm_80 and on sm_86, and one in between: other tiles of the gradient.
SHARED_BYTES = (163 << 10, 115 << 10, 99 << 10)


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_emulation.load()


def place(case: Case, size: Any) -> tuple[Any, ...]:
    """What both ops take after student and teacher, up to the loss."""
    packed = isinstance(case.grid_size, Tensor)
    grids = (case.grid_size, 0, 0) if packed else (None, *case.grid_size)
    outs = (size, 0, 0) if isinstance(size, Tensor) else (None, *size)
    return (case.boxes, case.image_index, *grids, *outs)


def cells(case: Case, size: Any, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(size, Tensor):
        return torch.randn(int(size.prod(1).sum()), channels).to(dtype)
    return torch.randn(len(case.boxes), size[0] * size[1], channels).to(dtype)


def ours(
    ops: Any,
    student: Tensor,
    teacher: Tensor,
    case: Case,
    size: Any,
    loss: str = "mse",
    *,
    weight: Tensor | None = None,
    upstream: Tensor | None = None,
    sampling_ratio: int = 2,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient as granvit.ops makes them; with `upstream` (R,) of each region's mean."""
    where, weight = place(case, size), None if weight is None else weight.double()
    rest = (weight, loss, "mean" if upstream is None else "none", sampling_ratio)
    value, grad = ops.region_distill(student, teacher, *where, *rest, True)
    assert value.dtype == torch.float32
    alone, nothing = ops.region_distill(student, teacher, *where, *rest, False)
    torch.testing.assert_close(alone, value, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert nothing.numel() == 0
    if upstream is not None:
        assert grad.numel() == 0
        grad = ops.region_distill_backward(upstream, student, teacher, *where, loss, sampling_ratio)
        assert grad.dtype == student.dtype
    else:
        assert grad.dtype == (torch.float32 if student.dtype == torch.float16 else student.dtype)
    return value, grad.to(student.dtype)


def exact(student: Tensor, teacher: Tensor, case: Case, size: Any, **options: Any) -> tuple[Tensor, Tensor]:
    upstream = options.pop("upstream", None)
    x = student.double().requires_grad_()
    where = (case.boxes, case.image_index, case.grid_size, size)
    reduction = "mean" if upstream is None else "none"
    value = reference.region_distill_loss(x, teacher.double(), *where, reduction=reduction, **options)
    value.backward(None if upstream is None else upstream.double())
    return value.detach(), x.grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "weighted", "none"])
@pytest.mark.parametrize(
    ("grid", "channels", "size", "sampling_ratio"),
    [((13, 17), 37, (7, 5), 2), ((5, 40), 8, (1, 19), 1), ((24, 37), 16, (2, 1), 0), ((9, 4), 70, (18, 9), 3)],
)
def test_matches_the_float64_reference(
    ops: Any,
    dtype: torch.dtype,
    loss: str,
    reduction: str,
    grid: tuple[int, int],
    channels: int,
    size: tuple[int, int],
    sampling_ratio: int,
) -> None:
    def draw() -> Iterator[Comparison]:
        case = dense_case(*grid)
        keep_inside(case, loss)
        if loss == "cosine" and sampling_ratio == 0:
            case.boxes = random_boxes(12)  # a box without area has no samples, and stock's cosine of zeros is NaN
        student, teacher = case.tokens(channels, dtype=dtype), cells(case, size, channels, dtype)
        weight = torch.rand(12) if reduction == "weighted" else None
        upstream = torch.randn(12) if reduction == "none" else None
        x = student.clone().requires_grad_()
        kind = "none" if reduction == "none" else "mean"
        narrow = None if weight is None else weight.to(dtype)
        stock = stock_loss(x, teacher, case, size, loss, kind, narrow, sampling_ratio)
        stock.backward(None if upstream is None else upstream.to(dtype))
        options = {"loss": loss, "weight": weight, "upstream": upstream, "sampling_ratio": sampling_ratio}
        value, grad = ours(ops, student, teacher, case, size, **options)
        exact_value, exact_grad = exact(student, teacher, case, size, **options)
        yield "loss", value, stock.detach(), exact_value
        yield "gradient of the student", grad, x.grad, exact_grad

    assert_within_budget(draw, draws=4)


def packed_comparison(ops: Any, dtype: torch.dtype, loss: str, uniform: bool) -> Iterator[Comparison]:
    case = packed_case()
    keep_inside(case, loss)
    sizes: Any = (3, 4) if uniform else torch.randint(1, 21, (len(case.boxes), 2))
    student, teacher = case.tokens(24, dtype=dtype), cells(case, sizes, 24, dtype)
    x = student.clone().requires_grad_()
    maps = x.split([int(h * w) for h, w in case.grid_size])
    counts = [12] * len(case.boxes) if uniform else sizes.prod(1).tolist()
    total, parts = torch.zeros(()), teacher.reshape(-1, 24).split(counts)
    for r, image in enumerate(case.image_index.tolist()):
        one = Case(tuple(case.grid_size[image].tolist()), 1, case.boxes[r : r + 1], torch.zeros(1, dtype=torch.long))
        size = sizes if uniform else tuple(sizes[r].tolist())
        total = total + stock_loss(maps[image][None], parts[r][None], one, size, loss, "mean", None) * counts[r]
    stock = (total / sum(counts)).to(dtype)
    stock.backward()
    value, grad = ours(ops, student, teacher, case, sizes, loss)
    exact_value, exact_grad = exact(student, teacher, case, sizes, loss=loss)
    yield "loss", value, stock.detach(), exact_value
    yield "gradient of the student", grad, x.grad, exact_grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("uniform", [False, True], ids=["grid per region", "one grid"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_tokens(ops: Any, dtype: torch.dtype, loss: str, uniform: bool) -> None:
    assert_within_budget(lambda: packed_comparison(ops, dtype, loss, uniform), draws=4)


def assert_exact(ops: Any, student: Tensor, teacher: Tensor, case: Case, size: Any, **options: Any) -> None:
    """For what the budget cannot judge; inputs are float32."""
    value, grad = ours(ops, student, teacher, case, size, **options)
    exact_value, exact_grad = exact(student, teacher, case, size, **options)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6 * float(exact_grad.abs().max()) + 1e-12)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shared_bytes", SHARED_BYTES)
def test_tiles_where_shared_memory_is_smaller(ops: Any, shared_bytes: int, loss: str) -> None:
    case = dense_case(37, 45, images=2)
    keep_inside(case, loss)
    for dtype in DTYPES:
        student, teacher = case.tokens(16, dtype=dtype), cells(case, (20, 6), 16, dtype)
        expected, expected_grad = ours(ops, student, teacher, case, (20, 6), loss)
        with cuda_emulation.switched("shared_bytes", shared_bytes):
            value, grad = ours(ops, student, teacher, case, (20, 6), loss)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_too_little_shared_memory_is_named(ops: Any) -> None:
    case = dense_case(3, 4)
    with (
        cuda_emulation.switched("shared_bytes", 48 << 10),
        pytest.raises(RuntimeError, match="region_distill_loss: this device's shared memory is too small"),
    ):
        ours(ops, case.tokens(8), cells(case, (2, 2), 8), case, (2, 2))


@pytest.mark.usefixtures("poisoned")
def test_cells_larger_than_a_window(ops: Any) -> None:
    """One cell under which the whole of a large image lies, and more blocks of cells than a chunk has."""
    case = dense_case(50, 35, images=2, regions=10)
    for size, ratio in (((1, 1), 0), ((2, 3), 40), ((17, 1), 7)):
        assert_exact(ops, case.tokens(8), cells(case, size, 8), case, size, sampling_ratio=ratio)
    narrow = dense_case(3, 2, images=1, regions=1)
    for size in ((1, 300), (270, 1)):
        assert_exact(ops, narrow.tokens(8), cells(narrow, size, 8), narrow, size)


@pytest.mark.usefixtures("poisoned")
def test_more_regions_than_a_warp_looks_at_once(ops: Any) -> None:
    case = dense_case(6, 5, images=3, regions=300)
    for size in ((2, 2), torch.randint(1, 4, (300, 2))):
        weight = torch.rand(300)
        assert_exact(ops, case.tokens(8), cells(case, size, 8), case, size, weight=weight)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("loss", LOSSES)
def test_grids_and_output_sizes_on_the_device(ops: Any, loss: str) -> None:
    case = packed_case()
    student = case.tokens(16)
    for size in (torch.randint(1, 19, (len(case.boxes), 2)), (2, 3)):
        teacher, upstream = cells(case, size, 16), torch.randn(len(case.boxes))
        expected = (
            ours(ops, student, teacher, case, size, loss),
            ours(ops, student, teacher, case, size, loss, upstream=upstream),
        )
        with cuda_emulation.switched("integers_on_device"):
            results = (
                ours(ops, student, teacher, case, size, loss),
                ours(ops, student, teacher, case, size, loss, upstream=upstream),
            )
        assert all(
            torch.equal(a, b) for pair in zip(results, expected, strict=True) for a, b in zip(*pair, strict=True)
        )


def test_the_same_map_costs_nothing(ops: Any) -> None:
    """A student equal to the teacher over the full image has loss 0 and gradient 0."""
    case = Case((18, 21), 2, torch.tensor([[0.0, 0, 1, 1]] * 2), torch.arange(2))
    for dtype in DTYPES:
        tokens = case.tokens(16, dtype=dtype)
        value, grad = ours(ops, tokens, tokens, case, (18, 21), sampling_ratio=1)
        assert value.item() == 0
        assert not grad.any()


def test_strided_student_teacher_and_boxes(ops: Any) -> None:
    case = dense_case(6, 7)
    where = (case, (3, 3))
    for dtype in DTYPES:
        teacher = cells(*where, 24, dtype)
        with_class_token = torch.randn(3, 43, 24).to(dtype)
        fused = torch.randn(3, 42, 2, 24).to(dtype)
        odd_rows = torch.randn(3, 42, 25).to(dtype)
        broadcast = torch.randn(1, 42, 24).to(dtype).expand(3, -1, -1)
        for student in (with_class_token[:, 1:], fused[:, :, 1], odd_rows[:, :, 1:], broadcast):
            loss = "mse" if student is not broadcast else "cosine"
            results = ours(ops, student, teacher, *where, loss)
            expected = ours(ops, student.contiguous(), teacher, *where, loss)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        student = case.tokens(24, dtype=dtype)
        rows, turned, odd = (torch.randn(12, *shape).to(dtype) for shape in ((10, 24), (24, 9), (9, 25)))
        repeated = torch.randn(1, 9, 24).to(dtype).expand(12, -1, -1)
        for other in (rows[:, 1:], turned.transpose(1, 2), odd[..., 1:], repeated):
            results = ours(ops, student, other, *where)
            expected = ours(ops, student, other.contiguous(), *where)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    student, teacher = case.tokens(8), cells(*where, 8)
    boxes = case.boxes.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    index = case.image_index.repeat_interleave(2)[::2]
    strided = Case(case.grid_size, 3, boxes, index)
    for upstream in (torch.ones(1).expand(12), torch.randn(24)[::2]):
        results = ours(ops, student, teacher, strided, (3, 3), upstream=upstream)
        expected = ours(ops, student, teacher, *where, upstream=upstream.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_regions_no_images_no_channels(ops: Any) -> None:
    empty, none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    dense, sizes = (empty, none, None, 3, 4, None, 2, 3), torch.zeros(0, 2, dtype=torch.long)
    for loss in LOSSES:
        value, grad = ops.region_distill(
            torch.randn(2, 12, 5), torch.zeros(0, 6, 5), *dense, None, loss, "mean", 2, True
        )
        assert value.shape == ()
        assert value.item() == 0
        assert torch.equal(grad, torch.zeros(2, 12, 5))
        value, _ = ops.region_distill(torch.randn(2, 12, 5), torch.zeros(0, 6, 5), *dense, None, loss, "none", 2, True)
        assert value.shape == (0,)
        grad = ops.region_distill_backward(torch.zeros(0), torch.randn(2, 12, 5), torch.zeros(0, 6, 5), *dense, loss, 2)
        assert torch.equal(grad, torch.zeros(2, 12, 5))
        packed = (empty, none, sizes, 0, 0, sizes, 0, 0)
        value, grad = ops.region_distill(torch.randn(0, 5), torch.zeros(0, 5), *packed, None, loss, "mean", 2, True)
        assert value.item() == 0
        assert grad.shape == (0, 5)
        case = dense_case(3, 4)
        value, grad = ours(ops, case.tokens(0), cells(case, (2, 2), 0), case, (2, 2), loss)
        assert value.item() == 0
        assert grad.shape == (3, 12, 0)
    # An image without regions has a gradient too.
    case = Case((3, 4), 3, torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.ones(1, dtype=torch.long))
    _, grad = ours(ops, case.tokens(8), cells(case, (2, 2), 8), case, (2, 2))
    assert not grad[::2].any()
    assert grad[1].any()


def test_weights_that_sum_to_zero_give_zero(ops: Any) -> None:
    case = dense_case(6, 7)
    for weight in (torch.zeros(12), -torch.rand(12)):
        value, grad = ours(ops, case.tokens(8), cells(case, (3, 3), 8), case, (3, 3), weight=weight)
        assert value.item() == 0
        assert not grad.any()


def test_cosine_of_a_region_outside_the_image_is_finite(ops: Any) -> None:
    case = Case((6, 7), 1, torch.tensor([[1.2, 1.2, 1.4, 1.4]]), torch.zeros(1, dtype=torch.long))
    value, grad = ours(ops, case.tokens(8), cells(case, (3, 3), 8), case, (3, 3), "cosine")
    assert value.item() == 1
    assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(ops: Any, loss: str, poison: float) -> None:
    """In the losses of the regions that read it, in its image and, in the gradient of squares, in its channel."""
    boxes = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 1.0, 1.0]])
    case = Case((20, 20), 2, boxes, torch.tensor([0, 0, 1]))
    for dtype in DTYPES:
        student, teacher = case.tokens(16, dtype=dtype), cells(case, (5, 5), 16, dtype)
        student[0, 19 * 20 + 19] = poison  # no region reads it
        value, grad = ours(ops, student, teacher, case, (5, 5), loss, upstream=torch.ones(3))
        assert value.isfinite().all()
        assert grad.isfinite().all()
        student[0, 20 * 14 + 14, 3] = poison
        value, grad = ours(ops, student, teacher, case, (5, 5), loss, upstream=torch.ones(3))
        assert value.isfinite().tolist() == [True, False, True]
        spoilt = ~grad.isfinite()
        assert spoilt.any()
        assert not spoilt[1].any()
        assert not spoilt[0].view(20, 20, 16)[:9].any()
        if loss == "mse":
            assert not spoilt[..., torch.arange(16) != 3].any()
        student, teacher[2, 7, 5] = case.tokens(16, dtype=dtype), poison
        value, grad = ours(ops, student, teacher, case, (5, 5), loss, upstream=torch.ones(3))
        assert value.isfinite().tolist() == [True, True, False]
        assert grad[0].isfinite().all()
        assert not grad[1].isfinite().all()


def hostile_arguments() -> Iterator[tuple[bool, tuple[Any, ...]]]:
    """Values that a GPU op cannot reject, because it does not wait to see them."""
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan] * 4, [0.5, 0.5, nan, 0.7], [-inf, -inf, inf, inf], [0.8, 0.9, 0.1, 0.2], [1e30] * 4,
                          [inf, 0, inf, 1], [-1e30, 0, 1e30, 1], [-inf] * 4])  # fmt: skip
    index = torch.tensor([0, 7, -3, 2**40, -(2**62), 1, 2, 3])
    for ratio in (0, 2):
        yield True, (boxes, index, None, 5, 6, None, 3, 4, ratio)
    for grids in ([[5, 6], [5, 6], [5, 6]], [[0, 0], [-5, 6], [90, 1]], [[2**40, 2**40], [5, 6], [5, 12]],
                  [[1, 91], [1, 90], [2, 1]]):  # fmt: skip
        yield False, (boxes, index, torch.tensor(grids), 0, 0, None, 3, 4, 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_hostile_values_stay_inside_the_tensors(ops: Any, loss: str) -> None:
    with cuda_emulation.switched("integers_on_device"):
        for dense, (*where, ratio) in hostile_arguments():
            student, teacher = torch.randn(3, 30, 8) if dense else torch.randn(90, 8), torch.randn(8, 12, 8)
            for with_grad in (True, False):
                value, _ = ops.region_distill(student, teacher, *where, None, loss, "mean", ratio, with_grad)
                assert value.isfinite()
            means, _ = ops.region_distill(student, teacher, *where, None, loss, "none", ratio, False)
            assert means.isfinite().all()
            backward = ops.region_distill_backward(torch.ones(8), student, teacher, *where, loss, ratio)
            if dense:
                assert backward.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_bits_every_time(ops: Any, loss: str) -> None:
    case = dense_case(37, 35, images=2, regions=12)
    student = case.tokens(38, dtype=torch.bfloat16)
    for size in ((17, 3), torch.randint(1, 19, (12, 2))):
        teacher, weight = cells(case, size, 38, torch.bfloat16), torch.rand(12)
        expected = ours(ops, student, teacher, case, size, loss, weight=weight)
        # Threads and blocks in the opposite order: what a missing barrier leaves to chance.
        with cuda_emulation.switched("reverse_order"):
            results = ours(ops, student, teacher, case, size, loss, weight=weight)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(3, 41, 8)}, "student: expected 42 tokens an image, got 41"),
        ({0: torch.zeros(3, 42, 16)[:, :, ::2]}, "student: expected contiguous dimensions"),
        ({0: torch.zeros(3, 42, 8).double(), 1: torch.zeros(12, 9, 8).double()},
         "student: expected float32, bfloat16 or float16"),
        ({1: torch.zeros(12, 9, 8).half()}, "teacher: expected the dtype of student"),
        ({1: torch.zeros(12, 8, 8)}, "teacher: expected 108 cells of 8 channels"),
        ({1: torch.zeros(9, 12, 8)}, "teacher: expected 108 cells of 8 channels"),
        ({2: torch.zeros(12, 5)}, r"boxes: expected shape \(R, 4\)"),
        ({3: torch.zeros(11, dtype=torch.long)}, r"image_index: expected an int64 tensor of shape \(12,\)"),
        ({7: torch.zeros(12, 2, dtype=torch.long)}, "output_size: expected heights and widths of at least 1"),
        ({10: torch.ones(12)}, r"weight: expected float64 of shape \(12,\)"),
        ({10: torch.ones(11).double()}, r"weight: expected float64 of shape \(12,\)"),
        ({11: "l1"}, "loss: expected 'mse' or 'cosine', got 'l1'"),
        ({12: "sum"}, "reduction: expected 'mean' or 'none', got 'sum'"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(ops: Any, change: dict[int, Any], text: str) -> None:
    call = [torch.zeros(3, 42, 8), torch.zeros(12, 9, 8), awkward_boxes(12), torch.zeros(12, dtype=torch.long), None,
            6, 7, None, 3, 3, None, "mse", "mean", 2, True]  # fmt: skip
    for position, value in change.items():
        call[position] = value
    with pytest.raises(RuntimeError, match=f"granvit value error: region_distill_loss: {text}"):
        ops.region_distill(*call)


def test_wrong_upstream_gradients_are_named(ops: Any) -> None:
    case = dense_case(6, 7)
    rest = (case.tokens(8), cells(case, (3, 3), 8), *place(case, (3, 3)), "mse", 2)
    for upstream in (torch.zeros(11), torch.zeros(12, 1), torch.zeros(12).half()):
        with pytest.raises(RuntimeError, match=r"gradient: expected float32 of shape \(12,\)"):
            ops.region_distill_backward(upstream, *rest)
