"""The CUDA kernels of box_embedding, run by tests/cuda_emulation: no GPU needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from granvit import reference
from tests import cuda_emulation
from tests.ops.test_box_embedding import NAMES, Inputs, make_inputs, rows_for, run, stock_box_embedding
from tests.support import Comparison, assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = [True] * 6
# Boxes of each way through the products: small tiles, larger ones, the library's products.
FEW, SOME, MANY = 9, 150, 600


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_emulation.load()


def emulate(ops: Any, inputs: Inputs, grad: Tensor, out: Tensor | None = None, index: Tensor | None = None) -> Inputs:
    """The output and the gradient of every input."""
    result, hidden = ops.box_embedding(*inputs, out, index, True)
    assert hidden.dtype == result.dtype == inputs[2].dtype
    return [result, *ops.box_embedding_backward(grad, *inputs, hidden, index, *ALL)]


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    error = (ours.double() - expected.double()).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * expected.abs().max(), f"{name}: error {error:.3e}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("boxes", "frequencies", "hidden", "size"),
    [
        (1, 1, 3, 5),
        (2, 5, 33, 17),
        (7, 33, 70, 45),
        (12, 32, 64, 64),
        (100, 260, 24, 200),
        (130, 20, 100, 131),
        (300, 36, 72, 64),
        (600, 12, 50, 70),
        (1100, 16, 40, 32),
    ],
)
def test_matches_the_float64_reference(
    ops: Any, dtype: torch.dtype, boxes: int, frequencies: int, hidden: int, size: int
) -> None:
    def draw() -> Iterator[Comparison]:
        inputs = make_inputs(boxes, frequencies, hidden, size, dtype)
        grad = torch.randn(boxes, size).to(dtype)
        exact = run(reference.box_embedding, [t.double() for t in inputs], grad.double())
        stock = run(stock_box_embedding, inputs, grad)
        ours = emulate(ops, inputs, grad)
        for result, like in zip(ours, (inputs[2], *inputs), strict=True):
            assert result.dtype == like.dtype
        return zip(("out", *NAMES), ours, stock, exact, strict=True)

    # A single box has only a few numbers, and its gradient, a difference of many waves, cancels.
    assert_within_budget(draw, draws=max(8, 64 // boxes))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("in_sequence", [False, True])
def test_more_boxes_than_go_through_the_products_at_once(ops: Any, in_sequence: bool) -> None:
    def draw() -> Iterator[Comparison]:
        inputs = make_inputs(8300, 4, 9, 6, torch.bfloat16)
        out, index = rows_for(inputs, 8305) if in_sequence else (None, None)
        grad = torch.randn(8305 if in_sequence else 8300, 6).bfloat16()
        picked = grad if index is None else grad[index]
        exact = run(reference.box_embedding, [t.double() for t in inputs], picked.double())
        stock = run(stock_box_embedding, inputs, picked)
        result, *grads = emulate(ops, inputs, grad, out, index)
        result = result if index is None else result[index]
        return zip(("out", *NAMES), (result, *grads), stock, exact, strict=True)

    assert_within_budget(draw, draws=2)


@pytest.mark.parametrize("boxes", [FEW, SOME])
def test_long_sums_are_added_up_in_parts(ops: Any, boxes: int) -> None:
    # Without frequencies the hidden layer is b1, and gelu(x) is x here.
    b1, w2, b2 = torch.rand(3000) + 8, torch.rand(40, 3000), torch.zeros(40)
    nothing = (torch.zeros(boxes, 4), torch.zeros(4, 1), torch.zeros(3000, 2))
    out, _ = ops.box_embedding(*nothing, b1, w2, b2, None, None, False)
    exact = w2.double() @ b1.double()
    assert (out - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.max()


@pytest.mark.parametrize("boxes", [64, SOME])
@pytest.mark.parametrize("turns", [1.0, 1e3, 1e4])
def test_trigonometry_is_right_however_many_turns(ops: Any, turns: float, boxes: int) -> None:
    # gelu(x + 8) - 8 is x to float32 precision, so the op returns its features.
    frequencies = torch.randn(4, 40) * turns
    corners = torch.rand(boxes, 4)
    eye, shift = torch.eye(80), torch.full((80,), 8.0)
    features, _ = ops.box_embedding(corners, frequencies, eye, shift, eye, -shift, None, None, False)
    u = 2 * math.pi * (corners.double() @ frequencies.double())
    exact = torch.cat([u.sin(), u.cos()], dim=-1)
    assert float((features - exact).abs().max()) < 3 * torch.finfo(torch.float32).eps * 8


def test_gelu_is_exact(ops: Any) -> None:
    # sin 0 = 0, so the hidden layer is b1; with w2 the identity the output is gelu(b1).
    x = torch.linspace(-14, 14, 501)
    zero, w1, eye = torch.zeros(1, 4), torch.zeros(len(x), 2), torch.eye(len(x))
    inputs = [zero, torch.ones(4, 1), w1, x, eye, torch.zeros(len(x))]
    out, hidden = ops.box_embedding(*inputs, None, None, True)
    grad = ops.box_embedding_backward(torch.ones_like(out), *inputs, hidden, None, *ALL)[3]
    wide = x.double().requires_grad_()
    # erfc keeps its precision for negative x, where 1 + erf cancels.
    exact = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    eps = torch.finfo(torch.float32).eps
    relative = 4 * eps * (1 + 0.5 * wide.detach().square())  # exp(-x^2 / 2) takes a rounded argument
    assert ((out[0].double() - exact).abs() <= relative * exact.abs() + 1e-37).all()
    assert ((grad.double() - slope).abs() <= 4 * eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boxes", [FEW, SOME, MANY])
def test_strided_views_and_rows_that_are_not_aligned(ops: Any, dtype: torch.dtype, boxes: int) -> None:
    inputs = make_inputs(boxes, 12, 32, 24, dtype)
    corners, frequencies, w1, b1, w2, b2 = inputs
    grad = torch.randn(24, boxes).to(dtype).t()
    expected = emulate(ops, inputs, grad.contiguous())
    strided = [
        corners.t().contiguous().t(),
        frequencies.t().contiguous().t(),
        torch.cat([w1, w1], dim=1)[:, :24],
        torch.stack([b1, b1], dim=1)[:, 0],
        w2.t().contiguous().t(),
        torch.stack([b2, b2], dim=1)[:, 1],
    ]
    # Rows that do not start at multiples of 16 bytes.
    odd = [*strided[:2], torch.cat([w1[:, :1], w1], dim=1)[:, 1:], b1, torch.cat([w2[:, :3], w2], dim=1)[:, 3:], b2]
    odd_grad = torch.cat([grad[:, :1], grad], dim=1)[:, 1:]
    for views, view in ((strided, grad), (odd, odd_grad)):
        for name, ours, dense in zip(("out", *NAMES), emulate(ops, views, view), expected, strict=True):
            if boxes == MANY:  # a library may add up in another order
                assert_near(ours, dense, dtype, name)
            else:
                assert torch.equal(ours, dense), name


@pytest.mark.parametrize("frequency_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_boxes_and_frequencies_of_any_dtype(ops: Any, frequency_dtype: torch.dtype) -> None:
    inputs = make_inputs(FEW, 6, 20, 19)
    inputs[0], inputs[1] = inputs[0].double(), inputs[1].to(frequency_dtype)
    grad = torch.randn(FEW, 19)
    exact = run(reference.box_embedding, [t.double() for t in inputs], grad.double())
    for ours, like, want in zip(emulate(ops, inputs, grad), (inputs[2], *inputs), exact, strict=True):
        assert ours.dtype == like.dtype
        eps = max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)
        assert (ours.double() - want).abs().max() <= 32 * eps * want.abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boxes", [FEW, SOME, MANY])
def test_rows_of_a_sequence(ops: Any, dtype: torch.dtype, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 24, 40, dtype)
    out, index = rows_for(inputs, boxes + 23)
    grad = torch.randn(boxes + 23, 40).to(dtype)
    expected = emulate(ops, inputs, grad[index])
    # A row stride, and an index that is a column of something.
    sequence, column = torch.cat([out, out], dim=1)[:, :40], torch.stack([index, index], dim=1)[:, 0]
    before = sequence.clone()
    result, *grads = emulate(ops, inputs, grad, sequence, column)
    assert torch.equal(sequence, before), "the sequence that came in must stay as it was"
    assert torch.equal(result, out.index_copy(0, index, expected[0]))
    for name, ours, want in zip(NAMES, grads, expected[1:], strict=True):
        assert torch.equal(ours, want), name
    columns = out.t().contiguous().t()
    assert torch.equal(ops.box_embedding(*inputs, columns, index, False)[0], result)
    wide = torch.full((boxes + 23, 47), 5.0).to(dtype)
    wide[:, 1:41] = out
    ops.box_embedding_(wide[:, 1:41], column, *inputs)
    assert torch.equal(wide[:, 1:41], result)
    assert (wide[:, [0, *range(41, 47)]] == 5).all()


@pytest.mark.parametrize("boxes", [FEW, SOME, MANY])
def test_hostile_indices_are_left_out(ops: Any, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 20, 19)
    out, index = rows_for(inputs, boxes)
    grad = torch.randn_like(out)
    outside = index.clone()
    outside[::3] = torch.tensor([-1, boxes, 2**40, -(2**62)]).repeat(boxes)[: len(outside[::3])]
    kept = outside == index
    tokens, hidden = ops.box_embedding(*inputs, out, outside, True)
    expected = out.clone()
    expected[index[kept]] = ops.box_embedding(*inputs, None, None, False)[0][kept]
    assert torch.equal(tokens, expected)
    ours = ops.box_embedding_backward(grad, *inputs, hidden, outside, *ALL)
    silenced = grad.index_fill(0, index[~kept], 0)
    for got, want in zip(ours, ops.box_embedding_backward(silenced, *inputs, hidden, index, *ALL), strict=True):
        assert torch.equal(got, want)
    ops.box_embedding_(out, outside, *inputs)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("boxes", [FEW, SOME, MANY])
def test_hostile_boxes_stay_in_their_rows(ops: Any, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 20, 19)
    nan, inf = float("nan"), float("inf")
    grad = torch.randn(boxes, 19)
    expected = emulate(ops, inputs, grad)
    inputs[0][:4] = torch.tensor([[nan] * 4, [0.5, 0.5, inf, 0.7], [-inf, 0, 0, 0], [1e30, -1e30, 1e38, 0.5]])
    out, grad_boxes = emulate(ops, inputs, grad)[:2]
    assert out[:3].isnan().all()
    assert out[3].isfinite().all()
    assert torch.equal(out[4:], expected[0][4:])
    assert torch.equal(grad_boxes[4:], expected[1][4:])


def test_what_is_not_finite_stays_where_it_belongs(ops: Any) -> None:
    for boxes in (FEW, SOME, MANY):
        inputs = make_inputs(boxes, 6, 20, 19)
        grad = torch.randn(boxes, 19)
        expected = emulate(ops, inputs, grad)
        w2 = inputs[4].clone()
        w2[3] = float("nan")
        out, _ = ops.box_embedding(*inputs[:4], w2, inputs[5], None, None, False)
        assert out[:, 3].isnan().all()
        rest = torch.arange(19) != 3
        assert torch.equal(out[:, rest], expected[0][:, rest])
        grad[5] = float("inf")
        grads = emulate(ops, inputs, grad)[1:]
        others = torch.arange(boxes) != 5
        assert torch.equal(grads[0][others], expected[1][others])
        assert not grads[4].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_the_opposite_order(ops: Any, dtype: torch.dtype) -> None:
    for boxes in (40, SOME, 1100):
        inputs = make_inputs(boxes, 20, 72, 40, dtype)
        out, index = rows_for(inputs, boxes + 5)
        grad = torch.randn(boxes + 5, 40).to(dtype)
        expected = emulate(ops, inputs, grad, out, index)
        again = emulate(ops, inputs, grad, out, index)
        with cuda_emulation.switched("reverse_order"):
            backwards = emulate(ops, inputs, grad, out, index)
        for name, *results in zip(("out", *NAMES), expected, again, backwards, strict=True):
            assert all(torch.equal(results[0], other) for other in results[1:]), name


@pytest.mark.parametrize("boxes", [FEW, SOME, MANY])
def test_only_the_gradients_asked_for(ops: Any, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 20, 19)
    grad = torch.randn(boxes, 19)
    expected = emulate(ops, inputs, grad)[1:]
    hidden = ops.box_embedding(*inputs, None, None, True)[1]
    for i, name in enumerate(NAMES):
        grads = ops.box_embedding_backward(grad, *inputs, hidden, None, *(j == i for j in range(6)))
        assert torch.equal(grads[i], expected[i]), name
        assert all(g.shape == (0,) for j, g in enumerate(grads) if j != i), name


def test_no_boxes_no_features_no_channels(ops: Any) -> None:
    inputs = make_inputs(0, 6, 20, 19)
    out, hidden = ops.box_embedding(*inputs, None, None, True)
    assert out.shape == (0, 19)
    assert hidden.shape == (0, 20)
    for grad, like in zip(ops.box_embedding_backward(out, *inputs, hidden, None, *ALL), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
    sequence, nowhere = torch.randn(5, 19), torch.empty(0, dtype=torch.long)
    assert torch.equal(ops.box_embedding(*inputs, sequence, nowhere, False)[0], sequence)
    for boxes in (FEW, SOME, MANY):
        for frequencies, width, size in ((0, 3, 2), (3, 0, 2), (3, 3, 0)):
            inputs = make_inputs(boxes, max(frequencies, 1), max(width, 1), size)
            inputs[1], inputs[2] = inputs[1][:, :frequencies], inputs[2][:width, : 2 * frequencies]
            inputs[3], inputs[4] = inputs[3][:width], inputs[4][:, :width]
            grad = torch.randn(boxes, size)
            exact = run(reference.box_embedding, [t.double() for t in inputs], grad.double())
            for ours, want in zip(emulate(ops, inputs, grad), exact, strict=True):
                torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(5, 3)}, r"boxes: expected shape \(R, 4\)"),
        ({0: torch.zeros(5, 4).int()}, "boxes: expected float32"),
        ({1: torch.zeros(3, 6)}, r"frequencies: expected shape \(4, M\)"),
        ({2: torch.zeros(20, 11)}, r"w1: expected shape \(D1, 12\)"),
        ({3: torch.zeros(20).double()}, r"b1: expected shape \(20,\) in the dtype of w1"),
        (dict(enumerate(make_inputs(5, 6, 20, 19, torch.float64)[2:], 2)) | {6: None, 7: None}, "w1: expected float32"),
        ({3: torch.zeros(19)}, r"b1: expected shape \(20,\)"),
        ({4: torch.zeros(19, 21)}, r"w2: expected shape \(D, 20\)"),
        ({4: torch.zeros(19, 20).half()}, "w2: expected the dtype of w1"),
        ({5: torch.zeros(18)}, r"b2: expected shape \(19,\)"),
        ({6: torch.zeros(9, 18)}, r"out: expected shape \(T, 19\)"),
        ({6: None}, "out, index: expected both or neither"),
        ({7: torch.arange(4)}, r"index: expected an int64 tensor of shape \(5,\)"),
        ({7: torch.arange(5).int()}, "index: expected an int64 tensor"),
    ],
)
def test_wrong_input_is_named(ops: Any, change: dict[int, Any], text: str) -> None:
    call: list[Any] = [*make_inputs(5, 6, 20, 19), torch.zeros(9, 19), torch.arange(5), True]
    for position, value in change.items():
        call[position] = value
    with pytest.raises(RuntimeError, match=f"granvit value error: box_embedding: .*{text}"):
        ops.box_embedding(*call)
