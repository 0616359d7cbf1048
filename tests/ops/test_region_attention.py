"""region_attention: every implementation against the float64 reference, and as a citizen of PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from granvit import reference
from granvit.ops import _dispatch, region_attention
from granvit.reference._regions import geometry_dtype
from granvit.reference.region_attention import cell_weights
from tests.support import (
    DTYPES,
    Case,
    Comparison,
    assert_within_budget,
    dense_case,
    kernel_dtypes,
    kernels,
    packed_case,
    run_interpreted,
)

# In Triton's slow interpreter there are fewer heads, regions and shapes, but as many draws.
FEW = _dispatch.INTERPRETED
IMAGES, REGIONS = (1, 9) if FEW else (3, 12)
KERNELS = kernels("region_attention")
KERNEL_DTYPES = kernel_dtypes("region_attention")
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in KERNELS, reason="the CPU kernels were not built")

CASES: dict[str, Callable[[], Case]] = {
    "one cell": lambda: dense_case(1, 1, images=IMAGES, regions=REGIONS),
    "one row": lambda: dense_case(1, 37, images=IMAGES, regions=REGIONS),
    "one column": lambda: dense_case(23, 1, images=IMAGES, regions=REGIONS),
    "odd": lambda: dense_case(7, 9, images=IMAGES, regions=REGIONS),
    "larger": lambda: dense_case(9, 15, images=1) if FEW else dense_case(20, 33, images=2),
    "packed": lambda: packed_case(images=2, regions=9, largest=12) if FEW else packed_case(),
    "packed, one image": lambda: packed_case(images=1, regions=6) if FEW else packed_case(images=1),
    "no regions": lambda: dense_case(4, 5, regions=0),
    "no regions, packed": lambda: packed_case(regions=0),
}


def inputs(case: Case, queries: int, heads: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    query = torch.randn(len(case.boxes), queries, heads, dim).to(dtype)
    key, value = case.tokens(heads, dim, dtype=dtype), case.tokens(heads, dim, dtype=dtype)
    return [t.to(device).requires_grad_() for t in (query, key, value)]


def run(case: Case, tensors: list[Tensor], impl: str | None = "cpu", **kwargs: Any) -> Tensor:
    device = tensors[0].device
    grid = case.grid_size.to(device) if isinstance(case.grid_size, Tensor) and impl != "cpu" else case.grid_size
    return region_attention(*tensors, case.boxes.to(device), case.image_index.to(device), grid, impl=impl, **kwargs)


def stock(case: Case, tensors: list[Tensor]) -> Tensor:
    """SDPA with one additive mask of log coverage an image, in the dtype of the tensors."""
    query, key, value = tensors
    if isinstance(case.grid_size, Tensor):
        grids = [tuple(g) for g in case.grid_size.tolist()]
        keys, values = (t.split([h * w for h, w in grids]) for t in (key, value))
    else:
        grids = [case.grid_size] * case.num_images
        keys, values = key.unbind(0), value.unbind(0)
    outputs = [query.new_empty(query.shape[1:])] * len(case.boxes)
    for r, (box, image) in enumerate(zip(case.boxes, case.image_index.tolist(), strict=True)):
        weights = cell_weights(box.to(geometry_dtype(box.device)), *grids[image]).flatten()
        mask = weights.log().to(query.dtype).expand(1, 1, query.shape[1], -1)
        attended = F.scaled_dot_product_attention(
            query[r].transpose(0, 1)[None],
            keys[image].transpose(0, 1)[None],
            values[image].transpose(0, 1)[None],
            attn_mask=mask,
        )
        outputs[r] = attended[0].transpose(0, 1)
    return torch.stack(outputs) if outputs else query * 0 + 0 * (key.sum() + value.sum())


def with_gradients(f: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    output = f(tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


Views = Callable[[list[Tensor]], list[Tensor]]
NAMES = ("output", "grad query", "grad key", "grad value")


def three_ways(
    case: Case, tensors: list[Tensor], impl: str, views: Views = lambda t: t, names: Sequence[str] = NAMES
) -> list[Comparison]:
    """Output and gradients of the op, of stock PyTorch in the same dtype, and of the reference in float64.

    `views` makes query, key and value of `tensors`, whose gradients are compared.
    """
    grad = torch.randn_like(views(tensors)[0])
    ours = with_gradients(lambda t: run(case, views(t), impl), tensors, grad)
    wide = [t.detach().cpu().double().requires_grad_() for t in tensors]
    exact = with_gradients(lambda t: run(case, views(t), "reference"), wide, grad.cpu().double())
    same = [t.detach().cpu().requires_grad_() for t in tensors]
    plain = with_gradients(lambda t: stock(case, views(t)), same, grad.cpu())
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    return list(zip(names, (t.cpu() for t in ours), plain, exact, strict=True))


def check(
    make_case: Callable[[], Case], queries: int, heads: int, dim: int, dtype: torch.dtype, device: str, impl: str
) -> None:
    def draw() -> list[Comparison]:
        case = make_case()
        return three_ways(case, inputs(case, queries, heads, dim, dtype, device), impl)

    assert_within_budget(draw)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("device", "impl", "dtype"), KERNEL_DTYPES)
def test_matches_reference(poisoned: None, device: str, impl: str, dtype: torch.dtype, case: str) -> None:
    check(CASES[case], 3, 1 if FEW else 2, 24, dtype, device, impl)


SHAPES = [(queries, dim) for dim in (8, 24, 64, 72, 256) for queries in (1, 4, 16, 17)]


@pytest.mark.parametrize(
    ("queries", "dim"), [(4, 8), (1, 24), (16, 64), (1, 72), (17, 72), (1, 256), (4, 256)] if FEW else SHAPES
)
@pytest.mark.parametrize(("device", "impl", "dtype"), KERNEL_DTYPES)
def test_head_dims_and_queries(
    poisoned: None, device: str, impl: str, dtype: torch.dtype, dim: int, queries: int
) -> None:
    images, regions, heads = (1, 5, 1) if FEW else (2, 10, 3)
    check(lambda: dense_case(6, 11, images=images, regions=regions), queries, heads, dim, dtype, device, impl)


@pytest.mark.parametrize(("device", "impl", "dtype"), KERNEL_DTYPES)
def test_views_are_read_in_place(poisoned: None, device: str, impl: str, dtype: torch.dtype) -> None:
    """A fused projection of tokens behind a class token, and a probe expanded over the regions."""
    heads, dim = 2 if FEW else 4, 24

    def draw() -> list[Comparison]:
        case = dense_case(5, 8, images=2, regions=4) if FEW else dense_case(5, 8)
        fused = torch.randn(case.num_images, 1 + 40, 3, heads, dim, device=device).to(dtype).requires_grad_()
        probe = torch.randn(1, 2, heads, dim, device=device).to(dtype).requires_grad_()

        def views(tensors: list[Tensor]) -> list[Tensor]:
            _, key, value = tensors[0][:, 1:].unbind(2)
            return [tensors[1].expand(len(case.boxes), -1, -1, -1), key, value]

        return three_ways(case, [fused, probe], impl, views, ("output", "grad fused", "grad probe"))

    assert_within_budget(draw)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_heads_that_are_not_contiguous(device: str, impl: str) -> None:
    case = dense_case(5, 8)
    tensors = inputs(case, 2, 3, 16, torch.float32, device)
    scattered = [t.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in tensors]
    assert not scattered[0].is_contiguous()
    grad = torch.randn_like(tensors[0])
    for a, b in zip(
        with_gradients(lambda t: run(case, t, impl), tensors, grad),
        with_gradients(lambda t: run(case, t, impl), scattered, grad.transpose(0, 1).contiguous().transpose(0, 1)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_uncovered_tokens_do_not_exist(device: str, impl: str) -> None:
    """NaN in tokens outside all boxes changes nothing, and gradients there are exactly zero."""
    case = dense_case(6, 7, images=2, boxes=torch.tensor([[0.2, 0.1, 0.55, 0.6], [0.5, 0.5, 0.5, 0.5]]))
    case.image_index = torch.zeros(2, dtype=torch.long)
    tensors = inputs(case, 2, 2, 24, torch.float32, device)
    covered = torch.zeros(2, 42, dtype=torch.bool)
    for box in case.boxes:
        covered[0] |= cell_weights(box.double(), 6, 7).flatten() > 0
    grad = torch.randn_like(tensors[0])
    clean = with_gradients(lambda t: run(case, t, impl), tensors, grad)
    with torch.no_grad():
        tensors[1][~covered] = torch.nan
        tensors[2][~covered] = torch.inf
    soiled = with_gradients(lambda t: run(case, t, impl), tensors, grad)
    for a, b in zip(clean, soiled, strict=True):
        assert torch.equal(a, b)
    assert (clean[2][~covered] == 0).all()
    assert (clean[3][~covered] == 0).all()


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_non_finite_tokens_stay_with_their_regions(device: str, impl: str) -> None:
    case = dense_case(4, 11, images=1, boxes=torch.tensor([[0.0, 0.0, 0.3, 1.0], [0.5, 0.0, 1.0, 1.0]]))
    case.image_index = torch.zeros(2, dtype=torch.long)
    tensors = inputs(case, 1, 1, 24, torch.float32, device)
    with torch.no_grad():
        tensors[1][0, 0] = torch.inf
        tensors[2][0, 1] = torch.nan
    output, grad_query, *_ = with_gradients(lambda t: run(case, t, impl), tensors, torch.ones_like(tensors[0]))
    assert output[0].isnan().any()
    assert output[1].isfinite().all()
    assert grad_query[1].isfinite().all()


@pytest.mark.parametrize(("device", "impl"), KERNELS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("argument", ["grad", "query"])
def test_non_finite_queries_stay_with_their_regions(device: str, impl: str, queries: int, argument: str) -> None:
    """Tokens that such a region does not cover keep their gradients, even beside those that it covers."""
    case = dense_case(3, 8, images=1, boxes=torch.tensor([[0.0, 0.0, 0.3, 1.0], [0.5, 0.0, 1.0, 1.0]]))
    case.image_index = torch.zeros(2, dtype=torch.long)
    tensors = inputs(case, queries, 1, 24, torch.float32, device)
    grad = torch.randn_like(tensors[0])
    clean = with_gradients(lambda t: run(case, t, impl), tensors, grad)
    with torch.no_grad():
        (grad if argument == "grad" else tensors[0])[0, 0, 0, 3] = torch.inf
    soiled = with_gradients(lambda t: run(case, t, impl), tensors, grad)
    columns = torch.arange(24) % 8
    assert not soiled[2][0, columns < 3].isfinite().all()
    for a, b in zip(clean[2:], soiled[2:], strict=True):
        assert torch.equal(a[0, columns >= 3], b[0, columns >= 3])
    assert torch.equal(clean[1][1], soiled[1][1])


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 30.0, 3e3])
@pytest.mark.parametrize(
    ("device", "impl", "dtype"), [p for p in KERNEL_DTYPES if p.values[2] in (torch.float32, torch.bfloat16)]
)
def test_scores_of_any_size(device: str, impl: str, dtype: torch.dtype, magnitude: float) -> None:
    """Equal scores, and scores so large that all but one weight underflow.

    A score that is off by d changes each weight by a factor of exp(d), hence an average of values by at most
    exp(2 d) - 1 times the largest of them; d is a few roundings of the largest score in float32.
    """
    case = dense_case(9, 11, images=1, regions=20) if FEW else dense_case(9, 11, regions=40)
    tensors = inputs(case, 2, 1 if FEW else 2, 24, dtype, device)
    with torch.no_grad():
        tensors[0] *= magnitude
    query, key, value = (t.detach().cpu().double() for t in tensors)
    ours, exact = {}, {}
    for name, ours[name], _, exact[name] in three_ways(case, tensors, impl):
        assert ours[name].isfinite().all(), name
    score = 24**-0.5 * query.norm(dim=-1).amax() * key.norm(dim=-1).amax() + 30  # 30: log of the smallest coverage
    weight_error = torch.expm1(2 * 2 * torch.finfo(torch.float32).eps * score)
    rounding = torch.finfo(dtype).eps
    assert ((ours["output"] - exact["output"]).abs() <= (weight_error + rounding) * value.abs().amax()).all()
    # A value collects one weight from every query, each times a gradient of about 1 (5 at most in these many draws).
    assert ((ours["grad value"] - exact["grad value"]).abs() <= (weight_error + rounding) * 5 * 80).all()


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_scale(device: str, impl: str) -> None:
    case = dense_case(6, 7, images=2, regions=REGIONS)
    tensors = inputs(case, 2, 1, 16, torch.float64 if impl == "cpu" else torch.float32, device)
    for scale in (0.0, -0.7, 2, 0.25):
        grad = torch.randn_like(tensors[0])
        ours = with_gradients(lambda t, s=scale: run(case, t, impl, scale=s), tensors, grad)
        exact = with_gradients(lambda t, s=scale: run(case, t, "reference", scale=s), tensors, grad)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(run(case, tensors, impl), run(case, tensors, impl, scale=0.25))


@pytest.mark.parametrize(("device", "impl"), [*KERNELS, ("cpu", "reference")])
def test_whole_image_is_plain_attention(device: str, impl: str) -> None:
    """With the full-image box and one query the op is an attention-pooling head."""
    case = dense_case(6, 7, images=3, boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3))
    case.image_index = torch.arange(3)
    tensors = inputs(case, 1, 4, 24, torch.float32, device)
    query, key, value = (t.transpose(1, 2) for t in tensors)
    pooled = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(run(case, tensors, impl), pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_empty_batches(poisoned: None, device: str, impl: str) -> None:
    case = dense_case(4, 5, regions=0)
    tensors = inputs(case, 2, 2, 8, torch.float32, device)
    output, grad_query, grad_key, grad_value = with_gradients(
        lambda t: run(case, t, impl), tensors, torch.zeros_like(tensors[0])
    )
    assert output.shape == grad_query.shape == (0, 2, 2, 8)
    assert (grad_key == 0).all()
    assert (grad_value == 0).all()
    case = dense_case(4, 5, regions=3)
    assert run(case, inputs(case, 0, 2, 8, torch.float32, device), impl).shape == (3, 0, 2, 8)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_gradients_of_some(poisoned: None, device: str, impl: str, wanted: tuple[bool, ...]) -> None:
    case = dense_case(6, 7)
    tensors = inputs(case, 2, 2, 24, torch.float32, device)
    grad = torch.randn_like(tensors[0])
    every = with_gradients(lambda t: run(case, t, impl), tensors, grad)[1:]
    some = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
    run(case, some, impl).backward(grad)
    for t, full, need in zip(some, every, wanted, strict=True):
        assert (t.grad is not None) == need
        assert t.grad is None or torch.equal(t.grad, full)


@settings(max_examples=12 if FEW else 60, deadline=None)
@given(
    data=st.data(),
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    regions=st.integers(0, 7),
    queries=st.integers(1, 5),
    heads=st.integers(1, 3),
    dim=st.sampled_from([8, 16, 40]),
)
@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_any_boxes(
    device: str,
    impl: str,
    data: st.DataObject,
    grids: list[tuple[int, int]],
    regions: int,
    queries: int,
    heads: int,
    dim: int,
) -> None:
    # Multiples of 1/6 put edges on, and a hair beside, the lines of many grids.
    edge = st.one_of(
        st.integers(-2, 8).map(lambda i: i / 6),
        st.floats(-1, 2, width=32),
        st.sampled_from([0.0, 1.0, 1e-30, 1 - 2**-24]),
    )
    rows = []
    for _ in range(regions):
        xs, ys = (sorted(data.draw(st.tuples(edge, edge))) for _ in range(2))
        rows.append([xs[0], ys[0], xs[1], ys[1]])
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(regions, 4)
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, len(grids) - 1), min_size=regions, max_size=regions)), dtype=torch.long
    )
    case = Case(torch.tensor(grids), len(grids), boxes, index)
    tensors = inputs(case, queries, heads, dim, torch.float32, device)
    grad = torch.randn_like(tensors[0])
    ours = with_gradients(lambda t: run(case, t, impl), tensors, grad)
    wide = [t.detach().cpu().double().requires_grad_() for t in tensors]
    exact = with_gradients(lambda t: run(case, t, "reference"), wide, grad.cpu().double())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.cpu(), b.float(), rtol=2e-5, atol=2e-5)


@needs_cpu
@pytest.mark.parametrize(
    "make", [lambda: dense_case(3, 4, images=2, regions=9), lambda: packed_case(images=2, regions=9, largest=5)]
)
def test_gradcheck(make: Callable[[], Case]) -> None:
    case = make()
    tensors = inputs(case, 2, 2, 8, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: run(case, list(t)), tensors, fast_mode=True)


@needs_cpu
def test_second_derivative_is_refused() -> None:
    case = dense_case(3, 4)
    tensors = inputs(case, 1, 1, 8, torch.float64)
    (grad,) = torch.autograd.grad(run(case, tensors, "reference").square().sum(), tensors[:1], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="region_attention: the gradient of its gradient is not implemented"):
        torch.autograd.grad(run(case, tensors).square().sum(), tensors[:1], create_graph=True)


@pytest.mark.parametrize(
    ("device", "impl", "dtype"), [p for p in KERNEL_DTYPES if p.values[2] in (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("case", ["one row", "packed", "no regions"])
def test_opcheck(device: str, impl: str, dtype: torch.dtype, case: str) -> None:
    drawn = CASES[case]()
    ops = _dispatch.ops(impl)
    query, key, value = inputs(drawn, 2, 1 if FEW else 2, 8, dtype, device)
    grid = (None, *drawn.grid_size) if not isinstance(drawn.grid_size, Tensor) else (drawn.grid_size, 0, 0)
    where = (drawn.boxes.to(device), drawn.image_index.to(device), *grid, 0.3)
    torch.library.opcheck(ops.region_attention.default, (query, key, value, *where))
    detached = [t.detach() for t in (query, key, value)]
    output, lse = ops.region_attention(*detached, *where)
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.region_attention_backward.default,
            (torch.randn_like(output), *detached, output, lse, *where, *flags),
        )


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["larger", "packed"])
def test_same_bits_for_any_thread_count(dtype: torch.dtype, case: str) -> None:
    drawn = CASES[case]()
    tensors = inputs(drawn, 5, 6, 24, dtype)
    grad = torch.randn_like(tensors[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(lambda t: run(drawn, t), tensors, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("device", "impl"), KERNELS)
def test_order_of_regions_does_not_matter_to_their_output(device: str, impl: str) -> None:
    case = dense_case(9, 8, regions=30)
    query, key, value = (t.detach() for t in inputs(case, 2, 2, 24, torch.float32, device))
    order = torch.randperm(30)
    shuffled = Case(case.grid_size, case.num_images, case.boxes[order], case.image_index[order])
    there = order.to(device)
    assert torch.equal(run(case, [query, key, value], impl)[there], run(shuffled, [query[there], key, value], impl))


@pytest.mark.parametrize(("device", "impl"), KERNELS)
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_one_cell_has_a_gradient_of_exactly_zero(device: str, impl: str, queries: int) -> None:
    """Its softmax is constant; a sum in another order would leave rounding errors where stock PyTorch has none."""
    boxes = torch.tensor([[0.35, 0.45, 0.35, 0.45], [0.81, 0.1, 0.82, 0.11]])
    case = Case((5, 8), 1, boxes, torch.zeros(2, dtype=torch.long))
    tensors = inputs(case, queries, 2, 24, torch.float32, device)
    _, grad_query, grad_key, grad_value = with_gradients(
        lambda t: run(case, t, impl), tensors, torch.randn_like(tensors[0])
    )
    assert not grad_query.any()
    assert not grad_key.any()
    assert grad_value.any()


@pytest.mark.parametrize(("device", "impl"), [kernel for kernel in KERNELS if kernel[1] != "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_wild_values_are_clamped(device: str, impl: str, packed: bool) -> None:
    """Values on a device are not checked, but lead to no other memory."""
    case = packed_case(images=3) if packed else dense_case(5, 8)
    query, key, value = (t.detach() for t in inputs(case, 2, 2, 8, torch.float32, device))
    nan = torch.nan
    wild = torch.tensor(
        [[nan, nan, nan, nan], [-9.0, -9.0, 1e30, torch.inf], [0.75, 0.75, 0.25, 0.25], [5.0, 5.0, 7.0, 7.0]]
    )
    tame = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])
    grid = (case.grid_size.to(device), 0, 0) if isinstance(case.grid_size, Tensor) else (None, *case.grid_size)

    def results(boxes: Tensor, index: list[int]) -> list[Tensor]:
        where = (boxes.to(device), torch.tensor(index, device=device), *grid, 0.3)
        output, lse = _dispatch.ops(impl).region_attention(query[:4], key, value, *where)
        backward = _dispatch.ops(impl).region_attention_backward
        return [output, *backward(output, query[:4], key, value, output, lse, *where, True, True)]

    for a, b in zip(results(wild, [-7, 1, 2**40, 3]), results(tame, [0, 1, 2, 2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(FEW, reason="this is the interpreter")
def test_triton_in_the_interpreter() -> None:
    run_interpreted(__file__)


ISA_SCRIPT = """
import torch
from granvit import EXTENSION
from tests.ops.test_region_attention import check
from tests.support import DTYPES, dense_case, packed_case
torch.manual_seed(3)
assert EXTENSION.core.cpu_isa() == "{level}"
for make_case in (lambda: dense_case(7, 19, images=2), packed_case):
    for dtype in DTYPES:
        for queries, dim in ((1, 72), (2, 24), (7, 64), (17, 8)):
            check(make_case, queries, 3, dim, dtype, "cpu", "cpu")
print("passed")
"""


@needs_cpu
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_instruction_sets(level: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT.format(level=level)],
        env={**os.environ, "GRANVIT_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not supported by this processor" in result.stderr or "was not compiled" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "passed"


BOX = torch.tensor([[0.1, 0.2, 0.5, 0.6]])
GOOD: dict[str, Any] = {
    "query": torch.zeros(1, 2, 3, 8),
    "key": torch.zeros(2, 12, 3, 8),
    "value": torch.zeros(2, 12, 3, 8),
    "boxes": BOX,
    "image_index": torch.tensor([1]),
    "grid_size": (3, 4),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, r"query: expected a tensor, got \[1.0\]"),
    (
        {"query": torch.zeros(1, 2, 3, 8, dtype=torch.int32)},
        TypeError,
        "query: expected float32, bfloat16, float16 or float64",
    ),
    (
        {"query": torch.zeros(1, 2, 24)},
        ValueError,
        r"query: expected shape \(R, Q, heads, dim\), got float32 of shape \(1, 2, 24\)",
    ),
    (
        {"query": torch.zeros(1, 2, 3, 12)},
        ValueError,
        "query: expected at least one head and a dim that is a multiple of 8 up to 256",
    ),
    (
        {"query": torch.zeros(1, 2, 3, 264)},
        ValueError,
        "query: expected at least one head and a dim that is a multiple of 8 up to 256",
    ),
    (
        {"query": torch.zeros(4, 2, 3, 8)},
        ValueError,
        r"query: expected shape \(1, Q, heads, dim\) to match boxes, got .*\(4, 2, 3, 8\)",
    ),
    ({"key": torch.zeros(2, 12, 3, 8).bfloat16()}, TypeError, "key: expected float32 like query, got bfloat16"),
    ({"key": torch.zeros(2, 11, 3, 8)}, ValueError, r"key: expected 3 \* 4 tokens an image to match grid_size"),
    ({"key": torch.zeros(24, 3, 8)}, ValueError, r"key: expected shape \(B, H\*W, heads, dim\) for this grid_size"),
    ({"key": torch.zeros(2, 12, 2, 8)}, ValueError, r"key: expected heads and dim \(3, 8\) like query"),
    ({"key": torch.zeros(2, 12, 3, 8, device="meta")}, ValueError, "key: expected a tensor on cpu"),
    ({"value": None}, TypeError, "value: expected a tensor, got None"),
    ({"value": torch.zeros(1, 12, 3, 8)}, ValueError, r"value: expected shape \(2, 12, 3, 8\) like key"),
    ({"value": torch.zeros(2, 12, 3, 8).double()}, TypeError, "value: expected float32 like query, got float64"),
    ({"boxes": BOX.bfloat16()}, TypeError, "boxes: expected a float32 tensor"),
    ({"boxes": BOX[0]}, ValueError, r"boxes: expected shape \(R, 4\)"),
    ({"boxes": BOX[:, [2, 1, 0, 3]]}, ValueError, "boxes: expected finite x0 <= x1 and y0 <= y1, got .* in row 0"),
    ({"boxes": BOX * torch.nan}, ValueError, "boxes: expected finite x0 <= x1 and y0 <= y1, got .* in row 0"),
    ({"boxes": BOX * 224}, ValueError, "boxes: expected coordinates relative to the image, 0 to 1"),
    ({"image_index": torch.tensor([1.0])}, TypeError, "image_index: expected an integer tensor"),
    ({"image_index": torch.tensor([1, 0])}, ValueError, r"image_index: expected shape \(1,\) to match boxes"),
    ({"image_index": torch.tensor([2])}, ValueError, r"image_index: expected values in \[0, 2\), got 2 in row 0"),
    ({"image_index": torch.tensor([-1])}, ValueError, r"image_index: expected values in \[0, 2\), got -1 in row 0"),
    ({"grid_size": "3x4"}, TypeError, "grid_size: expected an integer, a pair of integers or an integer tensor"),
    ({"grid_size": (0, 4)}, ValueError, "grid_size: expected height and width of at least 1"),
    ({"grid_size": torch.tensor([3, 4])}, ValueError, r"grid_size: expected shape \(B, 2\)"),
    ({"scale": "1"}, TypeError, "scale: expected a number or None, got '1'"),
    ({"scale": True}, TypeError, "scale: expected a number or None, got True"),
    ({"impl": "fast"}, ValueError, "impl: expected one of cuda, triton, cpu, reference, got 'fast'"),
    ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: it runs on CUDA tensors, not on cpu"),
]


@pytest.mark.parametrize("impl", [*(impl for device, impl in KERNELS if device == "cpu"), "reference"])
@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=range(len(BAD)))
def test_bad_inputs(change: dict[str, Any], error: type[Exception], text: str, impl: str) -> None:
    with pytest.raises(error, match=f"^region_attention: {text}"):
        region_attention(**{"impl": impl, **GOOD, **change})


@pytest.mark.parametrize("impl", [*(impl for device, impl in KERNELS if device == "cpu"), "reference"])
def test_good_inputs_pass(impl: str) -> None:
    assert region_attention(**GOOD, impl=impl).shape == (1, 2, 3, 8)


def test_reference_is_exported() -> None:
    case = dense_case(3, 3)
    tensors = inputs(case, 1, 1, 8, torch.float64)
    direct = reference.region_attention(*tensors, case.boxes, case.image_index, case.grid_size)
    assert torch.equal(direct, run(case, tensors, "reference"))
