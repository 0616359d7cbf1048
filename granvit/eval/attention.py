"""Where a token of a vision tower looks, and which tokens it is like: only the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granvit.errors import MissingDependencyError
from granvit.model.tower import blocks_of, depth, grid_of, prefix_tokens, vision_tokens

try:
    from transformers import PreTrainedModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    raise MissingDependencyError("granvit.eval.attention needs transformers: pip install granvit[train]") from error

Cell = tuple[int, int]  # row and column in the patch grid
_NAME = "granvit_query_rows"


@dataclass(frozen=True)
class QueryAttention:
    """Attention of a few query tokens, float32 or wider.

    Attributes:
        patches: ``(L, heads, Q, rows, columns)``, the share that each patch has.
        prefix: ``(L, heads, Q)``, the share of class and register tokens together. With the patches it makes 1.
    """

    patches: Tensor
    prefix: Tensor


@torch.no_grad()
def query_attention(
    tower: PreTrainedModel, pixels: Tensor, queries: Sequence[Cell], layers: Sequence[int] = (-1,)
) -> QueryAttention:
    """Rows of ``softmax(q k^T * scale)``, those of the query tokens alone; no map of all tokens is ever made.

    The model's own modules make queries and keys, rotary embeddings and all, and its attention runs as it would have;
    the rows are computed beside it.

    Args:
        tower: as for :func:`granvit.model.tower.vision_tokens`.
        pixels: ``(1, 3, H, W)``, normalised as the tower wants them.
        queries: rows and columns of patches.
        layers: 1 is the first block and -1 the last, so that ``hidden_states[layer]`` is what comes out of it.

    Returns:
        A layer for each of `layers`, in their order.

    Raises:
        TypeError, ValueError: as for ``vision_tokens``; a cell outside the grid; layer 0, which attends to nothing.
    """
    numbers, grid, cells = _checked(tower, pixels, queries, layers)
    prefix = prefix_tokens(tower)
    tokens = cells + prefix
    found: dict[int, Tensor] = {}
    place = {id(part): i for i, block in enumerate(blocks_of(tower), 1) for part in block.modules()}
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **more: Any
    ) -> Any:
        layer = place[id(module)]
        if layer in numbers:
            wide = torch.promote_types(query.dtype, torch.float32)
            rows = query[0, :, tokens].to(wide)  # [heads, Q, d]
            found[layer] = (rows @ key[0].to(wide).transpose(-1, -2) * scaling).softmax(-1)
        return stock(module, query, key, value, mask, scaling=scaling, **more)

    with _attending(tower, attend):
        vision_tokens(tower, pixels, max(numbers))
    rows = torch.stack([found[number] for number in numbers])  # [L, heads, Q, prefix + patches]
    return QueryAttention(rows[..., prefix:].unflatten(-1, grid), rows[..., :prefix].sum(-1))


@torch.no_grad()
def query_similarity(
    tower: PreTrainedModel, pixels: Tensor, queries: Sequence[Cell], layers: Sequence[int] = (-1,)
) -> Tensor:
    """Cosine similarity of the query tokens' features to those of all patches.

    Features are ``hidden_states[layer]``: for the last layer, what the projector reads.

    Args:
        tower: as for :func:`query_attention`.
        pixels: same.
        queries: same.
        layers: same, and 0, the embeddings.

    Returns:
        ``(L, Q, rows, columns)``, -1 to 1.

    Raises:
        TypeError, ValueError: as for :func:`query_attention`.
    """
    numbers, grid, cells = _checked(tower, pixels, queries, layers, least=0)
    prefix = prefix_tokens(tower)
    found: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        wide = hidden[0, prefix:].to(torch.promote_types(hidden.dtype, torch.float32))
        unit = F.normalize(wide, dim=-1)  # [patches, C]
        found[layer] = (unit[cells] @ unit.T).unflatten(-1, grid)

    blocks = blocks_of(tower)
    hooks = [
        blocks[number - 1].register_forward_hook(lambda module, args, hidden, number=number: keep(number, hidden))
        for number in set(numbers) - {0}
    ]
    try:
        vision_tokens(tower, pixels, max(numbers))
    finally:
        for hook in hooks:
            hook.remove()
    if 0 in numbers:  # what enters the first block has no hook of its own
        patches = vision_tokens(tower, pixels, 0)
        keep(0, F.pad(patches, (0, 0, prefix, 0)))
    return torch.stack([found[number] for number in numbers])


def _checked(
    tower: PreTrainedModel, pixels: Tensor, queries: Sequence[Cell], layers: Sequence[int], least: int = 1
) -> tuple[list[int], Cell, Tensor]:
    """Layers counted from the front, the grid, and the queries' numbers among the patches."""
    numbers = [depth(tower, layer) for layer in layers]
    if not numbers or min(numbers) < least:
        raise ValueError(f"layers: expected some from {least} on, got {list(layers)}")
    if pixels.dim() != 4 or len(pixels) != 1:
        raise ValueError(f"pixels: expected one frame, (1, 3, H, W), got {tuple(pixels.shape)}")
    rows, columns = grid_of(tower, (pixels.shape[-2], pixels.shape[-1]))
    for row, column in queries:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"queries: expected cells of a grid of {rows} x {columns}, got {(row, column)}")
    if not queries:
        raise ValueError("queries: expected at least one cell, got none")
    cells = torch.tensor([row * columns + column for row, column in queries], device=pixels.device)
    return numbers, (rows, columns), cells


@contextmanager
def _attending(tower: PreTrainedModel, attend: Any) -> Iterator[None]:
    """The tower with another attention function."""
    configs = {id(part.config): part.config for part in tower.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del ALL_ATTENTION_FUNCTIONS[_NAME]
