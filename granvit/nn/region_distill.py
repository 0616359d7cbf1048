"""The region self-distillation loss, as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from granvit.ops import region_distill_loss


class RegionDistillLoss(nn.Module):
    """Distance between regions of a map and a teacher's features of their crops.

    See :func:`granvit.ops.region_distill_loss`.

    Args:
        output_size: the teacher's grid, one integer or ``(h, w)``; None where every call brings its own.
        loss: ``"mse"`` or ``"cosine"``.
        reduction: ``"mean"`` or ``"none"``.
        sampling_ratio: samples a cell along each axis; 0 takes one per grid unit that the cell spans, rounded up.
        impl: the implementation to demand; None picks the best that can run.
    """

    def __init__(
        self,
        output_size: int | Sequence[int] | None = None,
        loss: str = "mse",
        reduction: str = "mean",
        sampling_ratio: int = 2,
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.loss = loss
        self.reduction = reduction
        self.sampling_ratio = sampling_ratio
        self.impl = impl

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        grid_size: Sequence[int] | Tensor,
        output_size: int | Sequence[int] | Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar, or ``(R,)`` with ``reduction="none"``.

        Args:
            student: tokens of the whole images, ``(B, H*W, C)`` or packed ``(T, C)``.
            teacher: tokens of the crops, ``(R, h*w, C)`` or packed ``(sum of h*w, C)``. Gets no gradient.
            boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the image, 0 to 1.
            image_index: ``(R,)`` integer, the image of each box.
            grid_size: ``(H, W)`` of every image, or an integer tensor ``(B, 2)`` for packed tokens.
            output_size: the teacher's grid in this call; None takes the module's.
            weight: ``(R,)`` weight of each region in the mean.
        """
        if output_size is None:
            output_size = self.output_size
        if output_size is None:
            raise ValueError("RegionDistillLoss: output_size: expected the teacher's grid, here or in the constructor")
        return region_distill_loss(
            student,
            teacher,
            boxes,
            image_index,
            grid_size,
            output_size,
            loss=self.loss,
            reduction=self.reduction,
            weight=weight,
            sampling_ratio=self.sampling_ratio,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The settings that are not submodules."""
        return (
            f"output_size={self.output_size}, loss={self.loss!r}, reduction={self.reduction!r}, "
            f"sampling_ratio={self.sampling_ratio}"
        )
