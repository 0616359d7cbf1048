"""Rows of attention and of similarity beside the maps that stock transformers makes whole."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from granvit.cli import app
from granvit.eval.attention import query_attention, query_similarity
from granvit.eval.attention_picture import LookError, draw_looks, look
from granvit.eval.features import Tower
from granvit.geometry import BoxTransform
from granvit.model.tower import grid_of, normalise, prefix_tokens, vision_tokens
from tests.eval.support import save_model
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


def opened(kind: str = "siglip", **options: object) -> Tower:
    return Tower("tiny", small(kind, **options), (0.5,) * 3, (0.5,) * 3, 64)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100), (90, 30), (33, 77)])
def test_maps_lie_where_the_tower_saw_the_image(height, width):
    """A patch of the frame, cut out of it by torch, is where the extent says."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    found = look(opened(), image, [(0.5, 0.5)], title="t")
    left, right, bottom, top = found.extent
    zoom = 64 / max(height, width)
    inner_height, inner_width = round(height * zoom), round(width * zoom)
    above, before = (64 - inner_height) // 2, (64 - inner_width) // 2
    # Column and row of the frame, each at the edges of the grid.
    for edge, offset, inner, side, at in (
        (left, before, inner_width, width, 0),
        (right, before, inner_width, width, 64),
        (top, above, inner_height, height, 0),
        (bottom, above, inner_height, height, 64),
    ):
        assert edge == pytest.approx((at - offset) / inner * side)


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (90, 30)])
def test_a_point_of_the_image_is_the_query_of_its_patch(size):
    tower = opened()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    frame = BoxTransform.letterbox(size, (64, 64)).pixels(image)
    pixels = normalise(frame[None], tower.mean, tower.std, torch.float32)
    for point in ((0.03, 0.04), (0.97, 0.96), (0.04, 0.97), (random.random(), random.random())):
        found = look(tower, image, [point], title="t", similarity=True)
        left, right, bottom, top = found.extent
        x, y = point[0] * size[1], point[1] * size[0]
        column, row = int((x - left) / (right - left) * 4), int((y - top) / (bottom - top) * 4)
        assert found.maps[0, row, column] == pytest.approx(1.0, abs=1e-5)
        attention = query_attention(tower.module, pixels, [(row, column)])
        assert torch.equal(look(tower, image, [point], title="t").maps[0], attention.patches[0].mean(0)[0])


def test_what_is_not_on_the_picture_is_said():
    wide = torch.full((3, 16, 64), 200, dtype=torch.uint8)
    found = look(opened("clip"), wide, [(0.5, 0.5)], title="t")
    # Of the four rows of patches, the image is in the two in the middle.
    outside = float(found.maps[0, [0, 3]].sum())
    prefix = 1 - float(found.maps.sum())
    assert found.captions == (f"query 1\nclass, registers {prefix:.0%}, black frame {outside:.0%}",)
    square = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    assert look(opened(), square, [(0.5, 0.5)], title="t").captions == ("query 1",)


def test_pictures_of_points_layers_and_heads(tmp_path):
    image = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    tower = opened("dinov3")
    two = [look(tower, image, [(0.2, 0.2), (1.0, 1.0)], title=title) for title in ("before", "after")]
    layers = look(tower, image, [(0.2, 0.2)], title="t", layers=(1, 2, 3))
    heads = look(tower, image, [(0.2, 0.2)], title="t", heads=True)
    assert [x.partition("\n")[0] for x in layers.captions] == ["layer 1", "layer 2", "layer 3"]
    assert [x.partition("\n")[0] for x in heads.captions] == ["head 1", "head 2", "head 3"]
    for i, looks in enumerate((two, [layers], [heads])):
        draw_looks(image, looks, tmp_path / "new" / f"{i}.png", title="all")
        with Image.open(tmp_path / "new" / f"{i}.png") as picture:
            picture.load()
            assert len(set(picture.convert("L").tobytes())) > 100
    for options in ({"layers": (1, 2)}, {"heads": True}):
        with pytest.raises(LookError, match="query: expected one point"):
            look(tower, image, [(0, 0), (1, 1)], title="t", **options)
    with pytest.raises(LookError, match="heads: expected attention of one layer"):
        look(tower, image, [(0, 0)], title="t", heads=True, similarity=True)
    with pytest.raises(LookError, match="0 to 1, got 1.5,0"):
        look(tower, image, [(1.5, 0)], title="t")
    (tmp_path / "file").touch()
    with pytest.raises(LookError, match="file"):
        draw_looks(image, two, tmp_path / "file" / "x.png")


def test_the_command(tmp_path):
    small("dinov2_registers").save_pretrained(tmp_path / "dino")
    save_model(tmp_path / "ours")
    Image.fromarray(np.random.default_rng().integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "i.jpg")

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["view", "attention", *map(str, arguments)])
        return result.exit_code, result.output + str(result.exception or "")

    image, out = tmp_path / "i.jpg", tmp_path / "out.png"
    for name, options in (("dino", ("--layers", "all")), ("ours", ("--query", "0.1,0.9", "--query", "0.5,0.5"))):
        before = ("--before", tmp_path / name) if name == "ours" else ()
        code, said = run(tmp_path / name, image, *options, *before, "--output", out)
        assert (code, out.exists()) == (0, True), said
        out.unlink()
    assert run(tmp_path / "dino", image, "--feature-similarity", "--layer", "2", "--output", out)[0] == 0
    for options, message in (
        (("--query", "a"), "expected x,y such as"),
        (("--layers", "4"), "expected 1 to 3"),
        (("--layers", "some"), "expected numbers or all"),
    ):
        code, said = run(tmp_path / "dino", image, *options)
        assert code != 0
        assert message in said
    assert "No such file" in run(tmp_path / "dino", tmp_path / "none.png")[1]
    assert "no such folder" in run(tmp_path / "nowhere", image)[1]
