"""One small instance of every module, with inputs and a scalar to differentiate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from granvit import nn as gnn
from tests.support import random_boxes

CHANNELS, HEADS, GRID = 16, 2, (4, 5)


class Harness(nn.Module):
    """A trainable layer before the module, so that a module without parameters still has a gradient to be compared."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Linear(CHANNELS, CHANNELS)
        self.region = make(kind)

    def forward(self, tokens: Tensor, boxes: Tensor, image_index: Tensor, teacher: Tensor) -> Tensor:
        x = self.stem(tokens)
        if self.kind == "RegionDistillLoss":
            return self.region(x, teacher, boxes, image_index, GRID)
        if self.kind == "BoxEmbedding":
            return (self.region(boxes) + x.mean(1)[image_index]).square().mean()
        return self.region(x, boxes, image_index, GRID).square().mean()


KINDS = ("RoIAlign", "RegionDistillLoss", "RegionAttentionPool", "BoxEmbedding")


def make(kind: str, **options: object) -> nn.Module:
    arguments = {
        "RoIAlign": {"output_size": (2, 3)},
        "RegionDistillLoss": {"output_size": (2, 3)},
        "RegionAttentionPool": {"embed_dim": CHANNELS, "num_heads": HEADS, "num_queries": 2},
        "BoxEmbedding": {"embed_dim": CHANNELS, "num_frequencies": 8, "hidden_dim": 24},
    }[kind]
    return getattr(gnn, kind)(**arguments, **options)


def inputs(images: int = 4, per_image: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, boxes, image_index and teacher features, the same number of regions in every image."""
    regions = images * per_image
    return (
        torch.randn(images, GRID[0] * GRID[1], CHANNELS),
        random_boxes(regions),
        torch.arange(images).repeat_interleave(per_image),
        torch.randn(regions, 6, CHANNELS),
    )
