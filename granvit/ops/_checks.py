"""Argument checks that all ops share: ranks, shapes, dtypes and devices, without looking at values on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# How far a box may reach beyond its image. Farther means pixels or another unit, not a sloppy box.
BOX_RANGE = (-1.0, 2.0)


@dataclass(frozen=True)
class Grid:
    """Grids in the form that the registered ops take: one (height, width), or an int64 tensor of them."""

    sizes: Tensor | None
    height: int
    width: int

    def as_argument(self) -> tuple[int, int] | Tensor:
        """The grid as a caller would pass it."""
        return (self.height, self.width) if self.sizes is None else self.sizes

    @property
    def packed(self) -> bool:
        """Whether every image (or region) has a grid of its own."""
        return self.sizes is not None


def describe(value: object) -> str:
    """A short text for what came instead of what was expected."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)} on {value.device}"
    return repr(value) if isinstance(value, (int, float, str, tuple, list, type(None))) else type(value).__name__


def wrong_type(op: str, argument: str, expected: str, got: object) -> TypeError:
    """The TypeError for one argument."""
    return TypeError(f"{op}: {argument}: expected {expected}, got {describe(got)}")


def wrong_value(op: str, argument: str, expected: str, got: object) -> ValueError:
    """The ValueError for one argument."""
    return ValueError(f"{op}: {argument}: expected {expected}, got {describe(got)}")


def is_integer(t: Tensor) -> bool:
    """Whether a tensor holds integers (bool is not one)."""
    return not t.dtype.is_floating_point and not t.dtype.is_complex and t.dtype != torch.bool


def floating(op: str, argument: str, t: object, dtype: torch.dtype | None = None) -> Tensor:
    """A floating tensor, of one dtype where given."""
    if not isinstance(t, Tensor):
        raise wrong_type(op, argument, "a tensor", t)
    if t.dtype not in FLOATS:
        raise wrong_type(op, argument, "float32, bfloat16, float16 or float64", t)
    if dtype is not None and t.dtype != dtype:
        raise wrong_type(op, argument, f"{str(dtype).removeprefix('torch.')} like the first argument", t)
    return t


def on_device(op: str, argument: str, t: Tensor, device: torch.device) -> None:
    """A tensor on the device of the op's first argument."""
    if t.device != device:
        raise wrong_value(op, argument, f"a tensor on {device}", t)


def pair(op: str, argument: str, value: object) -> tuple[int, int]:
    """Two positive integers, from one integer or a pair."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        value = (value, value)
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise wrong_type(op, argument, "an integer, a pair of integers or an integer tensor", value)
    height, width = value
    for side in (height, width):
        if not isinstance(side, (int, torch.SymInt)) or isinstance(side, bool):
            raise wrong_type(op, argument, "an integer, a pair of integers or an integer tensor", value)
        if side < 1:
            raise wrong_value(op, argument, "height and width of at least 1", value)
    return height, width


def grids(op: str, argument: str, value: int | Sequence[int] | Tensor, rows: int | None, what: str) -> Grid:
    """A grid for all, or an integer tensor ``(rows, 2)`` with one for each `what`."""
    if not isinstance(value, Tensor):
        return Grid(None, *pair(op, argument, value))
    if not is_integer(value):
        raise wrong_type(op, argument, "an integer tensor", value)
    if value.dim() != 2 or value.shape[1] != 2 or (rows is not None and value.shape[0] != rows):
        shape = f"({'B' if rows is None else rows}, 2)"
        raise wrong_value(op, argument, f"shape {shape}, one (height, width) for each {what}", value)
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and bool((value < 1).any()):
        row = int((value < 1).any(1).nonzero()[0])
        got = tuple(value[row].tolist())
        raise ValueError(f"{op}: {argument}: expected heights and widths of at least 1, got {got} for {what} {row}")
    return Grid(value.long(), 0, 0)


def tokens(op: str, argument: str, t: object, grid: Grid, trailing: int, dtype: torch.dtype | None = None) -> Tensor:
    """Dense ``(B, H*W, ...)`` or packed ``(T, ...)`` tokens with `trailing` own dimensions; made contiguous there."""
    t = floating(op, argument, t, dtype)
    lead = 1 if grid.packed else 2
    names = {1: "C", 2: "heads, dim"}[trailing]
    if t.dim() != lead + trailing:
        shape = f"(T, {names})" if grid.packed else f"(B, H*W, {names})"
        raise wrong_value(op, argument, f"shape {shape} for this grid_size", t)
    if not grid.packed and t.shape[1] != grid.height * grid.width:
        raise wrong_value(op, argument, f"{grid.height} * {grid.width} tokens an image to match grid_size", t)
    if grid.packed and not torch.compiler.is_compiling() and grid.sizes is not None and grid.sizes.device.type == "cpu":
        expected = int(grid.sizes.prod(1).sum())
        if t.shape[0] != expected:
            raise wrong_value(op, argument, f"{expected} tokens in all to match grid_size", t)
    inner = 1
    for size, stride in zip(reversed(t.shape[lead:]), reversed(t.stride()[lead:]), strict=True):
        if size > 1 and stride != inner:
            # Not contiguous(), which leaves a tensor without elements as it is.
            return t.clone(memory_format=torch.contiguous_format)
        inner *= size
    return t


def num_images(t: Tensor, grid: Grid) -> int:
    """The number of images behind dense or packed tokens."""
    return t.shape[0] if grid.sizes is None else grid.sizes.shape[0]


def regions(op: str, boxes: object, image_index: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes ``(R, 4)`` in float32 (float64 is let through for gradient checks) and their image_index ``(R,)``."""
    if not isinstance(boxes, Tensor) or boxes.dtype not in (torch.float32, torch.float64):
        raise wrong_type(op, "boxes", "a float32 tensor", boxes)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise wrong_value(op, "boxes", "shape (R, 4)", boxes)
    on_device(op, "boxes", boxes, device)
    if not isinstance(image_index, Tensor) or not is_integer(image_index):
        raise wrong_type(op, "image_index", "an integer tensor", image_index)
    if image_index.dim() != 1 or image_index.shape[0] != boxes.shape[0]:
        raise wrong_value(op, "image_index", f"shape ({boxes.shape[0]},) to match boxes", image_index)
    on_device(op, "image_index", image_index, device)
    return boxes.detach(), image_index.long()


def values(op: str, boxes: Tensor, image_index: Tensor, num_images: int) -> None:
    """Checks what boxes and image_index hold. CPU kernels check for themselves; this is for all others.

    Looking at values on a device waits for it, so there it is done only where GRANVIT_CHECK=1. A compiled graph cannot
    look at all: it asserts, without the values in its message.
    """
    ordered = (boxes[:, 0] <= boxes[:, 2]) & (boxes[:, 1] <= boxes[:, 3]) & boxes.isfinite().all(1)
    near = ((boxes >= BOX_RANGE[0]) & (boxes <= BOX_RANGE[1])).all(1)
    inside = (image_index >= 0) & (image_index < num_images)
    if torch.compiler.is_compiling():
        torch._assert_async(ordered.all(), f"{op}: boxes: expected finite x0 <= x1 and y0 <= y1")
        torch._assert_async(near.all(), f"{op}: boxes: expected coordinates relative to the image, 0 to 1")
        torch._assert_async(inside.all(), f"{op}: image_index: expected values in [0, number of images)")
        return
    if not bool(ordered.all()):
        row = int((~ordered).nonzero()[0])
        raise ValueError(f"{op}: boxes: expected finite x0 <= x1 and y0 <= y1, got {boxes[row].tolist()} in row {row}")
    if not bool(near.all()):
        row = int((~near).nonzero()[0])
        raise ValueError(
            f"{op}: boxes: expected coordinates relative to the image, 0 to 1 (at most {BOX_RANGE[0]:g} to "
            f"{BOX_RANGE[1]:g}), got {boxes[row].tolist()} in row {row}"
        )
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"{op}: image_index: expected values in [0, {num_images}), got {int(image_index[row])} in row {row}"
        )


def sampling_ratio(op: str, value: object) -> int:
    """A sampling ratio: samples a cell along an axis, 0 for as many as the cell spans."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(op, "sampling_ratio", "an integer", value)
    if value < 0:
        raise wrong_value(op, "sampling_ratio", "an integer of at least 0", value)
    return value
