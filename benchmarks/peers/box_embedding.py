"""box_embedding in stock PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import Provider, compiled


def eager(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    out: Tensor,
    index: Tensor,
    inplace: bool,
) -> Tensor:
    """Features in float32, layers in the weights' dtype, rows copied into the sequence."""
    u = 2 * math.pi * (boxes @ frequencies)
    features = torch.cat([u.sin(), u.cos()], -1).to(w1.dtype)
    rows = F.linear(F.gelu(F.linear(features, w1, b1)), w2, b2)
    return out.index_copy_(0, index, rows) if inplace else out.index_copy(0, index, rows)


_EAGER = Provider("eager", eager, sweep=True)
BOX_EMBEDDING = (_EAGER, compiled(_EAGER))
