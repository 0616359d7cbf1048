"""BoxTransform and the text forms of boxes: round trips, composition, clipping, and pixels that move with boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from granvit.geometry import BOX_STYLES, BoxTransform, clip, format_box, parse_boxes, resize_image
from tests.support import random_boxes

SIDE = st.integers(1, 900)
SIZE = st.tuples(SIDE, SIDE)


@st.composite
def transforms(draw: st.DrawFn, source: tuple[int, int] | None = None) -> BoxTransform:
    source = draw(SIZE) if source is None else source
    kind = draw(st.sampled_from(["resize", "letterbox", "crop", "flip", "tile"]))
    if kind == "resize":
        return BoxTransform.resize(source, draw(SIZE))
    if kind == "letterbox":
        anchor = (draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.sampled_from([0.0, 0.5, 1.0])))
        return BoxTransform.letterbox(source, draw(SIZE), anchor)
    if kind == "flip":
        return BoxTransform.flip(source)
    if kind == "tile":
        return draw(st.sampled_from(BoxTransform.tiles(source, (max(1, source[0] // 2), max(1, source[1] // 3)))))
    x0, y0 = draw(st.integers(-50, 900)), draw(st.integers(-50, 900))
    return BoxTransform.crop(source, (x0, y0, x0 + draw(SIDE), y0 + draw(SIDE)))


def boxes() -> Tensor:
    return random_boxes(6).double()


@settings(max_examples=200, deadline=None)
@given(transforms())
def test_the_inverse_leads_back(transform: BoxTransform) -> None:
    there = transform.boxes(boxes())
    assert (there[:, :2] <= there[:, 2:]).all()
    # A frame of one pixel shows a large image's box far outside of itself: rounding grows with that.
    torch.testing.assert_close(transform.inverse().boxes(transform.boxes(there)), there, rtol=1e-9, atol=1e-6)
    assert transform.inverse().inverse().source == transform.source


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_two_transforms_are_one(data: st.DataObject) -> None:
    first = data.draw(transforms())
    second = data.draw(transforms(first.target))
    both = first.then(second)
    assert (both.source, both.target) == (first.source, second.target)
    drawn = boxes()
    torch.testing.assert_close(both.boxes(drawn), second.boxes(first.boxes(drawn)), rtol=1e-9, atol=1e-6)


def test_transforms_that_do_not_meet_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"BoxTransform.then: expected a transform of images of \(8, 9\), got \(9, 8\)"
    ):
        BoxTransform.resize((4, 4), (8, 9)).then(BoxTransform.flip((9, 8)))


def test_known_places() -> None:
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    assert BoxTransform.flip((10, 20)).boxes(box).tolist() == [[0.25, 0.5, 0.75, 1.0]]
    assert BoxTransform.flip((10, 20)).boxes(torch.tensor([0.0, 0.0, 0.25, 1.0])).tolist() == [0.75, 0.0, 1.0, 1.0]
    letterbox = BoxTransform.letterbox((100, 200), (512, 512))
    assert letterbox.boxes(torch.tensor([0.0, 0.0, 1.0, 1.0])).tolist() == [0.0, 0.25, 1.0, 0.75]
    corner = BoxTransform.letterbox((100, 200), (512, 512), (0.0, 0.0))
    assert corner.boxes(torch.tensor([0.0, 0.0, 1.0, 1.0])).tolist() == [0.0, 0.0, 1.0, 0.5]
    crop = BoxTransform.crop((100, 200), (50, 0, 150, 100))
    assert crop.boxes(box).tolist() == [[0.0, 0.5, 1.0, 1.0]]
    assert len(BoxTransform.tiles((100, 200), (64, 64))) == 2 * 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pixels_move_with_boxes(data: st.DataObject) -> None:
    """A rectangle drawn into an image is found where the transform puts its box, to a pixel of either image."""
    height, width = data.draw(st.integers(40, 120)), data.draw(st.integers(40, 120))
    x0, y0 = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    x1, y1 = x0 + data.draw(st.integers(12, 20)), y0 + data.draw(st.integers(12, 20))
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (x0, y0, x1, y1))
    transform = data.draw(
        st.sampled_from(
            [
                BoxTransform.resize((height, width), (90, 70)),
                BoxTransform.letterbox((height, width), (96, 96)),
                BoxTransform.letterbox((height, width), (80, 130), (0.0, 1.0)),
                BoxTransform.flip((height, width)),
                BoxTransform.crop((height, width), (-7, -9, width + 5, height + 3)),
                BoxTransform.letterbox((height, width), (96, 96)).then(BoxTransform.flip((96, 96))),
            ]
        )
    )
    moved = transform.image(image)
    pixels = transform.pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(np.array(moved)))
    assert (moved.height, moved.width) == transform.target
    found = moved.convert("L").point(lambda v: 255 if v > 127 else 0).getbbox()
    assert found is not None
    box = transform.boxes(torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height], dtype=torch.float64))
    expected = box * torch.tensor([*transform.target[::-1]] * 2)
    zoom = max(abs(s) * n / m for s, n, m in zip(transform.scale, transform.target[::-1], (width, height), strict=True))
    assert (expected - torch.tensor(found)).abs().max() <= 1 + zoom / 2


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, st.booleans())
def test_resizing_is_as_exact_as_pillow(source: tuple[int, int], size: tuple[int, int], fraction: bool) -> None:
    """Against the same filter in float64; for whole images, which torch resizes, and for windows inside pixels."""
    # No black and no white: both filter in two steps and cut what overshoots after the first, which float64 does not.
    noise = torch.randint(64, 192, (1, 3, *source), dtype=torch.uint8)
    image = Image.fromarray(noise[0].permute(1, 2, 0).contiguous().numpy())
    window = (0.25, 0.0, float(source[1]), float(source[0])) if fraction else None
    ours = torch.from_numpy(np.array(resize_image(image, size, window))).permute(2, 0, 1)
    pillow = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC, box=window))
    expected = torch.from_numpy(pillow).permute(2, 0, 1)
    if fraction:
        assert torch.equal(ours, expected)
        return
    exact = torch.nn.functional.interpolate(noise.double(), size, mode="bicubic", antialias=True)[0]
    assert (ours - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"BoxTransform.pixels: expected uint8 of shape \(3, 4, 5\), got .*\(3, 5, 4\)"
    ):
        BoxTransform.flip((4, 5)).pixels(torch.zeros(3, 5, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"BoxTransform.pixels: expected uint8 .*, got torch.float32"):
        BoxTransform.flip((4, 5)).pixels(torch.zeros(3, 4, 5))
    assert not BoxTransform.crop((4, 5), (9, 9, 12, 10)).pixels(torch.ones(3, 4, 5, dtype=torch.uint8)).any()
    with pytest.raises(ValueError, match=r"BoxTransform.image: expected \(4, 5\), got \(5, 4\)"):
        BoxTransform.flip((4, 5)).image(Image.new("RGB", (4, 5)))
    outside = BoxTransform.crop((4, 5), (100, 100, 120, 110)).image(Image.new("RGB", (5, 4), (9, 9, 9)), (1, 2, 3))
    assert outside.getcolors() == [(200, (1, 2, 3))]


@pytest.mark.parametrize("wrong", [{"scale": (0.0, 1.0)}, {"offset": (float("nan"), 0.0)}, {"target": (0, 4)}])
def test_impossible_transforms_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="^BoxTransform: "):
        BoxTransform(**{"source": (4, 4), "target": (4, 4), **wrong})
    with pytest.raises(ValueError, match=r"BoxTransform.crop: expected x0 < x1"):
        BoxTransform.crop((4, 4), (3, 0, 3, 4))


def test_clip_tells_what_is_left() -> None:
    drawn = torch.tensor(
        [[0.1, 0.1, 0.3, 0.3], [-0.1, 0.0, 0.1, 0.5], [1.1, 0.0, 1.2, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0]]
    )
    clipped, share = clip(drawn)
    assert ((clipped >= 0) & (clipped <= 1)).all()
    torch.testing.assert_close(share, torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_text_round_trips_within_its_precision(data: st.DataObject) -> None:
    xs, ys = (sorted(data.draw(st.floats(0, 1)) for _ in range(2)) for _ in range(2))
    box = (xs[0], ys[0], xs[1], ys[1])
    style, size = (
        data.draw(st.sampled_from(BOX_STYLES)),
        (data.draw(st.integers(20, 900)), data.draw(st.integers(20, 900))),
    )
    text = format_box(box, style, size)
    step = 1e-3 if style != "pixels" else 1 / min(size)
    frame = data.draw(st.sampled_from(["{}", "It is at {}.", "<box>{}</box>", "1. {}", "a 3-legged dog {}"]))
    (parsed,) = parse_boxes(frame.format(text), style, size)
    assert max(abs(a - b) for a, b in zip(parsed, box, strict=True)) <= step / 2 + 1e-9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("(0.5,0.6),(0.1,0.2)", [(0.1, 0.2, 0.5, 0.6)]),
        ("[[.1, .2], [.3, .4]]", [(0.1, 0.2, 0.3, 0.4)]),
        ('{"x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 1.02}', [(0.1, 0.2, 0.3, 1.0)]),
        ("x_min=0.1, y_min=0.2, x_max=0.3 and y_max=0.4.", [(0.1, 0.2, 0.3, 0.4)]),
        ("3 cats [0.1 0.2 0.3 0.4] and 2 dogs (0.5;0.5;0.6;0.6)", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.6, 0.6)]),
        ("1.[1e-1, 0.2, 0.3, 0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("[100, 200, 300, 400]", []),
        ("[0.1, 0.2, 0.3]", []),
        ("[nan, 0.2, 0.3, 0.4]", []),
        ("in 2024 about 0.3 of 12 trees, or 5", []),
        ("", []),
    ],
)
def test_what_models_write_is_understood(text: str, expected: list) -> None:
    assert parse_boxes(text) == expected


@pytest.mark.parametrize("box", [(0.2, 0.0, 0.1, 1.0), (0.0, 0.0, 1.1, 1.0), (float("nan"), 0.0, 1.0, 1.0)])
def test_writing_is_strict(box: tuple) -> None:
    with pytest.raises(ValueError, match="format_box: expected 0 <= x0 <= x1 <= 1"):
        format_box(box)


def test_styles_are_named() -> None:
    with pytest.raises(ValueError, match="style: expected one of relative, thousandths, pixels, got 'percent'"):
        format_box((0, 0, 1, 1), "percent")
    with pytest.raises(ValueError, match=r"size: expected \(height, width\)"):
        parse_boxes("[1, 2, 3, 4]", "pixels")
