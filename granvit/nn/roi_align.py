"""RoIAlign on token layout, as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from granvit.ops import roi_align


class RoIAlign(nn.Module):
    """Resamples the tokens under each box onto a grid of its own; see :func:`granvit.ops.roi_align`.

    Args:
        output_size: cells of every region, one integer or ``(h, w)``.
        sampling_ratio: samples a cell along each axis; 0 takes one per grid unit that the cell spans, rounded up.
        impl: the implementation to demand; None picks the best that can run.
    """

    def __init__(self, output_size: int | Sequence[int], sampling_ratio: int = 2, *, impl: str | None = None) -> None:
        super().__init__()
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.impl = impl

    def forward(self, tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Sequence[int] | Tensor) -> Tensor:
        """Tokens ``(B, H*W, C)`` or packed ``(T, C)`` to region features ``(R, h*w, C)``."""
        return roi_align(
            tokens,
            boxes,
            image_index,
            grid_size,
            self.output_size,
            sampling_ratio=self.sampling_ratio,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The settings that are not submodules."""
        return f"output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
