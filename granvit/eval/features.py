"""What a vision tower makes of regions and of whole images: features for probes, without a language model."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from granvit import geometry
from granvit.data.sources import Broken, Shown, Source, SourceError
from granvit.eval.metrics import normalised
from granvit.eval.sources import readable
from granvit.geometry import BoxTransform
from granvit.model.tower import grid_of, normalise, patch_of, vision_tokens
from granvit.ops import region_attention, roi_align

# isort: split
# After granvit.model, which says in a sentence where transformers is not installed.
from transformers import PreTrainedModel

POOLS = ("region_attention", "roi_align")
_CELLS = 7  # a side of RoIAlign's grid, as detectors have it
_BATCH = 16  # images
_COLOUR = (0.6, 1.4)  # of the factors of brightness, contrast and saturation
_CROP = 0.5  # least share of an image that a view shows


@dataclass(frozen=True)
class Tower:
    """A vision tower and what it needs to be fed.

    Attributes:
        name: in reports.
        module: one that :func:`granvit.model.tower.vision_tokens` takes.
        mean: of RGB in 0 to 1, to subtract.
        std: to divide by.
        size: side of the square frame in pixels.
        layer: index into hidden_states, that features are taken from.
    """

    name: str
    module: PreTrainedModel
    mean: Sequence[float]
    std: Sequence[float]
    size: int
    layer: int = -1

    def sha256(self) -> str:
        """Of all its weights, by name."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Features:
    """Of the images of some sources.

    Attributes:
        regions: ``(R, C)`` float32 of each of :data:`POOLS`.
        names: of the regions: captions as :func:`granvit.eval.metrics.normalised` has them.
        image: ``(R,)`` int64, the image of each region.
        whole: ``(N, C)`` float32, of each image.
        views: ``(N, C)`` float32, of a view of each image: cropped, mirrored or not, in other colours.
    """

    regions: dict[str, Tensor]
    names: list[str]
    image: Tensor
    whole: Tensor
    views: Tensor


def pool_regions(
    tokens: Tensor, boxes: Tensor, image_index: Tensor, grid: tuple[int, int], heads: int
) -> dict[str, Tensor]:
    """One vector a region, by two ways that have no parameters.

    Tokens are brought to mean 0 and variance 1 over their channels first (LayerNorm without weights), because a few
    channels of a ViT are larger than all others. Then

    - ``region_attention``: the tokens under the box attended to by their own average; the tokens are keys and values.
      The average counts tokens by how much of them the box covers, as the attention does.
    - ``roi_align``: the mean of a grid of 7 by 7 samples of the box.

    Args:
        tokens: ``(B, H*W, C)`` floating.
        boxes: ``(R, 4)`` float32 relative to the grid.
        image_index: ``(R,)`` integer.
        grid: ``(H, W)``.
        heads: that attention splits channels into; channels a head must be what
            :func:`granvit.ops.region_attention` takes.

    Returns:
        ``(R, C)`` for each of :data:`POOLS`.
    """
    normal = functional.layer_norm(tokens, tokens.shape[-1:])
    split = normal.unflatten(-1, (heads, -1))
    nothing = split.new_zeros(boxes.shape[0], 1, *split.shape[-2:])  # no preference: attention is the average
    average = region_attention(nothing, split, split, boxes, image_index, grid)
    attended = region_attention(average, split, split, boxes, image_index, grid)
    aligned = roi_align(normal, boxes, image_index, grid, _CELLS)
    return {"region_attention": attended.flatten(1), "roi_align": aligned.mean(1)}


@torch.no_grad()
def features(
    tower: Tower,
    sources: Sequence[tuple[Source, Sequence[int]]],
    *,
    broken: Broken,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Features:
    """Features of all regions that have a caption and an area, and of all images that can be read.

    Args:
        tower: whose; left on `device`, in evaluation mode.
        sources: and the numbers of their images.
        broken: counts images that cannot be read.
        seed: of the views.
        device: to run on; features come back to the CPU.
        progress: is told how many images are done.
        note: is told of each image that cannot be read.

    Raises:
        SourceError: fewer than two images can be read, or more are broken than may be.
    """
    module = tower.module.to(device).eval()
    found: dict[str, list[Tensor]] = {name: [] for name in (*POOLS, "image", "whole", "views")}
    names: list[str] = []
    batches = [(source, own[i : i + _BATCH]) for source, own in sources for i in range(0, len(own), _BATCH)]
    done = read = 0
    for source, part in batches:
        seen, reasons = readable(source, part, tower.size)
        if note is not None:
            for reason in reasons:
                note(f"left out: {reason}")
        broken.add(len(part), reasons)
        done += len(part)
        if not seen:
            continue
        shown = list(seen.values())
        boxes, index = [], []
        for row, image in enumerate(shown):
            kept = [region for region in image.record.regions if region.caption.strip() and region.area()]
            corners = torch.tensor([region.box for region in kept], dtype=torch.float64).reshape(-1, 4)
            boxes.append(geometry.clip(image.transform.boxes(corners))[0].float())
            index += [row] * len(kept)
            names += [normalised(region.caption) for region in kept]
        tokens, grid = _tokens(tower, torch.stack([image.pixels for image in shown]), device)
        patch = patch_of(module)
        size = (tower.size, tower.size)
        where = geometry.rescale(torch.cat(boxes), size, (grid[0] * patch[0], grid[1] * patch[1])).to(device)
        rows = torch.tensor(index, dtype=torch.int64)
        pooled = pool_regions(tokens, where, rows.to(device), grid, int(module.config.num_attention_heads))
        for name, values in pooled.items():
            found[name].append(values.float().cpu())
        found["image"].append(rows + read)
        rngs = [random.Random(f"{seed} {image.record.key}") for image in shown]
        for name, pixels in (
            ("whole", [plain_view(image) for image in shown]),
            ("views", [changed_view(image, rng) for image, rng in zip(shown, rngs, strict=True)]),
        ):
            found[name].append(_whole(_tokens(tower, torch.stack(pixels), device)[0]))
        read += len(shown)
        if progress is not None:
            progress(done)
    if read < 2:
        raise SourceError(f"expected at least two images that can be read, got {read}")
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Features({name: joined[name] for name in POOLS}, names, joined["image"], joined["whole"], joined["views"])


def _tokens(tower: Tower, pixels: Tensor, device: str) -> tuple[Tensor, tuple[int, int]]:
    module = tower.module
    normal = normalise(pixels.to(device), tower.mean, tower.std, module.dtype)
    return vision_tokens(module, normal, tower.layer), grid_of(module, (tower.size, tower.size))


def _whole(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:]).mean(1).float().cpu()


def plain_view(shown: Shown) -> Tensor:
    """The whole image stretched over the frame, so that no border tells its shape; uint8 ``(3, size, size)``."""
    inner = _inner(shown.transform)
    return BoxTransform.crop(shown.transform.target, inner).then(_stretch(inner, shown)).pixels(shown.pixels)


def changed_view(shown: Shown, rng: random.Random) -> Tensor:
    """Half of the image or more, stretched over the frame, mirrored by chance, in other colours; as
    :func:`plain_view`.

    Sides of the cut are drawn as by torchvision's RandomResizedCrop (area from 0.5, aspect 3/4 to 4/3); brightness,
    contrast and saturation are scaled by 0.6 to 1.4.
    """
    x0, y0, x1, y1 = _inner(shown.transform)
    width, height = x1 - x0, y1 - y0
    area, aspect = rng.uniform(_CROP, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = min(width, max(1, round(width * math.sqrt(area * aspect))))
    h = min(height, max(1, round(height * math.sqrt(area / aspect))))
    left, top = x0 + rng.randint(0, width - w), y0 + rng.randint(0, height - h)
    cut = (left, top, left + w, top + h)
    way = BoxTransform.crop(shown.transform.target, cut).then(_stretch(cut, shown))
    if rng.random() < 0.5:
        way = way.then(BoxTransform.flip(way.target))
    brightness, contrast, saturation = (rng.uniform(*_COLOUR) for _ in range(3))
    pixels = way.pixels(shown.pixels).float() * brightness
    pixels = pixels.mean() + contrast * (pixels - pixels.mean())
    grey = pixels.mean(0, keepdim=True)
    return (grey + saturation * (pixels - grey)).clamp(0, 255).round().to(torch.uint8)


def _inner(transform: BoxTransform) -> tuple[int, int, int, int]:
    """Of a letterboxed frame the window that shows the image, in whole pixels."""
    height, width = transform.target
    (sx, sy), (ox, oy) = transform.scale, transform.offset
    x0, y0 = round(ox * width), round(oy * height)
    return x0, y0, x0 + round(sx * width), y0 + round(sy * height)


def _stretch(window: tuple[int, int, int, int], shown: Shown) -> BoxTransform:
    return BoxTransform.resize((window[3] - window[1], window[2] - window[0]), shown.transform.target)
