"""Native-resolution crops: each equal to the crop, and to the tower's tokens, of its region alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granvit import geometry
from granvit.model import native
from granvit.model.native import native_grids, native_patches, packed_tokens
from granvit.model.tower import vision_tokens
from granvit.ops import region_distill_loss
from tests.model.test_tower import small
from tests.support import DEVICE_TYPES, Comparison, assert_within_budget, awkward_boxes, random_boxes

PACKED = ["siglip", "clip", "aimv2_native"]
devices = pytest.mark.parametrize("device", DEVICE_TYPES)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """On GPUs, stock's patch embedding rounds float32 to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def unfold(crop: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches (h*w, C*ph*pw) of one crop (C, H, W)."""
    return F.unfold(crop[None], patch, stride=patch)[0].T


def fold(patches: Tensor, grid: list[int], patch: int, channels: int = 3) -> Tensor:
    """One crop (1, C, H, W) of its patches."""
    size = (grid[0] * patch, grid[1] * patch)
    return F.fold(patches.T[None], size, patch, stride=patch).reshape(1, channels, *size)


def random_patches(grids: Tensor, patch: int = 16) -> Tensor:
    return torch.randn(int(grids.prod(1).sum()), 3 * patch * patch)


def one_by_one(tower: nn.Module, patches: Tensor, grids: Tensor, layer: int = -1) -> Tensor:
    parts = patches.split(grids.prod(1).tolist())
    crops = (fold(part, grid, 16) for part, grid in zip(parts, grids.tolist(), strict=True))
    return torch.cat([vision_tokens(tower, crop, layer)[0] for crop in crops])


# Grids


def test_grids_are_rounded_to_whole_patches_within_one_and_the_frame():
    boxes = torch.tensor(
        [
            [0.0, 0.0, 1.0, 1.0],
            [0.25, 0.5, 0.75, 0.75],  # 64 x 32 pixels
            [0.0, 0.0, 39 / 128, 41 / 128],  # 2.44 x 2.56 patches
            [0.5, 0.5, 0.5, 0.5],
            [-0.5, -0.5, 0.5, 0.5],
            [1.1, 1.1, 1.2, 1.3],
        ]
    )
    grids = native_grids(boxes, torch.zeros(6, dtype=torch.long), (128, 128), (16, 16))
    assert grids.dtype == torch.int64
    assert grids.tolist() == [[8, 8], [2, 4], [3, 2], [1, 1], [4, 4], [1, 1]]
    # 70 pixels are 4.4 patches of 16, and the tower reads 4.
    assert native_grids(boxes[:1], torch.tensor([3]), (70, 130), (16, 8)).tolist() == [[4, 16]]
    assert native_grids(boxes[:0], torch.zeros(0, dtype=torch.long), (64, 64), (16, 16)).shape == (0, 2)


def test_max_side_scales_a_crop_down_with_its_aspect_ratio():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.25, 0.25], [0.0, 0.0, 0.05, 1.0]])
    grids = native_grids(boxes, torch.zeros(3, dtype=torch.long), (512, 512), (16, 16), max_side=12)
    assert grids.tolist() == [[6, 12], [8, 8], [12, 1]]
    many = random_boxes(200)
    limited = native_grids(many, torch.zeros(200, dtype=torch.long), (512, 480), (16, 16), max_side=5)
    assert limited.max() <= 5
    assert limited.min() >= 1


# Patches


def assert_crops_equal(device, frames, boxes, image_index, grids, patch, tolerance):
    patches = native_patches(frames.to(device), boxes, image_index, grids, patch).cpu()
    parts = patches.split(grids.prod(1).tolist())
    for r, part in enumerate(parts):
        size = (int(grids[r, 0]) * patch[0], int(grids[r, 1]) * patch[1])
        crop = geometry.crop_boxes(frames, boxes[r : r + 1], image_index[r : r + 1], size)[0]
        torch.testing.assert_close(part, unfold(crop, patch), rtol=0, atol=tolerance)


@devices
@pytest.mark.parametrize(
    ("size", "patch"), [((96, 80), (16, 16)), ((70, 101), (14, 14)), ((40, 64), (8, 16)), ((9, 7), (3, 2))]
)
@pytest.mark.parametrize("max_side", [None, 2])
def test_each_crop_is_that_of_crop_boxes(size, patch, max_side, device):
    frames = torch.randn(3, 3, *size)
    boxes, image_index = awkward_boxes(30), torch.randint(0, 3, (30,))
    grids = native_grids(boxes, image_index, size, patch, max_side=max_side)
    assert_crops_equal(device, frames, boxes, image_index, grids, patch, 2e-5)
    assert_crops_equal(device, frames.double(), boxes.double(), image_index, grids, patch, 1e-12)


def test_any_grids_will_do_also_such_that_shrink_or_magnify_much():
    frames = torch.randn(2, 3, 200, 150)
    boxes, image_index = awkward_boxes(40), torch.randint(0, 2, (40,))
    grids = torch.randint(1, 4, (40, 2))
    assert_crops_equal("cpu", frames, boxes, image_index, grids, (5, 5), 2e-5)
    assert_crops_equal("cpu", frames[:, :1], boxes, image_index, grids.int(), (1, 1), 2e-5)
    assert_crops_equal("cpu", frames[..., :2, :3], boxes, image_index, grids, (5, 5), 2e-5)


@devices
def test_boxes_on_whole_pixels_are_torchs_own_resized_cuts(device):
    frames = torch.randn(2, 3, 90, 120)
    cuts = [(3, 5, 40, 70), (0, 0, 120, 90), (50, 20, 75, 30), (7, 7, 23, 23), (100, 80, 101, 81)]  # x0 y0 x1 y1
    boxes = torch.tensor(cuts) / torch.tensor([120, 90, 120, 90])
    image_index = torch.tensor([0, 1, 1, 0, 1])
    for max_side in (None, 2):
        grids = native_grids(boxes, image_index, (90, 120), (16, 16), max_side=max_side)
        patches = native_patches(frames.to(device), boxes, image_index, grids, (16, 16)).cpu()
        parts = patches.split(grids.prod(1).tolist())
        for (x0, y0, x1, y1), f, grid, part in zip(cuts, image_index, grids.tolist(), parts, strict=True):
            cut = frames[f, :, y0:y1, x0:x1]
            size = [16 * side for side in grid]
            expected = F.interpolate(cut[None], size, mode="bilinear", antialias=True)[0]
            torch.testing.assert_close(part, unfold(expected, (16, 16)), rtol=0, atol=5e-5)


def test_patches_come_in_chunks_in_any_dtype_also_none(monkeypatch):
    frames = torch.randn(2, 3, 64, 64)
    boxes, image_index = awkward_boxes(12), torch.randint(0, 2, (12,))
    grids = native_grids(boxes, image_index, (64, 64), (16, 16), max_side=2)
    whole = native_patches(frames, boxes, image_index, grids, (16, 16))
    monkeypatch.setattr(native, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(native_patches(frames, boxes, image_index, grids, (16, 16)), whole)
    with torch.autocast("cpu", torch.bfloat16):  # pixels are cut as they are
        torch.testing.assert_close(native_patches(frames, boxes, image_index, grids, (16, 16)), whole)
    narrow = native_patches(frames.bfloat16(), boxes, image_index, grids, (16, 16))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), whole, rtol=0.02, atol=0.02)
    none = native_patches(frames, boxes[:0], image_index[:0], grids[:0], (16, 16))
    assert none.shape == (0, 768)


def test_patches_are_differentiable_in_the_pixels():
    frames = torch.randn(2, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    boxes, image_index = awkward_boxes(10), torch.randint(0, 2, (10,))
    grids = native_grids(boxes, image_index, (9, 8), (2, 2), max_side=2)
    assert torch.autograd.gradcheck(lambda x: native_patches(x, boxes, image_index, grids, (2, 2)), frames)


# Tokens


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_positions_are_the_models_own_for_every_grid(kind):
    tower = small(kind, image_size=112)
    grids = torch.cartesian_prod(torch.arange(1, 12), torch.arange(1, 12))
    ours = native._positions(tower, grids, torch.zeros(1, 48)).split(grids.prod(1).tolist())
    classes = 1 if kind == "clip" else 0
    for grid, positions in zip(grids.tolist(), ours, strict=True):
        like = torch.zeros(1, grid[0] * grid[1] + classes, 48)
        theirs = tower.embeddings.interpolate_pos_encoding(like, grid[0] * 16, grid[1] * 16)[0, classes:]
        torch.testing.assert_close(positions, theirs, rtol=0, atol=2e-6)
    assert torch.equal(ours[6 * 11 + 6], tower.embeddings.position_embedding.weight[classes:])  # the configured grid


@devices
@pytest.mark.parametrize("kind", PACKED)
def test_each_crop_has_the_tokens_it_has_alone(kind, device):
    tower = small(kind).double().to(device)
    grids = torch.tensor([[4, 4], [1, 1], [2, 5], [5, 2], [1, 7], [3, 3], [2, 2], [1, 4], [6, 5]])
    patches = random_patches(grids).double().to(device)
    implementation = tower.config._attn_implementation
    near = 1e-5 if kind == "aimv2_native" else 1e-10  # its norms compute in float32 whatever the weights are
    with torch.no_grad():
        for layer in (-1, -2, 0, 1):
            ours = packed_tokens(tower, patches, grids, layer)
            torch.testing.assert_close(ours, one_by_one(tower, patches, grids, layer), rtol=near, atol=near)
    assert tower.config._attn_implementation == implementation


@devices
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_tokens_are_as_good_as_stocks(kind, how, device):
    tower = small(kind).to(device)
    if how == "bfloat16":
        tower = tower.bfloat16()
    exact_tower = copy.deepcopy(tower).double()

    def draw() -> Iterator[Comparison]:
        grids = torch.randint(1, 6, (7, 2))
        patches = random_patches(grids).to(device)
        if how == "bfloat16":
            patches = patches.bfloat16()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
            ours = packed_tokens(tower, patches, grids)
            stock = one_by_one(tower, patches, grids)
        assert ours.dtype == stock.dtype
        with torch.no_grad():
            exact = one_by_one(exact_tower, patches.double(), grids)
        yield kind, ours, stock, exact

    assert_within_budget(draw)


def test_varlen_attention_is_told_where_crops_end(monkeypatch):
    """The path of a GPU, with varlen_attn replaced by its definition."""
    calls = []

    def definition(query, key, value, starts, other_starts, longest, other_longest):
        assert starts is other_starts
        assert starts.dtype == torch.int32
        assert longest == other_longest == int(starts.diff().max())
        calls.append(starts.tolist())
        parts = zip(*(x.split(starts.diff().tolist()) for x in (query, key, value)), strict=True)
        one = (F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)) for part in parts)
        return torch.cat([x.transpose(0, 1) for x in one])

    monkeypatch.setattr(native, "_varlen_takes", lambda query, scaling: True)
    monkeypatch.setattr(native, "varlen_attn", definition)
    grids = torch.tensor([[2, 3], [1, 1], [3, 2]])
    for kind, bounds in (("siglip", [0, 6, 7, 13]), ("clip", [0, 7, 9, 16])):
        tower, patches = small(kind), random_patches(grids)
        calls.clear()
        ours = packed_tokens(tower, patches, grids)
        assert calls == [bounds] * 3  # one a block
        torch.testing.assert_close(ours, one_by_one(tower, patches, grids), rtol=1e-4, atol=1e-4)


def test_varlen_attention_is_used_where_it_can_be():
    class OnGpu:
        is_cuda = True

        def __init__(self, dtype: torch.dtype, dim: int) -> None:
            self.dtype, self.shape = dtype, (5, 2, dim)

    assert native._varlen_takes(OnGpu(torch.bfloat16, 72), 72**-0.5)
    assert not native._varlen_takes(OnGpu(torch.float32, 64), 64**-0.5)
    assert not native._varlen_takes(OnGpu(torch.float16, 20), 20**-0.5)
    assert not native._varlen_takes(OnGpu(torch.float16, 64), 1.0)
    assert not native._varlen_takes(torch.zeros(5, 2, 64, dtype=torch.bfloat16), 64**-0.5)


@pytest.mark.parametrize("kind", PACKED)
def test_gradients_are_those_of_each_crop_alone(kind):
    tower = small(kind)
    grids = torch.tensor([[2, 3], [4, 4], [1, 1]])
    patches = random_patches(grids)
    twin = copy.deepcopy(tower)
    packed_tokens(tower, patches, grids).square().sum().backward()
    one_by_one(twin, patches, grids).square().sum().backward()
    for (name, p), q in zip(tower.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_compiled_blocks():
    tower = small("siglip", num_hidden_layers=2)
    batches = [torch.tensor(grids) for grids in ([[2, 3], [4, 4]], [[5, 3], [1, 1], [2, 2]], [[3, 3]])]
    patches = [random_patches(grids) for grids in batches]
    expected = [packed_tokens(tower, p, grids) for p, grids in zip(patches, batches, strict=True)]
    pixels = torch.randn(1, 3, 64, 64)
    alone = vision_tokens(tower, pixels)
    torch._dynamo.reset()
    for block in tower.encoder.layers:
        block.compile(backend="eager")
    for p, grids, tokens in zip(patches, batches, expected, strict=True):
        torch.testing.assert_close(packed_tokens(tower, p, grids), tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vision_tokens(tower, pixels), alone)  # by the tower's own attention again


def test_no_crops():
    for kind in PACKED:
        none = packed_tokens(small(kind), torch.zeros(0, 768), torch.zeros(0, 2, dtype=torch.long))
        assert none.shape == (0, 48)


def test_an_aimv2_table_serves_its_own_grid_only():
    tower, grids = small("aimv2"), torch.tensor([[4, 4], [4, 4]])
    patches = random_patches(grids)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_tokens(tower, patches, grids), one_by_one(tower, patches, grids), rtol=1e-4, atol=1e-4
        )
    other = torch.tensor([[4, 4], [2, 8]])
    with pytest.raises(ValueError, match="learned position for each of 4 x 4 patches and cannot interpolate"):
        packed_tokens(tower, patches, other)


@devices
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_distillation_step_from_native_crops(kind, device):
    student = small(kind, image_size=128).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    frames = torch.randn(2, 3, 128, 128)
    boxes, image_index = awkward_boxes(12), torch.randint(0, 2, (12,))
    grids = native_grids(boxes, image_index, (128, 128), (16, 16), max_side=6)
    with torch.no_grad():
        patches = native_patches(frames.to(device), boxes, image_index, grids, (16, 16))
        features = packed_tokens(teacher, patches, grids)
    tokens = vision_tokens(student, frames.to(device))
    place = (boxes.to(device), image_index.to(device), (8, 8))
    loss = region_distill_loss(tokens, features, *place, output_size=grids)
    loss.backward()
    assert student.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    # The plain way: each crop cut, run and compared alone.
    terms, sizes = [], []
    for r, grid in enumerate(grids.tolist()):
        crop = geometry.crop_boxes(frames, boxes[r : r + 1], image_index[r : r + 1], [16 * side for side in grid])
        with torch.no_grad():
            alone = vision_tokens(teacher, crop.to(device))
        one = (boxes[r : r + 1].to(device), image_index[r : r + 1].to(device), (8, 8))
        terms.append(region_distill_loss(tokens, alone, *one, output_size=tuple(grid), impl="reference"))
        sizes.append(grid[0] * grid[1])
    weights = torch.tensor(sizes, device=device) / sum(sizes)
    torch.testing.assert_close(loss, (torch.stack(terms) * weights).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PACKED)
def test_nothing_waits_for_the_device(kind, monkeypatch):
    """Tensors on the meta device have no values, so whatever would look at one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none on meta
    tower = small(kind).to("meta")
    boxes, image_index = awkward_boxes(12), torch.randint(0, 2, (12,))
    for max_side in (None, 2):
        grids = native_grids(boxes, image_index, (192, 64), (16, 16), max_side=max_side)
        patches = native_patches(torch.zeros(2, 3, 192, 64, device="meta"), boxes, image_index, grids, (16, 16))
        assert patches.shape == (int(grids.prod(1).sum()), 768)
        assert packed_tokens(tower, patches, grids).shape == (len(patches), 48)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", PACKED)
def test_nothing_waits_for_a_gpu(kind):
    tower, frames = small(kind).cuda(), torch.randn(2, 3, 192, 64, device="cuda")
    boxes, image_index = awkward_boxes(12), torch.randint(0, 2, (12,))
    grids = native_grids(boxes, image_index, (192, 64), (16, 16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            packed_tokens(tower, native_patches(frames, boxes, image_index, grids, (16, 16)), grids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Wrong inputs


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"boxes": torch.zeros(2, 5)}, ValueError, r"boxes: expected shape \(R, 4\)"),
        ({"boxes": torch.zeros(2, 4, device="meta")}, ValueError, "boxes: expected a tensor on cpu"),
        (
            {"boxes": torch.tensor([[0.0, 0, 1, 1], [10, 10, 200, 200]])},
            ValueError,
            "boxes: .* relative to the image.* in row 1",
        ),
        ({"boxes": torch.tensor([[0.6, 0, 0.5, 1], [0, 0, 1, 1]])}, ValueError, "boxes: .* x0 <= x1.* in row 0"),
        ({"image_index": torch.zeros(3, dtype=torch.long)}, ValueError, r"image_index: expected shape \(2,\)"),
        ({"image_index": torch.zeros(2)}, TypeError, "image_index: expected an integer tensor"),
        ({"image_index": torch.tensor([0, -1])}, ValueError, "image_index: expected values in .*, got -1 in row 1"),
        ({"patch": (0, 16)}, ValueError, "patch: expected height and width of at least 1"),
    ],
)
def test_wrong_regions_are_one_clear_sentence(change, error, text):
    given = {
        "boxes": torch.tensor([[0.0, 0, 1, 1]] * 2),
        "image_index": torch.zeros(2, dtype=torch.long),
        "patch": (16, 16),
        **change,
    }
    with pytest.raises(error, match=f"native_grids: {text}"):
        native_grids(given["boxes"], given["image_index"], (64, 64), given["patch"])
    with pytest.raises(error, match=f"native_patches: {text}"):
        native_patches(
            torch.zeros(1, 3, 64, 64), given["boxes"], given["image_index"], torch.ones(2, 2).long(), given["patch"]
        )


def test_wrong_grids_are_one_clear_sentence():
    frames, boxes, index = torch.zeros(1, 3, 64, 64), torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"native_grids: size: expected at least one patch of \(16, 16\) pixels"):
        native_grids(boxes, index, (64, 12), (16, 16))
    with pytest.raises(ValueError, match="native_grids: max_side: expected at least 1 patch, got 0"):
        native_grids(boxes, index, (64, 64), (16, 16), max_side=0)
    with pytest.raises(ValueError, match="native_patches: pixels: expected floating"):
        native_patches(frames.byte(), boxes, index, torch.ones(1, 2).long(), (16, 16))
    with pytest.raises(ValueError, match=r"image_index: expected values in \[0, 1\), got 1 in row 0"):
        native_patches(frames, boxes, index + 1, torch.ones(1, 2).long(), (16, 16))
    for grids, error, text in (
        (torch.ones(2, 2).long(), ValueError, r"expected shape \(1, 2\)"),
        (torch.ones(1, 2), TypeError, "expected an integer tensor"),
        ([[1, 1]], TypeError, "expected an integer tensor"),
        (torch.tensor([[1, 0]]), ValueError, r"expected heights and widths of at least 1, got \(1, 0\) for region 0"),
        (torch.ones(1, 2, device="meta").long(), ValueError, "expected a tensor on cpu"),
    ):
        with pytest.raises(error, match=f"native_patches: grids: {text}"):
            native_patches(frames, boxes, index, grids, (16, 16))
    tower = small("siglip")
    for patches in (torch.zeros(3, 768), torch.zeros(4, 700), torch.zeros(4, 768).byte()):
        with pytest.raises(ValueError, match=r"packed_tokens: patches: expected floating \(4, 768\) to match"):
            packed_tokens(tower, patches, torch.tensor([[2, 2]]))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers", "dinov3"])
def test_towers_that_cannot_be_told_where_a_crop_ends(kind):
    with pytest.raises(TypeError, match=r"expected SiglipVisionModel, CLIPVisionModel or Aimv2VisionModel.* got D\w+;"):
        packed_tokens(small(kind), torch.zeros(1, 768), torch.ones(1, 2).long())


def test_what_would_go_wrong_in_training_mode_is_refused():
    grids = torch.tensor([[2, 2]])
    patches = random_patches(grids)
    tower = small("siglip", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"packed_tokens: tower: expected no attention dropout, call tower.eval\(\)"):
        packed_tokens(tower, patches, grids)
    assert tower.config._attn_implementation == "sdpa"  # also after an error
    tower = small("siglip").train()
    tower.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing would run its blocks again.* torch.no_grad\(\)"):
        packed_tokens(tower, patches, grids)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_tokens(tower, patches, grids), one_by_one(tower, patches, grids), rtol=1e-4, atol=1e-4
        )
