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
        torch.testing.assert_close(output, dense)
        torch.testing.assert_close(lse.float(), dense_lse.float())


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


def test_uncovered_tokens_are_not_read(ops: Any) -> None:
    case = dense_case(9, 8, images=1, boxes=random_boxes(20, low=0.3, high=0.6))
    tensors = inputs(case, 3, 2, 16, torch.float32)
    expected = ops.region_attention(*tensors, *arguments(case, 0.25))
    covered = torch.stack([cell_weights(box, 9, 8).flatten() > 0 for box in case.boxes]).any(0)
    for t in tensors[1:]:
        t[:, ~covered] = float("nan")
    for ours, before in zip(ops.region_attention(*tensors, *arguments(case, 0.25)), expected, strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(ops: Any, magnitude: float) -> None:
    case = dense_case(13, 17)
    query, key, value = inputs(case, 2, 2, 16, torch.float32)
    output, lse = ops.region_attention(query * magnitude, key, value, *arguments(case, 1.0))
    assert output.isfinite().all()
    assert lse.isfinite().all()
    assert output.abs().max() <= value.abs().max() * 1.001


def test_no_regions_no_queries_no_images(ops: Any) -> None:
    case = dense_case(3, 4, images=2, regions=0, boxes=torch.zeros(0, 4))
    output, lse = ops.region_attention(*inputs(case, 2, 3, 8, torch.float32), *arguments(case, 1.0))
    assert output.shape == (0, 2, 3, 8)
    assert lse.shape == (0, 3, 2)
    case = dense_case(3, 4)
    output, lse = ops.region_attention(*inputs(case, 0, 3, 8, torch.float32), *arguments(case, 1.0))
    assert output.shape == (12, 0, 3, 8)
    assert lse.shape == (12, 3, 0)


def test_hostile_values_stay_inside_the_tensors(ops: Any) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan] * 4, [0.5, 0.5, nan, 0.7], [-inf, -inf, inf, inf], [0.8, 0.9, 0.1, 0.2], [1e30] * 4])
    index = torch.tensor([0, 7, -3, 2**40, -(2**62)])
    query, tokens = torch.randn(5, 3, 2, 8), torch.randn(90, 2, 8)
    output, _ = ops.region_attention(
        query, tokens.unflatten(0, (3, 30)), tokens.unflatten(0, (3, 30)), boxes, index, None, 5, 6, 1.0
    )
    assert output.isfinite().all()
    with cuda_emulation.switched("integers_on_device"):
        for grids in ([[5, 6]] * 3, [[0, 0], [-5, 6], [90, 1]], [[2**40, 2**40], [5, 6], [5, 12]], [[1, 91]] * 3):
            output, _ = ops.region_attention(query, tokens, tokens, boxes, index, torch.tensor(grids), 0, 0, 1.0)
            assert output.isfinite().all()


def test_the_same_bits_in_the_opposite_order(ops: Any) -> None:
    for case in (dense_case(9, 11, regions=30), packed_case()):
        call = (*inputs(case, 5, 3, 24, torch.bfloat16), *arguments(case, 0.2))
        expected = ops.region_attention(*call)
        with cuda_emulation.switched("reverse_order"):
            for ours, before in zip(ops.region_attention(*call), expected, strict=True):
                assert torch.equal(ours, before)


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
