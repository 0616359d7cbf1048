"""What the region encoders of all libraries share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granvit import geometry
from granvit.ops import region_attention, region_distill_loss, roi_align


class Grid(NamedTuple):
    """The patch grid of an image, and the pixels that it covers.

    Attributes:
        size: rows and columns of patches.
        frame: height and width in pixels that they cover, from the upper left corner. Not the image's size where the
            patch size does not divide it.
    """

    size: tuple[int, int]
    frame: tuple[int, int]


class Attend(Protocol):
    """:func:`granvit.ops.region_attention` with the regions filled in, and one ``query (Q, heads, dim)`` for all."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns ``(R, Q, heads * dim)``."""


class BaseRegionEncoder(nn.Module, ABC):
    """A foreign ViT that looks at boxes.

    All methods take ``images (B, 3, H, W)``, prepared as the model wants them; ``boxes (R, 4)`` float32, ``x0 y0 x1
    y1`` relative to the image as it is given, 0 to 1; and ``image_index (R,)``, the image of each box. Where the patch
    size does not divide the image, boxes are moved to the frame that the grid covers.

    To run the ViT once for several calls, give each the ``tokens=`` that :meth:`tokens` returned; `images` then only
    tells their size. Calling the encoder is calling :meth:`tokens`, so under DDP or FSDP run the wrapped encoder for
    the tokens, and the methods on them.

    Attributes:
        model: the foreign model, as it was given.
        pool: the module that :meth:`region_pool` uses, or None for the model's own attention-pooling head.
    """

    model: Any

    def __init__(self, model: nn.Module, *, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.pool = pool

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Patch tokens ``(B, N, C)`` after the model's final norm, without class and register tokens."""

    @abstractmethod
    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The patch grid that the model lays over an image of (height, width) pixels."""

    @abstractmethod
    def _pool_by_head(self, tokens: Tensor, attend: Attend) -> Tensor:
        """The model's own attention-pooling head with its attention replaced; raises where there is none."""

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs the ViT.

        Returns:
            Patch tokens ``(B, H*W, C)``, row-major and without class and register tokens, and the grid ``(H, W)``.

        Raises:
            ValueError: `images` are not ``(B, C, H, W)``, or the model's tokens are not one grid.
        """
        size = self.grid(self._image_size(images)).size
        tokens = self._encode(images)
        if tokens.dim() != 3 or tokens.shape[1] != size[0] * size[1]:
            raise ValueError(
                f"{type(self.model).__name__}: expected tokens (B, {size[0]} * {size[1]}, C) for images of shape "
                f"{tuple(images.shape)}, got {tuple(tokens.shape)}; models that drop or merge tokens have no grid"
            )
        return tokens, size

    forward = tokens

    def region_features(
        self,
        images: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        output_size: int | Sequence[int] | Tensor,
        *,
        tokens: Tensor | None = None,
        sampling_ratio: int = 2,
        impl: str | None = None,
    ) -> Tensor:
        """Tokens under each box on a grid of `output_size`: ``(R, h*w, C)``. See :func:`granvit.ops.roi_align`."""
        tokens, grid, boxes = self._prepare(images, boxes, tokens)
        return roi_align(tokens, boxes, image_index, grid, output_size, sampling_ratio=sampling_ratio, impl=impl)

    def region_pool(
        self,
        images: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        *,
        tokens: Tensor | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """One vector a box by attention over the tokens under it. See :func:`granvit.ops.region_attention`.

        Returns:
            ``(R, C)`` from the model's own head, which for the box of a whole image is what the model returns for the
            image. With ``pool=`` given to the constructor, what that returns: ``(R, Q, C)`` from a
            :class:`granvit.nn.RegionAttentionPool`, which brings its own `impl`.

        Raises:
            ValueError: the model has no attention-pooling head and no pool was given.
        """
        tokens, grid, boxes = self._prepare(images, boxes, tokens)
        if self.pool is not None:
            return self.pool(tokens, boxes, image_index, grid)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Under autocast a norm of queries and keys leaves them wider than the values; attention narrows them again.
            query, key = query.to(value.dtype), key.to(value.dtype)
            per_region = query.expand(boxes.shape[0], *query.shape)
            return region_attention(per_region, key, value, boxes, image_index, grid, impl=impl).flatten(-2)

        return self._pool_by_head(tokens, attend)

    def distill_loss(
        self,
        images: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        teacher_features: Tensor,
        output_size: int | Sequence[int] | Tensor,
        *,
        tokens: Tensor | None = None,
        loss: str = "mse",
        reduction: str = "mean",
        weight: Tensor | None = None,
        sampling_ratio: int = 2,
        impl: str | None = None,
    ) -> Tensor:
        """Distance between the regions of this encoder's map and a teacher's features of their crops.

        Args:
            images: whole images.
            boxes: relative to the images.
            image_index: the image of each box.
            teacher_features: ``(R, h*w, C)``, for example from :meth:`crop_features` of the teacher.
            output_size: the teacher's grid ``(h, w)``.
            tokens: this encoder's tokens of `images`, where they are known.
            loss: as the arguments below, see :func:`granvit.ops.region_distill_loss`.
            reduction: same.
            weight: same.
            sampling_ratio: same.
            impl: same.
        """
        tokens, grid, boxes = self._prepare(images, boxes, tokens)
        return region_distill_loss(
            tokens,
            teacher_features,
            boxes,
            image_index,
            grid,
            output_size,
            loss=loss,
            reduction=reduction,
            weight=weight,
            sampling_ratio=sampling_ratio,
            impl=impl,
        )

    @torch.no_grad()
    def crop_features(
        self, images: Tensor, boxes: Tensor, image_index: Tensor, size: int | Sequence[int] | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """A teacher's view of the boxes: cuts each one out, resizes it and runs the ViT on it. Records no gradient.

        Args:
            images: whole images.
            boxes: relative to the images, inside them.
            image_index: the image of each box.
            size: of the crops as the model sees them, one integer or ``(height, width)``; None is the images' size.

        Returns:
            ``(R, h*w, C)`` and ``(h, w)``. The grid covers the box exactly, also where the patch size does not divide
            `size`.
        """
        if size is None:
            size = self._image_size(images)
        height, width = (size, size) if isinstance(size, int) else size
        frame_height, frame_width = self.grid((height, width)).frame
        crops = geometry.crop_boxes(images, boxes, image_index, (frame_height, frame_width))
        # The model wants its input size, but reads no further than its last whole patch.
        crops = F.pad(crops, (0, max(0, width - frame_width), 0, max(0, height - frame_height)))
        return self.tokens(crops)

    def _image_size(self, images: Tensor) -> tuple[int, int]:
        if images.dim() != 4:
            raise ValueError(f"RegionEncoder: images: expected shape (B, C, H, W), got {tuple(images.shape)}")
        return images.shape[-2], images.shape[-1]

    def _prepare(self, images: Tensor, boxes: Tensor, tokens: Tensor | None) -> tuple[Tensor, tuple[int, int], Tensor]:
        size = self._image_size(images)
        grid = self.grid(size)
        if tokens is None:
            tokens, _ = self.tokens(images)
        return tokens, grid.size, geometry.rescale(boxes, size, grid.frame)

    def _no_head(self) -> ValueError:
        return ValueError(
            f"region_pool: {type(self.model).__name__} has no attention-pooling head over its patch tokens; "
            "give the encoder one, RegionEncoder(model, pool=granvit.nn.RegionAttentionPool(embed_dim, num_heads))"
        )
