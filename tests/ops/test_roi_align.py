"""roi_align: against the float64 reference, torchvision, and PyTorch's own expectations of an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from granvit import reference
from granvit.ops import _dispatch, roi_align
from tests.support import (
    Case,
    Comparison,
    assert_within_budget,
    awkward_boxes,
    dense_case,
    examples,
    kernel_dtypes,
    kernels,
    packed_case,
    random_boxes,
    run_at_isa,
    run_interpreted,
    with_reference,
)

KERNELS = kernels("roi_align")
EVERYWHERE = [*KERNELS, ("cpu", "reference")]
SHAPES = [
    ((13, 17), 37, (7, 5), 2),
    ((1, 1), 16, (3, 3), 2),
    ((5, 40), 1, (1, 9), 1),
    ((24, 9), 64, (4, 2), 0),
]
if not _dispatch.INTERPRETED:  # in which these would take a minute each
    SHAPES += [((32, 32), 130, (32, 32), 2), ((9, 24), 300, (2, 3), 3)]


def align(
    x: Tensor, case: Case, output_size: int | tuple[int, int] | Tensor, device: str, impl: str, **options: int
) -> Tensor:
    """roi_align of tokens on the CPU, computed on a device; the result is on the CPU again."""
    where = (case.boxes.to(device), case.image_index.to(device), case.grid_size)
    return roi_align(x.to(device), *where, output_size, impl=impl, **options).cpu()


def stock_roi_align(tokens: Tensor, case: Case, output_size: tuple[int, int], sampling_ratio: int = 2) -> Tensor:
    """torchvision on the (B, C, H, W) map, in float32 or wider as it wants, rounded to the tokens' dtype."""
    height, width = case.grid_size
    wide = torch.promote_types(tokens.dtype, torch.float32)
    maps = tokens.to(wide).transpose(1, 2).unflatten(2, (height, width))
    scale = torch.tensor([width, height, width, height])
    rois = torch.cat([case.image_index[:, None], case.boxes * scale], dim=1).to(wide)
    cells = torchvision.ops.roi_align(maps, rois, output_size, 1.0, sampling_ratio, aligned=True)
    return cells.flatten(2).transpose(1, 2).to(tokens.dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("device", "impl", "dtype"), with_reference("roi_align"))
@pytest.mark.parametrize(("grid", "channels", "output_size", "sampling_ratio"), SHAPES)
def test_matches_the_float64_reference(
    device: str,
    impl: str,
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

        def run(x: Tensor, device: str, impl: str) -> tuple[Tensor, Tensor]:
            x = x.clone().requires_grad_()
            out = align(x, case, output_size, device, impl, sampling_ratio=sampling_ratio)
            out.backward(grad.to(x.dtype))
            assert out.dtype == x.dtype
            return out.detach(), x.grad

        exact, exact_grad = run(tokens.double(), "cpu", "reference")
        x = tokens.clone().requires_grad_()
        stock = stock_roi_align(x, case, output_size, sampling_ratio)
        stock.backward(grad)
        ours, ours_grad = run(tokens, device, impl)
        yield "output", ours, stock.detach(), exact
        yield "gradient of tokens", ours_grad, x.grad, exact_grad

    # Among many numbers the largest error is no lottery.
    assert_within_budget(draw, draws=3 if channels > 30 else 8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("device", "impl", "dtype"), kernel_dtypes("roi_align"))
def test_packed_grids_and_a_grid_per_region(device: str, impl: str, dtype: torch.dtype) -> None:
    assert_within_budget(lambda: packed_comparison(device, impl, dtype))


def packed_comparison(device: str, impl: str, dtype: torch.dtype) -> Iterator[Comparison]:
    case = packed_case()
    tokens = case.tokens(45, dtype=dtype).requires_grad_()
    sizes = torch.randint(1, 9, (len(case.boxes), 2), dtype=torch.int32)
    out = align(tokens, case, sizes, device, impl)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert out.shape == (int(sizes.prod(1).sum()), 45)

    # Image by image and region by region through the dense form, for the reference and for torchvision.
    def one_by_one(align: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        maps = x.split([int(h * w) for h, w in case.grid_size])
        parts = []
        for box, image, size in zip(case.boxes, case.image_index.tolist(), sizes.tolist(), strict=True):
            grid = tuple(case.grid_size[image].tolist())
            one = Case(grid, 1, box[None], torch.zeros(1, dtype=torch.long))
            parts.append(align(maps[image][None], one, size)[0])
        cells = torch.cat(parts)
        cells.backward(grad.to(x.dtype))
        return cells.detach(), x.grad

    def exact_roi_align(x: Tensor, one: Case, size: list[int]) -> Tensor:
        return reference.roi_align(x, one.boxes, one.image_index, one.grid_size, size)

    exact, exact_grad = one_by_one(exact_roi_align, tokens.double())
    stock, stock_grad = one_by_one(stock_roi_align, tokens)
    yield "output", out.detach(), stock, exact
    yield "gradient", tokens.grad, stock_grad, exact_grad


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_equals_torchvision_in_float32(device: str, impl: str) -> None:
    for sampling_ratio in (0, 1, 2, 4):
        case = dense_case(21, 34, regions=40, boxes=random_boxes(40))
        tokens = case.tokens(19)
        ours = align(tokens, case, (6, 11), device, impl, sampling_ratio=sampling_ratio)
        # torchvision computes its coordinates in float32: 34 * 2^-23 of a grid unit times a gradient of a few units.
        torch.testing.assert_close(ours, stock_roi_align(tokens, case, (6, 11), sampling_ratio), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("device", "impl", "dtype"), with_reference("roi_align"))
def test_a_coordinate_ramp_returns_box_coordinates(device: str, impl: str, dtype: torch.dtype) -> None:
    """Tokens that hold their own centre give back the centre of every output cell."""
    height, width, cells = 12, 20, 5
    wide = torch.promote_types(dtype, torch.float32)
    y = (torch.arange(height, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, dtype=dtype) + 0.5) / width
    tokens = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)[None]
    boxes = random_boxes(30, low=0.06, high=0.94)  # clear of the border, where RoIAlign clamps
    out = align(tokens, Case((height, width), 1, boxes, torch.zeros(30, dtype=torch.long)), cells, device, impl)
    steps = (torch.arange(cells, dtype=wide) + 0.5) / cells
    x0, y0, x1, y1 = boxes.to(wide).T[:, :, None]
    centre_x, centre_y = x0 + (x1 - x0) * steps, y0 + (y1 - y0) * steps
    expected = torch.stack(
        [centre_x[:, None].expand(-1, cells, -1), centre_y[:, :, None].expand(-1, -1, cells)], -1
    ).flatten(1, 2)
    torch.testing.assert_close(out.to(wide), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_strided_tokens(device: str, impl: str) -> None:
    case = dense_case(6, 7)
    with_class_token = torch.randn(3, 43, 24)
    fused = torch.randn(3, 42, 2, 24)
    channels_first = torch.randn(3, 24, 42)
    broadcast = torch.randn(1, 42, 24).expand(3, -1, -1)
    for tokens in (with_class_token[:, 1:], fused[:, :, 1], channels_first.transpose(1, 2), broadcast):
        args = (case.boxes.to(device), case.image_index.to(device), case.grid_size, 3)
        tokens = tokens.to(device)  # keeps the strides
        assert torch.equal(roi_align(tokens, *args, impl=impl), roi_align(tokens.contiguous(), *args, impl=impl))


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_strided_boxes_and_other_integer_types(device: str, impl: str) -> None:
    case = dense_case(6, 7)
    tokens = case.tokens(8)
    expected = align(tokens, case, 3, device, impl)
    boxes = case.boxes.to(device).repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    index = case.image_index.to(device, torch.uint8).repeat_interleave(2)[::2]
    assert torch.equal(roi_align(tokens.to(device), boxes, index, [6, 7], (3, 3), impl=impl).cpu(), expected)


@pytest.mark.parametrize(("device", "impl"), EVERYWHERE)
def test_no_regions_and_no_images(device: str, impl: str) -> None:
    empty, none = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.long, device=device)
    tokens = torch.randn(2, 12, 5, device=device, requires_grad=True)
    out = roi_align(tokens, empty, none, (3, 4), (2, 3), impl=impl)
    assert out.shape == (0, 6, 5)
    out.sum().backward()
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))
    sizes = torch.zeros(0, 2, dtype=torch.long)
    assert roi_align(tokens, empty, none, (3, 4), sizes, impl=impl).shape == (0, 5)
    assert roi_align(tokens[:0], empty, none, (3, 4), 2, impl=impl).shape == (0, 4, 5)
    no_grids = torch.zeros(0, 2, dtype=torch.long)
    assert roi_align(tokens[0, :0], empty, none, no_grids, 2, impl=impl).shape == (0, 4, 5)


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_and_second_derivative(packed: bool) -> None:
    case = packed_case(images=2, regions=5, largest=5) if packed else dense_case(4, 5, images=2, regions=5)
    size = torch.randint(1, 4, (5, 2)) if packed else (2, 3)
    tokens = case.tokens(3, dtype=torch.float64).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return roi_align(x, case.boxes, case.image_index, case.grid_size, size, impl="cpu")

    assert torch.autograd.gradcheck(function, tokens)
    assert torch.autograd.gradgradcheck(function, tokens)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device: str, impl: str, packed: bool) -> None:
    case = packed_case() if packed else dense_case(6, 7)
    tokens = case.tokens(8).to(device).requires_grad_()
    grids = (case.grid_size, 0, 0) if packed else (None, 6, 7)
    sizes = torch.randint(1, 5, (len(case.boxes), 2))
    outs = (sizes, 0, 0) if packed else (None, 3, 2)
    arguments = (case.boxes.to(device), case.image_index.to(device), *grids, *outs, 2)
    ops = _dispatch.ops(impl)
    torch.library.opcheck(ops.roi_align.default, (tokens, *arguments))
    cells = ops.roi_align(tokens, *arguments).detach().requires_grad_()
    torch.library.opcheck(ops.roi_align_backward.default, (cells, *arguments, case.num_tokens))


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_compile_packed_with_a_grid_per_region(device: str, impl: str) -> None:
    def function(tokens: Tensor, boxes: Tensor, index: Tensor, grids: Tensor, sizes: Tensor) -> Tensor:
        return roi_align(tokens, boxes, index, grids, sizes, impl=impl) * 2

    case = packed_case()
    sizes = torch.randint(1, 5, (len(case.boxes), 2))
    arguments = [t.to(device) for t in (case.tokens(8), case.boxes, case.image_index, case.grid_size, sizes)]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = torch.compile(function, fullgraph=True)(*arguments)
    torch.testing.assert_close(out, function(*arguments))


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_the_same_bits_every_time(device: str, impl: str) -> None:
    case = dense_case(16, 16, regions=30)
    tokens = case.tokens(70).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    for count in (threads, threads, 1, 3) if impl == "cpu" else (threads, threads):
        torch.set_num_threads(count)
        out = align(tokens, case, 5, device, impl)
        (grad,) = torch.autograd.grad(out.square().sum(), tokens)
        results.append((out.detach(), grad))
    torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@settings(**examples(60))
@given(data=st.data())
@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_any_boxes_grids_and_counts(device: str, impl: str, data: st.DataObject) -> None:
    edge = st.floats(-0.5, 1.5, width=32)
    count = data.draw(st.integers(0, 6))
    boxes = torch.tensor([[data.draw(edge) for _ in range(4)] for _ in range(count)], dtype=torch.float32)
    boxes = boxes.reshape(-1, 2, 2).sort(1).values.flatten(1)
    images = data.draw(st.integers(1, 3))
    grids = torch.tensor([[data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))] for _ in range(images)])
    sizes = [[data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))] for _ in range(count)]
    sizes = torch.tensor(sizes, dtype=torch.long).reshape(-1, 2)
    index = torch.tensor([data.draw(st.integers(0, images - 1)) for _ in range(count)], dtype=torch.long)
    ratio = data.draw(st.integers(0, 3))
    dtype, tolerance = (torch.float64, 1e-12) if impl == "cpu" else (torch.float32, 1e-5)
    tokens = torch.randn(int(grids.prod(1).sum()), data.draw(st.integers(1, 40)), dtype=dtype)
    case = Case(grids, images, boxes, index)
    ours = align(tokens, case, sizes, device, impl, sampling_ratio=ratio)
    exact = align(tokens.double(), case, sizes, "cpu", "reference", sampling_ratio=ratio)
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("device", "impl"), [kernel for kernel in KERNELS if kernel[1] != "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_values_that_nobody_checked_stay_in_memory(device: str, impl: str, packed: bool) -> None:
    """On a device values are not looked at: whatever boxes and indices hold, other regions are right."""
    case = packed_case() if packed else dense_case(6, 7)
    good = case.boxes.clone()
    case.boxes[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])[:, None]
    case.boxes[4] = torch.tensor([0.9, 0.8, 0.1, 0.2])
    index = case.image_index.clone()
    index[:2] = torch.tensor([-(2**40), 2**40])
    tokens = case.tokens(8)
    grids = (case.grid_size, 0, 0) if packed else (None, 6, 7)
    arguments = [t.to(device) if isinstance(t, Tensor) else t for t in (case.boxes, index, *grids, None, 3, 2)]
    for ratio in (0, 2):
        ops = _dispatch.ops(impl)
        out = ops.roi_align(tokens.to(device), *arguments, ratio).cpu()
        case.boxes = good
        expected = align(tokens, case, (3, 2), device, impl, sampling_ratio=ratio)
        assert torch.equal(out[5:], expected[5:])
        grad = ops.roi_align_backward(torch.ones_like(out).to(device), *arguments, ratio, case.num_tokens)
        assert grad.cpu().isfinite().all()


@pytest.mark.parametrize("impl", [impl for device, impl in EVERYWHERE if device == "cpu"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tokens": [1.0]}, TypeError, "roi_align: tokens: expected a tensor, got"),
        ({"tokens": torch.zeros(3, 42, 8, dtype=torch.int64)}, TypeError, "tokens: expected float32, bfloat16"),
        ({"tokens": torch.zeros(42, 8)}, ValueError, r"tokens: expected shape \(B, H\*W, C\)"),
        ({"tokens": torch.zeros(3, 41, 8)}, ValueError, r"tokens: expected 6 \* 7 tokens an image"),
        ({"boxes": torch.zeros(12, 4, dtype=torch.bfloat16)}, TypeError, "boxes: expected a float32 tensor"),
        ({"boxes": torch.zeros(12, 5)}, ValueError, r"boxes: expected shape \(R, 4\)"),
        ({"boxes": torch.full((12, 4), float("nan"))}, ValueError, "boxes: expected finite x0 <= x1"),
        ({"boxes": torch.tensor([[0.5, 0.1, 0.4, 0.2]] * 12)}, ValueError, "boxes: expected finite x0 <= x1"),
        ({"boxes": torch.tensor([[0.0, 0.0, 200.0, 80.0]] * 12)}, ValueError, "boxes: expected coordinates relative"),
        ({"image_index": torch.zeros(12)}, TypeError, "image_index: expected an integer tensor"),
        ({"image_index": torch.zeros(11, dtype=torch.long)}, ValueError, r"image_index: expected shape \(12,\)"),
        ({"image_index": torch.full((12,), 3)}, ValueError, r"image_index: expected values in \[0, 3\), got 3"),
        ({"image_index": torch.full((12,), -1)}, ValueError, r"image_index: expected values in \[0, 3\), got -1"),
        ({"grid_size": (6, 7, 1)}, TypeError, "grid_size: expected an integer, a pair"),
        ({"grid_size": (6, 7.0)}, TypeError, "grid_size: expected an integer, a pair"),
        ({"grid_size": torch.tensor([[6.0, 7.0]])}, TypeError, "grid_size: expected an integer tensor"),
        ({"tokens": torch.zeros(42, 8), "grid_size": torch.tensor([[6, 8]])}, ValueError, "tokens: expected 48 tokens"),
        ({"tokens": torch.zeros(0, 8), "grid_size": torch.tensor([[0, 8]])}, ValueError, "grid_size: expected heights"),
        ({"output_size": 0}, ValueError, "output_size: expected height and width of at least 1"),
        ({"output_size": "7"}, TypeError, "output_size: expected an integer, a pair"),
        ({"output_size": torch.ones(11, 2, dtype=torch.long)}, ValueError, r"output_size: expected shape \(12, 2\)"),
        ({"output_size": torch.zeros(12, 2, dtype=torch.long)}, ValueError, "output_size: expected heights and"),
        ({"sampling_ratio": -1}, ValueError, "sampling_ratio: expected an integer of at least 0"),
        ({"sampling_ratio": 1.5}, TypeError, "sampling_ratio: expected an integer"),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: it runs on CUDA tensors"),
    ],
)
def test_wrong_input_gets_one_sentence(impl: str, change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "tokens": torch.zeros(3, 42, 8),
        "boxes": awkward_boxes(12),
        "image_index": torch.zeros(12, dtype=torch.long),
        "grid_size": (6, 7),
        "output_size": 3,
        "impl": impl,
    }
    with pytest.raises(error, match=text) as caught:
        roi_align(**{**arguments, **change})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("roi_align: ")


def test_other_devices_are_named() -> None:
    case = dense_case(6, 7)
    with pytest.raises(ValueError, match=r"boxes: expected a tensor on cpu, got float32 of shape .* on meta"):
        roi_align(case.tokens(8), case.boxes.to("meta"), case.image_index, (6, 7), 3)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: str) -> None:
    run_at_isa(isa, __file__, "test_matches_the_float64_reference")


def test_triton_in_the_interpreter() -> None:
    run_interpreted(__file__)
