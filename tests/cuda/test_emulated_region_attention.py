"""The CUDA kernels of region_attention, run by tests/cuda_emulation: no GPU needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from granvit import reference
from granvit.reference.region_attention import cell_weights
from tests import cuda_emulation
from tests.ops.test_region_attention import stock
from tests.support import Case, Comparison, assert_within_budget, dense_case, packed_case, random_boxes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES: dict[str, Callable[[], Case]] = {
    "dense": lambda: dense_case(13, 17),
    "packed": packed_case,
    "one token": lambda: dense_case(1, 1),
}


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_emulation.load()


def inputs(case: Case, queries: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    query = torch.randn(len(case.boxes), queries, heads, dim).to(dtype)
    return [query, case.tokens(heads, dim, dtype=dtype), case.tokens(heads, dim, dtype=dtype)]


def arguments(case: Case, scale: float) -> tuple[Any, ...]:
    grids = (case.grid_size, 0, 0) if isinstance(case.grid_size, Tensor) else (None, *case.grid_size)
    return (case.boxes, case.image_index, *grids, scale)


def exact_lse(case: Case, tensors: list[Tensor], scale: float) -> Tensor:
    """Log-sum-exp of the scores, region by region in float64."""
    query, key, _ = (t.double() for t in tensors)
    packed = isinstance(case.grid_size, Tensor)
    grids = case.grid_size.tolist() if packed else [case.grid_size] * case.num_images
    keys = key.split([h * w for h, w in grids]) if packed else key.unbind(0)
    rows = []
    for r, (box, image) in enumerate(zip(case.boxes, case.image_index.tolist(), strict=True)):
        bias = cell_weights(box.double(), *grids[image]).flatten().log()
        rows.append((scale * torch.einsum("qhd,nhd->hqn", query[r], keys[image]) + bias).logsumexp(-1))
    return torch.stack(rows)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("queries", "heads", "dim"), [(1, 3, 72), (5, 2, 24), (4, 1, 256), (2, 16, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_float64_reference(
    ops: Any, dtype: torch.dtype, queries: int, heads: int, dim: int, case: str
) -> None:
    def draw() -> Iterator[Comparison]:
        drawn = CASES[case]()
        tensors = inputs(drawn, queries, heads, dim, dtype)
        output, lse = ops.region_attention(*tensors, *arguments(drawn, dim**-0.5))
        wide = [t.double() for t in tensors]
        exact = reference.region_attention(*wide, drawn.boxes, drawn.image_index, drawn.grid_size)
        assert output.dtype == dtype
        assert lse.dtype == torch.float64
        torch.testing.assert_close(lse, exact_lse(drawn, tensors, dim**-0.5), rtol=2e-6, atol=2e-6)
        yield "output", output, stock(drawn, tensors), exact

    assert_within_budget(draw)


def gradients(ops: Any, case: Case, tensors: list[Tensor], grad: Tensor, scale: float) -> list[Tensor]:
    """Output of the op, and gradients of query, key and value."""
    rest = arguments(case, scale)
    output, lse = ops.region_attention(*tensors, *rest)
    return [output, *ops.region_attention_backward(grad, *tensors, output, lse, *rest, True, True)]


def with_gradients(f: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = f(leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def exact_gradients(case: Case, tensors: list[Tensor], grad: Tensor, scale: float | None = None) -> list[Tensor]:
    where = (case.boxes, case.image_index, case.grid_size)
    wide = [t.double() for t in tensors]
    return with_gradients(lambda t: reference.region_attention(*t, *where, scale=scale), wide, grad.double())


SHAPES = [(1, 3, 72), (2, 3, 16), (5, 2, 24), (16, 1, 72), (17, 2, 8), (4, 1, 64), (3, 1, 80), (2, 1, 256)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("queries", "heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_the_float64_reference(
    ops: Any, dtype: torch.dtype, queries: int, heads: int, dim: int, case: str
) -> None:
    def draw() -> Iterator[Comparison]:
        drawn = CASES[case]()
        tensors = inputs(drawn, queries, heads, dim, dtype)
        grad = torch.randn_like(tensors[0])
        ours = gradients(ops, drawn, tensors, grad, dim**-0.5)
        plain = with_gradients(lambda t: stock(drawn, t), tensors, grad)
        exact = exact_gradients(drawn, tensors, grad)
        for name, *results in zip(("output", "grad query", "grad key", "grad value"), ours, plain, exact, strict=True):
            assert results[0].dtype == dtype
            yield name, *results

    assert_within_budget(draw)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_cell_has_a_gradient_of_zero(ops: Any, dtype: torch.dtype, queries: int) -> None:
    """A weight that is 1 whatever the scores are: queries and keys have no influence, to the last bit."""
    corners = torch.rand(40, 1, 2).mul(8).floor().add(torch.rand(40, 2, 2).mul(0.8).add(0.1)) / 8
    case = dense_case(8, 8, images=2, boxes=corners.sort(1).values.flatten(1))
    for dim in (24, 72, 80):
        tensors = inputs(case, queries, 2, dim, dtype)
        grad = torch.randn_like(tensors[0])
        _, grad_query, grad_key, grad_value = gradients(ops, case, tensors, grad, dim**-0.5)
        assert torch.equal(grad_query, torch.zeros_like(grad_query))
        assert torch.equal(grad_key, torch.zeros_like(grad_key))
        assert grad_value.abs().sum() > 0


def test_gradients_of_some(ops: Any) -> None:
    for dtype in DTYPES:
        for case in (dense_case(6, 7), packed_case()):
            tensors = inputs(case, 3, 2, 24, dtype)
            rest = arguments(case, 0.3)
            output, lse = ops.region_attention(*tensors, *rest)
            call = (torch.randn_like(output), *tensors, output, lse, *rest)
            every = ops.region_attention_backward(*call, True, True)
            query, *tokens = ops.region_attention_backward(*call, True, False)
            assert torch.equal(query, every[0])
            assert [t.numel() for t in tokens] == [0, 0]
            query, *tokens = ops.region_attention_backward(*call, False, True)
            assert query.numel() == 0
            assert all(torch.equal(a, b) for a, b in zip(tokens, every[1:], strict=True))
            assert all(t.numel() == 0 for t in ops.region_attention_backward(*call, False, False))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("argument", ["grad", "query", "key", "value"])
def test_what_is_not_finite_stays_with_its_region(ops: Any, dtype: torch.dtype, argument: str, queries: int) -> None:
    """Even beside tokens that the region covers, in one tile of the kernels."""
    case = dense_case(3, 8, images=1, boxes=torch.tensor([[0.0, 0.0, 0.3, 1.0], [0.3, 0.0, 1.0, 1.0]]))
    case.boxes[1, 0] = 0.375
    case.image_index = torch.zeros(2, dtype=torch.long)
    tensors = inputs(case, queries, 2, 24, dtype)
    grad = torch.randn_like(tensors[0])
    clean = gradients(ops, case, tensors, grad, 0.2)
    soil = {"grad": grad, "query": tensors[0], "key": tensors[1], "value": tensors[2]}[argument]
    for bad in (float("inf"), float("nan")):
        soil[0, 0, 0, 3] = bad  # of the first region, or in a token that it covers
        output, grad_query, grad_key, grad_value = gradients(ops, case, tensors, grad, 0.2)
        columns = torch.arange(24) % 8
        if bad != float("inf"):  # with a score of -inf a token has no weight
            assert not grad_key[0, columns < 3, 0].isfinite().all()
        assert torch.equal(output[1], clean[0][1])
        assert torch.equal(grad_query[1], clean[1][1])
        assert torch.equal(grad_key[0, columns >= 3], clean[2][0, columns >= 3])
        assert torch.equal(grad_value[0, columns >= 3], clean[3][0, columns >= 3])
        assert torch.equal(grad_key[:, :, 1], clean[2][:, :, 1])
        assert torch.equal(grad_value[:, :, 1], clean[3][:, :, 1])


def test_uncovered_tokens_have_no_gradient(ops: Any) -> None:
    case = dense_case(9, 8, images=2, boxes=random_boxes(20, low=0.3, high=0.6))
    case.image_index = torch.zeros(20, dtype=torch.long)
    covered = torch.stack([cell_weights(box, 9, 8).flatten() > 0 for box in case.boxes]).any(0)
    for dtype in DTYPES:
        tensors = inputs(case, 3, 2, 16, dtype)
        grad = torch.randn_like(tensors[0])
        clean = gradients(ops, case, tensors, grad, 0.25)
        for t in tensors[1:]:
            t[0, ~covered] = float("nan")
            t[1] = float("nan")
        soiled = gradients(ops, case, tensors, grad, 0.25)
        assert all(torch.equal(a, b) for a, b in zip(soiled, clean, strict=True))
        for t in soiled[2:]:
            assert torch.equal(t[1], torch.zeros_like(t[1]))
            assert torch.equal(t[0, ~covered], torch.zeros_like(t[0, ~covered]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_strided_views(ops: Any, dtype: torch.dtype) -> None:
    case = dense_case(5, 8)
    fused = torch.randn(3, 41, 3, 4, 24).to(dtype)
    probe = torch.randn(1, 2, 4, 24).to(dtype).expand(12, -1, -1, -1)
    _, key, value = fused[:, 1:].unbind(2)
    grad = torch.randn(12, 4, 2, 24).to(dtype).transpose(1, 2)
    ours = gradients(ops, case, [probe, key, value], grad, 0.2)
    copies = [t.contiguous() for t in (probe, key, value)]
    dense = gradients(ops, case, copies, grad.contiguous(), 0.2)
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    # Rows that do not start at multiples of 16 bytes, of tokens and of the gradient.
    odd = torch.randn(3, 40, 4 * 24 + 1).to(dtype)[:, :, 1:].unflatten(2, (4, 24))
    odd_grad = torch.empty(grad.numel() + 1, dtype=dtype)[1:].view(12, 2, 4, 24)
    odd_grad.copy_(grad)
    for key_view, grad_view in ((odd, grad), (key, odd_grad)):
        tensors = [copies[0], key_view, value]
        ours = gradients(ops, case, tensors, grad_view, 0.2)
        exact = exact_gradients(case, tensors, grad_view, 0.2)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_views_and_rows_that_are_not_aligned(ops: Any) -> None:
    case = dense_case(5, 8)
    for dtype in DTYPES:
        fused = torch.randn(3, 41, 3, 4, 24).to(dtype)
        probe = torch.randn(1, 2, 4, 24).to(dtype).expand(12, -1, -1, -1)
        _, key, value = fused[:, 1:].unbind(2)
        contiguous = (probe.contiguous(), key.contiguous(), value.contiguous())
        rest = arguments(case, 0.2)
        expected = ops.region_attention(*contiguous, *rest)
        for ours, dense in zip(ops.region_attention(probe, key, value, *rest), expected, strict=True):
            assert torch.equal(ours, dense)
        # Rows that do not start at multiples of 16 bytes are read one number at a time, and sums take another order.
        odd = torch.randn(3, 40, 4 * 24 + 1).to(dtype)[:, :, 1:].unflatten(2, (4, 24))
        output, lse = ops.region_attention(probe, odd, value, *rest)
        dense, dense_lse = ops.region_attention(contiguous[0], odd.contiguous(), contiguous[2], *rest)
        # In 16 bits they are not the kernels with matrix units either, which round the weights.
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(output, dense, **near)
        torch.testing.assert_close(lse, dense_lse, rtol=1e-6, atol=2e-6)


def test_more_regions_than_blocks_are_wanted(ops: Any) -> None:
    """Then no region is cut into parts."""
    case = dense_case(5, 7, regions=1100)
    tensors = inputs(case, 5, 2, 8, torch.float32)
    output, lse = ops.region_attention(*tensors, *arguments(case, 0.5))
    exact = reference.region_attention(
        *(t.double() for t in tensors), case.boxes, case.image_index, case.grid_size, scale=0.5
    )
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse(case, tensors, 0.5), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("grid", "heads", "dtype"),
    # Several tiles of cells and no parts; runs of heads that end inside the last one; a rest of heads in a block.
    [((5, 7), 1, torch.float32), ((11, 9), 2, torch.bfloat16), ((2, 3), 9, torch.float16)],
)
def test_gradients_of_more_regions_than_warps_are_wanted(
    ops: Any, grid: tuple[int, int], heads: int, dtype: torch.dtype
) -> None:
    case = dense_case(*grid, regions=1100)
    tensors = inputs(case, 1, heads, 8, dtype)
    grad = torch.randn_like(tensors[0])
    rounding = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    ours, exact = gradients(ops, case, tensors, grad, 0.5), exact_gradients(case, tensors, grad, 0.5)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=rounding * float(b.abs().max()))


def test_uncovered_tokens_are_not_read(ops: Any) -> None:
    case = dense_case(9, 8, images=1, boxes=random_boxes(20, low=0.3, high=0.6))
    tensors = inputs(case, 3, 2, 16, torch.float32)
    expected = ops.region_attention(*tensors, *arguments(case, 0.25))
    covered = torch.stack([cell_weights(box, 9, 8).flatten() > 0 for box in case.boxes]).any(0)
    for t in tensors[1:]:
        t[:, ~covered] = float("nan")
    for ours, before in zip(ops.region_attention(*tensors, *arguments(case, 0.25)), expected, strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(ops: Any, magnitude: float, dtype: torch.dtype) -> None:
    case = dense_case(13, 17)
    query, key, value = inputs(case, 2, 2, 16, dtype)
    query = (query * magnitude).to(dtype)
    rest = arguments(case, 1.0)
    output, lse = ops.region_attention(query, key, value, *rest)
    assert output.isfinite().all()
    assert lse.isfinite().all()
    assert output.abs().max() <= value.abs().max() * 1.001
    _, _, grad_value = grads = ops.region_attention_backward(
        torch.ones_like(output), query, key, value, output, lse, *rest, True, True
    )
    assert all(t.isfinite().all() for t in grads)
    # Every query spreads weights of 1 in all; a weight changes by as much as its score is rounded.
    queries = torch.bincount(case.image_index, minlength=3) * 2
    sums = grad_value.double().sum(1).flatten(1)
    error = 2 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps * float(lse.abs().max() + 10)
    torch.testing.assert_close(sums, queries[:, None].expand_as(sums).double(), rtol=error, atol=error)


def test_no_regions_no_queries_no_images(ops: Any) -> None:
    case = dense_case(3, 4, images=2, regions=0, boxes=torch.zeros(0, 4))
    output, lse = ops.region_attention(*inputs(case, 2, 3, 8, torch.float32), *arguments(case, 1.0))
    assert output.shape == (0, 2, 3, 8)
    assert lse.shape == (0, 3, 2)
    case = dense_case(3, 4)
    output, lse = ops.region_attention(*inputs(case, 0, 3, 8, torch.float32), *arguments(case, 1.0))
    assert output.shape == (12, 0, 3, 8)
    assert lse.shape == (12, 3, 0)
    for case in (dense_case(3, 4, regions=0, boxes=torch.zeros(0, 4)), packed_case(regions=0)):
        tensors = inputs(case, 2, 3, 8, torch.float32)
        _, grad_query, *grads = gradients(ops, case, tensors, tensors[0], 1.0)
        assert grad_query.shape == (0, 2, 3, 8)
        assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, tensors[1:], strict=True))


def test_hostile_values_stay_inside_the_tensors(ops: Any) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan] * 4, [0.5, 0.5, nan, 0.7], [-inf, -inf, inf, inf], [0.8, 0.9, 0.1, 0.2], [1e30] * 4])
    index = torch.tensor([0, 7, -3, 2**40, -(2**62)])
    for dtype in DTYPES:
        query, tokens = torch.randn(5, 3, 2, 8).to(dtype), torch.randn(90, 2, 8).to(dtype)

        def run(tokens: Tensor, *grids: Any, query: Tensor = query) -> list[Tensor]:
            where = (boxes, index, *grids, 1.0)
            output, lse = ops.region_attention(query, tokens, tokens, *where)
            backward = ops.region_attention_backward(query, query, tokens, tokens, output, lse, *where, True, True)
            return [output, *backward]

        assert all(t.isfinite().all() for t in run(tokens.unflatten(0, (3, 30)), None, 5, 6))
        with cuda_emulation.switched("integers_on_device"):
            for grids in ([[5, 6]] * 3, [[0, 0], [-5, 6], [90, 1]], [[2**40, 2**40], [5, 6], [5, 12]], [[1, 91]] * 3):
                output, grad_query, *_ = run(tokens, torch.tensor(grids), 0, 0)
                assert output.isfinite().all()
                assert grad_query.isfinite().all()


def test_the_same_bits_in_the_opposite_order(ops: Any) -> None:
    for case in (dense_case(9, 11, regions=30), packed_case()):
        for queries, dtype in ((5, torch.bfloat16), (1, torch.float16), (3, torch.float32)):
            tensors = inputs(case, queries, 3, 24, dtype)
            call = (case, tensors, torch.randn_like(tensors[0]), 0.2)
            expected = gradients(ops, *call)
            assert all(torch.equal(a, b) for a, b in zip(gradients(ops, *call), expected, strict=True))
            with cuda_emulation.switched("reverse_order"):
                assert all(torch.equal(a, b) for a, b in zip(gradients(ops, *call), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(11, 2, 3, 8)}, r"query: expected shape \(12, Q, heads, dim\)"),
        ({0: torch.zeros(12, 2, 3, 16)}, "key: expected heads and dim like query"),
        ({1: torch.zeros(3, 42, 3, 8).half()}, "key: expected the dtype of query"),
        ({2: torch.zeros(2, 42, 3, 8)}, "value: expected the shape of key"),
        ({0: torch.zeros(12, 2, 3, 12), 1: torch.zeros(3, 42, 3, 12), 2: torch.zeros(3, 42, 3, 12)}, "multiple of 8"),
    ],
)
def test_wrong_input_is_named(ops: Any, change: dict[int, Tensor], text: str) -> None:
    tokens = torch.zeros(3, 42, 3, 8)
    call = [torch.zeros(12, 2, 3, 8), tokens, tokens, *arguments(dense_case(6, 7), 1.0)]
    for position, value in change.items():
        call[position] = value
    with pytest.raises(RuntimeError, match=f"granvit value error: region_attention: .*{text}"):
        ops.region_attention(*call)
