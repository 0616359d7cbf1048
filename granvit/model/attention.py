"""Who sees whom in a packed row: a token sees what comes before it in its own image's prefix and in its own pair."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

IMPLEMENTATIONS = ("sdpa", "flex_attention")


def packed_mask(image: Tensor, pair: Tensor, implementation: str) -> Tensor | BlockMask:
    """The attention mask of packed rows, as a language model of transformers takes it for ``attention_mask``.

    Padding sees the padding before it and itself, and nothing else sees padding: no row of the mask is empty, hence
    no softmax over nothing, in any implementation.

    Args:
        image: ``(S, L)`` integer, :attr:`granvit.model.packing.PackedBatch.image`.
        pair: ``(S, L)`` integer, :attr:`granvit.model.packing.PackedBatch.pair`.
        implementation: of the attention. ``"sdpa"`` takes a dense mask; ``"flex_attention"`` takes blocks and skips
            those where nothing is seen, which is most of them.

    Returns:
        Boolean ``(S, 1, L, L)``, true where seen, or a ``BlockMask`` of the same.

    Raises:
        ValueError: another implementation, or shapes that differ.
    """
    if image.shape != pair.shape or image.dim() != 2:
        raise ValueError(
            f"packed_mask: image, pair: expected one shape (S, L), got {tuple(image.shape)} and {tuple(pair.shape)}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"packed_mask: attention of the language model: expected {' or '.join(IMPLEMENTATIONS)}, "
            f"got {implementation!r}; load the model with attn_implementation={{'text_config': 'sdpa'}}"
        )
    if implementation == "flex_attention":
        return _blocks(image, pair, compiled=image.device.type == "cuda")
    rows, length = image.shape
    place = torch.arange(length, device=image.device)
    row = torch.arange(rows, device=image.device)[:, None, None]
    return _rule(image, pair)(row, row, place[:, None], place)[:, None]


def _blocks(image: Tensor, pair: Tensor, *, compiled: bool) -> BlockMask:
    """Compiled, because otherwise the dense mask is made first, with several copies."""
    rows, length = image.shape
    create = _compiled_create() if compiled else create_block_mask
    return create(_rule(image, pair), rows, None, length, length, device=image.device)


@functools.cache
def _compiled_create() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def _rule(image: Tensor, pair: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_image = image[row, query] == image[row, key]
        shared = (pair[row, key] == 0) | (pair[row, query] == pair[row, key])
        return same_image & shared & (key <= query)

    return sees
