"""What the tests of the region encoders share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from granvit.adapters._base import BaseRegionEncoder
from tests.support import Comparison, assert_within_budget, random_boxes

FULL = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
LEAK = 1e4  # what class and register tokens hold in a transparent model


def transparent(model: nn.Module, conv: nn.Conv2d, prefix: list[nn.Parameter], norms: list[str]) -> nn.Module:
    """Makes a ViT hand each patch through: channels 0 and 1 of a token become the patch's mean of planes 0 and 1.

    All its layers still run, with weights of zero, so only the residual stream is left.
    """
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for p in prefix:
            p.fill_(LEAK)
        conv.weight[0, 0] = conv.weight[1, 1] = 1 / conv.weight[0, 0].numel()
    for name in norms:
        setattr(model, name, nn.Identity())
    return model.double().eval()


def ramps(height: int, width: int, images: int = 1) -> Tensor:
    """Images whose planes 0 and 1 hold each pixel's relative x and y; image i is shifted by 10 i."""
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    one = torch.stack([x.expand(height, width), y[:, None].expand(height, width), x.new_zeros(height, width)])
    return torch.stack([one + 10 * i for i in range(images)])


def assert_reads_coordinates(encoder: BaseRegionEncoder, height: int, width: int, patch: int) -> None:
    """On coordinate ramps, every cell of region_features holds the coordinates of its own centre."""
    images = ramps(height, width, images=2)
    tokens, grid = encoder.tokens(images)
    assert grid == (height // patch, width // patch)
    assert tokens.shape[:2] == (2, grid[0] * grid[1])
    # Half a patch inside of what the grid covers: farther out the features are flat, not a ramp.
    low = torch.tensor([patch / 2 / width, patch / 2 / height])
    high = torch.tensor([(grid[1] - 0.5) * patch / width, (grid[0] - 0.5) * patch / height])
    boxes = random_boxes(20).double() * (high - low).repeat(2) + low.repeat(2)
    image_index = torch.arange(20) % 2
    found = encoder.region_features(images, boxes, image_index, (3, 2))[..., :2].unflatten(1, (3, 2))
    x0, y0, x1, y1 = boxes.unbind(1)
    cell_x = x0[:, None] + (x1 - x0)[:, None] * torch.tensor([0.25, 0.75])
    cell_y = y0[:, None] + (y1 - y0)[:, None] * torch.tensor([1 / 6, 3 / 6, 5 / 6])
    expected = torch.stack([cell_x[:, None].expand(20, 3, 2), cell_y[:, :, None].expand(20, 3, 2)], dim=-1)
    torch.testing.assert_close(found, expected + 10 * image_index[:, None, None, None], rtol=0, atol=1e-6)


def assert_crops_cover_their_boxes(encoder: BaseRegionEncoder, height: int, width: int, patch: int) -> None:
    """On coordinate ramps, the tokens of a crop hold the coordinates of equal parts of the whole box."""
    edges = [8 / width, 4 / height, (width - 4) / width, (height - 8) / height]
    box = torch.tensor([edges], dtype=torch.float64)
    tokens, (h, w) = encoder.crop_features(ramps(height, width), box, torch.tensor([0]))
    assert (h, w) == (height // patch, width // patch)
    x0, y0, x1, y1 = box[0]
    x = x0 + (x1 - x0) * (torch.arange(w, dtype=torch.float64) + 0.5) / w
    y = y0 + (y1 - y0) * (torch.arange(h, dtype=torch.float64) + 0.5) / h
    expected = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
    # Cells at the border lose the symmetry of the filter's triangle.
    inner = tokens[0, :, :2].unflatten(0, (h, w))[1:-1, 1:-1]
    torch.testing.assert_close(inner, expected[1:-1, 1:-1], rtol=0, atol=1e-6)


def assert_head_equal(
    make_encoder: Callable[[nn.Module], BaseRegionEncoder],
    model: nn.Module,
    head: Callable[[nn.Module, Tensor], Tensor],
    draw_images: Callable[[], Tensor],
) -> None:
    """region_pool is `head` on the covered tokens: of the whole image, and of a box that ends on cell borders.

    Grids have to be powers of two: then edges of boxes are exact, and rounding covers no bit of a neighbouring cell.
    """
    with torch.no_grad():
        for p in model.parameters():  # random weights everywhere, so that nothing is hidden behind zeros and ones
            p.add_(0.2 * torch.randn_like(p))
    model.eval()
    exact_model = copy.deepcopy(model).double()
    encoder, exact_encoder = make_encoder(model), make_encoder(exact_model)

    def draw() -> Iterator[Comparison]:
        images = draw_images()
        tokens, (height, width) = encoder.tokens(images)
        part = torch.tensor([[1 / width, 1 / height, 3 / width, 1.0]])
        index = torch.arange(len(images))
        for name, box, rows, columns in (
            ("whole", FULL, slice(None), slice(None)),
            ("part", part, slice(1, None), slice(1, 3)),
        ):
            boxes = box.repeat(len(images), 1)
            covered = tokens.unflatten(1, (height, width))[:, rows, columns].flatten(1, 2)
            exact = head(exact_model, covered.double())
            yield name, encoder.region_pool(images, boxes, index, tokens=tokens), head(model, covered), exact
            ours = exact_encoder.region_pool(images.double(), boxes.double(), index, tokens=tokens.double())
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)

    assert_within_budget(draw)
