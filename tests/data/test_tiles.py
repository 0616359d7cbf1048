"""Overviews and tiles: the grid against LLaVA-NeXT's choice, pixels against Pillow, boxes against marks in images."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from granvit.data.images import ImageError, frame, frames, tile_grid, tiled
from granvit.geometry import BoxTransform

SIDE = st.integers(1, 3000)


@pytest.fixture(autouse=True)
def drawn() -> None:
    random.seed(int(torch.randint(1 << 40, ())))


def noise(height: int, width: int) -> Image.Image:
    """Without black and white, where filters cut what overshoots after one step or two."""
    small = np.array(random.choices(range(80, 176), k=8 * 8 * 3), np.uint8).reshape(8, 8, 3)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- the grid -------------------------------------------------------------------------------------------------------


def test_known_grids() -> None:
    known = {
        # height, width, tiles: a frame of 100
        (100, 100, 4): (1, 1),
        (99, 20, 9): (1, 1),
        (101, 100, 4): (2, 1),
        (200, 200, 4): (2, 2),
        (5000, 5000, 3): (1, 1),  # a square gains nothing from two or three tiles in a row
        (200, 200, 3): (1, 1),
        (100, 300, 4): (1, 3),
        (400, 90, 4): (4, 1),
        (100, 300, 2): (1, 2),
        (220, 290, 6): (2, 3),
        (3000, 3000, 8): (2, 2),
        (3000, 3000, 9): (3, 3),
        (9000, 10, 5): (5, 1),
        (500, 500, 0): (1, 1),
        (500, 500, 1): (1, 1),
    }
    for (height, width, tiles), expected in known.items():
        assert tile_grid((height, width), (100, 100), tiles) == expected, (height, width, tiles)


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, st.integers(8, 600), st.integers(1, 12))
def test_the_grid_keeps_as_much_as_that_of_llava_next(height: int, width: int, side: int, tiles: int) -> None:
    image_processing_utils = pytest.importorskip("transformers.image_processing_utils")
    grids = [(r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= tiles]
    resolutions = [(r * side, c * side) for r, c in grids]
    theirs = image_processing_utils.select_best_resolution((height, width), resolutions)
    rows, columns = tile_grid((height, width), (side, side), tiles)

    def kept(size: tuple[int, int]) -> float:
        return min(1.0, size[0] / height, size[1] / width) ** 2 * height * width

    # It counts whole pixels, and so may waste tiles for the sake of one; and where an image has fewer than one row.
    ours = (rows * side, columns * side)
    assert rows * columns <= tiles
    assert kept(ours) >= kept(theirs) * (1 - 1e-9)
    assert all(kept((r * side, c * side)) < kept(ours) * (1 - 1e-9) for r, c in grids if r * c < rows * columns)
    if max(height, width) <= side:
        assert (rows, columns) == (1, 1)


# ---- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_tiles_are_the_canvas_cut_row_by_row(flip: bool) -> None:
    side = 48
    for height, width, tiles in ((200, 110, 6), (97, 301, 5), (100, 100, 4), (333, 334, 9), (60, 30, 4)):
        image = noise(height, width)
        made, transform = frames(encoded(image), (side, side), tiles, flip=flip)
        rows, columns = tile_grid((height, width), (side, side), tiles)
        assert (rows, columns) != (1, 1)
        assert made.shape == (1 + rows * columns, 3, side, side)
        assert made.dtype == torch.uint8
        assert made.is_contiguous()
        canvas = torch.cat([torch.cat([*made[1 + r * columns :][:columns]], 2) for r in range(rows)], 1)
        zoom = min(rows * side / height, columns * side / width)
        inner = (max(1, round(height * zoom)), max(1, round(width * zoom)))
        resized = to_tensor(image.resize(inner[::-1], Image.Resampling.BICUBIC))
        top, left = (rows * side - inner[0]) // 2, (columns * side - inner[1]) // 2
        expected = torch.zeros(3, rows * side, columns * side, dtype=torch.uint8)
        expected[:, top : top + inner[0], left : left + inner[1]] = resized
        expected = expected.flip(2) if flip else expected
        apart = (canvas.int() - expected.int()).abs()
        assert apart.max() <= 2  # torch and Pillow round the weights of each of two steps in their own way
        assert apart.float().mean() < 0.1
        overview, alone = frame(encoded(image), (side, side), flip=flip)
        assert torch.equal(made[0], overview)
        assert transform == alone


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_an_image_that_gains_nothing_is_its_overview(tiles: int) -> None:
    for height, width in ((40, 40), (31, 48), (48, 48), (500, 500)):
        data = encoded(noise(height, width))
        made, transform = frames(data, (48, 48), tiles)
        overview, alone = frame(data, (48, 48))
        assert torch.equal(made, overview[None])
        assert transform == alone


def test_a_large_photograph_is_decoded_no_larger_than_its_tiles_need(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(1600, 1200), "JPEG", quality=95)
    sizes: list[tuple[int, int]] = []
    real = BoxTransform.pixels
    monkeypatch.setattr(BoxTransform, "pixels", lambda self, x: sizes.append(tuple(x.shape[1:])) or real(self, x))
    made, _ = frames(data, (128, 128), 4)
    assert sizes[0] == sizes[1] == (400, 300)  # a quarter of each side, the smallest halving above 256
    whole = to_tensor(Image.open(io.BytesIO(data)))
    expected, _ = tiled(whole, (1600, 1200), (128, 128), (2, 2))
    assert (made.int() - expected.int()).abs().float().mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiles_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(90, 200)
    made, _ = frames(encoded(image, exif=exif), (64, 64), 4)
    turned = np.array(image)
    turns = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
    mirrored, quarters = turns.get(orientation, (0, 0))
    turned = np.rot90(turned[:, ::-1] if mirrored else turned, quarters)
    expected, _ = frames(encoded(Image.fromarray(np.ascontiguousarray(turned))), (64, 64), 4)
    assert made.shape == expected.shape == (4, 3, 64, 64)
    assert (made.int() - expected.int()).abs().max() <= 2


def test_boxes_of_the_image_are_found_in_the_overview_and_in_the_tiles() -> None:
    side, height, width = 64, 256, 190
    x0, y0, x1, y1 = 120, 30, 160, 90
    image = Image.new("RGB", (width, height), (255, 255, 255))
    image.paste((200, 0, 0), (x0, y0, x1, y1))
    for flip in (False, True):
        made, transform = frames(encoded(image), (side, side), 6, flip=flip)
        rows, columns = tile_grid((height, width), (side, side), 6)
        canvas = BoxTransform.letterbox((height, width), (rows * side, columns * side))
        canvas = canvas.then(BoxTransform.flip(canvas.target)) if flip else canvas
        ways = [transform, *(canvas.then(tile) for tile in BoxTransform.tiles(canvas.target, (side, side)))]
        box = torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height], dtype=torch.float64)
        seen = 0
        for way, pixels in zip(ways, made, strict=True):
            red = (pixels[0].int() - pixels[1].int()) > 100
            left, top, right, bottom = way.boxes(box).clamp(0, 1).mul(side).tolist()
            if right - left < 1 or bottom - top < 1:
                assert not red.any()
                continue
            seen += 1
            ys, xs = red.nonzero(as_tuple=True)
            found = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            assert found == pytest.approx([left, top, right, bottom], abs=1.5)
        assert seen >= 2


def test_what_cannot_be_shown_is_one_sentence() -> None:
    for data in (b"", b"\x89PNG\r\n\x1a\nnot at all", encoded(noise(300, 300))[:400]):
        with pytest.raises(ImageError, match="^here: "):
            frames(data, (64, 64), 4, name="here")
    with pytest.raises(ValueError, match="expected a height and width of at least 1"):
        frames(encoded(noise(30, 30)), (0, 64), 4)
