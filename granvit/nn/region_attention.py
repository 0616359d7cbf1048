"""Attention pooling over the tokens that a box covers, with learned queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from granvit.ops import region_attention


class RegionAttentionPool(nn.Module):
    """Pools the tokens under each box into ``num_queries`` vectors by multi-head attention.

    The attention pooling head of a ViT (Lee et al. 2019; SigLIP's and timm's "MAP" head), restricted to a box: a token
    counts by how much of its cell the box covers. See :func:`granvit.ops.region_attention`.

    State dict: ``query (num_queries, embed_dim)``, and ``weight`` and ``bias`` of the linear layers ``q_proj``,
    ``k_proj``, ``v_proj`` and ``out_proj``, all ``(embed_dim, embed_dim)``.

    Args:
        embed_dim: channels of the tokens and of the pooled vectors.
        num_heads: attention heads; ``embed_dim / num_heads`` must be a whole number.
        num_queries: learned queries, hence vectors a region.
        bias: whether the linear layers have a bias.
        device: where the parameters are made.
        dtype: the parameters' dtype.
        impl: the implementation to demand; None picks the best that can run.

    Raises:
        ValueError: a size below 1, or heads that do not divide `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_queries: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_queries", num_queries)):
            if size < 1:
                raise ValueError(f"RegionAttentionPool: {name}: expected at least 1, got {size}")
        if embed_dim % num_heads:
            raise ValueError(
                f"RegionAttentionPool: num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.impl = impl
        self.query = nn.Parameter(torch.empty(num_queries, embed_dim, device=device, dtype=dtype))
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries of about unit length, Xavier-uniform projections, biases of zero."""
        nn.init.trunc_normal_(self.query, std=self.embed_dim**-0.5)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: Sequence[int] | Tensor) -> Tensor:
        """Tokens ``(B, H*W, embed_dim)`` or packed ``(T, embed_dim)`` to ``(R, num_queries, embed_dim)``.

        Args:
            tokens: row-major patch grids.
            boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the image, 0 to 1.
            image_index: ``(R,)`` integer, the image of each box.
            grid_size: ``(H, W)`` of every image, or an integer tensor ``(B, 2)`` for packed tokens.
        """
        heads = (self.num_heads, self.embed_dim // self.num_heads)
        query = self.q_proj(self.query).unflatten(-1, heads)  # [Q, heads, dim]
        pooled = region_attention(
            query.expand(boxes.shape[0], *query.shape),
            self.k_proj(tokens).unflatten(-1, heads),
            self.v_proj(tokens).unflatten(-1, heads),
            boxes,
            image_index,
            grid_size,
            impl=self.impl,
        )
        return self.out_proj(pooled.flatten(-2))

    def extra_repr(self) -> str:
        """The settings that are not submodules."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_queries={self.num_queries}"
