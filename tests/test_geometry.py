import pytest
import torch
import torch.nn.functional as F

from granvit import geometry
from tests.support import awkward_boxes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(8, 8), (64, 48), (13, 57), (1, 1), (28, 34)])
@pytest.mark.parametrize("pixels", [(3, 5, 31, 39), (0, 0, 56, 40), (7, 7, 8, 8), (55, 0, 56, 40)])
def test_whole_pixel_crops_equal_antialiased_interpolation(pixels, size, dtype):
    height, width = 40, 56
    images = torch.randn(3, 2, height, width, dtype=dtype)
    x0, y0, x1, y1 = pixels
    box = torch.tensor([[x0 / width, y0 / height, x1 / width, y1 / height]], dtype=dtype)
    crop = geometry.crop_boxes(images, box, torch.tensor([2]), size)
    cut = images[2:, :, y0:y1, x0:x1]
    expected = F.interpolate(cut, size, mode="bilinear", antialias=True)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(crop, expected, rtol=0, atol=tolerance)


def test_crops_come_in_the_order_of_the_boxes_and_in_chunks(monkeypatch):
    images = torch.randn(3, 2, 20, 30)
    boxes, image_index = awkward_boxes(14), torch.randint(0, 3, (14,))
    whole = geometry.crop_boxes(images, boxes, image_index, (6, 5))
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(geometry.crop_boxes(images, boxes, image_index, (6, 5)), whole)
    for i in range(14):
        alone = geometry.crop_boxes(images, boxes[i : i + 1], image_index[i : i + 1], (6, 5))
        torch.testing.assert_close(alone[0], whole[i])
    assert geometry.crop_boxes(images, boxes[:0], image_index[:0], (6, 5)).shape == (0, 2, 6, 5)


def test_a_crop_shows_nothing_outside_its_box_and_counts_partial_pixels_in_part():
    images = torch.zeros(1, 1, 4, 4)
    images[..., 1:3, 1:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    images[images == 0] = 1000.0
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    assert geometry.crop_boxes(images, box, torch.tensor([0]), 7).max() <= 4
    # Half of column 1 and all of column 2, as one pixel: the filter is as wide as the box, centred in it.
    box = torch.tensor([[1.5 / 4, 0.25, 0.75, 0.5]])
    left, right = 0.5 * (1 - 0.75 / 1.5), 1 * (1 - 0.25 / 1.5)
    expected = (left * 1 + right * 2) / (left + right)
    assert geometry.crop_boxes(images, box, torch.tensor([0]), 1).item() == pytest.approx(expected, rel=1e-6)


def test_a_box_without_extent_shows_the_pixel_at_its_centre():
    images = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[0.6, 0.5, 0.6, 0.5], [1.0, 1.0, 1.0, 1.0], [1.3, 0.0, 1.4, 0.2]])
    crops = geometry.crop_boxes(images, points, torch.zeros(3, dtype=torch.long), 2)
    expected = torch.tensor([6.0, 11.0, 3.0])
    torch.testing.assert_close(crops, expected.view(3, 1, 1, 1).expand(3, 1, 2, 2))


def test_crops_are_differentiable_in_the_images_and_keep_their_dtype():
    images = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    boxes, image_index = awkward_boxes(10).double(), torch.randint(0, 2, (10,))
    assert torch.autograd.gradcheck(lambda x: geometry.crop_boxes(x, boxes, image_index, (3, 4)), images)
    narrow = geometry.crop_boxes(images.detach().bfloat16(), boxes, image_index, 3)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(
        narrow.double(), geometry.crop_boxes(images.detach(), boxes, image_index, 3), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": torch.zeros(3, 4, 4)}, "images: expected floating"),
        ({"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, "images: expected floating"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes: expected floating \(R, 4\)"),
        ({"boxes": torch.tensor([[0.0, 0, 1, 1], [10.0, 10, 200, 200]])}, "relative to the image.* in row 1"),
        ({"boxes": torch.tensor([[0.6, 0, 0.5, 1], [0.0, 0, 1, 1]])}, "x0 <= x1.* in row 0"),
        ({"boxes": torch.tensor([[float("nan"), 0, 0.5, 1], [0.0, 0, 1, 1]])}, "in row 0"),
        ({"image_index": torch.zeros(3, dtype=torch.long)}, r"image_index: expected shape \(2,\)"),
        ({"image_index": torch.tensor([0, 1])}, r"image_index: expected values in \[0, 1\), got 1 in row 1"),
        ({"size": 0}, "size: expected"),
    ],
)
def test_wrong_inputs_are_one_clear_sentence(change, text):
    arguments = {
        "images": torch.zeros(1, 3, 4, 4),
        "boxes": torch.tensor([[0.0, 0, 1, 1]] * 2),
        "image_index": torch.zeros(2, dtype=torch.long),
        "size": 2,
    }
    with pytest.raises(ValueError, match=f"crop_boxes: .*{text}|crop_boxes: {text}"):
        geometry.crop_boxes(**{**arguments, **change})
    with pytest.raises(TypeError, match="crop_boxes: image_index: expected an integer tensor"):
        geometry.crop_boxes(**{**arguments, "image_index": torch.zeros(2)})


def test_rescale_moves_boxes_between_frames_with_a_common_corner():
    boxes = torch.tensor([[0.0, 0.5, 0.25, 1.0]])
    assert geometry.rescale(boxes, (40, 60), (40, 60)) is boxes
    expected = torch.tensor([[0.0, 0.5 * 40 / 32, 0.25 * 60 / 48, 40 / 32]])
    torch.testing.assert_close(geometry.rescale(boxes, (40, 60), (32, 48)), expected)
