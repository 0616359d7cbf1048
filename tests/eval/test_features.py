"""Features of regions and images against stock transformers and torchvision, and their views."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchvision.ops import roi_align
from transformers import SiglipVisionConfig, SiglipVisionModel

from granvit.data.images import frames
from granvit.data.record import Record
from granvit.data.sources import Broken, Scenes, Shards, Shown, SourceError
from granvit.eval.features import Tower, changed_view, features, plain_view, pool_regions
from granvit.eval.metrics import normalised
from tests.eval.support import noise, write_shards
from tests.model.support import random_boxes


def tower(size: int = 32, patch: int = 8) -> Tower:
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
        vision_use_head=False,
    )
    return Tower("tiny", SiglipVisionModel(config), (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), size)


def test_pools_are_what_they_say() -> None:
    grid, heads, channels = (5, 7), 2, 16
    tokens, boxes, index = torch.randn(3, 35, channels), random_boxes(9), torch.randint(0, 3, (9,))
    found = pool_regions(tokens, boxes, index, grid, heads)
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
    normal = (tokens - mean) / (variance + 1e-5).sqrt()
    # In cells, each of which torchvision has around a whole number's half.
    scaled = torch.cat([index[:, None].float(), boxes * torch.tensor([7.0, 5.0, 7.0, 5.0])], 1)
    maps = normal.transpose(1, 2).unflatten(2, grid)
    aligned = roi_align(maps, scaled, 7, sampling_ratio=2, aligned=True).mean((2, 3))
    torch.testing.assert_close(found["roi_align"], aligned, atol=1e-5, rtol=1e-5)
    for i, (box, image) in enumerate(zip(boxes, index, strict=True)):
        x, y = torch.arange(7), torch.arange(5)
        over_x = ((box[2] * 7).minimum(x + 1.0) - (box[0] * 7).maximum(x * 1.0)).clamp(min=0)
        over_y = ((box[3] * 5).minimum(y + 1.0) - (box[1] * 5).maximum(y * 1.0)).clamp(min=0)
        covered = (over_y[:, None] * over_x[None]).flatten()
        split = normal[image].unflatten(-1, (heads, -1))
        average = (covered[:, None, None] * split).sum(0) / covered.sum()
        scores = torch.einsum("hd,nhd->nh", average, split) / (channels // heads) ** 0.5 + covered.log()[:, None]
        attended = torch.einsum("nh,nhd->hd", scores.softmax(0), split).flatten()
        torch.testing.assert_close(found["region_attention"][i], attended, atol=1e-4, rtol=1e-4)


def test_features_are_those_of_the_stock_tower(tmp_path: Path) -> None:
    own, source = tower(), Shards(write_shards(tmp_path / "shards", 20))
    told: list[int] = []
    numbers = [0, 3, *range(5, 20)]  # more than a batch
    found = features(own, [(source, numbers)], seed=2, broken=Broken(0.0), progress=told.append)
    assert told == [16, 17]
    shown = [source.read(i, 32) for i in numbers]
    assert found.names == [normalised(region.caption) for x in shown for region in x.record.regions]
    assert found.image.tolist() == [i for i, x in enumerate(shown) for _ in x.record.regions]
    assert found.whole.shape == found.views.shape == (17, 16)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (own.mean, own.std))
    with torch.no_grad():
        for i in (0, 16):
            stretched = plain_view(shown[i])
            normal = (stretched / 255 - mean) / std
            hidden = own.module(normal[None], output_hidden_states=True).hidden_states[-1]
            expected = functional.layer_norm(hidden, (16,)).mean(1)[0]
            torch.testing.assert_close(found.whole[i], expected, atol=1e-4, rtol=1e-4)
            normal = (shown[i].pixels / 255 - mean) / std
            hidden = own.module(normal[None], output_hidden_states=True).hidden_states[-1]
            corners = torch.tensor([region.box for region in shown[i].record.regions], dtype=torch.float64)
            boxes = shown[i].transform.boxes(corners).float()
            pooled = pool_regions(hidden, boxes, torch.zeros(len(boxes), dtype=torch.int64), (4, 4), 2)
            for name, values in pooled.items():
                mine = found.regions[name][found.image == i]
                torch.testing.assert_close(mine, values, atol=1e-4, rtol=1e-4)
    again = features(own, [(source, numbers)], seed=2, broken=Broken(0.0))
    assert again.views.equal(found.views)
    assert not features(own, [(source, numbers)], seed=3, broken=Broken(0.0)).views.equal(found.views)
    with_others = features(own, [(source, [3]), (source, [5])], seed=2, broken=Broken(0.0))
    torch.testing.assert_close(with_others.views, found.views[1:3])


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    class Holed(Shards):
        def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
            if i in (1, 4, *range(16, 32)):
                raise SourceError(f"image {i} is broken")
            return super().read(i, size, flip=flip, tiles=tiles)

    folder, own = write_shards(tmp_path / "shards", 40), tower()
    left = [i for i in range(40) if i not in (1, 4, *range(16, 32))]
    said: list[str] = []
    told: list[int] = []
    broken = Broken(0.1)
    found = features(own, [(Holed(folder), range(40))], broken=broken, progress=told.append, note=said.append)
    assert told == [16, 40]  # none of the second batch could be read
    assert (broken.wanted, broken.count) == (40, 18)
    assert said[:2] == ["left out: image 1 is broken", "left out: image 4 is broken"]
    whole = features(own, [(Shards(folder), left)], broken=Broken(0.0))
    assert (found.names, found.image.tolist()) == (whole.names, whole.image.tolist())
    torch.testing.assert_close(found.views, whole.views)
    with pytest.raises(SourceError, match="expected at least two images that can be read, got 1"):
        features(own, [(Holed(folder), [0, 1, 4])], broken=Broken(0.1))
    with pytest.raises(SourceError, match="2 of 3 samples cannot be read, and max_broken allows 0.001"):
        features(own, [(Holed(folder), [0, 1, 4])], broken=Broken(0.001))


def test_a_patch_that_does_not_divide_the_frame() -> None:
    own = tower(30, 8)  # the grid covers 24 of 30 pixels
    found = features(own, [(Scenes(2, kind="natural", size=128), [0, 1])], broken=Broken(0.0))
    assert found.regions["roi_align"].isfinite().all()
    assert found.regions["region_attention"].shape[1] == 16


def test_images_without_regions() -> None:
    class Bare(Shards):
        def __init__(self) -> None:
            self.name = "bare"

        def read(self, i: int, size: int, *, flip: bool = False, tiles: int = 0) -> Shown:
            return Shown(Record(f"{i}", 20, 20, "noise"), *frames(noise(random.Random(i), 20, 20), (size, size), 0))

    found = features(tower(), [(Bare(), [0, 1])], broken=Broken(0.0))
    assert found.regions["roi_align"].shape == (0, 16)
    assert (found.names, found.whole.shape) == ([], (2, 16))


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (5, 90)])
def test_views_show_the_image_and_no_border(height: int, width: int) -> None:
    white = Image.fromarray(np.full((height, width, 3), 255, np.uint8))
    import io

    file = io.BytesIO()
    white.save(file, "PNG")
    shown = Shown(Record("a", width, height, "noise"), *frames(file.getvalue(), (48, 48), 0))
    assert (plain_view(shown) == 255).all()
    for seed in range(5):
        view = changed_view(shown, random.Random(seed))
        assert view.shape == (3, 48, 48)
        assert view.dtype == torch.uint8
        assert int(view.min()) > 140  # darker by 0.6 at most, and nowhere the black of a border
        assert len(view.unique()) == 1


def test_views_are_crops_mirrored_or_not() -> None:
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., :] = (np.arange(64) * 3)[None, :, None]
    pixels = torch.from_numpy(ramp).permute(2, 0, 1)
    from granvit.geometry import BoxTransform

    shown = Shown(Record("a", 64, 64, "noise"), pixels[None], BoxTransform.letterbox((64, 64), (64, 64)))
    rising = [
        bool(changed_view(shown, random.Random(i))[0, 0, 10] < changed_view(shown, random.Random(i))[0, 0, 50])
        for i in range(20)
    ]
    assert 2 <= sum(rising) <= 18


def test_the_checksum_is_of_the_weights() -> None:
    own = tower()
    before = own.sha256()
    assert own.sha256() == before
    with torch.no_grad():
        next(own.module.parameters()).view(-1)[0] += 1
    assert own.sha256() != before
