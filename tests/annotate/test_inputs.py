"""Which images a run reads, their order and their keys; and what becomes of broken ones."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from granvit.annotate import AnnotationError
from granvit.annotate.inputs import ImageFile, _key, digest, list_images
from granvit.annotate.reading import for_shard, read_file
from granvit.data.images import ImageError, decode
from granvit.data.record import Record


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(images: list[ImageFile]) -> list[str]:
    return [image.name for image in images]


def test_folders_files_and_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "set/b.jpg", "set/a/c.PNG", "set/a/notes.txt", "set/.hidden.webp", "other/b.jpg", "odd.data")
    found = list_images([tmp_path / "set"])
    assert names(found) == [".hidden.webp", "a/c.PNG", "b.jpg"]
    assert {image.source for image in found} == {"set"}
    both = list_images([tmp_path / "other", tmp_path / "set", tmp_path / "odd.data"])
    assert names(both) == [".hidden.webp", "a/c.PNG", "b.jpg", "b.jpg", "odd.data"]
    assert [image.key for image in both] == [
        "hidden-" + both[0].key[-10:],
        "a-c-" + both[1].key[-10:],
        "b",
        "b-2",
        "odd",
    ]
    assert names(list_images([str(tmp_path / "set" / "**" / "*.[jP]*")])) == ["a/c.PNG", "b.jpg"]
    assert names(list_images([str(tmp_path / "s*" / "b.jpg")])) == ["set/b.jpg"]


def test_a_file_is_read_once_and_the_order_is_not_that_of_the_inputs(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i:02d}.jpg" for i in range(30)))
    inputs = [tmp_path, *tmp_path.iterdir(), str(tmp_path / "*.jpg")]
    expected = list_images([tmp_path])
    assert names(expected) == [f"{i:02d}.jpg" for i in range(30)]
    random.shuffle(inputs)
    again = list_images(inputs)
    assert names(again) == names(expected)
    assert digest(again) == digest(expected)
    assert digest(again[1:]) != digest(expected)


def test_nothing_found_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere: no such file or folder"):
        list_images([tmp_path / "nowhere"])
    with pytest.raises(AnnotationError, match=r"\*\.jpg: no file matches this pattern"):
        list_images([str(tmp_path / "*.jpg")])
    with pytest.raises(AnnotationError, match=r"no images: the folders given hold no file that ends in \.jpg"):
        list_images([tmp_path])


@given(st.lists(st.text(min_size=1, max_size=150).map(lambda t: t.replace("\0", "_")), unique=True, max_size=8))
def test_any_name_makes_a_legal_key(given_names: list[str]) -> None:
    for name in given_names:
        Record(_key(name), 1, 1, "s").check()
    lossy = [name for name in given_names if _key(name) != name.rpartition(".")[0]]
    assert len({_key(name) for name in lossy}) == len({*lossy})


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def ramp(mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((300, 200)).convert(mode)


def huge_png() -> bytes:
    """A header that claims 3.6 gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\1\0IDAT"
    )


BROKEN = {
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"no image at all", "no image, or its header is broken"),
    "truncated.jpg": (encoded(ramp(), "JPEG")[:1500], "broken or cut short"),
    "truncated.png": (encoded(ramp(), "PNG")[:150], "broken or cut short"),
    "huge.png": (huge_png(), "too large to be read safely, at most 134217728 pixels are"),
    "float.tiff": (encoded(ramp("F"), "TIFF"), "its channels have 32 bits"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image, or its header is broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named(tmp_path: Path, name: str) -> None:
    data, text = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"{name}: .*{text}"):
        decode(read_file(path), name=str(path))


def test_a_missing_image_is_its_own_fault_and_a_broken_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageError, match=r"gone\.jpg: No such file"):
        read_file(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="Is a directory"):
        read_file(tmp_path)

    def fail(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(AnnotationError, match=r"gone\.jpg: cannot be read: Input/output error"):
        read_file(tmp_path / "gone.jpg")


def pixels(data: bytes) -> Image.Image:
    image = decode(data)
    assert image.mode == "RGB"
    return image


def test_unusual_images_are_read_as_they_are_shown() -> None:
    grey = ramp()
    assert pixels(encoded(grey, "PNG")).tobytes() == grey.tobytes()
    cmyk = pixels(encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"))
    assert all(abs(a - b) < 6 for a, b in zip(cmyk.getpixel((5, 5)), (255, 0, 0), strict=True))
    deep = Image.new("I;16", (40, 30), 257 * 100)
    assert pixels(encoded(deep, "PNG")).getpixel((5, 5)) == (100, 100, 100)
    frames = [Image.new("RGB", (40, 30), c) for c in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(moving).getpixel((5, 5)) == (255, 0, 0)
    assert pixels(encoded(Image.new("RGBA", (40, 30), (0, 0, 0, 0)), "PNG")).getpixel((5, 5)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right when it is shown
    turned = Image.new("RGB", (40, 30), "white")
    turned.paste("black", (0, 0, 40, 10))
    shown = pixels(encoded(turned, "PNG", exif=exif))
    assert shown.size == (30, 40)
    assert shown.getpixel((27, 20)) == (0, 0, 0)
    assert shown.getpixel((3, 20)) == (255, 255, 255)


def test_a_shard_holds_the_file_as_it_is_or_png() -> None:
    for form, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        data = encoded(ramp(), form)
        assert for_shard(data, Path("misnamed.tif")) == (data, extension)
    for form in ("GIF", "BMP", "TIFF", "PPM"):
        data = encoded(ramp(), form)
        png, extension = for_shard(data, Path("image"))
        assert extension == "png"
        assert pixels(png).tobytes() == pixels(data).tobytes()
