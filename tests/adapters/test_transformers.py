import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from granvit.adapters.transformers import RegionEncoder  # noqa: E402
from granvit.nn import RegionAttentionPool  # noqa: E402
from tests.adapters.support import (  # noqa: E402
    FULL,
    assert_crops_cover_their_boxes,
    assert_head_equal,
    assert_reads_coordinates,
    transparent,
)
from tests.support import random_boxes  # noqa: E402

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
KINDS = ("siglip", "clip", "dinov2", "dinov2_with_registers", "dinov3")
HEADLESS = KINDS[1:]


def small(kind: str, image_size: int = 64, patch_size: int = 16, **options: object) -> nn.Module:
    config, model = {
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
        "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
        "dinov2": ("Dinov2Config", "Dinov2Model"),
        "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
        "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    }[kind]
    sizes = {"image_size": image_size, "patch_size": patch_size}
    if kind == "dinov2_with_registers":
        sizes["num_register_tokens"] = 3
    if kind == "dinov3":
        sizes["num_register_tokens"] = 2
    return getattr(transformers, model)(getattr(transformers, config)(**SMALL, **sizes, **options)).eval()


def transparent_hf(model: nn.Module) -> nn.Module:
    e = model.embeddings
    names = ("class_embedding", "cls_token", "register_tokens")
    prefix = [getattr(e, name) for name in names if hasattr(e, name)]
    conv = getattr(e, "patch_embedding", None) or e.patch_embeddings
    norms = [n for n in ("pre_layrnorm", "post_layernorm", "layernorm", "norm") if hasattr(model, n)]
    return transparent(model, getattr(conv, "projection", conv), prefix, norms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["configured size", "another size"])
def test_patches_are_read_where_they_lie(kind, size):
    assert_reads_coordinates(RegionEncoder(transparent_hf(small(kind))), *size, 16)


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "dinov3"])
def test_a_patch_size_that_does_not_divide_the_image_moves_nothing(kind):
    """SigLIP-so400m reads 27 * 14 = 378 of 384 pixels; here 4 * 14 = 56 of 64."""
    encoder = RegionEncoder(transparent_hf(small(kind, patch_size=14)))
    assert encoder.grid((64, 64)) == ((4, 4), (56, 56))
    assert_reads_coordinates(encoder, 64, 64, 14)
    assert_crops_cover_their_boxes(encoder, 64, 64, 14)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_last_hidden_state_as_the_model_returns_it(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    tokens, grid = RegionEncoder(model)(images)
    assert grid == (4, 4)
    hidden = model(images).last_hidden_state
    prefix = {"siglip": 0, "clip": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3": 3}[kind]
    assert hidden.shape[1] == 16 + prefix
    assert torch.equal(tokens, hidden[:, prefix:])


def test_region_pool_is_siglips_own_head():
    def head(model: nn.Module, patches: torch.Tensor) -> torch.Tensor:
        return model.head(patches)

    assert_head_equal(RegionEncoder, small("siglip"), head, lambda: torch.randn(8, 3, 64, 64))


def test_the_box_of_the_image_is_what_siglip_returns():
    model, images = small("siglip", patch_size=14), torch.randn(3, 3, 64, 64)
    index = torch.tensor([2, 0, 1])
    ours = RegionEncoder(model).region_pool(images, FULL.repeat(3, 1), index)
    torch.testing.assert_close(ours, model(images).pooler_output[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADLESS)
def test_models_without_a_head_take_a_pool_or_say_so(kind):
    images, boxes, index = torch.randn(2, 3, 64, 64), random_boxes(5), torch.tensor([0, 1, 1, 0, 1])
    model = small(kind)
    with pytest.raises(ValueError, match=r"region_pool: .* has no attention-pooling head.*pool="):
        RegionEncoder(model).region_pool(images, boxes, index)
    pool = RegionAttentionPool(48, 6)
    encoder = RegionEncoder(model, pool=pool)
    pooled = encoder.region_pool(images, boxes, index)
    assert torch.equal(pooled, pool(encoder.tokens(images)[0], boxes, index, (4, 4)))
    pooled.square().sum().backward()
    conv = model.get_input_embeddings()
    assert all(p.grad.abs().sum() > 0 for p in conv.parameters())


def test_siglip_without_its_head_says_so():
    encoder = RegionEncoder(small("siglip", vision_use_head=False))
    with pytest.raises(ValueError, match="region_pool: SiglipVisionModel has no attention-pooling head"):
        encoder.region_pool(torch.randn(1, 3, 64, 64), FULL, torch.tensor([0]))


def test_models_with_a_text_tower_are_taken_for_their_vision_tower():
    text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    vision = {**SMALL, "image_size": 64, "patch_size": 16}
    images = torch.randn(2, 3, 64, 64)
    boxes, index = random_boxes(3), torch.tensor([0, 1, 1])
    for config, model in (
        (transformers.SiglipConfig, transformers.SiglipModel),
        (transformers.CLIPConfig, transformers.CLIPModel),
        (transformers.CLIPConfig, transformers.CLIPVisionModelWithProjection),
    ):
        settings = config(text_config={**text, "vocab_size": 50}, vision_config=vision)
        whole = model(settings.vision_config if "Projection" in model.__name__ else settings).eval()
        a = RegionEncoder(whole).region_features(images, boxes, index, 2)
        b = RegionEncoder(whole.vision_model).region_features(images, boxes, index, 2)
        assert torch.equal(a, b)


def test_distillation_from_crops_trains_the_student():
    images, boxes, index = torch.randn(2, 3, 64, 64), random_boxes(4), torch.tensor([0, 1, 1, 0])
    student, teacher = RegionEncoder(small("siglip", patch_size=14)), RegionEncoder(small("dinov2", patch_size=14))
    features, size = teacher.crop_features(images, boxes, index)
    assert features.shape == (4, 16, 48)
    student.distill_loss(images, boxes, index, features, size).backward()
    assert student.model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_other_models_are_one_clear_sentence():
    naflex = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SMALL, num_patches=16))
    with pytest.raises(TypeError, match=r"expected a vision model of type siglip_vision_model.*got siglip2"):
        RegionEncoder(naflex)
    with pytest.raises(TypeError, match=r"expected a vision model of type .* got Linear"):
        RegionEncoder(nn.Linear(2, 2))
