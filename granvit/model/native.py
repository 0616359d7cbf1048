"""Crops at their own size: cut out, resampled and run through a vision tower as one variable-length batch."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from granvit.errors import MissingDependencyError
from granvit.model.tower import blocks_of, convolution_of, depth, family_of
from granvit.ops import _checks

try:
    from transformers import AttentionInterface, PreTrainedModel
except ImportError as error:
    raise MissingDependencyError("granvit.model needs transformers: pip install granvit[train]") from error

_CPU = torch.device("cpu")
_ATTENTION = "granvit_packed"  # the name under which transformers knows _attend
_PACKED = ("siglip_vision_model", "clip_vision_model", "aimv2_vision_model")
# Patches are cut a few at a time: the pixels under each are gathered with a margin, and that copy has to stay small.
_CHUNK_ELEMENTS = 1 << 25


def native_grids(
    boxes: Tensor,
    image_index: Tensor,
    size: tuple[int, int],
    patch: tuple[int, int],
    *,
    max_side: int | None = None,
) -> Tensor:
    """Grid of patches for the crop of each box at the frame's own scale, rounded to whole patches.

    At least one patch and at most the frame's own grid along each axis. Made on the CPU, where the batch is put
    together, so that lengths are known without waiting for a device.

    Args:
        boxes: ``(R, 4)`` float32, on the CPU, ``x0 y0 x1 y1`` relative to the frame, 0 to 1; clamped to it.
        image_index: ``(R,)`` integer, on the CPU, the frame of each box.
        size: ``(height, width)`` of the frames in pixels.
        patch: ``(height, width)`` of the tower's patches in pixels, see :func:`granvit.model.tower.patch_of`.
        max_side: most patches along a side. A larger crop is scaled down with its aspect ratio kept.

    Returns:
        ``(R, 2)`` int64 on the CPU, rows and columns of patches.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or value.
    """
    op = "native_grids"
    boxes = _check_regions(op, boxes, image_index, None)
    patch, size = _checks.pair(op, "patch", patch), _checks.pair(op, "size", size)
    limit = (size[0] // patch[0], size[1] // patch[1])
    if min(limit) < 1:
        raise ValueError(f"{op}: size: expected at least one patch of {patch} pixels, got {size} pixels")
    if max_side is not None and max_side < 1:
        raise ValueError(f"{op}: max_side: expected at least 1 patch, got {max_side}")
    x0, y0, x1, y1 = boxes.double().clamp(0, 1).unbind(1)
    extent = torch.stack([(y1 - y0) * (size[0] / patch[0]), (x1 - x0) * (size[1] / patch[1])], dim=1)
    if max_side is not None:
        extent = extent * (max_side / extent.amax(1, keepdim=True).clamp(min=max_side))
    return (extent + 0.5).floor().long().clamp(torch.ones(2, dtype=torch.long), torch.tensor(limit))


def native_patches(pixels: Tensor, boxes: Tensor, image_index: Tensor, grids: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cuts the boxes out of frames, each resized to its own grid of patches, and returns the patches.

    Each crop is that of :func:`granvit.geometry.crop_boxes` at ``grids * patch`` pixels: antialiased where it shrinks,
    pixels covered in part counted in part, a box without extent along an axis showing the one pixel at its centre. All
    patches of all crops are gathered together, each with the pixels that its filter reaches, and resampled by two
    small matrix products; nothing loops over regions and nothing waits for the device.

    Args:
        pixels: ``(F, C, H, W)`` floating, on any device, normalised as the tower wants them.
        boxes: ``(R, 4)`` float32, on the CPU as :func:`native_grids` takes them: how far a filter reaches decides
            shapes.
        image_index: ``(R,)`` integer, on the CPU, the frame of each box.
        grids: ``(R, 2)`` integer, on the CPU, patches of each crop; of :func:`native_grids` or any others.
        patch: ``(height, width)`` in pixels.

    Returns:
        ``(sum of h*w, C * patch height * patch width)`` in the dtype of `pixels`: region after region, patches
        row-major, each in the order of a convolution's weight. Differentiable in `pixels`.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or value.
    """
    op = "native_patches"
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(
            f"{op}: pixels: expected floating (F, C, H, W), got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    patch = _checks.pair(op, "patch", patch)
    boxes = _check_regions(op, boxes, image_index, pixels.shape[0])
    _check_grids(op, grids, boxes.shape[0])
    compute = torch.promote_types(pixels.dtype, torch.float32)
    size = (pixels.shape[2], pixels.shape[3])
    edges = boxes.to(compute).clamp(0, 1)
    axes = [_axis(edges[:, 1 - a], edges[:, 3 - a], size[a], grids[:, a] * patch[a]) for a in (0, 1)]  # y, then x
    # Nearly all crops keep their scale and share one window; those that shrink much have windows of their own, of few
    # sizes, so that they do not widen everybody's.
    usual = math.ceil(_reach(1.5, max(patch)))
    steps = torch.stack([axis[:, 2] for axis in axes]).amax(0)
    doublings = (_reach(steps.double(), max(patch)) / usual).log2().ceil().clamp(min=0).long()
    counts = grids.prod(1)
    places = counts.cumsum(0) - counts
    out = pixels.new_empty(int(counts.sum()), pixels.shape[1] * patch[0] * patch[1])
    channel = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
    for doubling in doublings.unique().tolist():
        chosen = (doublings == doubling).nonzero()[:, 0]
        own = counts[chosen].cumsum(0) - counts[chosen]
        table = _move(torch.stack([image_index[chosen].long(), places[chosen] - own], 1), pixels.device)
        y_axis, x_axis = (_move(axis[chosen], pixels.device) for axis in axes)
        cells = _cells(grids[chosen], pixels.device)
        place = torch.arange(len(cells[0]), device=pixels.device) + table[cells[0], 1]
        spans = (min(usual << doubling, size[0]), min(usual << doubling, size[1]))
        chunk = max(1, _CHUNK_ELEMENTS // (pixels.shape[1] * spans[0] * spans[1]))
        for part in zip(*(x.split(chunk) for x in (*cells, place)), strict=True):
            region, row, column, target = part
            y, rows = _weights(y_axis[region], row, patch[0], spans[0], size[0])
            x, columns = _weights(x_axis[region], column, patch[1], spans[1], size[1])
            frame = table[region, 0, None, None, None]
            under = pixels[frame, channel, y[:, None, :, None], x[:, None, None, :]].to(compute)  # [t, C, S, S]
            with torch.autocast(pixels.device.type, enabled=False):
                cut = torch.einsum("tps,tcsx->tcpx", rows, under)
                cut = torch.einsum("tqx,tcpx->tcpq", columns, cut)
            out[target] = cut.flatten(1).to(out.dtype)
    return out


def packed_tokens(tower: PreTrainedModel, patches: Tensor, grids: Tensor, layer: int = -1) -> Tensor:
    """Patch tokens of crops of any sizes, run as one sequence in which each crop attends to itself only.

    What :func:`granvit.model.tower.vision_tokens` returns for each crop alone at its own size, up to rounding: the
    patch embedding as a matrix product, the position embedding interpolated for each crop as the model's own method
    does it, and the tower's own blocks with their attention confined. Meant for a teacher: under ``torch.no_grad`` and
    autocast. Gradients work too, without gradient checkpointing, and so do blocks compiled one by one.

    Attention in bfloat16 and float16 on CUDA is ``torch.nn.attention.varlen.varlen_attn``, which every torch that
    granvit supports has; FlexAttention would need compiling, once more for every new number of tokens. Elsewhere, and
    for float32, which the former does not take, it is scaled_dot_product_attention over all crops of one length.

    Args:
        tower: SiglipVisionModel, CLIPVisionModel or Aimv2VisionModel. While it runs here, no other thread may run it.
        patches: ``(sum of h*w, 3 * patch height * patch width)``, of :func:`native_patches`.
        grids: ``(R, 2)`` integer, on the CPU, rows and columns of patches of each crop.
        layer: as for :func:`granvit.model.tower.vision_tokens`.

    Returns:
        ``(sum of h*w, C)``, without class tokens: a packed teacher for :func:`granvit.ops.region_distill_loss` with
        ``output_size=grids``.

    Raises:
        TypeError, ValueError: a tower whose attention cannot be confined, or an argument of wrong type, shape, device
            or value; a tower in training mode with attention dropout, or with gradient checkpointing under gradients.
    """
    op = "packed_tokens"
    family = family_of(tower)
    kind = tower.config.model_type
    if kind not in _PACKED:
        raise TypeError(
            f"{op}: tower: expected SiglipVisionModel, CLIPVisionModel or Aimv2VisionModel, whose blocks can be told "
            f"where a crop ends, got {family.name}; run vision_tokens on crops of one size instead"
        )
    blocks = blocks_of(tower)[: depth(tower, layer)]
    _check_grids(op, grids, None)
    convolution = convolution_of(tower)
    expected = (int(grids.prod(1).sum()), convolution.weight[0].numel())
    if tuple(patches.shape) != expected or not patches.is_floating_point():
        raise ValueError(
            f"{op}: patches: expected floating {expected} to match grids and the tower's patches, got {patches.dtype} "
            f"of shape {tuple(patches.shape)}"
        )
    checkpointed = any(getattr(block, "gradient_checkpointing", False) and block.training for block in blocks)
    if checkpointed and torch.is_grad_enabled():
        raise ValueError(f"{op}: tower: gradient checkpointing would run its blocks again outside; use torch.no_grad()")
    hidden = F.linear(patches.to(convolution.weight.dtype), convolution.weight.flatten(1), convolution.bias)
    if kind == "aimv2_vision_model":
        hidden = tower.embeddings.rms_norm(hidden)
    hidden = hidden + _positions(tower, grids, hidden)
    if not len(grids):
        return hidden
    region = _cells(grids, hidden.device)[0]
    crops = _Crops(grids.prod(1) + family.class_tokens, hidden.device)
    kept = None
    if kind == "clip_vision_model":
        embeddings = tower.embeddings
        first = embeddings.class_embedding + embeddings.position_embedding.weight[0]
        # Token t of crop r comes after t tokens and r + 1 class tokens.
        kept = torch.arange(len(hidden), device=hidden.device) + region + 1
        order = region.new_zeros(len(hidden) + len(grids))
        order[kept] = torch.arange(1, len(hidden) + 1, device=hidden.device)
        hidden = tower.pre_layrnorm(torch.cat([first[None], hidden])[order])
    hidden = hidden[None]
    with _confined(blocks):
        for block in blocks:
            hidden = block(hidden, attention_mask=crops)
    return hidden[0] if kept is None else hidden[0, kept]


class _Crops:
    """Where each crop begins and ends in a packed sequence; goes to the attention in the place of a mask."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.device = device
        self.bounds = _move(F.pad(lengths.cumsum(0), (1, 0)).int(), device)  # [R + 1], for varlen_attn

    @functools.cached_property
    def groups(self) -> list[Tensor]:
        """For each length, the tokens of all crops that have it: ``(crops, length)``, on the device."""
        starts = self.lengths.cumsum(0) - self.lengths
        lengths = self.lengths.unique().tolist()
        indices = (starts[self.lengths == length, None] + torch.arange(length) for length in lengths)
        return [_move(index, self.device) for index in indices]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Crops,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention inside each crop, in the form in which transformers calls it: ``(1, heads, T, dim)`` in, ``(1, T,
    heads, dim)`` out."""
    if dropout:
        raise ValueError("packed_tokens: tower: expected no attention dropout, call tower.eval() first")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, dim]
    if _varlen_takes(query, scaling):
        bounds, longest = attention_mask.bounds, attention_mask.longest
        attended = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        assert isinstance(attended, Tensor)  # no auxiliary output was asked for
        return attended[None], None
    out = torch.empty_like(query)
    for index in attention_mask.groups:
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))  # [crops, heads, length, dim]
        out[index] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return out[None], None


def _varlen_takes(query: Tensor, scaling: float) -> bool:
    """Whether varlen_attn can be used; its scale is fixed in torch 2.10."""
    dim = query.shape[-1]
    narrow = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and narrow and dim % 8 == 0 and dim <= 256 and math.isclose(scaling, dim**-0.5)


AttentionInterface.register(_ATTENTION, _attend)


@contextlib.contextmanager
def _confined(blocks: nn.ModuleList) -> Iterator[None]:
    """While it lasts, the blocks attend by :func:`_attend`: transformers reads the choice from their config."""
    configs: list[Any] = list({id(m.config): m.config for m in blocks.modules() if hasattr(m, "config")}.values())
    chosen = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for config, implementation in zip(configs, chosen, strict=True):
            config._attn_implementation = implementation


def _positions(tower: PreTrainedModel, grids: Tensor, like: Tensor) -> Tensor:
    """What the tower adds to the patches of each crop for their places, ``(T, C)``."""
    embeddings = tower.embeddings
    region, row, column = _cells(grids, like.device)
    if tower.config.model_type == "aimv2_vision_model":
        if tower.config.is_native:
            # Sines and cosines of x, then of y, in float64 as transformers computes them.
            quarter = like.shape[-1] // 4
            frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=like.device) / quarter)
            longest = int(grids.max()) if len(grids) else 0
            angle = torch.arange(longest, dtype=torch.float64, device=like.device).outer(frequency)
            sine, cosine = angle.sin().to(like.dtype), angle.cos().to(like.dtype)
            return torch.cat([sine[column], cosine[column], sine[row], cosine[row]], dim=1)
        side = tower.config.image_size // tower.config.patch_size
        if not bool((grids == side).all()):
            raise ValueError(
                f"packed_tokens: grids: this Aimv2VisionModel has a learned position for each of {side} x {side} "
                "patches and cannot interpolate them, got other grids"
            )
        return embeddings.position_embedding.weight[row * side + column]
    table = embeddings.position_embedding.weight
    if tower.config.model_type == "clip_vision_model":
        table = table[1:]  # the class token has the first
    return _interpolated(table, _move(grids, like.device)[region], row, column)


def _interpolated(table: Tensor, grid: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Bicubic interpolation of a square table ``(S * S, C)`` at cells of grids of any size, ``(T, C)``.

    The values of ``F.interpolate(mode="bicubic", align_corners=False)``: cubic convolution with a = -0.75 (Keys 1981)
    in float32, or float64 for such a table; taps beyond the edge repeat it. As a bag of 16 weighted rows for each cell
    it is one kernel for all crops and, unlike a matrix product, never rounds to TF32 or to autocast's dtype.
    """
    side = math.isqrt(len(table))
    wide = torch.promote_types(table.dtype, torch.float32)
    taps, weights = [], []
    for cell, count in ((row, grid[:, 0]), (column, grid[:, 1])):
        scale = torch.full_like(count, side, dtype=wide) / count
        place = scale * (cell + 0.5) - 0.5
        low = place.floor()
        t = (place - low)[:, None]
        far = torch.cat([t + 1, 2 - t], 1)
        near = torch.cat([t, 1 - t], 1)
        far = ((-0.75 * far + 3.75) * far - 6) * far + 3
        near = (1.25 * near - 2.25) * near * near + 1
        weights.append(torch.stack([far[:, 0], near[:, 0], near[:, 1], far[:, 1]], dim=1))
        offset = torch.arange(-1, 3, device=table.device)
        taps.append((low.long()[:, None] + offset).clamp(0, side - 1))
    index = (taps[0][:, :, None] * side + taps[1][:, None, :]).flatten(1)
    weight = (weights[0][:, :, None] * weights[1][:, None, :]).flatten(1)
    return F.embedding_bag(index, table.to(wide), mode="sum", per_sample_weights=weight).to(table.dtype)


def _cells(grids: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Region, row and column ``(T,)`` of every patch of grids ``(R, 2)`` on the CPU, made on the device."""
    counts = grids.long().prod(1)
    table = _move(torch.stack([counts, counts.cumsum(0) - counts, grids[:, 1].long()]), device)
    total = int(counts.sum())
    every = torch.arange(len(grids), device=device)
    region = torch.repeat_interleave(every, table[0], output_size=total)  # told its length, it does not wait
    place = torch.arange(total, device=device) - table[1, region]
    return region, place // table[2, region], place % table[2, region]


def _axis(start: Tensor, end: Tensor, size: int, cells: Tensor) -> Tensor:
    """Start, end and step between output pixels ``(R, 3)`` along one axis in input pixels, as crop_boxes has them."""
    start, end = start * size, end * size
    centre = ((start + end) / 2).floor().clamp(0, size - 1)
    flat = end <= start
    start, end = torch.where(flat, centre, start), torch.where(flat, centre + 1, end)
    return torch.stack([start, end, (end - start) / cells], dim=1)


def _reach(step: Any, patch: int) -> Any:
    """Input pixels, at most, that the filters of the pixels of one patch touch, with one for rounding."""
    return (patch - 1) * step + 2 * (step.clamp(min=1) if isinstance(step, Tensor) else max(step, 1)) + 3


def _weights(axis: Tensor, cell: Tensor, patch: int, span: int, size: int) -> tuple[Tensor, Tensor]:
    """The input pixels ``(t, span)`` under each patch along one axis, and their weights ``(t, patch, span)``."""
    start, end, step = (x[:, None] for x in axis.unbind(1))
    output = cell[:, None] * patch + torch.arange(patch, device=axis.device)
    t = start + step * (output + 0.5)
    radius = step.clamp(min=1)
    first = (t[:, :1] - radius - 0.5).floor().clamp(0, size - span)
    pixel = first + torch.arange(span, device=axis.device)
    covered = (torch.minimum(end, pixel + 1) - torch.maximum(start, pixel)).clamp(0, 1)
    hat = (1 - (pixel[:, None] + 0.5 - t[:, :, None]).abs() / radius[:, :, None]).clamp(min=0)
    weights = hat * covered[:, None]
    return pixel.long(), weights / weights.sum(-1, keepdim=True)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _check_grids(op: str, grids: Tensor, regions: int | None) -> None:
    if not isinstance(grids, Tensor):
        raise _checks.wrong_type(op, "grids", "an integer tensor", grids)
    _checks.on_device(op, "grids", grids, _CPU)  # they decide shapes
    _checks.grids(op, "grids", grids, regions, "region")


def _check_regions(op: str, boxes: Tensor, image_index: Tensor, frames: int | None) -> Tensor:
    boxes, image_index = _checks.regions(op, boxes, image_index, _CPU)  # they decide shapes
    if frames is None:
        frames = int(image_index.max()) + 1 if len(image_index) else 0
    _checks.values(op, boxes, image_index, frames)
    return boxes
