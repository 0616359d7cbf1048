"""box_embedding, the specification."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from granvit.reference._regions import accumulation_dtype


def box_embedding(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    out: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """See :func:`granvit.ops.box_embedding`. Fourier features (Tancik et al. 2020), then linear, GELU (erf), linear."""
    compute = accumulation_dtype(w1.dtype)
    geometry = torch.promote_types(compute, boxes.dtype)
    u = 2 * math.pi * (boxes.to(geometry) @ frequencies.to(geometry))  # [R, M]
    features = torch.cat([u.sin(), u.cos()], dim=-1).to(compute)  # [R, 2M]
    hidden = F.gelu(F.linear(features, w1.to(compute), b1.to(compute)))
    embedding = F.linear(hidden, w2.to(compute), b2.to(compute)).to(w1.dtype)
    if out is None:
        return embedding
    assert index is not None
    return out.index_copy(0, index, embedding)
