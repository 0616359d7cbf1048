"""The region self-distillation loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from granvit import reference
from granvit.ops import _checks, _dispatch

LOSSES = ("mse", "cosine")
REDUCTIONS = ("mean", "none")


def region_distill_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_size: Sequence[int] | Tensor,
    output_size: int | Sequence[int] | Tensor,
    *,
    loss: str = "mse",
    reduction: str = "mean",
    weight: Tensor | None = None,
    sampling_ratio: int = 2,
    impl: str | None = None,
) -> Tensor:
    """Distance between a region of the student's map and the teacher's features of the same region's crop.

    GranViT's self-distillation (arXiv 2510.21501): the teacher saw the crop of each box, the student saw the whole
    image, and ``L = mean((teacher - roi_align(student))^2)``. With ``loss="cosine"`` it is ``1 - cosine`` per cell,
    averaged, as in CLIPSelf (arXiv 2310.01403). The aligned map is never written to memory; with ``reduction="mean"``
    the student's gradient is made in the same pass as the loss (cosine reads the teacher twice: the norms of a cell are
    known only after all its channels).

    Args:
        student: tokens of the whole images, dense ``(B, H*W, C)`` or packed ``(T, C)``; float32, bfloat16, float16 or
            float64.
        teacher: tokens of the crops, ``(R, h*w, C)``, or packed ``(sum of h*w, C)`` with an `output_size` per region.
            The dtype of `student`. Gets no gradient.
        boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the image, 0 to 1. Treated as constant.
        image_index: ``(R,)`` integer, the image of each box.
        grid_size: ``(H, W)`` of every image, or for packed tokens an integer tensor ``(B, 2)``, on the
            CPU or on the device of the tokens.
        output_size: the teacher's grid: one integer or ``(h, w)``, or an integer tensor ``(R, 2)``, likewise.
        loss: ``"mse"`` or ``"cosine"``.
        reduction: ``"mean"`` over all elements (cosine: cells), ``"none"`` for the mean of each region, ``(R,)``.
        weight: ``(R,)``, with ``reduction="mean"``: the loss is the weighted mean of the regions' means, and 0 where
            the weights sum to 0. Treated as constant; weigh the result of ``reduction="none"`` to learn weights.
        sampling_ratio: as in :func:`granvit.ops.roi_align`.
        impl: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None picks the best that can run.

    Returns:
        A scalar, or ``(R,)``, in float32 (float64 for float64 inputs). Without regions the scalar is 0 with a zero
        gradient. Differentiable once in `student` (``impl="reference"``: any number of times).

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or value; the text names it.
        RuntimeError: the implementation asked for cannot run here.
    """
    op = "region_distill_loss"
    grid = _checks.grids(op, "grid_size", grid_size, None, "image")
    student = _checks.tokens(op, "student", student, grid, 1)
    boxes, image_index = _checks.regions(op, boxes, image_index, student.device)
    out = _checks.grids(op, "output_size", output_size, boxes.shape[0], "region")
    teacher = _check_teacher(op, teacher, student, out, boxes.shape[0])
    weight = _check_weight(op, weight, reduction, boxes)
    sampling_ratio = _checks.sampling_ratio(op, sampling_ratio)
    for argument, value, known in (("loss", loss, LOSSES), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise _checks.wrong_value(op, argument, " or ".join(map(repr, known)), value)
    chosen = _dispatch.choose("region_distill", impl, student.device.type, student.dtype)
    if _dispatch.must_check(chosen, student.device):
        _checks.values(op, boxes, image_index, _checks.num_images(student, grid))
    if chosen == "reference":
        return reference.region_distill_loss(
            student,
            teacher,
            boxes,
            image_index,
            grid.as_argument(),
            out.as_argument(),
            loss=loss,
            reduction=reduction,
            weight=weight,
            sampling_ratio=sampling_ratio,
        )
    value, _ = _dispatch.call(
        _dispatch.ops(chosen).region_distill,
        student,
        teacher,
        boxes,
        image_index,
        grid.sizes,
        grid.height,
        grid.width,
        out.sizes,
        out.height,
        out.width,
        weight,
        loss,
        reduction,
        sampling_ratio,
        _dispatch.needs_grad(student),
    )
    return value


def _check_teacher(op: str, teacher: object, student: Tensor, out: _checks.Grid, num_regions: int) -> Tensor:
    teacher = _checks.floating(op, "teacher", teacher, student.dtype)
    _checks.on_device(op, "teacher", teacher, student.device)
    channels = student.shape[-1]
    if out.packed:
        if teacher.dim() != 2 or teacher.shape[1] != channels:
            raise _checks.wrong_value(op, "teacher", f"shape (sum of h*w, {channels}) for this output_size", teacher)
        if out.sizes is not None and out.sizes.device.type == "cpu" and not torch.compiler.is_compiling():
            cells = int(out.sizes.prod(1).sum())
            if teacher.shape[0] != cells:
                raise _checks.wrong_value(op, "teacher", f"{cells} rows in all to match output_size", teacher)
    elif tuple(teacher.shape) != (num_regions, out.height * out.width, channels):
        expected = (num_regions, out.height * out.width, channels)
        raise _checks.wrong_value(op, "teacher", f"shape {expected} to match boxes, output_size and student", teacher)
    return teacher.detach()


def _check_weight(op: str, weight: Tensor | None, reduction: str, boxes: Tensor) -> Tensor | None:
    if weight is None:
        return None
    weight = _checks.floating(op, "weight", weight)
    _checks.on_device(op, "weight", weight, boxes.device)
    if weight.shape != (boxes.shape[0],):
        raise _checks.wrong_value(op, "weight", f"shape ({boxes.shape[0]},) to match boxes", weight)
    if reduction != "mean":
        raise _checks.wrong_value(op, "weight", "none with reduction='none'", weight)
    if weight.requires_grad:
        raise ValueError(
            f"{op}: weight: expected a constant, got a tensor that requires grad; weigh the result of reduction='none'"
        )
    return weight.double()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, boxes, image_index, grid_sizes, height, width, output_sizes, out_height, out_width = inputs[:10]
    _, loss, reduction, sampling_ratio, _ = inputs[10:]
    ctx.one_pass = reduction == "mean"
    ctx.dtype = student.dtype
    if ctx.one_pass:
        ctx.save_for_backward(output[1])
    else:
        ctx.save_for_backward(student, teacher, boxes, image_index, grid_sizes, output_sizes)
        ctx.arguments = (height, width, out_height, out_width, loss, sampling_ratio)


def _backward(ops: Any, ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    _dispatch.refuse_double_backward("region_distill_loss")
    if ctx.one_pass:
        (grad,) = ctx.saved_tensors
        # loss.backward() passes 1: then the saved gradient is the answer and needs no other pass over memory. A traced
        # gradient has no value to look at; while this is traced, torch 2.11 does not say that it compiles.
        known = type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        unit = known and float(grad_loss) == 1.0
        grad = (grad if unit else grad * grad_loss).to(ctx.dtype)
    else:
        student, teacher, boxes, image_index, grid_sizes, output_sizes = ctx.saved_tensors
        height, width, out_height, out_width, loss, sampling_ratio = ctx.arguments
        grad = ops.region_distill_backward(
            grad_loss,
            student,
            teacher,
            boxes,
            image_index,
            grid_sizes,
            height,
            width,
            output_sizes,
            out_height,
            out_width,
            loss,
            sampling_ratio,
        )
    return (grad, *[None] * 14)


def _fake(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    output_sizes: Tensor | None,
    output_height: int,
    output_width: int,
    weight: Tensor | None,
    loss: str,
    reduction: str,
    sampling_ratio: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    value = student.new_empty((boxes.shape[0],) if reduction == "none" else (), dtype=wide)
    if not with_grad or reduction == "none":
        return value, student.new_empty(0)
    return value, student.new_empty(student.shape, dtype=_grad_dtype(student.dtype))


def _fake_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    grid_sizes: Tensor | None,
    grid_height: int,
    grid_width: int,
    output_sizes: Tensor | None,
    output_height: int,
    output_width: int,
    loss: str,
    sampling_ratio: int,
) -> Tensor:
    return student.new_empty(student.shape)


def _grad_dtype(dtype: torch.dtype) -> torch.dtype:
    # A mean over millions of elements leaves gradients below float16's range; a loss scale that arrives later, in the
    # backward, could not bring them back. Until then they are kept in float32.
    return torch.float32 if dtype == torch.float16 else dtype


_dispatch.declare("region_distill")
_dispatch.register("region_distill", "region_distill", _fake, setup=_setup, backward=_backward)
_dispatch.register("region_distill", "region_distill_backward", _fake_backward)
