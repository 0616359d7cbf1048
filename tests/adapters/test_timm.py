import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from timm.layers import AttentionPoolLatent  # noqa: E402

from granvit import geometry, ops  # noqa: E402
from granvit.adapters.timm import RegionEncoder  # noqa: E402
from granvit.nn import RegionAttentionPool  # noqa: E402
from tests.adapters.support import (  # noqa: E402
    FULL,
    assert_crops_cover_their_boxes,
    assert_head_equal,
    assert_reads_coordinates,
    transparent,
)
from tests.support import assert_within_budget, random_boxes  # noqa: E402

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}


def small(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options}).eval()


def transparent_timm(model: nn.Module) -> nn.Module:
    prefix = [t for t in (model.cls_token, getattr(model, "reg_token", None)) if t is not None]
    return transparent(model, model.patch_embed.proj, prefix, ["norm"])


@pytest.mark.parametrize(
    ("name", "options", "patch"),
    [
        ("vit_tiny_patch16_224", {}, 16),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 16),
        ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 3, "global_pool": "avg"}, 16),
        ("vit_small_patch14_reg4_dinov2", {}, 14),
        ("vit_base_patch16_siglip_224", {}, 16),
        ("vit_small_patch16_dinov3", {}, 16),  # Eva: rotary positions
        ("deit_tiny_distilled_patch16_224", {}, 16),
        ("beit_base_patch16_224", {}, 16),
    ],
)
def test_patches_are_read_where_they_lie(name, options, patch):
    height, width = 5 * patch, 7 * patch
    model = transparent_timm(small(name, img_size=(height, width), **options))
    assert_reads_coordinates(RegionEncoder(model), height, width, patch)


def test_images_of_other_sizes_than_the_model_was_made_for():
    model = transparent_timm(small(img_size=64, dynamic_img_size=True))
    encoder = RegionEncoder(model)
    assert_reads_coordinates(encoder, 48, 112, 16)
    assert_crops_cover_their_boxes(encoder, 112, 96, 16)


def test_padded_images_keep_their_coordinates():
    model = small(img_size=64, dynamic_img_size=True, dynamic_img_pad=True)
    encoder = RegionEncoder(transparent_timm(model))
    images = torch.zeros(1, 3, 40, 56, dtype=torch.float64)
    assert encoder.grid((40, 56)) == ((3, 4), (48, 64))
    images[:, 0, :, 32:48] = 1.0  # the third column of patches
    box = torch.tensor([[32 / 56, 0.0, 48 / 56, 32 / 40]], dtype=torch.float64)
    align = encoder.region_features(images, box, torch.tensor([0]), (2, 1), sampling_ratio=1)
    torch.testing.assert_close(align[0, :, 0], torch.ones(2, dtype=torch.float64))
    tokens, grid = encoder.crop_features(images, box, torch.tensor([0]))
    assert grid == (3, 4)
    torch.testing.assert_close(tokens[..., 0], torch.ones(1, 12, dtype=torch.float64))


HEADS = {
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "class and register tokens": ("vit_tiny_patch16_224", {"global_pool": "map", "reg_tokens": 2}),
    "norm after the pool": ("vit_base_patch16_siglip_224", {"fc_norm": True}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_region_pool_is_the_models_own_head(kind):
    name, options = HEADS[kind]
    model = small(name, img_size=(64, 128), **options)
    assert_head_equal(RegionEncoder, model, head_on, lambda: torch.randn(8, 3, 64, 128))


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"latent_len": 3, "pool_type": "token"},
        {"latent_len": 3, "pool_type": "avg", "qkv_bias": False},
        {"latent_dim": 24, "out_features": 40, "norm_layer": nn.LayerNorm},
        {"q_proj": False},
        {"out_features": 0},
    ],
    ids=str,
)
def test_region_pool_follows_every_attention_pool_latent(options):
    model = small("vit_base_patch16_siglip_224", img_size=64)
    model.attn_pool = AttentionPoolLatent(48, num_heads=3, **options)
    assert_head_equal(RegionEncoder, model, head_on, lambda: torch.randn(8, 3, 64, 64))


def test_a_head_with_positions_sees_them():
    model = small("vit_base_patch16_siglip_224", img_size=64)
    model.attn_pool = AttentionPoolLatent(48, num_heads=3, pos_embed="abs", feat_size=16)
    images = torch.randn(2, 3, 64, 64)
    ours = RegionEncoder(model).region_pool(images, FULL.repeat(2, 1), torch.arange(2))
    torch.testing.assert_close(ours, model(images), rtol=1e-5, atol=1e-6)


def head_on(model: nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """The model's pre-logits from patch tokens, with prefix tokens that the head has to leave out."""
    prefix = torch.full((len(patches), model.num_prefix_tokens, patches.shape[-1]), 1e4, dtype=patches.dtype)
    return model.forward_head(torch.cat([prefix, patches], dim=1), pre_logits=True)


def test_the_box_of_the_image_is_what_the_model_returns():
    model = small("vit_base_patch16_siglip_224", img_size=64)
    images = torch.randn(3, 3, 64, 64)
    index = torch.tensor([2, 0, 1])
    ours = RegionEncoder(model).region_pool(images, FULL.repeat(3, 1), index)
    torch.testing.assert_close(ours, model(images)[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"qk_norm": True, "norm_layer": nn.LayerNorm}, {"q_proj": False}], ids=str)
def test_region_pool_under_autocast_is_as_near_as_the_head(options):
    model = small("vit_base_patch16_siglip_224", img_size=64)
    model.attn_pool = AttentionPoolLatent(48, num_heads=3, **options)
    nn.init.normal_(model.attn_pool.latent)
    encoder = RegionEncoder(model)

    def draw():
        images = torch.randn(2, 3, 64, 64)
        tokens, _ = encoder.tokens(images)
        exact = model.forward_head(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            head = model.forward_head(tokens)
            ours = encoder.region_pool(images, FULL.repeat(2, 1), torch.arange(2), tokens=tokens)
        assert ours.dtype == head.dtype == torch.bfloat16
        yield "pooled", ours, head, exact

    assert_within_budget(draw)


def test_models_without_a_head_take_a_pool_or_say_so():
    images, boxes, index = torch.randn(2, 3, 64, 64), random_boxes(5), torch.tensor([0, 1, 1, 0, 1])
    model = small(img_size=64)
    with pytest.raises(ValueError, match=r"region_pool: VisionTransformer has no attention-pooling head.*pool="):
        RegionEncoder(model).region_pool(images, boxes, index)
    include = small("vit_tiny_patch16_224", img_size=64, global_pool="map", pool_include_prefix=True)
    with pytest.raises(ValueError, match="no attention-pooling head over its patch tokens"):
        RegionEncoder(include).region_pool(images, boxes, index)
    pool = RegionAttentionPool(48, 6, num_queries=2)
    encoder = RegionEncoder(model, pool=pool)
    pooled = encoder.region_pool(images, boxes, index)
    assert pooled.shape == (5, 2, 48)
    assert torch.equal(pooled, pool(encoder.tokens(images)[0], boxes, index, (4, 4)))
    assert any(name.startswith("pool.") for name in encoder.state_dict())


def test_wrong_models_and_images_are_one_clear_sentence():
    with pytest.raises(TypeError, match=r"timm.RegionEncoder: model: expected a timm ViT .* got Linear"):
        RegionEncoder(nn.Linear(2, 2))
    encoder = RegionEncoder(small(img_size=64))
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\), got \(3, 64, 64\)"):
        encoder.tokens(torch.zeros(3, 64, 64))
    dropping = RegionEncoder(small(img_size=64, patch_drop_rate=0.5).train())
    with pytest.raises(ValueError, match=r"expected tokens \(B, 4 \* 4, C\).*got \(2, 8, 48\)"):
        dropping.tokens(torch.randn(2, 3, 64, 64))


def test_features_and_loss_are_the_ops_on_the_tokens_and_train_the_model():
    images, boxes, index = torch.randn(2, 3, 64, 96), random_boxes(6), torch.randint(0, 2, (6,))
    model = small(img_size=(64, 96))
    encoder = RegionEncoder(model)
    tokens, grid = encoder(images)
    assert torch.equal(tokens, model.forward_features(images)[:, 1:])
    features = encoder.region_features(images, boxes, index, 3, sampling_ratio=1)
    assert torch.equal(features, ops.roi_align(tokens, boxes, index, grid, 3, sampling_ratio=1))
    teacher, size = RegionEncoder(small(img_size=(64, 96))).crop_features(images, boxes, index)
    assert size == (4, 6)
    assert not teacher.requires_grad
    loss = encoder.distill_loss(images, boxes, index, teacher, size, loss="cosine")
    torch.testing.assert_close(loss, ops.region_distill_loss(tokens, teacher, boxes, index, grid, size, loss="cosine"))
    loss.backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_known_tokens_spare_the_model():
    images, boxes, index = torch.randn(2, 3, 64, 64), random_boxes(6), torch.randint(0, 2, (6,))
    model = small("vit_base_patch16_siglip_224", img_size=64)
    encoder = RegionEncoder(model)
    tokens, _ = encoder.tokens(images)
    teacher = torch.randn(6, 4, 48)
    fresh = (
        encoder.region_features(images, boxes, index, 2),
        encoder.region_pool(images, boxes, index),
        encoder.distill_loss(images, boxes, index, teacher, 2),
    )
    model.forward_features = None  # calling it would raise
    reused = (
        encoder.region_features(images, boxes, index, 2, tokens=tokens),
        encoder.region_pool(images, boxes, index, tokens=tokens),
        encoder.distill_loss(images, boxes, index, teacher, 2, tokens=tokens),
    )
    for a, b in zip(fresh, reused, strict=True):
        assert torch.equal(a, b)


def test_crop_features_are_the_model_on_the_crops():
    images, boxes, index = torch.randn(2, 3, 64, 64), random_boxes(3), torch.tensor([1, 0, 1])
    model = small(img_size=64, dynamic_img_size=True)
    encoder = RegionEncoder(model)
    crops = geometry.crop_boxes(images, boxes, index, (32, 48))
    features, size = encoder.crop_features(images, boxes, index, (32, 48))
    assert size == (2, 3)
    torch.testing.assert_close(features, model.forward_features(crops)[:, 1:])
    whole, size = encoder.crop_features(images, FULL.repeat(2, 1), torch.arange(2))
    torch.testing.assert_close(whole, encoder.tokens(images)[0], rtol=1e-4, atol=1e-5)
    assert size == (4, 4)
