"""region_distill_loss: against the float64 reference, torchvision's form, and PyTorch's own expectations of an op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from granvit.ops import _dispatch, region_distill_loss
from tests.ops.test_roi_align import stock_roi_align
from tests.support import (
    Case,
    Comparison,
    assert_within_budget,
    dense_case,
    examples,
    kernel_dtypes,
    kernels,
    packed_case,
    run_at_isa,
    run_interpreted,
    with_reference,
)

KERNELS = kernels("region_distill")
EVERYWHERE = [*KERNELS, ("cpu", "reference")]
# The interpreter's time goes with the number of programs: still two tiles an image, and three blocks of channels.
SHAPES = [((13, 17), 21 if _dispatch.INTERPRETED else 37, (7, 5)), ((1, 2), 3, (1, 1))]
if not _dispatch.INTERPRETED:  # in which it would take a minute each time
    SHAPES.append(((9, 5), 290, (6, 9)))


def distill(
    student: Tensor,
    teacher: Tensor,
    case: Case,
    output_size: int | tuple[int, int] | Tensor,
    device: str,
    impl: str,
    **options: Any,
) -> Tensor:
    """region_distill_loss of tensors on the CPU, computed on a device; the result is on the CPU again."""
    options = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
    where = (case.boxes.to(device), case.image_index.to(device), case.grid_size, output_size)
    return region_distill_loss(student.to(device), teacher.to(device), *where, impl=impl, **options).cpu()


def stock_loss(
    student: Tensor,
    teacher: Tensor,
    case: Case,
    size: tuple[int, int],
    loss: str,
    reduction: str,
    weight: Tensor | None,
    sampling_ratio: int = 2,
) -> Tensor:
    """What people write today: torchvision's map, then a loss of torch.nn.functional, in the tokens' dtype."""
    aligned = stock_roi_align(student, case, size, sampling_ratio)
    if loss == "mse":
        per_region = F.mse_loss(aligned, teacher, reduction="none").mean((1, 2))
    else:
        per_region = 1 - F.cosine_similarity(aligned, teacher, dim=-1).mean(1)
    if reduction == "none":
        return per_region
    return per_region.mean() if weight is None else (weight * per_region).sum() / weight.sum()


def keep_inside(case: Case, loss: str) -> None:
    """Cells outside the image align to exact zeros, of which stock PyTorch's float16 cosine is NaN."""
    if loss == "cosine":
        case.boxes.clamp_(0, 1)
        case.boxes[8] = torch.tensor([0.1, 0.1, 0.4, 0.2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("device", "impl", "dtype"), with_reference("region_distill"))
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "weighted", "none"])
@pytest.mark.parametrize(("grid", "channels", "size"), SHAPES)
def test_matches_the_float64_reference(
    device: str,
    impl: str,
    dtype: torch.dtype,
    loss: str,
    reduction: str,
    grid: tuple[int, int],
    channels: int,
    size: tuple[int, int],
) -> None:
    weighted = reduction == "weighted"
    reduction = "none" if reduction == "none" else "mean"

    def draw() -> Iterator[Comparison]:
        case = dense_case(*grid, images=2 if _dispatch.INTERPRETED else 3)
        keep_inside(case, loss)
        student = case.tokens(channels, dtype=dtype)
        teacher = torch.randn(12, size[0] * size[1], channels).to(dtype)
        weight = torch.rand(12) if weighted else None
        upstream = torch.randn(12) if reduction == "none" else torch.tensor(0.7)

        def loss_and_gradient(x: Tensor, teacher: Tensor, device: str, impl: str) -> tuple[Tensor, Tensor]:
            x = x.clone().requires_grad_()
            value = distill(x, teacher, case, size, device, impl, loss=loss, reduction=reduction, weight=weight)
            assert value.dtype == torch.promote_types(x.dtype, torch.float32)
            value.backward(upstream.to(value.dtype))
            assert x.grad.dtype == x.dtype
            return value.detach(), x.grad

        x = student.clone().requires_grad_()
        stock = stock_loss(x, teacher, case, size, loss, reduction, None if weight is None else weight.to(dtype))
        stock.backward(upstream.to(dtype))
        exact, exact_grad = loss_and_gradient(student.double(), teacher.double(), "cpu", "reference")
        ours, ours_grad = loss_and_gradient(student, teacher, device, impl)
        yield "loss", ours, stock.detach(), exact
        yield "gradient of the student", ours_grad, x.grad, exact_grad

    # Among many numbers the largest error is no lottery.
    draws = 8 if channels < 20 else 4
    assert_within_budget(draw, draws=draws // 2 if _dispatch.INTERPRETED else draws)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize(("device", "impl", "dtype"), kernel_dtypes("region_distill"))
def test_packed_grids_on_both_sides(device: str, impl: str, dtype: torch.dtype, loss: str) -> None:
    assert_within_budget(lambda: packed_comparison(device, impl, dtype, loss), draws=4)


def packed_comparison(device: str, impl: str, dtype: torch.dtype, loss: str) -> Iterator[Comparison]:
    case = packed_case()
    keep_inside(case, loss)
    sizes = torch.randint(1, 9, (12, 2))
    student, teacher = case.tokens(45, dtype=dtype), torch.randn(int(sizes.prod(1).sum()), 45).to(dtype)

    def run(x: Tensor, t: Tensor, device: str, impl: str) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        value = distill(x, t, case, sizes, device, impl, loss=loss)
        value.backward()
        return value.detach(), x.grad

    exact, exact_grad = run(student.double(), teacher.double(), "cpu", "reference")
    maps = list(student.clone().requires_grad_().split([int(h * w) for h, w in case.grid_size]))
    leaf = maps[0]._base if maps[0]._base is not None else maps[0]
    total, cells = 0, 0
    parts = teacher.split(sizes.prod(1).tolist())
    for box, image, size, part in zip(case.boxes, case.image_index.tolist(), sizes.tolist(), parts, strict=True):
        one = Case(tuple(case.grid_size[image].tolist()), 1, box[None], torch.zeros(1, dtype=torch.long))
        region = stock_loss(maps[image][None], part[None], one, size, loss, "mean", None)
        total, cells = total + region * len(part), cells + len(part)
    stock = total / cells
    (stock_grad,) = torch.autograd.grad(stock, leaf)
    ours, ours_grad = run(student, teacher, device, impl)
    yield "loss", ours, stock.detach(), exact
    yield "gradient of the student", ours_grad, stock_grad, exact_grad


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_the_same_map_costs_nothing(device: str, impl: str) -> None:
    """A student equal to the teacher over the full image has loss 0 and gradient 0."""
    tokens = torch.randn(2, 30, 16, requires_grad=True)
    case = Case((5, 6), 2, torch.tensor([[0.0, 0, 1, 1]] * 2), torch.arange(2))
    loss = distill(tokens, tokens.detach(), case, (5, 6), device, impl, sampling_ratio=1)
    loss.backward()
    assert loss.item() == 0
    assert not tokens.grad.any()


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_strided_teacher_and_student(device: str, impl: str) -> None:
    case = dense_case(6, 7)
    student, teacher = torch.randn(3, 43, 24)[:, 1:], torch.randn(12, 10, 24)[:, 1:]
    backwards = torch.randn(12, 24, 9).transpose(1, 2)
    for cells in (teacher, backwards):
        results = []
        for x, t in ((student, cells), (student.contiguous(), cells.contiguous())):
            x = x.detach().to(device).requires_grad_()
            where = (case.boxes.to(device), case.image_index.to(device), (6, 7), 3)
            value = region_distill_loss(x, t.to(device), *where, impl=impl)
            results.append((value, *torch.autograd.grad(value, x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("device", "impl"), EVERYWHERE)
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_no_regions(device: str, impl: str, loss: str) -> None:
    student = torch.randn(2, 12, 5, requires_grad=True)
    case = Case((3, 4), 2, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    value = distill(student, torch.zeros(0, 4, 5), case, 2, device, impl, loss=loss)
    value.backward()
    assert value.shape == ()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))
    nothing = distill(student, torch.zeros(0, 4, 5), case, 2, device, impl, loss=loss, reduction="none")
    assert nothing.shape == (0,)


@pytest.mark.parametrize(("device", "impl"), EVERYWHERE)
def test_weights_that_sum_to_zero_give_zero(device: str, impl: str) -> None:
    case = dense_case(6, 7)
    student = case.tokens(8).requires_grad_()
    value = distill(student, torch.randn(12, 9, 8), case, 3, device, impl, weight=torch.zeros(12))
    value.backward()
    assert value.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_cosine_of_a_region_outside_the_image_is_finite(device: str, impl: str) -> None:
    student = torch.randn(1, 42, 8, requires_grad=True)
    case = Case((6, 7), 1, torch.tensor([[1.2, 1.2, 1.4, 1.4]]), torch.zeros(1, dtype=torch.long))
    value = distill(student, torch.randn(1, 9, 8), case, 3, device, impl, loss="cosine")
    value.backward()
    assert value.item() == 1
    assert not student.grad.any()


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_float16_gradient_survives_a_loss_scale(device: str, impl: str) -> None:
    """A mean over many elements has gradients below float16's range until the loss scale arrives."""
    few = (6, 9, (4, 25), 40)  # for the interpreter
    side, regions, size, channels = few if _dispatch.INTERPRETED else (24, 32, (32, 32), 256)
    case = dense_case(side, side, images=4, regions=regions)
    student = case.tokens(channels, dtype=torch.float16)
    teacher = torch.randn(regions, size[0] * size[1], channels).half()
    x, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    (distill(x, teacher, case, size, device, impl) * 65536).backward()
    (distill(exact, teacher.double(), case, size, "cpu", "reference") * 65536).backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(packed: bool, loss: str, reduction: str) -> None:
    case = packed_case(images=2, regions=5, largest=5) if packed else dense_case(4, 5, images=2, regions=5)
    size = torch.randint(1, 4, (5, 2)) if packed else (2, 3)
    cells = (int(size.prod(1).sum()),) if packed else (5, 6)
    student = case.tokens(3, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(*cells, 3, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return region_distill_loss(
            x, teacher, case.boxes, case.image_index, case.grid_size, size, loss=loss, reduction=reduction, impl="cpu"
        )

    assert torch.autograd.gradcheck(function, student)
    value = function(student).sum()
    with pytest.raises(RuntimeError, match="region_distill_loss: the gradient of its gradient is not implemented"):
        torch.autograd.grad(value, student, create_graph=True)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(device: str, impl: str, reduction: str) -> None:
    case = dense_case(6, 7)
    ops = _dispatch.ops(impl)
    arguments = (case.boxes.to(device), case.image_index.to(device), None, 6, 7, None, 3, 2)
    student, teacher = case.tokens(8).to(device).requires_grad_(), torch.randn(12, 6, 8, device=device)
    torch.library.opcheck(
        ops.region_distill.default,
        (student, teacher, *arguments, None, "mse", reduction, 2, True),
        # The second output is the saved gradient itself: its own derivative is refused, not computed.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(
        ops.region_distill_backward.default,
        (torch.randn(12, device=device), student.detach(), teacher, *arguments, "cosine", 2),
    )


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_the_same_bits_every_time(device: str, impl: str, loss: str) -> None:
    case = dense_case(16, 16, regions=30)
    student, teacher = case.tokens(70).requires_grad_(), torch.randn(30, 25, 70)
    threads = torch.get_num_threads()
    results = []
    for count in (threads, threads, 1, 3) if impl == "cpu" else (threads, threads):
        torch.set_num_threads(count)
        value = distill(student, teacher, case, 5, device, impl, loss=loss)
        results.append((value.detach(), torch.autograd.grad(value, student)[0]))
    torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_saves_nothing_of_the_teacher_for_a_mean(device: str, impl: str) -> None:
    case = dense_case(6, 7)
    student = case.tokens(8).to(device).requires_grad_()
    where = (case.boxes.to(device), case.image_index.to(device), (6, 7), 30)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        region_distill_loss(student, torch.randn(12, 900, 8, device=device), *where, impl=impl)
    assert sum(t.numel() for t in saved) == student.numel()


@settings(**examples(40))
@given(data=st.data())
@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_any_boxes_grids_and_counts(device: str, impl: str, data: st.DataObject) -> None:
    edge = st.floats(0, 1, width=32)
    count = data.draw(st.integers(0, 6))
    boxes = torch.tensor([[data.draw(edge) for _ in range(4)] for _ in range(count)], dtype=torch.float32)
    boxes = boxes.reshape(-1, 2, 2).sort(1).values.flatten(1)
    images = data.draw(st.integers(1, 3))
    grids = torch.tensor([[data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))] for _ in range(images)])
    sizes = [[data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))] for _ in range(count)]
    sizes = torch.tensor(sizes, dtype=torch.long).reshape(-1, 2)
    index = torch.tensor([data.draw(st.integers(0, images - 1)) for _ in range(count)], dtype=torch.long)
    channels = data.draw(st.integers(1, 40))
    wide = torch.float64 if impl == "cpu" else torch.float32
    student = torch.randn(int(grids.prod(1).sum()), channels, dtype=wide, requires_grad=True)
    teacher = torch.randn(int(sizes.prod(1).sum()), channels, dtype=wide)
    loss = data.draw(st.sampled_from(["mse", "cosine"]))
    case = Case(grids, images, boxes, index)
    value = distill(student, teacher, case, sizes, device, impl, loss=loss)
    exact = distill(student.double(), teacher.double(), case, sizes, "cpu", "reference", loss=loss)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if impl == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(value.double(), exact, **tolerance)
    (grad,), (exact_grad,) = torch.autograd.grad(value, student), torch.autograd.grad(exact, student)
    # One channel's cosine is +1 or -1 with a gradient of zero, a difference of large numbers where a cell is near zero.
    if loss == "mse" or channels > 2:
        torch.testing.assert_close(grad, exact_grad, **tolerance)


@pytest.mark.parametrize("impl", [impl for device, impl in EVERYWHERE if device == "cpu"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"teacher": None}, TypeError, "teacher: expected a tensor, got None"),
        ({"teacher": torch.zeros(12, 9, 8).bfloat16()}, TypeError, "teacher: expected float32 like the first"),
        ({"teacher": torch.zeros(12, 8, 8)}, ValueError, r"teacher: expected shape \(12, 9, 8\)"),
        ({"teacher": torch.zeros(12, 9, 8, device="meta")}, ValueError, "teacher: expected a tensor on cpu"),
        ({"output_size": torch.full((12, 2), 3)}, ValueError, r"teacher: expected shape \(sum of h\*w, 8\)"),
        ({"output_size": torch.full((12, 2), 3), "teacher": torch.zeros(100, 8)}, ValueError, "teacher: expected 108"),
        ({"student": torch.zeros(3, 40, 8)}, ValueError, r"student: expected 6 \* 7 tokens an image"),
        ({"boxes": torch.full((12, 4), float("inf"))}, ValueError, "boxes: expected finite"),
        ({"loss": "l1"}, ValueError, "loss: expected 'mse' or 'cosine', got 'l1'"),
        ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
        ({"weight": torch.ones(11)}, ValueError, r"weight: expected shape \(12,\)"),
        ({"weight": torch.ones(12), "reduction": "none"}, ValueError, "weight: expected none with reduction='none'"),
        ({"weight": torch.ones(12, requires_grad=True)}, ValueError, "weight: expected a constant"),
        ({"weight": [1.0] * 12}, TypeError, "weight: expected a tensor"),
    ],
)
def test_wrong_input_gets_one_sentence(impl: str, change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "student": torch.zeros(3, 42, 8),
        "teacher": torch.zeros(12, 9, 8),
        "boxes": torch.tensor([[0.1, 0.2, 0.5, 0.6]] * 12),
        "image_index": torch.zeros(12, dtype=torch.long),
        "grid_size": (6, 7),
        "output_size": 3,
        "impl": impl,
    }
    with pytest.raises(error, match=text) as caught:
        region_distill_loss(**{**arguments, **change})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("region_distill_loss: ")


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: str) -> None:
    run_at_isa(isa, __file__, "test_matches_the_float64_reference")


def test_triton_in_the_interpreter() -> None:
    run_interpreted(__file__)
