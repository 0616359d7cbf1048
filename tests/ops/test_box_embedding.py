"""box_embedding: against the float64 reference, NeRF, Segment Anything, and what PyTorch expects of an op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from granvit import reference
from granvit.ops import _dispatch, box_embedding
from granvit.ops.box_embedding import _without_rows
from tests.support import (
    DEVICE_TYPES,
    Comparison,
    assert_within_budget,
    awkward_boxes,
    dtypes,
    kernels,
    run_at_isa,
    run_interpreted,
)

KERNELS = kernels("box_embedding")
IMPLS = [*KERNELS, *((device, "reference") for device in DEVICE_TYPES)]
ON_CPU = [impl for device, impl in IMPLS if device == "cpu"]
NAMES = ("boxes", "frequencies", "w1", "b1", "w2", "b2")
Inputs = list[Tensor]


def with_dtypes(implementations: list[tuple[str, str]], count: int | None = None) -> list[Any]:
    """Parameters (device, impl, dtype), with the first `count` dtypes that each is tested with."""
    return [
        pytest.param(device, impl, dtype, id=f"{device}-{impl}-{str(dtype).removeprefix('torch.')}")
        for device, impl in implementations
        for dtype in dtypes(impl)[:count]
    ]


def make_inputs(
    boxes: int,
    frequencies: int,
    hidden: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0,
    device: str = "cpu",
) -> Inputs:
    """Boxes, frequencies and the weights of both layers, scaled so that activations are of order one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = (
        torch.randn(hidden, 2 * frequencies) / math.sqrt(frequencies),
        torch.randn(hidden),
        torch.randn(size, hidden) / math.sqrt(hidden),
        torch.randn(size),
    )
    return [
        awkward_boxes(boxes).to(device, wide),
        (scale * torch.randn(4, frequencies)).to(device, wide),
        *(w.to(device, dtype) for w in weights),
    ]


def stock_box_embedding(boxes: Tensor, frequencies: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    u = 2 * math.pi * (boxes @ frequencies)
    features = torch.cat([u.sin(), u.cos()], dim=-1).to(w1.dtype)
    return F.linear(F.gelu(F.linear(features, w1, b1)), w2, b2)


def run(function: Callable[..., Tensor], inputs: Inputs, grad: Tensor) -> Inputs:
    """The output and the gradient of every input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def rows_for(inputs: Inputs, length: int) -> tuple[Tensor, Tensor]:
    """A sequence of `length` tokens and a row of it for every box, in no order."""
    b2 = inputs[5]
    return torch.randn(length, b2.shape[0]).to(b2), torch.randperm(length)[: inputs[0].shape[0]].to(b2.device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("device", "impl", "dtype"), with_dtypes(IMPLS))
@pytest.mark.parametrize(
    ("boxes", "frequencies", "hidden", "size"),
    [
        (1, 1, 3, 5),
        (2, 5, 33, 17),
        (7, 33, 70, 45),
        (130, 20, 100, 131),
        (65, 60, 40, 150) if _dispatch.INTERPRETED else (65, 160, 40, 600),
        (12, 32, 64, 64),
        (1030, 3, 40, 30),
    ],
)
def test_matches_the_float64_reference(
    device: str, impl: str, dtype: torch.dtype, boxes: int, frequencies: int, hidden: int, size: int
) -> None:
    def draw() -> Iterator[Comparison]:
        inputs = make_inputs(boxes, frequencies, hidden, size, dtype, device=device)
        grad = torch.randn(boxes, size).to(device, dtype)
        exact = run(reference.box_embedding, [t.double() for t in inputs], grad.double())
        stock = run(stock_box_embedding, inputs, grad)
        ours = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad)
        for result, like in zip(ours, (inputs[2], *inputs), strict=True):
            assert result.dtype == like.dtype
        return zip(("out", *NAMES), ours, stock, exact, strict=True)

    # A single box has only a few numbers, and its gradient, a difference of many waves, cancels.
    least = 2 if _dispatch.INTERPRETED and boxes > 64 else 8
    assert_within_budget(draw, draws=max(least, 64 // boxes), float64=1e-11)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
@pytest.mark.parametrize("boxes", [64, 200])
@pytest.mark.parametrize("turns", [1.0, 1e3, 1e4])
def test_trigonometry_is_right_however_many_turns(device: str, impl: str, turns: float, boxes: int) -> None:
    # gelu(x + 8) - 8 is x to float32 precision, so the op returns its features.
    frequencies = torch.randn(4, 40).to(device) * turns
    corners = torch.rand(boxes, 4).to(device)
    eye = torch.eye(80, device=device)
    shift = torch.full((80,), 8.0, device=device)
    features = box_embedding(corners, frequencies, eye, shift, eye, -shift, impl=impl)
    u = 2 * math.pi * (corners.double() @ frequencies.double())
    exact = torch.cat([u.sin(), u.cos()], dim=-1)
    assert float((features - exact).abs().max()) < 3 * torch.finfo(torch.float32).eps * 8


@pytest.mark.parametrize(
    ("device", "impl", "dtype"),
    [p for p in with_dtypes(KERNELS) if p.values[2] in (torch.float32, torch.float64)],
)
def test_gelu_is_exact(device: str, impl: str, dtype: torch.dtype) -> None:
    # sin 0 = 0, so the hidden layer is b1; with w2 the identity the output is gelu(b1).
    x = torch.linspace(-14, 14, 201 if _dispatch.INTERPRETED else 2001, dtype=dtype, device=device)
    zero = torch.zeros(1, 4, dtype=dtype, device=device)
    w1 = torch.zeros(len(x), 2, dtype=dtype, device=device)
    eye = torch.eye(len(x), dtype=dtype, device=device)
    b1 = x.clone().requires_grad_()
    out = box_embedding(zero, zero.new_ones(4, 1), w1, b1, eye, torch.zeros_like(x), impl=impl)[0]
    (grad,) = torch.autograd.grad(out.sum(), b1)
    wide = x.double().requires_grad_()
    # erfc keeps its precision for negative x, where 1 + erf cancels.
    exact = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    eps = torch.finfo(dtype).eps
    relative = 4 * eps * (1 + 0.5 * wide.detach().square())  # exp(-x^2 / 2) takes a rounded argument
    assert ((out.double() - exact).abs() <= relative * exact.abs() + 1e-37).all()
    assert ((grad.double() - slope).abs() <= 4 * eps).all()


@pytest.mark.parametrize("boxes", [9, 150])
@pytest.mark.parametrize(("device", "impl", "dtype"), with_dtypes(KERNELS, 2))
def test_strided_inputs(device: str, impl: str, dtype: torch.dtype, boxes: int) -> None:
    inputs = make_inputs(boxes, 12, 30, 20, dtype, device=device)
    corners, frequencies, w1, b1, w2, b2 = inputs
    strided = [
        torch.cat([corners, corners], dim=1).flip(1).flip(1)[:, :4].t().contiguous().t(),
        frequencies.t().contiguous().t(),
        torch.cat([w1, w1], dim=1)[:, : w1.shape[1]],
        torch.stack([b1, b1], dim=1)[:, 0],
        w2.t().contiguous().t(),
        torch.stack([b2, b2], dim=1)[:, 1],
    ]
    assert not any(t.is_contiguous() for t in strided)
    grad = torch.randn(20, boxes).to(device, dtype).t()
    expected = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad.contiguous())
    leaves = [t.detach().requires_grad_() for t in strided]
    out = box_embedding(*leaves, impl=impl)
    for got, want in zip([out, *torch.autograd.grad(out, leaves, grad)], expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("device", "impl"), IMPLS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_writes_rows_into_a_new_sequence(device: str, impl: str, index_dtype: torch.dtype) -> None:
    inputs = make_inputs(7, 6, 20, 19, device=device)
    out, index = rows_for(inputs, 30)
    # A row stride, and an index that is a column of something.
    strided = torch.cat([out, out], dim=1)[:, :19]
    index = torch.stack([index, index], dim=1).to(index_dtype)[:, 0]
    embedding = box_embedding(*inputs, impl=impl)
    expected = out.index_copy(0, index.long(), embedding)
    result = box_embedding(*inputs, out=strided, index=index, impl=impl)
    assert torch.equal(result, expected)
    assert torch.equal(strided, out), "the sequence that came in must stay as it was"


@pytest.mark.parametrize(("device", "impl", "dtype"), with_dtypes(IMPLS, 2))
@pytest.mark.parametrize("boxes", [7, 150])
def test_gradients_through_a_sequence(device: str, impl: str, dtype: torch.dtype, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 20, 19, dtype, device=device)
    out, index = rows_for(inputs, boxes + 23)
    grad = torch.randn(boxes + 23, 19).to(device, dtype)
    *ours, grad_out = run(lambda *a: box_embedding(*a[:6], out=a[6], index=index, impl=impl), [*inputs, out], grad)[1:]
    expected = run(lambda *a: box_embedding(*a, impl=impl), inputs, grad[index])[1:]
    for name, got, want in zip(NAMES, ours, expected, strict=True):
        torch.testing.assert_close(got, want, msg=name)
    assert torch.equal(grad_out, grad.index_fill(0, index, 0))


@pytest.mark.parametrize(("device", "impl"), IMPLS)
def test_writes_in_place(device: str, impl: str) -> None:
    inputs = make_inputs(7, 6, 20, 19, device=device)
    out, index = rows_for(inputs, 30)
    expected = box_embedding(*inputs, out=out, index=index, impl=impl)
    strided = torch.full((30, 40), 5.0, device=device)
    strided[:, :19] = out
    with torch.no_grad():
        view = strided[:, :19]
        version = view._version
        result = box_embedding(*inputs, out=view, index=index, inplace=True, impl=impl)
        assert view._version > version
    assert result is view
    assert torch.equal(view, expected)
    assert (strided[:, 19:] == 5).all()
    with torch.inference_mode():
        fresh = out.clone()
        assert box_embedding(*inputs, out=fresh, index=index, inplace=True, impl=impl) is fresh
    assert torch.equal(fresh, expected)


@pytest.mark.parametrize(("device", "impl"), [pair for pair in KERNELS if pair[1] != "cpu"])
@pytest.mark.parametrize("boxes", [5, 150])
def test_rows_outside_of_the_sequence_are_left_out(device: str, impl: str, boxes: int) -> None:
    # The public op checks on the CPU; on a GPU nobody does unless asked.
    inputs = make_inputs(boxes, 6, 20, 19, device=device)
    out, index = rows_for(inputs, boxes)
    grad = torch.randn_like(out)
    outside = index.clone()
    outside[::5] = torch.tensor([-1, boxes, 2**40], device=device).repeat(boxes)[: len(outside[::5])]
    kept = outside == index
    ops = _dispatch.ops(impl)
    tokens, hidden = ops.box_embedding(*inputs, out, outside, True)
    expected = reference.box_embedding(*(inputs[0][kept], *inputs[1:]), out=out, index=index[kept])
    torch.testing.assert_close(tokens, expected)
    ours = ops.box_embedding_backward(grad, *inputs, hidden, outside, *[True] * 6)
    silenced = grad.index_fill(0, index[~kept], 0)
    for got, want in zip(ours, ops.box_embedding_backward(silenced, *inputs, hidden, index, *[True] * 6), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICE_TYPES)
def test_gradient_of_the_sequence_with_rows_outside_of_it(device: str) -> None:
    grad = torch.randn(6, 3, device=device)
    grad[4] = math.nan
    index = torch.tensor([4, -1, 6, 2**40, 1], device=device)
    assert torch.equal(_without_rows(grad, index), grad.index_fill(0, index[[0, 4]], 0))
    assert _without_rows(grad[:0], index).shape == (0, 3)
    assert torch.equal(_without_rows(grad, index[:0])[:4], grad[:4])


@pytest.mark.parametrize(("device", "impl"), IMPLS)
def test_no_boxes(device: str, impl: str) -> None:
    inputs = make_inputs(0, 6, 20, 19, device=device)
    leaves = [t.requires_grad_() for t in inputs]
    empty = box_embedding(*leaves, impl=impl)
    assert empty.shape == (0, 19)
    for grad, leaf in zip(torch.autograd.grad(empty.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    out = torch.randn(5, 19, device=device)
    nowhere = torch.empty(0, dtype=torch.long, device=device)
    assert torch.equal(box_embedding(*leaves, out=out, index=nowhere, impl=impl), out)


@pytest.mark.parametrize("boxes", [5, 150])
@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_only_the_gradients_asked_for(device: str, impl: str, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 20, 19, device=device)
    grad = torch.randn(boxes, 19, device=device)
    expected = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad)[1:]
    for i, name in enumerate(NAMES):
        leaves = [t.detach().clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        (got,) = torch.autograd.grad(box_embedding(*leaves, impl=impl), leaves[i], grad)
        assert torch.equal(got, expected[i]), name


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(5, 3, 7, 6, torch.float64, scale=0.5)]
    assert torch.autograd.gradcheck(lambda *args: box_embedding(*args, impl="cpu"), inputs)
    out, index = rows_for(inputs, 8)
    assert torch.autograd.gradcheck(
        lambda *args: box_embedding(*args[:6], out=args[6], index=index, impl="cpu"),
        [*inputs, out.double().requires_grad_()],
    )


def test_second_derivative() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(3, 2, 4, 3, torch.float64, scale=0.5)]
    assert torch.autograd.gradgradcheck(lambda *args: box_embedding(*args, impl="reference"), inputs)
    (grad,) = torch.autograd.grad(box_embedding(*inputs, impl="reference").sum(), inputs[2], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="box_embedding: the gradient of its gradient is not implemented"):
        torch.autograd.grad(box_embedding(*inputs, impl="cpu").sum(), inputs[2], create_graph=True)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_nerf_encoding_is_axis_aligned_frequencies(device: str, impl: str) -> None:
    levels = 6
    boxes = torch.rand(11, 4).to(device)
    frequencies = torch.zeros(4, 4 * levels, device=device)
    for axis in range(4):
        for level in range(levels):
            frequencies[axis, axis * levels + level] = 2.0**level / 2  # NeRF: sin(2^l pi x)
    _, _, w1, b1, w2, b2 = make_inputs(1, 4 * levels, 50, 40, device=device)
    angles = (2.0 ** torch.arange(levels, device=device)) * math.pi * boxes[..., None]
    encoding = torch.cat([angles.sin().flatten(1), angles.cos().flatten(1)], dim=1)
    expected = F.linear(F.gelu(F.linear(encoding, w1, b1)), w2, b2)
    torch.testing.assert_close(box_embedding(boxes, frequencies, w1, b1, w2, b2, impl=impl), expected)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_segment_anything_box_prompts_are_a_special_case(device: str, impl: str) -> None:
    # Segment Anything encodes the corners 2p - 1 with one Gaussian matrix G (2, F) as [sin, cos] and adds a learned
    # embedding to each corner. gelu(x) - gelu(-x) = x turns the two layers into a linear map, here a permutation.
    features = 24
    gaussian = torch.randn(2, features).to(device)
    corner = torch.randn(2, 2 * features).to(device)
    boxes = awkward_boxes(14).to(device)
    expected = []
    for i in range(2):
        u = 2 * math.pi * ((2 * boxes[:, 2 * i : 2 * i + 2] - 1) @ gaussian)
        expected.append(torch.cat([u.sin(), u.cos()], dim=-1) + corner[i])

    frequencies = torch.block_diag(gaussian, gaussian)
    # Ours: sines of both corners, then cosines of both. Theirs: sines and cosines of a corner, then of the other.
    order = torch.arange(4 * features).view(2, 2, features).transpose(0, 1).flatten()
    eye = torch.eye(4 * features, device=device)
    permutation = eye[order]
    embedding = box_embedding(
        2 * boxes - 1, frequencies, torch.cat([eye, -eye]), eye.new_zeros(8 * features),
        torch.cat([permutation, -permutation], dim=1), corner.flatten(), impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(embedding.view(-1, 2, 2 * features), torch.stack(expected, dim=1), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("device", "impl", "dtype"), with_dtypes(KERNELS, 2))
@pytest.mark.parametrize("sequence", [False, True])
def test_opcheck(sequence: bool, device: str, impl: str, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(5, 6, 20, 19, dtype, device=device)]
    out, index = rows_for([t.detach() for t in inputs], 9) if sequence else (None, None)
    ops = _dispatch.ops(impl)
    torch.library.opcheck(ops.box_embedding.default, (*inputs, out, index, True))
    detached = [t.detach() for t in inputs]
    tokens, hidden = ops.box_embedding(*detached, out, index, True)
    needs = (True, False, True, True, True, False)
    arguments = (torch.randn_like(tokens), *detached, hidden, index, *needs)
    torch.library.opcheck(ops.box_embedding_backward.default, arguments)
    if sequence:
        torch.library.opcheck(ops.box_embedding_.default, (out, index, *detached))


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_compile_fullgraph_with_changing_number_of_boxes(device: str, impl: str) -> None:
    def loss(out: Tensor, index: Tensor, *inputs: Tensor) -> Tensor:
        return box_embedding(*inputs, out=out * 2, index=index, impl=impl).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for boxes in (5, 11, 3):
        inputs = make_inputs(boxes, 6, 20, 19, device=device)
        out, index = rows_for(inputs, 23)
        leaves = [t.requires_grad_() for t in (out, *inputs)]
        expected = torch.autograd.grad(loss(leaves[0], index, *leaves[1:]), leaves)
        grads = torch.autograd.grad(compiled(leaves[0], index, *leaves[1:]), leaves)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_compile_in_place(device: str, impl: str) -> None:
    def write(out: Tensor, index: Tensor, *inputs: Tensor) -> Tensor:
        box_embedding(*inputs, out=out, index=index, inplace=True, impl=impl)
        return out.sum(1)

    inputs = make_inputs(5, 6, 20, 19, device=device)
    out, index = rows_for(inputs, 9)
    expected = box_embedding(*inputs, out=out, index=index, impl=impl)
    with torch.no_grad():
        sums = torch.compile(write, fullgraph=True)(out, index, *inputs)
    assert torch.equal(out, expected)
    torch.testing.assert_close(sums, expected.sum(1))


def test_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, *weights = make_inputs(1, 6, 20, 19)
            self.weights = torch.nn.ParameterList(weights)

        def forward(self, boxes: Tensor) -> Tensor:
            return box_embedding(boxes, *self.weights)

    model = Model()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (torch.rand(5, 4),), dynamic_shapes=({0: rows},))
    boxes = torch.rand(17, 4)
    assert torch.equal(program.module()(boxes), model(boxes))


@pytest.mark.parametrize(("device", "impl", "dtype"), with_dtypes(IMPLS, 2))
@pytest.mark.parametrize("boxes", [5, 150])
def test_autocast_runs_in_the_incoming_dtype(device: str, impl: str, dtype: torch.dtype, boxes: int) -> None:
    inputs = make_inputs(boxes, 6, 20, 19, dtype, device=device)
    grad = torch.randn(boxes, 19).to(device, dtype)
    expected = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad)
    # PyTorch runs the backward of the reference, under whatever autocast says.
    compared = 1 if impl == "reference" else len(results)
    for got, want in zip(results[:compared], expected[:compared], strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize(("device", "impl", "dtype"), with_dtypes(KERNELS, 2))
@pytest.mark.parametrize("boxes", [7, 150])
def test_the_same_bits_every_time(device: str, impl: str, boxes: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(boxes, 40, 200, 190, dtype, device=device)
    grad = torch.randn(boxes, 190, device=device)
    first = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, threads) if impl == "cpu" else (threads,):
            torch.set_num_threads(count)
            again = run(lambda *args: box_embedding(*args, impl=impl), inputs, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


def magnitudes(inputs: Inputs, out: Tensor, index: Tensor, grad: Tensor) -> Inputs:
    """What the result and the gradients would be if nothing cancelled: what rounding errors are relative to."""
    boxes, frequencies, w1, b1, w2, b2 = (t.double().abs() for t in inputs)
    grad_embedding = grad.double().abs()[index]
    hidden = w1.sum(1) + b1  # features are at most 1, gelu(x) at most |x|, its slope about 1
    grad_hidden = (grad_embedding @ w2) * (1 + hidden)
    grad_features = grad_hidden @ w1
    grad_turns = 2 * math.pi * grad_features.unflatten(1, (2, -1)).sum(1)
    return [
        torch.maximum((hidden @ w2.T + b2).max(), out.double().abs().max()),
        grad_turns @ frequencies.T,
        boxes.T @ grad_turns,
        grad_hidden.sum(0),
        grad_hidden.sum(0),
        grad_embedding.sum(0)[:, None] * hidden,
        grad_embedding.sum(0),
        grad.double().abs(),
    ]


@pytest.mark.parametrize(("device", "impl"), KERNELS)
@settings(max_examples=20 if _dispatch.INTERPRETED else 60, deadline=None)
@given(data=st.data())
def test_any_sizes_and_rows(device: str, impl: str, data: st.DataObject) -> None:
    boxes = data.draw(st.integers(0, 80) | st.integers(120, 140), label="boxes")
    frequencies = data.draw(st.integers(1, 40), label="frequencies")
    hidden = data.draw(st.integers(1, 70), label="hidden")
    size = data.draw(st.integers(1, 70), label="size")
    extra = data.draw(st.integers(0, 5), label="rows more than boxes")
    dtype = data.draw(st.sampled_from([d for d in dtypes(impl) if d != torch.float64]), label="dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    inputs = make_inputs(boxes, frequencies, hidden, size, dtype, device=device)
    out, index = rows_for(inputs, boxes + extra)
    grad = torch.randn(boxes + extra, size).to(device, dtype)

    exact = run(
        lambda *a: reference.box_embedding(*a[:6], out=a[6], index=index),
        [t.double() for t in (*inputs, out)],
        grad.double(),
    )
    ours = run(lambda *a: box_embedding(*a[:6], out=a[6], index=index, impl=impl), [*inputs, out], grad)
    sizes = magnitudes(inputs, out, index, grad) if boxes else exact
    for name, mine, truth, size in zip(("result", *NAMES, "out"), ours, exact, sizes, strict=True):
        if truth.numel():
            error = float((mine.double() - truth).abs().max())
            allowed = 4 * torch.finfo(dtype).eps * float(size.abs().max())
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"  # not true for NaN


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"boxes": torch.rand(5, 4).half()}, TypeError, "boxes: expected a float32 tensor, got float16 of shape"),
        ({"boxes": torch.rand(5, 3)}, ValueError, r"boxes: expected shape \(R, 4\), got float32 of shape \(5, 3\)"),
        ({"boxes": torch.full((5, 4), math.nan)}, ValueError, "boxes: expected finite values, got .* in row 0"),
        ({"frequencies": torch.ones(4, 6).int()}, TypeError, "frequencies: expected float32"),
        ({"frequencies": torch.ones(2, 6)}, ValueError, r"frequencies: expected shape \(4, M\)"),
        ({"w1": [1.0]}, TypeError, "w1: expected a tensor, got"),
        ({"w1": torch.ones(20, 11)}, ValueError, r"w1: expected shape \(D1, 12\), two features a frequency"),
        ({"b1": torch.ones(20).double()}, TypeError, "b1: expected a tensor of float32 like w1, got float64"),
        ({"b1": torch.ones(21)}, ValueError, r"b1: expected shape \(20,\) to match w1"),
        ({"w2": torch.ones(19, 21)}, ValueError, r"w2: expected shape \(D, 20\) to match w1"),
        ({"w2": torch.ones(19, 20).half()}, TypeError, "w2: expected a tensor of float32 like w1"),
        ({"b2": torch.ones(19, 1)}, ValueError, r"b2: expected shape \(19,\) to match w2"),
        ({"b2": torch.ones(19, device="meta")}, ValueError, "b2: expected a tensor on cpu"),
        ({"out": None}, ValueError, "index: expected None without out"),
        ({"index": None}, TypeError, "index: expected an integer tensor with out, got None"),
        ({"index": torch.ones(5)}, TypeError, "index: expected an integer tensor with out, got float32"),
        ({"index": torch.arange(4)}, ValueError, r"index: expected shape \(5,\) to match boxes"),
        ({"index": torch.arange(5) + 5}, ValueError, r"index: expected values in \[0, 9\), got 9 in row 4"),
        ({"index": torch.arange(5) - 1}, ValueError, r"index: expected values in \[0, 9\), got -1 in row 0"),
        ({"index": torch.tensor([1, 2, 3, 2, 4])}, ValueError, "index: expected no row twice, got 2 more than once"),
        ({"out": torch.ones(9, 18)}, ValueError, r"out: expected shape \(T, 19\) to match w2"),
        ({"out": torch.ones(9, 19).half()}, TypeError, "out: expected a tensor of float32 like w1"),
        ({"inplace": True}, RuntimeError, "inplace: expected gradients to be off"),
        ({"inplace": True, "out": None, "index": None}, ValueError, "inplace: expected False without out"),
    ],
)
def test_wrong_input_gets_one_sentence(impl: str, change: dict, error: type[Exception], text: str) -> None:
    arguments = dict(zip(NAMES, make_inputs(5, 6, 20, 19), strict=True))
    arguments |= {"out": torch.ones(9, 19), "index": torch.arange(5)} | change
    with pytest.raises(error, match=f"^box_embedding: {text}"):
        box_embedding(**arguments, impl=impl)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.ones(19, 9).t(), "a contiguous last dimension"),
        (torch.ones(1, 19).expand(9, 19), "rows that do not overlap"),
    ],
)
def test_in_place_needs_rows_of_its_own(impl: str, out: Tensor, text: str) -> None:
    inputs = make_inputs(5, 6, 20, 19)
    with torch.no_grad(), pytest.raises(ValueError, match=f"^box_embedding: out: expected {text}"):
        box_embedding(*inputs, out=out, index=torch.arange(5), inplace=True, impl=impl)


# A check of values looks at them before the op can refuse.
@pytest.mark.parametrize(
    ("device", "impl"), [pair for pair in KERNELS if not _dispatch.must_check(pair[1], torch.device(pair[0]))]
)
def test_vmap_is_refused(device: str, impl: str) -> None:
    inputs = make_inputs(5, 6, 20, 19, device=device)
    with pytest.raises(RuntimeError, match="box_embedding: torch.func.vmap is not supported"):
        torch.func.vmap(lambda b: box_embedding(b, *inputs[1:], impl=impl))(torch.rand(3, 5, 4, device=device))


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: str) -> None:
    run_at_isa(isa, __file__, "test_matches_the_float64_reference")


def test_triton_in_the_interpreter() -> None:
    run_interpreted(__file__, "triton and not interpreter")
