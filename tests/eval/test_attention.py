"""Rows of attention and of similarity beside the maps that stock transformers makes whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from granvit.eval.attention import query_attention, query_similarity
from granvit.model.tower import grid_of, prefix_tokens, vision_tokens
from tests.model.test_tower import KINDS, small


def eager(tower: nn.Module) -> nn.Module:
    """The same weights, with an attention that can hand out its maps."""
    twin = copy.deepcopy(tower)
    twin.set_attn_implementation("eager")
    return twin


def stock_maps(tower: nn.Module, pixels: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """``(heads, N, N)`` of each layer, by ``output_attentions=True``."""
    size = tuple(pixels.shape[-2:])
    options = {"interpolate_pos_encoding": True} if kind.startswith(("siglip", "clip")) and size != (64, 64) else {}
    with torch.no_grad():
        output = eager(tower)(pixel_values=pixels, output_attentions=True, **options)
    assert len(output.attentions) == 3
    return [layer[0] for layer in output.attentions]


SIZES = [(kind, size) for kind in KINDS for size in ((64, 64), (48, 81)) if kind != "aimv2" or size == (64, 64)]


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_rows_are_those_of_the_stock_models_maps(kind, size):
    tower = small(kind).double()
    pixels = torch.randn(1, 3, *size, dtype=torch.float64)
    rows, columns = grid_of(tower, size)
    cells = [(int(torch.randint(rows, ())), int(torch.randint(columns, ()))) for _ in range(3)]
    tokens = [prefix_tokens(tower) + row * columns + column for row, column in cells]
    maps = stock_maps(tower, pixels, kind)
    before = tower.config._attn_implementation
    found = query_attention(tower, pixels, cells, (-1, 1, 2))
    assert tower.config._attn_implementation == before
    assert found.patches.shape == (3, 3, 3, rows, columns)
    for mine, outside, stock in zip(found.patches, found.prefix, (maps[2], maps[0], maps[1]), strict=True):
        wanted = stock[:, tokens]
        prefix = prefix_tokens(tower)
        torch.testing.assert_close(mine.flatten(-2), wanted[..., prefix:].double(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(outside, wanted[..., :prefix].double().sum(-1), rtol=1e-6, atol=1e-9)
    total = found.patches.sum((-1, -2)) + found.prefix
    torch.testing.assert_close(total, torch.ones_like(total))


def test_the_maps_differ_between_heads_layers_and_queries():
    tower = small("dinov3")
    found = query_attention(tower, torch.randn(1, 3, 64, 64), [(0, 0), (3, 2)], (1, 3)).patches
    for axis in range(3):
        first, second = found.unbind(axis)[:2]
        assert (first - second).abs().max() > 1e-3, axis


def test_only_rows_are_made():
    tower, pixels = small("siglip"), torch.randn(1, 3, 64, 64)
    made: list[tuple[int, ...]] = []
    softmax = torch.Tensor.softmax

    def counted(self, *args, **kwargs):
        made.append(tuple(self.shape))
        return softmax(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", counted)
        query_attention(tower, pixels, [(1, 1)], (2, 3))
    assert made == [(3, 1, 16)] * 2


def test_half_precision_gives_shares_in_float32():
    tower = small("clip").bfloat16()
    found = query_attention(tower, torch.randn(1, 3, 64, 64).bfloat16(), [(1, 2)])
    assert found.patches.dtype == torch.float32
    torch.testing.assert_close(found.patches.sum((-1, -2)) + found.prefix, torch.ones(1, 3, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_is_that_of_the_hidden_states(kind):
    tower = small(kind).double()
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        states = list(tower(pixel_values=pixels, output_hidden_states=True).hidden_states)
        # The last one of some families is behind the final norm, and the projector reads what is before it.
        states[3] = F.pad(vision_tokens(tower, pixels), (0, 0, prefix_tokens(tower), 0))
    found = query_similarity(tower, pixels, [(0, 3), (2, 1)], (1, 0, 3))
    for mine, layer in zip(found, (1, 0, 3), strict=True):
        patches = states[layer][0, prefix_tokens(tower) :].double()
        wanted = F.cosine_similarity(patches[[3, 9], None], patches[None], dim=-1)
        torch.testing.assert_close(mine.flatten(-2), wanted, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(mine[[0, 1], [0, 2], [3, 1]], torch.ones(2, dtype=torch.float64))


def test_wrong_arguments():
    tower, pixels = small("siglip"), torch.randn(1, 3, 64, 64)
    for queries in ([], [(4, 0)], [(0, -1)]):
        with pytest.raises(ValueError, match="queries: expected"):
            query_attention(tower, pixels, queries)
    with pytest.raises(ValueError, match="layers: expected some from 1 on"):
        query_attention(tower, pixels, [(0, 0)], (0,))
    with pytest.raises(ValueError, match="expected -4 to 3"):
        query_attention(tower, pixels, [(0, 0)], (4,))
    with pytest.raises(ValueError, match="one frame"):
        query_attention(tower, pixels.expand(2, -1, -1, -1), [(0, 0)])
