"""Segment Anything's box prompts through :func:`granvit.ops.box_embedding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from granvit.nn import BoxEmbedding


class BoxPromptEncoder(nn.Module):
    """The sparse embeddings that Segment Anything's prompt encoder (Kirillov et al. 2023) gives for boxes.

    SAM embeds each corner of a box as ``[sin u, cos u]`` with ``u = 2 pi (2 c - 1) G``, G Gaussian, plus a learned
    vector for each of the two corners. That is one box embedding: G on the block diagonal of the frequencies, linear
    layers that only reorder (``gelu(x) - gelu(-x) = x`` undoes the GELU between them), and the corner vectors as the
    last bias.

    State dict: that of a :class:`granvit.nn.BoxEmbedding` under ``embedding.``. The parameters are copies and start
    frozen; ``requires_grad_()`` makes the module trainable.

    Args:
        prompt_encoder: transformers' `SamPromptEncoder` (``SamModel.prompt_encoder``), or Meta's `PromptEncoder`.
        impl: the implementation of the op to demand; None picks the best that can run.

    Raises:
        TypeError: `prompt_encoder` is neither.
    """

    def __init__(self, prompt_encoder: nn.Module, *, impl: str | None = None) -> None:
        super().__init__()
        gaussian, corners, self.input_size = _read(prompt_encoder)
        count = gaussian.shape[1]  # M: SAM's frequencies; a corner has 2M features, a box 4M
        self.embedding = BoxEmbedding(
            4 * count, 2 * count, 8 * count, device=gaussian.device, dtype=gaussian.dtype, impl=impl
        )
        with torch.no_grad():
            self.embedding.frequencies.copy_(torch.block_diag(gaussian, gaussian))
            identity = torch.eye(4 * count, device=gaussian.device, dtype=gaussian.dtype)
            sin0, sin1, cos0, cos1 = identity.split(count)
            reorder = torch.cat([sin0, cos0, sin1, cos1])
            self.embedding.w1.copy_(torch.cat([identity, -identity]))
            self.embedding.b1.zero_()
            self.embedding.w2.copy_(torch.cat([reorder, -reorder], dim=1))
            self.embedding.b2.copy_(corners)
        self.requires_grad_(False)

    def forward(self, boxes: Tensor) -> Tensor:
        """Embeds boxes.

        Args:
            boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to SAM's square input, padding included: its pixel boxes
                divided by the input size (1024).

        Returns:
            ``(R, 2, D)``, the upper left and the lower right corner, in the dtype of the prompt encoder.
        """
        # SAM takes a coordinate for a pixel and moves it to that pixel's centre.
        y, x = (0.5 / side for side in self.input_size)
        x0, y0, x1, y1 = boxes.unbind(-1)
        centred = 2 * torch.stack([x0 + x, y0 + y, x1 + x, y1 + y], dim=-1) - 1
        return self.embedding(centred).unflatten(-1, (2, -1))

    def extra_repr(self) -> str:
        """The settings that are not submodules."""
        return f"input_size={self.input_size}"


def _read(prompt_encoder: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """SAM's Gaussian matrix ``(2, M)``, the vectors of both corners ``(4M,)``, and the input size."""
    if hasattr(prompt_encoder, "shared_embedding") and hasattr(prompt_encoder, "point_embed"):
        gaussian = prompt_encoder.shared_embedding.positional_embedding
        points = prompt_encoder.point_embed
    elif hasattr(prompt_encoder, "pe_layer") and hasattr(prompt_encoder, "point_embeddings"):
        gaussian = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        points = prompt_encoder.point_embeddings
    else:
        raise TypeError(
            "BoxPromptEncoder: prompt_encoder: expected transformers' SamPromptEncoder or Meta's PromptEncoder, got "
            f"{type(prompt_encoder).__name__}"
        )
    size = prompt_encoder.input_image_size
    height, width = (size, size) if isinstance(size, int) else size
    # Points of labels 0 and 1 come first, then the two corners.
    corners = torch.cat([points[2].weight[0], points[3].weight[0]])
    return gaussian.detach(), corners.detach(), (height, width)
