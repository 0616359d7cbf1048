"""A box as a token, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from granvit.ops import box_embedding

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11


class BoxEmbedding(nn.Module):
    """Embeds boxes as tokens: random Fourier features (Tancik et al. 2020), then linear, GELU, linear.

    See :func:`granvit.ops.box_embedding`.

    State dict: ``frequencies (4, num_frequencies)``, ``w1 (hidden_dim, 2 * num_frequencies)``, ``b1 (hidden_dim,)``,
    ``w2 (embed_dim, hidden_dim)``, ``b2 (embed_dim,)``, the names of the op's arguments. `frequencies` is a buffer, or
    a parameter with ``learnable=True``, under the same name. It stays float32 when the module is cast to a narrower
    dtype: a phase of many turns has no digits to lose.

    Args:
        embed_dim: channels of the embedding.
        num_frequencies: frequency vectors; each gives a sine and a cosine.
        hidden_dim: width between the linear layers; None is `embed_dim`.
        scale: standard deviation of the frequencies, in turns per image side. Larger tells near boxes better apart,
            smaller generalises more smoothly.
        learnable: whether the frequencies are trained.
        device: where the parameters are made.
        dtype: the dtype of the linear layers; the frequencies are float32, or float64 where `dtype` is.
        impl: the implementation to demand; None picks the best that can run.

    Raises:
        ValueError: a size below 1 or a scale that is not positive.
    """

    frequencies: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_frequencies: int = 256,
        hidden_dim: int | None = None,
        *,
        scale: float = 1.0,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = embed_dim if hidden_dim is None else hidden_dim
        for name, size in (("embed_dim", embed_dim), ("num_frequencies", num_frequencies), ("hidden_dim", hidden_dim)):
            if size < 1:
                raise ValueError(f"BoxEmbedding: {name}: expected at least 1, got {size}")
        if not scale > 0:
            raise ValueError(f"BoxEmbedding: scale: expected a positive number, got {scale}")
        self.embed_dim = embed_dim
        self.num_frequencies = num_frequencies
        self.hidden_dim = hidden_dim
        self.scale = scale
        self.learnable = learnable
        self.impl = impl
        dtype = torch.get_default_dtype() if dtype is None else dtype
        frequencies = torch.empty(4, num_frequencies, device=device, dtype=torch.promote_types(dtype, torch.float32))
        if learnable:
            self.frequencies = nn.Parameter(frequencies)
        else:
            self.register_buffer("frequencies", frequencies)
        # Bare parameters, not Linear modules: the op reads the weights itself, and a Linear whose forward is never
        # called would silently drop whatever is hooked onto it (LoRA, quantisation).
        self.w1 = nn.Parameter(torch.empty(hidden_dim, 2 * num_frequencies, device=device, dtype=dtype))
        self.b1 = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(embed_dim, hidden_dim, device=device, dtype=dtype))
        self.b2 = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal frequencies, and the linear layers as :class:`torch.nn.Linear` starts them."""
        nn.init.normal_(self.frequencies, std=self.scale)
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(
        self, boxes: Tensor, *, out: Tensor | None = None, index: Tensor | None = None, inplace: bool = False
    ) -> Tensor:
        """Boxes ``(R, 4)`` to embeddings ``(R, embed_dim)``, or to a token sequence that holds them.

        Under autocast the linear layers run in its dtype, as those of PyTorch do; the frequencies stay as they are.

        Args:
            boxes: float32, ``x0 y0 x1 y1`` relative to the image, 0 to 1.
            out: ``(T, embed_dim)``, a token sequence; the result is a copy of it with the embeddings in rows `index`.
            index: ``(R,)`` integer, with `out`.
            inplace: with `out` and without gradients, write into `out` itself.
        """
        dtype, device = self.w1.dtype, boxes.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        weights = (self.w1.to(dtype), self.b1.to(dtype), self.w2.to(dtype), self.b2.to(dtype))
        return box_embedding(boxes, self.frequencies, *weights, out=out, index=index, inplace=inplace, impl=self.impl)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        frequencies = self.frequencies

        def keep_wide(t: Tensor) -> Tensor:
            moved = fn(t)
            if (t is frequencies or t is frequencies.grad) and moved.dtype in (torch.bfloat16, torch.float16):
                return t.to(moved.device, torch.float32)
            return moved

        return super()._apply(keep_wide, recurse)

    def extra_repr(self) -> str:
        """The settings that are not submodules."""
        return (
            f"embed_dim={self.embed_dim}, num_frequencies={self.num_frequencies}, hidden_dim={self.hidden_dim}, "
            f"scale={self.scale:g}, learnable={self.learnable}"
        )
