"""tests/cuda_emulation itself: what it computes, and what it must notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cuda_emulation

EXIT, TWO_BARRIERS, MISSING_LANE, UNINITIALISED, MISSING_BARRIER, BEYOND_SHARED, BALLOT = range(7)


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_emulation.load()


def test_shuffles_barriers_and_shared_memory(ops: Any) -> None:
    numbers = torch.randint(-100, 100, (5, 1024)).float()
    for threads in (32, 256, 1024):
        assert torch.equal(ops.sums(numbers, threads), numbers.reshape(-1, threads).sum(1))
    assert ops.misbehave(torch.zeros(1), BALLOT).all()


def test_a_launch_beyond_the_limits_is_refused(ops: Any) -> None:
    with pytest.raises(RuntimeError, match="sum: CUDA emulation: invalid configuration"):
        ops.sums(torch.zeros(2048), 2048)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (EXIT, r"thread \(5, 0, 0\) of block \(0, 0, 0\): exited while others wait at a barrier"),
        (TWO_BARRIERS, r"thread \(40, 0, 0\) .* waits at .*kernels.cu:\d+, others at .*kernels.cu:\d+"),
        (MISSING_LANE, r"thread \(0, 0, 0\) .* for lanes of its warp that do not come"),
    ],
)
def test_divergence_is_an_error(ops: Any, kind: int, text: str) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"misbehave: CUDA emulation: {text}"):
            ops.misbehave(torch.zeros(1), kind)
        # What was left in the middle of the kernel does not disturb the next.
        assert ops.sums(torch.ones(1024), 512).tolist() == [512, 512]


def test_shared_memory_is_poisoned(ops: Any) -> None:
    assert ops.misbehave(torch.zeros(1), UNINITIALISED)[0].isnan()


def test_the_opposite_order_shows_a_missing_barrier(ops: Any) -> None:
    forwards = ops.misbehave(torch.zeros(1), MISSING_BARRIER)
    with cuda_emulation.switched("reverse_order"):
        backwards = ops.misbehave(torch.zeros(1), MISSING_BARRIER)
    assert not torch.equal(forwards, backwards)


@pytest.mark.parametrize("depth", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrix_products_and_asynchronous_copies(ops: Any, dtype: torch.dtype, depth: int) -> None:
    a, b = (torch.randn(size).to(dtype) for size in ((16, depth), (depth, 8)))
    rounded = [t.double() if dtype != torch.float32 else tf32(t) for t in (a, b)]
    torch.testing.assert_close(ops.multiply(a, b, True).double(), rounded[0] @ rounded[1], rtol=1e-6, atol=1e-5)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 11 significant bits, halves away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor().copysign(mantissa) / 2**11, exponent)


def test_a_copy_that_is_not_waited_for_has_not_arrived(ops: Any) -> None:
    a, b = torch.randn(16, 32).bfloat16(), torch.randn(32, 8).bfloat16()
    assert ops.multiply(a, b, False).isnan().all()


@pytest.mark.skipif(cuda_emulation.SANITIZE, reason="this is the process that this test starts")
def test_no_access_outside_tensors_and_shared_memory() -> None:
    """Tests of every op again, under the address sanitizer."""
    files = map(str, sorted(Path(__file__).parent.glob("test_emulated_*.py")))
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    selection = "hostile or strided or views or device or bits or more_regions"
    run = cuda_emulation.run_sanitized("-m", "pytest", *options, *files, "-k", selection)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]


def test_the_sanitizer_sees_shared_memory() -> None:
    call = f"import torch; from tests import cuda_emulation as e; e.load().misbehave(torch.zeros(1), {BEYOND_SHARED})"
    run = cuda_emulation.run_sanitized("-c", call)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "kind_kernel" in run.stderr
