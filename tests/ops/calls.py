"""Every op as one call on given tensors, for tests that ask the same of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from granvit.ops import box_embedding, region_attention, region_distill_loss, roi_align
from tests.support import Case, dense_case, kernels, packed_case, random_boxes

IMAGES, GRID = 3, (6, 7)


@dataclass(frozen=True)
class Call:
    """function(*leaves, *constants).

    Attributes:
        op: whose kernels it needs.
        function: takes `impl` as a keyword.
        leaves: tensors that have gradients.
        constants: all others.
        by_region: whether dimension 0 of each argument counts regions.
    """

    op: str
    function: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    by_region: tuple[bool, ...]

    def on(self, device: str | torch.device, impl: str) -> Call:
        """The same values on a device, through one implementation."""
        leaves = tuple(t.detach().to(device).requires_grad_() for t in self.leaves)
        constants = tuple(t.to(device) for t in self.constants)
        function = functools.partial(self.function, impl=impl)
        return replace(self, function=function, leaves=leaves, constants=constants)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.leaves, *self.constants)

    def run(self, function: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """The result, and the gradient of every leaf for the gradient that `seed` makes."""
        out = (function or self.function)(*self.arguments)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, seed(out))]


def seed(out: Tensor) -> Tensor:
    """A gradient of the result that depends on nothing but its shape, made without a random generator."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def _case(regions: int, packed: bool) -> Case:
    if packed:
        case = packed_case(images=IMAGES, regions=0, largest=7)
        case.grid_size[-1] = torch.tensor(GRID)  # so that they are never as many tokens as images
    else:
        case = dense_case(*GRID, images=IMAGES, regions=0)
    case.boxes, case.image_index = random_boxes(regions), torch.randint(0, IMAGES, (regions,))
    return case


def _where(case: Case) -> tuple[Tensor, ...]:
    """Boxes, image indices, and grids where they are a tensor."""
    grids = (case.grid_size,) if isinstance(case.grid_size, Tensor) else ()
    return (case.boxes, case.image_index, *grids)


def _grid(grids: tuple[Tensor, ...]) -> Tensor | tuple[int, int]:
    return grids[0] if grids else GRID


def _roi_align(regions: int, dtype: torch.dtype, packed: bool) -> Call:
    def function(tokens: Tensor, boxes: Tensor, index: Tensor, *grids: Tensor, impl: str | None = None) -> Tensor:
        return roi_align(tokens, boxes, index, _grid(grids), (3, 2), impl=impl)

    case = _case(regions, packed)
    where = _where(case)
    return Call(
        "roi_align", function, (case.tokens(24, dtype=dtype),), where, (False, True, True, False)[: 1 + len(where)]
    )


def _region_distill(regions: int, dtype: torch.dtype, packed: bool, loss: str = "mse", reduction: str = "mean") -> Call:
    def function(
        student: Tensor, teacher: Tensor, boxes: Tensor, index: Tensor, *grids: Tensor, impl: str | None = None
    ) -> Tensor:
        where = (boxes, index, _grid(grids), (3, 2))
        return region_distill_loss(student, teacher, *where, loss=loss, reduction=reduction, impl=impl)

    case = _case(regions, packed)
    constants = (torch.randn(regions, 6, 24).to(dtype), *_where(case))
    by_region = (False, True, True, True, False)[: 1 + len(constants)]
    return Call("region_distill", function, (case.tokens(24, dtype=dtype),), constants, by_region)


def _region_attention(regions: int, dtype: torch.dtype, packed: bool, queries: int = 1) -> Call:
    def function(
        query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, index: Tensor, *grids: Tensor, impl: str | None = None
    ) -> Tensor:
        return region_attention(query, key, value, boxes, index, _grid(grids), impl=impl)

    case = _case(regions, packed)
    query = torch.randn(regions, queries, 2, 24).to(dtype)
    where = _where(case)
    leaves = (query, *(case.tokens(2, 24, dtype=dtype) for _ in range(2)))
    return Call("region_attention", function, leaves, where, (True, False, False, True, True, False)[: 3 + len(where)])


def _box_embedding(regions: int, dtype: torch.dtype, sequence: bool) -> Call:
    def function(*arguments: Tensor, impl: str | None = None) -> Tensor:
        boxes, *weights = arguments[:6]
        out, index = (arguments[6], arguments[7]) if sequence else (None, None)
        return box_embedding(boxes, *weights, out=out, index=index, impl=impl)

    weights = (torch.randn(20, 16) / 4, torch.randn(20), torch.randn(24, 20) / 4, torch.randn(24))
    leaves = (random_boxes(regions), torch.randn(4, 8), *(w.to(dtype) for w in weights))
    by_region = (True, *[False] * 5)
    if not sequence:
        return Call("box_embedding", function, leaves, (), by_region)
    tokens = torch.randn(40, 24).to(dtype)
    index = torch.randperm(40)[:regions]
    return Call("box_embedding", function, (*leaves, tokens), (index,), (*by_region, False, True))


# name -> (op, maker of a call for a number of regions and a dtype)
CALLS: dict[str, tuple[str, Callable[[int, torch.dtype], Call]]] = {
    "roi_align": ("roi_align", functools.partial(_roi_align, packed=False)),
    "roi_align, packed": ("roi_align", functools.partial(_roi_align, packed=True)),
    "region_distill": ("region_distill", functools.partial(_region_distill, packed=False)),
    "region_distill, packed cosine": ("region_distill", functools.partial(_region_distill, packed=True, loss="cosine")),
    "region_distill, no reduction": (
        "region_distill",
        functools.partial(_region_distill, packed=False, reduction="none"),
    ),
    "region_attention": ("region_attention", functools.partial(_region_attention, packed=False)),
    "region_attention, packed": ("region_attention", functools.partial(_region_attention, packed=True, queries=3)),
    "region_attention, many queries": (
        "region_attention",
        functools.partial(_region_attention, packed=False, queries=16),
    ),
    "box_embedding": ("box_embedding", functools.partial(_box_embedding, sequence=False)),
    "box_embedding into a sequence": ("box_embedding", functools.partial(_box_embedding, sequence=True)),
}


def on_kernels(*device_types: str) -> list[tuple[str, str, str]]:
    """(name of a call, device type, implementation) for every kernel that can run here, on these types of device."""
    return [
        (name, device, impl)
        for name, (op, _) in CALLS.items()
        for device, impl in kernels(op)
        if not device_types or device in device_types
    ]


def make(name: str, regions: int = 9, dtype: torch.dtype = torch.float32) -> Call:
    return CALLS[name][1](regions, dtype)
