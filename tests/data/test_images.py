"""Reading images: right pixels from every kind of file, and a sentence for every kind of broken one."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_image

from granvit.data.images import ImageError, decode, frame, shard_extension, size_as_shown
from granvit.geometry import BoxTransform


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def quarters(width: int = 64, height: int = 32) -> Image.Image:
    """Red and green above, blue and white below."""
    image = Image.new("RGB", (width, height), (255, 255, 255))
    half = (width // 2, height // 2)
    image.paste((255, 0, 0), (0, 0, *half))
    image.paste((0, 255, 0), (half[0], 0, width, half[1]))
    image.paste((0, 0, 255), (0, half[1], half[0], height))
    return image


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


@cache
def photograph(times: int = 1) -> Image.Image:
    image = Image.fromarray(load_sample_image("flower.jpg"))
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_is_read(form: str) -> None:
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = saved(quarters(), form, **options)
    image = decode(data)
    assert image.mode == "RGB"
    assert size_as_shown(data) == (32, 64) == (image.height, image.width)
    assert np.abs(array(image) - array(quarters())).max() <= 3
    assert shard_extension(data) == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(form)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", [None, (16, 16)])
def test_every_orientation_is_shown_upright(form: str, orientation: int, fit: tuple[int, int] | None) -> None:
    # What each orientation does to the stored pixels, by its definition: rows and columns of the stored image.
    stored = np.asarray(quarters())
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = saved(quarters(), form, exif=exif, **options)
    image = decode(data, fit)
    assert size_as_shown(data) == shown.shape[:2]
    if fit is None:
        assert np.abs(array(image) - shown).max() <= 3
    else:
        assert max(image.size) == 16  # so a quarter has 8 by 4 pixels
        rows, columns = image.height, image.width
        middles = np.ix_([rows // 4, 3 * rows // 4], [columns // 4, 3 * columns // 4])
        assert np.abs(array(image)[middles] - shown[4 * middles[0], 4 * middles[1]]).max() <= 3


def test_exif_behind_the_pixels_or_broken_counts_as_none() -> None:
    broken = saved(quarters(), "JPEG", exif=b"Exif\x00\x00rubbish")
    assert size_as_shown(broken) == (32, 64)
    assert decode(broken).size == (64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(quarters(), "PNG")
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    late = data[:-12] + chunk + data[-12:]
    assert size_as_shown(late) == (32, 64)
    assert decode(late).size == (64, 32)


@pytest.mark.parametrize("fit", [(400, 400), (224, 224), (100, 300), (63, 63)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_decoding_small_is_decoding_and_resizing(form: str, fit: tuple[int, int]) -> None:
    data = saved(photograph(2), form)
    full, small = decode(data), decode(data, fit)
    letterbox = BoxTransform.letterbox((full.height, full.width), fit)
    corner = letterbox.boxes(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    assert small.width == round(float(corner[2] - corner[0]) * fit[1])
    assert small.height == round(float(corner[3] - corner[1]) * fit[0])
    expected = full.resize(small.size, Image.Resampling.BICUBIC)
    assert np.abs(array(small) - array(expected)).mean() < 2  # of 255; half a pixel of shift makes 4 and more
    moved = full.resize(small.size, Image.Resampling.BICUBIC, box=(0, 0, full.width * 0.99, full.height * 0.99))
    assert np.abs(array(moved) - array(expected)).mean() > 2 * np.abs(array(small) - array(expected)).mean()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(128, 128), (90, 200), (700, 500)])
def test_a_frame_holds_the_image_where_its_boxes_go(form: str, orientation: int, flip: bool, size: tuple) -> None:
    image = Image.new("RGB", (400, 300), (40, 40, 40))
    image.paste((250, 250, 250), (40, 60, 200, 120))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, form, exif=exif)
    pixels, transform = frame(data, size, flip=flip)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, *size))
    assert (transform.source, transform.target) == (size_as_shown(data), size)
    # A quarter turn to the right takes (x, y) to (1 - y, x).
    box = (
        [40 / 400, 60 / 300, 200 / 400, 120 / 300] if orientation == 1 else [180 / 300, 40 / 400, 240 / 300, 200 / 400]
    )
    expected = transform.boxes(torch.tensor(box, dtype=torch.float64)) * torch.tensor([*size[::-1]] * 2)
    rows, columns = (pixels[0] > 145).nonzero().unbind(1)
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (found - expected).abs().max() <= 1.5
    inside = transform.boxes(torch.tensor([0.0, 0.0, 1.0, 1.0])) * torch.tensor([*size[::-1]] * 2)
    shown = torch.zeros(size, dtype=torch.bool)
    x0, y0, x1, y1 = inside.round().int().tolist()
    shown[y0:y1, x0:x1] = True
    assert (pixels[0][shown] > 20).all()
    assert (pixels[0][~shown] == 0).all()


def test_a_smaller_image_is_not_enlarged() -> None:
    assert decode(saved(quarters(), "PNG"), (512, 512)).size == (64, 32)
    assert decode(saved(Image.new("RGB", (1000, 3)), "PNG"), (100, 100)).size == (100, 1)
    with pytest.raises(ValueError, match=r"decode: fit: expected a height and width of at least 1, got \(0, 5\)"):
        decode(saved(quarters(), "PNG"), (0, 5))


def test_a_jpeg_is_decoded_no_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(photograph(4), "JPEG")  # 2560 x 1708
    loaded = []
    load = JpegImageFile.load

    def noted(self: JpegImageFile) -> Any:
        loaded.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", noted)
    assert decode(data, (300, 300)).size == (300, 200)
    assert max(loaded) == (320, 214)
    loaded.clear()
    decode(data)
    assert max(loaded) == (2560, 1708)


def test_transparency_is_laid_over_white() -> None:
    layer = Image.new("RGBA", (4, 1), (200, 0, 0, 255))
    layer.putpixel((1, 0), (200, 0, 0, 0))
    layer.putpixel((2, 0), (0, 0, 0, 127))
    expected = [(200, 0, 0), (255, 255, 255), (128, 128, 128), (200, 0, 0)]
    assert [decode(saved(layer, "PNG")).getpixel((x, 0)) for x in range(4)] == expected
    assert [decode(saved(layer, "WEBP", lossless=True)).getpixel((x, 0)) for x in range(2)] == expected[:2]
    grey = Image.new("LA", (2, 1), (10, 255))
    grey.putpixel((1, 0), (10, 0))
    assert [decode(saved(grey, "PNG")).getpixel((x, 0)) for x in range(2)] == [(10, 10, 10), (255, 255, 255)]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        data = saved(palette, form, transparency=0)
        assert [decode(data).getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (9, 8, 7)]
    keyed = saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode(keyed).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_cut(form: str) -> None:
    values = np.array([[0, 257, 128 * 257, 254 * 257, 65535]], dtype=np.uint16)
    data = saved(Image.fromarray(values), form)
    assert [decode(data).getpixel((x, 0)) for x in range(5)] == [(v, v, v) for v in (0, 1, 128, 254, 255)]


def test_deeper_channels_are_refused() -> None:
    for values in (np.array([[0.5]], dtype=np.float32), np.array([[1 << 20]], dtype=np.int32)):
        data = saved(Image.fromarray(values), "TIFF")
        with pytest.raises(ImageError, match=r"a\.tif: its channels have 32 bits; expected at most 16"):
            decode(data, name="a.tif")


def test_cmyk_and_grey_become_rgb() -> None:
    data = saved(quarters().convert("CMYK"), "JPEG", quality=100)
    assert np.abs(array(decode(data)) - array(quarters())).max() <= 6
    assert decode(saved(photograph(2).convert("CMYK"), "JPEG"), (64, 64)).size == (64, 43)
    assert decode(saved(Image.new("L", (3, 3), 77), "JPEG")).getpixel((1, 1)) == (77, 77, 77)
    assert decode(saved(Image.new("1", (3, 3), 1), "PNG")).getpixel((1, 1)) == (255, 255, 255)


def test_of_a_stereo_photograph_the_first_is_read() -> None:
    data = saved(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 32))], quality=100)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    assert shard_extension(data) == "jpg"
    assert np.abs(array(decode(data)) - array(quarters())).mean() < 10


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    red, green, blue = decode(data).getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("fit", [None, (64, 64)])
def test_a_file_cut_short_is_named(form: str, fit: tuple[int, int] | None) -> None:
    data = saved(photograph().crop((0, 0, 320, 240)), form)
    for share in (0.01, 0.3, 0.9):
        with pytest.raises(ImageError, match=r"^some/a\.img: "):
            decode(data[: int(len(data) * share)], fit, name="some/a.img")


@pytest.mark.parametrize("read", [decode, size_as_shown, shard_extension])
def test_what_is_no_image_is_named(read: Any) -> None:
    with pytest.raises(ImageError, match=r"^a\.jpg: the file is empty$"):
        read(b"", name="a.jpg")
    for data in (b"<html>404 Not Found</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP", b"\x00" * 1000):
        with pytest.raises(ImageError, match=r"^a\.jpg: "):
            read(data, name="a.jpg")
    # A format that Pillow would hand to Ghostscript.
    with pytest.raises(ImageError, match="no image, or its header is broken"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", name="a.eps")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_before_it_goes_off(width: int, height: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(1 << 20) * 8)
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(bomb) < 10_000
    for read in (decode, size_as_shown):
        tracemalloc.start()
        with pytest.raises(ImageError, match=r"^b\.png: too large to be read safely, at most 134217728 pixels are"):
            read(bomb, name="b.png")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the TIFF reader, which tells what it skips
def test_random_damage_is_an_image_or_a_sentence() -> None:
    rng = np.random.default_rng()
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = saved(quarters(), form)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), size=4):
                data[place] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):  # and nothing else
                assert decode(bytes(data), name="damaged").mode == "RGB"
