"""What is measured: the workloads, their inputs, and the suites that name them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

SEED = 20240917
HEADS = 16
CHANNELS = 1152  # SigLIP-so400m: 16 heads of 72


@dataclass(frozen=True)
class Regions:
    """Images on a grid, each with the same number of boxes, in image order.

    Attributes:
        name: the workload's name.
        images: number of images, B.
        grid: tokens of an image, (H, W).
        boxes: boxes an image.
        width: smallest and largest width of a box, as a share of the image's.
        height: the same for its height.
        output: cells of a region's RoI grid, (h, w).
        queries: queries a region, for attention.
        channels: C.
        heads: attention heads; the head dimension is C / heads.
    """

    name: str
    images: int
    grid: tuple[int, int]
    boxes: int
    width: tuple[float, float]
    height: tuple[float, float]
    output: tuple[int, int]
    queries: int = 1
    channels: int = CHANNELS
    heads: int = HEADS

    @property
    def num_regions(self) -> int:
        return self.images * self.boxes

    @property
    def num_tokens(self) -> int:
        return self.images * self.grid[0] * self.grid[1]

    def regions(self) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) and image_index (R,), the same ones in every run."""
        generator = torch.Generator().manual_seed(SEED)
        share = torch.rand(self.num_regions, 4, generator=generator)
        low = torch.tensor([self.width[0], self.height[0]])
        high = torch.tensor([self.width[1], self.height[1]])
        size = low + (high - low) * share[:, :2]
        start = (1 - size) * share[:, 2:]
        return torch.cat([start, start + size], 1), torch.arange(self.images).repeat_interleave(self.boxes)

    def tokens(
        self, rows: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device, *, salt: int
    ) -> Tensor:
        """Normal values (rows, H*W, C), the same ones in every run on every device; `salt` tells tensors apart."""
        generator = torch.Generator().manual_seed(SEED + salt)
        return torch.randn(rows, math.prod(grid), self.channels, generator=generator).to(device, dtype)


@dataclass(frozen=True)
class Boxes:
    """Box tokens: R boxes through Fourier features and two layers, into a sequence of 2 R tokens."""

    name: str
    boxes: int
    frequencies: int = 256
    hidden: int = 1536
    width: int = 1536

    @property
    def num_regions(self) -> int:
        return self.boxes

    @property
    def sequence(self) -> int:
        return 2 * self.boxes


Workload = Regions | Boxes

_PAPER = {"width": (0.1, 0.8), "height": (0.1, 0.8), "output": (32, 32)}
_PAGE = {"width": (0.05, 0.4), "height": (0.015, 0.05), "output": (8, 8)}
SWEEP_BOXES = (1, 4, 16, 64, 256, 1024)
SWEEP_GRIDS = (16, 32, 64, 128)


def _region_workloads() -> Iterator[Regions]:
    yield Regions("paper", 16, (32, 32), 6, **_PAPER)
    yield Regions("page", 8, (64, 64), 64, **_PAGE)
    yield Regions("page256", 4, (64, 64), 256, **_PAGE)
    yield Regions("cpu", 8, (32, 32), 6, **_PAPER)
    for queries in (1, 4, 16):
        yield Regions(f"paper.q{queries}", 16, (32, 32), 6, **_PAPER, queries=queries)
        yield Regions(f"page.q{queries}", 8, (64, 64), 64, **_PAGE, queries=queries)
        yield Regions(f"paper.b2.q{queries}", 2, (32, 32), 6, **_PAPER, queries=queries)
        yield Regions(f"page.b2.q{queries}", 2, (64, 64), 64, **_PAGE, queries=queries)
    sweep = {"width": (0.05, 0.4), "height": (0.05, 0.4), "output": (8, 8)}
    for count in SWEEP_BOXES:
        yield Regions(f"boxes.{count}", 1, (32, 32), count, **sweep)
    for side in SWEEP_GRIDS:
        yield Regions(f"grid.{side}", 1, (side, side), 16, **sweep)
    yield Regions("tiny", 2, (8, 8), 3, **{**_PAPER, "output": (4, 4)}, queries=2, channels=32, heads=2)


REGIONS = {workload.name: workload for workload in _region_workloads()}
BOXES = {
    workload.name: workload
    for workload in (
        *(Boxes(f"R{count}", count) for count in (12, 96, 128, 1024, 4096, 65536)),
        *(Boxes(f"boxes.{count}", count) for count in SWEEP_BOXES),
        Boxes("tiny", 5, frequencies=8, hidden=16, width=16),
    )
}


def find(op: str, name: str) -> Workload:
    """The workload of that name for an op."""
    return BOXES[name] if op == "box_embedding" else REGIONS[name]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Selection:
    """One line of a suite: every combination of these is measured, with the peers of the op that are not left out.

    `sweep` asks for our op and for the peers that stay affordable at every size.
    """

    op: str
    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = ("forward", "full")
    leave_out: tuple[str, ...] = ()
    sweep: bool = False


@dataclass(frozen=True)
class Suite:
    """Selections, and how long they are sampled.

    Attributes:
        selections: what is measured.
        passes: how often the providers of a group take turns; a drifting machine meets them all alike.
        seconds: time spent on samples of one provider in one pass; at least one sample is taken.
    """

    selections: tuple[Selection, ...]
    passes: int = 2
    seconds: float = 0.15
    device: str | None = field(default=None)


_BOX_SWEEP = tuple(f"boxes.{count}" for count in SWEEP_BOXES)
_GRID_SWEEP = tuple(f"grid.{side}" for side in SWEEP_GRIDS)
_BF16 = ("bfloat16",)
_FULL = ("full",)


def _sweeps(dtypes: tuple[str, ...]) -> tuple[Selection, ...]:
    ops = ("roi_align", "region_distill", "region_attention")
    return (
        *(Selection(op, (*_BOX_SWEEP, *_GRID_SWEEP), dtypes, _FULL, sweep=True) for op in ops),
        Selection("box_embedding", _BOX_SWEEP, dtypes, _FULL, sweep=True),
    )


_QUERIES = (1, 4, 16)
# Minutes of a run on two cores go where they decide something. RoIAlign of keys and values is another function and
# costs the same for every Q; FlexAttention is several times behind the best peer on pages with more than one query.
_LEFT_OUT = {"paper": ("roi_align_kv",), "page": ("roi_align_kv", "flex")}
_CPU_TARGETS = (
    Selection("region_distill", ("cpu",), modes=_FULL, leave_out=("torchvision_compiled",)),
    Selection("roi_align", ("cpu",), modes=_FULL, leave_out=("torchvision_compiled", "einsum", "einsum_compiled")),
    Selection("region_attention", ("paper.b2.q1", "page.b2.q1")),
    *(
        Selection("region_attention", tuple(f"{name}.b2.q{q}" for q in _QUERIES[1:]), _BF16, leave_out=left_out)
        for name, left_out in _LEFT_OUT.items()
    ),
    Selection("box_embedding", ("R12", "R128", "R1024")),
)

SUITES = {
    "cpu": Suite((*_CPU_TARGETS, *_sweeps(_BF16)), device="cpu"),
    "sweep": Suite(_sweeps(("float32", "bfloat16"))),
    "gpu": Suite(
        (
            *(Selection(op, ("paper", "page", "page256"), _BF16) for op in ("roi_align", "region_distill")),
            Selection(
                "region_attention",
                tuple(f"{name}.q{queries}" for name in ("paper", "page") for queries in _QUERIES),
                _BF16,
            ),
            Selection("box_embedding", ("R96", "R4096", "R65536"), _BF16),
            *_sweeps(_BF16),
        ),
        passes=5,
        device="cuda",
    ),
    "data": Suite((), device="cpu"),  # bench_data.py
    "train_step": Suite(()),  # bench_train_step.py
    "smoke": Suite(
        tuple(
            Selection(
                op,
                ("tiny",),
                leave_out=("torchvision_compiled", "einsum_compiled", "separable_compiled", "eager_compiled", "flex"),
            )
            for op in ("roi_align", "region_distill", "region_attention", "box_embedding")
        ),
        passes=2,
        seconds=0.005,
        device="cpu",
    ),
}
