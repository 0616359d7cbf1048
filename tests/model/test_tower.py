"""Vision tokens: the bits that LLaVA's projector reads, without keeping what nobody reads."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import transformers
from torch import Tensor, nn

from granvit.model.tower import blocks_of, grid_of, normalise, patch_of, unused_parameters, vision_tokens
from tests.support import DEVICE_TYPES

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}
KINDS = {
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "siglip_no_head": ("SiglipVisionConfig", "SiglipVisionModel", {"vision_use_head": False}),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "dinov2_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 2}),
    "aimv2": ("Aimv2VisionConfig", "Aimv2VisionModel", {}),
    "aimv2_native": ("Aimv2VisionConfig", "Aimv2VisionModel", {"is_native": True}),
}
PREFIX = {"clip": 1, "dinov2": 1, "dinov2_registers": 4, "dinov3": 3}


def vision_config(kind: str, image_size: int = 64, patch_size: int = 16, **options: object) -> object:
    config, _, own = KINDS[kind]
    settings = {**SMALL, "image_size": image_size, "patch_size": patch_size, **own, **options}
    return getattr(transformers, config)(**settings)


def small(kind: str, image_size: int = 64, patch_size: int = 16, **options: object) -> nn.Module:
    tower = getattr(transformers, KINDS[kind][1])(vision_config(kind, image_size, patch_size, **options))
    return scattered(tower).eval()


def scattered(module: nn.Module) -> nn.Module:
    """Moves every weight, so that nothing is hidden behind zeros and ones."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def llava(kind: str, layer: int = -1, **options: object) -> nn.Module:
    """A LLaVA whose projector hands its input through, so that its image features are what the projector reads."""
    text = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    config = transformers.LlavaConfig(
        vision_config=vision_config(kind, **options),
        text_config=text,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaModel(config).eval()
    scattered(model.vision_tower)
    model.multi_modal_projector = nn.Identity()
    return model


def read_by_projector(model: nn.Module, pixels: Tensor, layer: int, kind: str, **options: object) -> Tensor:
    features = model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full",
        return_dict=True,
        **options,
    ).pooler_output
    return torch.stack(list(features))[:, PREFIX.get(kind, 0) :]


@pytest.mark.parametrize("device", DEVICE_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_llava_hands_to_its_projector(kind, device):
    model = llava(kind).to(device)
    pixels = torch.randn(2, 3, 64, 64, device=device)
    for layer in (-1, -2, 0, 1, 3, -4):
        assert torch.equal(
            vision_tokens(model.vision_tower, pixels, layer), read_by_projector(model, pixels, layer, kind)
        )
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        ours, theirs = vision_tokens(model.vision_tower, pixels), read_by_projector(model, pixels, -1, kind)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    narrow = model.to(torch.bfloat16)
    pixels = pixels.bfloat16()
    assert torch.equal(vision_tokens(narrow.vision_tower, pixels), read_by_projector(narrow, pixels, -1, kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "aimv2"])
@pytest.mark.parametrize("size", [(48, 80), (16, 33), (96, 64)])
def test_the_same_bits_at_another_size(kind, size):
    model, pixels = llava(kind), torch.randn(2, 3, *size)
    options = {"interpolate_pos_encoding": True} if kind.startswith(("siglip", "clip")) else {}
    ours = vision_tokens(model.vision_tower, pixels)
    grid = grid_of(model.vision_tower, size)
    assert grid == (size[0] // 16, size[1] // 16)
    assert ours.shape == (2, grid[0] * grid[1], 48)
    assert torch.equal(ours, read_by_projector(model, pixels, -1, kind, **options))


def test_a_patch_size_that_does_not_divide_the_image():
    model, pixels = llava("siglip", patch_size=14), torch.randn(1, 3, 64, 64)
    assert patch_of(model.vision_tower) == (14, 14)
    assert grid_of(model.vision_tower, (64, 64)) == (4, 4)
    assert torch.equal(vision_tokens(model.vision_tower, pixels), read_by_projector(model, pixels, -1, "siglip"))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_no_hidden_state_outlives_the_next_block(kind):
    model, pixels = llava(kind, num_hidden_layers=6), torch.randn(1, 3, 64, 64)
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def record(module: nn.Module, arguments: object, output: Tensor) -> None:
        nonlocal most
        made.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in made))

    for block in blocks_of(model.vision_tower):
        block.register_forward_hook(record)
    with torch.no_grad():
        tokens = vision_tokens(model.vision_tower, pixels)
        assert len(made) == 6
        assert most == 2  # a block's input and its output
        assert sum(ref() is not None for ref in made) <= 1  # what the tokens are a view of
        del tokens
        made.clear()
        vision_tokens(model.vision_tower, pixels, layer=2)
        assert len(made) == 2  # later blocks do not run
        made.clear()
        most = 0
        read_by_projector(model, pixels, -1, kind)
        assert most == 6  # what this is for


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_llavas_also_with_checkpointing(kind):
    model, pixels = llava(kind), torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(model.vision_tower).train()
    twin.gradient_checkpointing_enable()
    if kind == "dinov3":  # would move positions at random while it trains
        twin.rope_embeddings.eval()
    runs = []
    blocks_of(twin)[1].register_forward_pre_hook(lambda *_: runs.append(1))
    weight = torch.randn(48)
    tokens = vision_tokens(twin, pixels)
    (tokens * weight).square().sum().backward()
    assert len(runs) == 2  # once more in the backward pass
    theirs = read_by_projector(model, pixels, -1, kind)
    assert torch.equal(tokens, theirs)
    (theirs * weight).square().sum().backward()
    for (name, p), q in zip(twin.named_parameters(), model.vision_tower.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None or not q.grad.any()), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parameters_are_those_without_a_gradient(kind):
    for layer in (-1, -2, 1, 0):
        tower = small(kind)
        vision_tokens(tower, torch.randn(2, 3, 64, 64), layer).square().sum().backward()
        still = {n for n, p in tower.named_parameters() if p.grad is None or not p.grad.any()}
        assert unused_parameters(tower, layer) == still
    names = unused_parameters(small(kind))
    if kind == "siglip":
        assert {"post_layernorm.weight", "head.probe", "head.mlp.fc1.bias"} < names
    if kind == "siglip_no_head":
        assert names == {"post_layernorm.weight", "post_layernorm.bias"}
    if kind.startswith("dinov2"):
        assert names == {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "dinov2_registers", "dinov3", "aimv2_native"])
def test_compiles_to_one_graph(kind):
    tower, pixels = small(kind, num_hidden_layers=2), torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(vision_tokens, fullgraph=True, backend="aot_eager" if kind == "siglip" else "eager")
    tokens = compiled(tower, pixels)
    torch.testing.assert_close(tokens, vision_tokens(tower, pixels))
    tokens.square().sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is None or not p.grad.any()} == unused_parameters(tower)
    other = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tower, other), vision_tokens(tower, other))


def test_compiled_blocks():
    tower, pixels = small("siglip", num_hidden_layers=2), torch.randn(2, 3, 64, 64)
    expected = vision_tokens(tower, pixels)
    torch._dynamo.reset()
    for block in tower.encoder.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(vision_tokens(tower, pixels), expected)


def test_a_tower_compiled_as_a_whole_is_refused():
    tower, pixels = small("siglip"), torch.randn(1, 3, 64, 64)
    with pytest.raises(TypeError, match="expected one of SiglipVisionModel.* not wrapped, got OptimizedModule"):
        vision_tokens(torch.compile(tower, backend="eager"), pixels)
    tower.compile(backend="eager")
    with pytest.raises(TypeError, match=r"SiglipVisionModel.compile\(\) compiles a forward that is not called"):
        vision_tokens(tower, pixels)


def test_normalise_is_what_the_image_processor_does():
    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    mean, std = [0.48, 0.45, 0.40], [0.26, 0.25, 0.27]
    exact = (pixels.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    assert (normalise(pixels, mean, std, torch.float32) - exact).abs().max() < 1e-6
    assert torch.equal(
        normalise(pixels, mean, std, torch.bfloat16), normalise(pixels, mean, std, torch.float32).bfloat16()
    )
    torch.testing.assert_close(normalise(pixels, mean, std, torch.float64), exact, rtol=1e-6, atol=1e-6)
    processor = transformers.SiglipImageProcessor(do_resize=False, image_mean=mean, image_std=std)
    theirs = processor(list(pixels), return_tensors="pt")["pixel_values"]
    assert (normalise(pixels, mean, std, torch.float32) - theirs).abs().max() < 1e-5
    assert normalise(pixels[:0], mean, std, torch.float32).shape == (0, 3, 20, 24)


def test_other_towers_are_one_clear_sentence():
    pixels = torch.randn(1, 3, 64, 64)
    naflex = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64, num_patches=16
        )
    )
    whole = llava("siglip")
    for tower in (naflex, nn.Linear(2, 2), whole):
        with pytest.raises(TypeError, match=r"expected one of SiglipVisionModel, CLIPVisionModel, .* got \w+"):
            vision_tokens(tower, pixels)
        with pytest.raises(TypeError, match="expected one of SiglipVisionModel"):
            grid_of(tower, (64, 64))
        with pytest.raises(TypeError, match="expected one of SiglipVisionModel"):
            unused_parameters(tower)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=f"layer: expected -4 to 3 for a tower of 3 blocks, got {layer}"):
        vision_tokens(small("clip"), torch.randn(1, 3, 64, 64), layer)
    with pytest.raises(TypeError, match=r"layer: expected one integer .*, got \[-2, -1\]"):
        vision_tokens(small("clip"), torch.randn(1, 3, 64, 64), [-2, -1])


def test_wrong_inputs_are_one_clear_sentence():
    tower = small("siglip")
    with pytest.raises(ValueError, match=r"pixels: expected floating \(F, 3, H, W\), got torch.uint8"):
        vision_tokens(tower, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixels: expected floating \(F, 3, H, W\)"):
        vision_tokens(tower, torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"at least one patch of 16 x 16 pixels, got \(12, 64\)"):
        vision_tokens(tower, torch.randn(1, 3, 12, 64))
    with pytest.raises(ValueError, match="learned position for each of 4 x 4 patches and cannot interpolate"):
        vision_tokens(small("aimv2"), torch.randn(1, 3, 32, 128))
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="normalise: pixels: expected uint8"):
        normalise(image.float(), [0.5] * 3, [0.5] * 3, torch.float32)
    with pytest.raises(ValueError, match="normalise: mean: expected 3 values"):
        normalise(image, [0.5], [0.5] * 3, torch.float32)
    with pytest.raises(ValueError, match="normalise: std: expected positive values"):
        normalise(image, [0.5] * 3, [0.5, 0, 1], torch.float32)
    with pytest.raises(ValueError, match="normalise: dtype: expected a floating dtype"):
        normalise(image, [0.5] * 3, [0.5] * 3, torch.uint8)
