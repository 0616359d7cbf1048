"""What the op tests share: inputs of every awkward kind, and the error budget."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

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


def assert_within_budget(ours: Tensor, stock: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Our error is at most twice the error of stock PyTorch in the same dtype, plus one ulp.

    Args:
        ours: result of the implementation under test.
        stock: result of stock PyTorch operations on the same inputs in the same dtype.
        exact: result of the float64 reference.
        dtype: the dtype that both computed in.
        what: what is compared, for the message.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    exact = exact.double()
    error = (ours.double() - exact).abs()
    assert not error.isnan().any(), f"{what}: {int(error.isnan().sum())} values are NaN"
    if not error.numel():
        return
    if dtype == torch.float64:  # no wider oracle: the reference rounds as much as what is tested
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11 * float(exact.abs().max()), msg=what)
        return
    allowed = 2 * (stock.double() - exact).abs().max() + ulp(exact, dtype)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: error {error.flatten()[worst]:.3e} at {exact.flatten()[worst]:.6g}, allowed "
        f"{allowed.flatten()[worst]:.3e} ({dtype})"
    )


def run_at_isa(isa: str, file: str, selection: str) -> None:
    """Runs a test file's tests named `selection` in a process that is held to one CPU instruction set."""
    probe = "import granvit, sys; sys.exit(granvit.EXTENSION.core.cpu_isa() != sys.argv[1])"
    environment = {**os.environ, "GRANVIT_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", probe, isa], env=environment, capture_output=True, text=True)
    if "is not supported by this processor" in found.stderr or "was not compiled" in found.stderr:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    assert found.returncode == 0, found.stderr
    # -p no:... : a worker of a parallel run must not hand its own settings down.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", file]
    run = subprocess.run(
        [*command, "-k", f"{selection} and cpu"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:]
