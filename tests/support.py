"""What the op tests share: inputs of every awkward kind, and the error budget."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase
from torch import Tensor

from granvit.ops import _dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_boxes(count: int, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Ordered boxes with corners anywhere in [low, high]."""
    corners = torch.rand(count, 2, 2).sort(1).values * (high - low) + low
    return corners.flatten(1).contiguous()


def awkward_boxes(count: int) -> Tensor:
    """Random boxes, the first ones replaced by a box of each degenerate kind."""
    kinds = torch.tensor(
        [
            [0.0, 0.0, 1.0, 1.0],  # the whole image
            [0.5, 0.5, 0.5, 0.5],  # a point
            [0.2, 0.3, 0.2, 0.9],  # no width
            [0.1, 0.7, 0.8, 0.7],  # no height
            [1.0, 1.0, 1.0, 1.0],  # the far corner
            [0.0, 0.0, 1e-6, 1e-6],  # less than a cell
            [-0.4, -0.3, 0.2, 0.3],  # beyond the near edge
            [0.7, 0.8, 1.5, 1.4],  # beyond the far edge
            [1.2, 1.2, 1.4, 1.4],  # outside
        ]
    )
    boxes = random_boxes(count)
    boxes[: len(kinds)] = kinds[:count]
    return boxes


@dataclass
class Case:
    """Images, grids and regions; `grid_size` is a pair for dense tokens and a (B, 2) tensor for packed ones."""

    grid_size: tuple[int, int] | Tensor
    num_images: int
    boxes: Tensor
    image_index: Tensor

    @property
    def num_tokens(self) -> int:
        if isinstance(self.grid_size, Tensor):
            return int(self.grid_size.prod(1).sum())
        return self.num_images * self.grid_size[0] * self.grid_size[1]

    def tokens(self, *trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh tokens (B, N, ...) or (T, ...)."""
        if isinstance(self.grid_size, Tensor):
            return torch.randn(self.num_tokens, *trailing).to(dtype)
        return torch.randn(self.num_images, self.grid_size[0] * self.grid_size[1], *trailing).to(dtype)


def dense_case(height: int, width: int, *, images: int = 3, regions: int = 12, boxes: Tensor | None = None) -> Case:
    boxes = awkward_boxes(regions) if boxes is None else boxes
    return Case((height, width), images, boxes, torch.randint(0, images, (len(boxes),)))


def packed_case(*, images: int = 4, regions: int = 12, largest: int = 19) -> Case:
    grid = torch.randint(1, largest, (images, 2))
    return Case(grid, images, awkward_boxes(regions), torch.randint(0, images, (regions,)))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at each |x|."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().double().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps


# What is compared, the result under test, that of stock PyTorch on the same inputs, that of the float64 reference.
Comparison = tuple[str, Tensor, Tensor, Tensor]


def assert_within_budget(draw: Callable[[], Iterable[Comparison]], draws: int = 8, float64: float = 1e-13) -> None:
    """Our largest error is at most twice the largest error of stock PyTorch, beyond one ulp, on average over draws.

    One draw cannot judge, because the largest of a few rounding errors is a lottery: stock attention with its channels
    permuted, the same mathematics, exceeds twice the error of stock attention in one draw out of twenty. Where the
    draws are beyond the budget, seven times as many follow, and all together judge: bad luck passes, a worse kernel
    does not.

    Args:
        draw: makes fresh inputs and returns the comparisons. The dtype of stock's result is the one that counts; in
            float64 there is no wider oracle, and the reference rounds as much.
        draws: how often, to begin with.
        float64: how near float64 results have to be, relative to each and to the largest number.
    """
    beyond: dict[str, list[float]] = {}  # per comparison: our largest error beyond an ulp, of every draw
    allowed: dict[str, list[float]] = {}
    worse: list[str] = []
    for more in (draws, 7 * draws):
        for _ in range(more):
            for what, *results in draw():
                ours, stock, exact = (t.detach() for t in results)
                assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
                if stock.dtype == torch.float64:
                    atol = float64 * float(exact.abs().max()) if exact.numel() else 0.0
                    named = functools.partial("{}: {}".format, what)
                    torch.testing.assert_close(ours, exact, rtol=float64, atol=atol, msg=named)
                    continue
                error = (ours.double() - exact.double()).abs()
                stock_error = (stock.double() - exact.double()).abs()
                assert not error.isnan().any(), f"{what}: {int(error.isnan().sum())} values are NaN"
                if error.numel():
                    beyond.setdefault(what, []).append(float((error - ulp(exact, stock.dtype)).amax().clamp(min=0)))
                    allowed.setdefault(what, []).append(2 * float(stock_error.amax()))
        worse = [what for what in beyond if not sum(beyond[what]) <= sum(allowed[what])]
        if not worse:
            return
    raise AssertionError(f"{worse[0]}: errors of {beyond[worse[0]]} beyond an ulp, allowed {allowed[worse[0]]}")


DEVICE_TYPES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def kernels(op: str) -> list[tuple[str, str]]:
    """(device type, implementation) of every kernel of an op that can run here."""
    return [
        (device, impl)
        for device in DEVICE_TYPES
        for impl in ("cpu", "cuda", "triton")
        if _dispatch.unavailable(op, impl, device) is None
    ]


def dtypes(impl: str) -> tuple[torch.dtype, ...]:
    """What an implementation is tested with."""
    if impl in ("cpu", "reference"):
        return DTYPES
    # Triton's interpreter takes the bits of bfloat16 for integers.
    return (torch.float32, torch.float16) if _dispatch.INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)


def kernel_dtypes(op: str) -> list[Any]:
    """Parameters (device, impl, dtype) for tests of every kernel in every dtype that it takes."""
    return [
        pytest.param(device, impl, dtype, id=f"{device}-{impl}-{str(dtype).removeprefix('torch.')}")
        for device, impl in kernels(op)
        for dtype in dtypes(impl)
    ]


def with_reference(op: str) -> list[Any]:
    """:func:`kernel_dtypes`, and the reference, which is held to the same budget, on the CPU."""
    if _dispatch.INTERPRETED:
        return kernel_dtypes(op)
    return kernel_dtypes(op) + [
        pytest.param("cpu", "reference", dtype, id=f"cpu-reference-{str(dtype).removeprefix('torch.')}")
        for dtype in DTYPES
    ]


def examples(count: int) -> dict[str, Any]:
    """Hypothesis settings: in Triton's interpreter, where an example takes seconds, few and as they were found."""
    if not _dispatch.INTERPRETED:
        return {"max_examples": count, "deadline": None}
    return {"max_examples": 10, "deadline": None, "phases": (Phase.explicit, Phase.reuse, Phase.generate)}


def run_interpreted(file: str, selection: str = "triton and not interpreter") -> None:
    """Runs a test file's tests of Triton kernels in a process where Triton interprets them, on CPU tensors."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", file]
    run = subprocess.run([*command, "-k", selection], env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-6000:]


def run_at_isa(isa: str, file: str, selection: str) -> None:
    """Runs a test file's tests of CPU kernels named `selection` in a process held to one CPU instruction set."""
    probe = "import granvit, sys; sys.exit(granvit.EXTENSION.core.cpu_isa() != sys.argv[1])"
    environment = {**os.environ, "GRANVIT_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", probe, isa], env=environment, capture_output=True, text=True)
    if "is not supported by this processor" in found.stderr or "was not compiled" in found.stderr:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    assert found.returncode == 0, found.stderr
    # -p no:... : a worker of a parallel run must not hand its own settings down.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", file]
    run = subprocess.run(
        [*command, "-k", f"{selection} and cpu-cpu"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:]
