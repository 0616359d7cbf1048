import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from granvit import nn as gnn
from granvit import ops
from tests.nn.support import CHANNELS, GRID, HEADS, KINDS, Harness, inputs, make
from tests.support import DEVICE_TYPES

WITH_PARAMETERS = ("RegionAttentionPool", "BoxEmbedding")


def gradients(model: nn.Module, *arguments: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(*arguments).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def call(module: nn.Module, *, dtype: torch.dtype = torch.float32, autocast: bool = False) -> Tensor:
    tokens, boxes, image_index, teacher = inputs()
    tokens, teacher = tokens.to(dtype), teacher.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if isinstance(module, gnn.RegionDistillLoss):
            return module(tokens, teacher, boxes, image_index, GRID)
        if isinstance(module, gnn.BoxEmbedding):
            return module(boxes)
        return module(tokens, boxes, image_index, GRID)


def on(device: str, kind: str) -> tuple[nn.Module, list[Tensor]]:
    return Harness(kind).to(device), [t.to(device) for t in inputs()]


def test_roi_align_is_the_op():
    tokens, boxes, image_index, _ = inputs()
    module = gnn.RoIAlign((3, 2), sampling_ratio=1)
    expected = ops.roi_align(tokens, boxes, image_index, GRID, (3, 2), sampling_ratio=1)
    assert torch.equal(module(tokens, boxes, image_index, GRID), expected)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_region_distill_loss_is_the_op(loss, reduction):
    tokens, boxes, image_index, teacher = inputs()
    module = gnn.RegionDistillLoss((3, 2), loss, reduction, sampling_ratio=3)
    expected = ops.region_distill_loss(
        tokens, teacher, boxes, image_index, GRID, (3, 2), loss=loss, reduction=reduction, sampling_ratio=3
    )
    assert torch.equal(module(tokens, teacher, boxes, image_index, GRID), expected)
    other = ops.region_distill_loss(
        tokens, teacher, boxes, image_index, GRID, (2, 3), loss=loss, reduction=reduction, sampling_ratio=3
    )
    assert torch.equal(module(tokens, teacher, boxes, image_index, GRID, (2, 3)), other)


def test_region_distill_loss_takes_weights_and_wants_a_grid():
    tokens, boxes, image_index, teacher = inputs()
    weight = torch.rand(len(boxes))
    module = gnn.RegionDistillLoss()
    with pytest.raises(ValueError, match="RegionDistillLoss: output_size: expected"):
        module(tokens, teacher, boxes, image_index, GRID)
    per_region = gnn.RegionDistillLoss(reduction="none")(tokens, teacher, boxes, image_index, GRID, (2, 3))
    weighted = module(tokens, teacher, boxes, image_index, GRID, (2, 3), weight=weight)
    torch.testing.assert_close(weighted, (weight * per_region).sum() / weight.sum())


def test_region_attention_pool_is_multi_head_attention_over_the_covered_tokens():
    """torch.nn.MultiheadAttention with the same weights, on the tokens of a box that ends on cell borders."""
    tokens = inputs()[0].double()
    module = make("RegionAttentionPool", dtype=torch.float64)
    peer = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, dtype=torch.float64)
    projections = [module.q_proj, module.k_proj, module.v_proj]
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
        peer.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        peer.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        peer.out_proj.load_state_dict(module.out_proj.state_dict())
    height, width = GRID
    boxes = torch.tensor([[0, 0, 1, 1], [1 / width, 1 / height, 4 / width, 3 / height]], dtype=torch.float64)
    image_index = torch.tensor([2, 1])
    covered = [tokens[2:3], tokens[1:2].unflatten(1, GRID)[:, 1:3, 1:4].flatten(1, 2)]
    expected = torch.cat([peer(module.query[None], x, x, need_weights=False)[0] for x in covered])
    torch.testing.assert_close(module(tokens, boxes, image_index, GRID), expected, rtol=1e-10, atol=1e-10)


def test_box_embedding_is_the_op_and_writes_into_a_sequence():
    _, boxes, _, _ = inputs()
    module = make("BoxEmbedding")
    weights = [module.frequencies, module.w1, module.b1, module.w2, module.b2]
    embedding = module(boxes)
    assert torch.equal(embedding, ops.box_embedding(boxes, *weights))
    sequence = torch.randn(40, CHANNELS)
    index = torch.randperm(40)[: len(boxes)]
    before = sequence.clone()
    torch.testing.assert_close(module(boxes, out=sequence, index=index), sequence.index_copy(0, index, embedding))
    assert torch.equal(sequence, before)
    with torch.no_grad():
        written = module(boxes, out=sequence, index=index, inplace=True)
    assert written is sequence
    torch.testing.assert_close(sequence, before.index_copy(0, index, embedding))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("RoIAlign", []),
        ("RegionDistillLoss", []),
        (
            "RegionAttentionPool",
            [
                "query",
                *(f"{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")),
                "out_proj.weight",
                "out_proj.bias",
            ],
        ),
        ("BoxEmbedding", ["w1", "b1", "w2", "b2", "frequencies"]),
    ],
)
def test_state_dict_names_are_stable_and_round_trip(kind, names):
    first, second = make(kind), make(kind)
    assert list(first.state_dict()) == names
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file), strict=True)
    seed = torch.random.get_rng_state()
    a = call(first)
    torch.random.set_rng_state(seed)
    assert torch.equal(call(second), a)


def test_learnable_frequencies_are_a_parameter_of_the_same_name():
    _, boxes, _, _ = inputs()
    fixed, learnable = make("BoxEmbedding"), make("BoxEmbedding", learnable=True)
    assert "frequencies" not in dict(fixed.named_parameters())
    assert set(fixed.state_dict()) == set(learnable.state_dict())
    learnable.load_state_dict(fixed.state_dict())
    assert torch.equal(learnable(boxes), fixed(boxes))
    learnable(boxes).square().mean().backward()
    assert learnable.frequencies.grad.abs().sum() > 0


@pytest.mark.parametrize("learnable", [False, True])
def test_frequencies_stay_float32_in_a_narrow_module(learnable):
    module = make("BoxEmbedding", learnable=learnable)
    before = module.frequencies.detach().clone()
    module.frequencies.grad = torch.ones_like(before)
    module.to(torch.bfloat16)
    assert module.w1.dtype == torch.bfloat16
    assert torch.equal(module.frequencies, before)
    assert module.frequencies.grad.dtype == torch.float32
    assert call(module).dtype == torch.bfloat16
    assert module.double().frequencies.dtype == torch.float64
    assert make("BoxEmbedding", dtype=torch.bfloat16).frequencies.dtype == torch.float32


@pytest.mark.parametrize("kind", WITH_PARAMETERS)
def test_factory_arguments_and_reset_parameters(kind):
    assert all(p.dtype == torch.float64 for p in make(kind, dtype=torch.float64).parameters())
    module = make(kind, device="meta")
    assert all(t.is_meta for t in module.state_dict().values())
    module.to_empty(device="cpu")
    for t in module.state_dict().values():
        t.fill_(float("nan"))
    module.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert call(module).isfinite().all()


def test_reset_parameters_gives_the_documented_scale():
    module = gnn.BoxEmbedding(8, num_frequencies=4096, scale=5.0)
    assert module.frequencies.std() == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_give_the_same_values(kind):
    module = make(kind)
    seed = torch.random.get_rng_state()
    expected = call(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.random.set_rng_state(seed)
        assert torch.equal(call(twin), expected)
        assert not {t.data_ptr() for t in twin.state_dict().values()} & {
            t.data_ptr() for t in module.state_dict().values()
        }


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("RoIAlign", "RoIAlign(output_size=(2, 3), sampling_ratio=2)"),
        (
            "RegionDistillLoss",
            "RegionDistillLoss(output_size=(2, 3), loss='mse', reduction='mean', sampling_ratio=2)",
        ),
        ("RegionAttentionPool", "embed_dim=16, num_heads=2, num_queries=2"),
        (
            "BoxEmbedding",
            "BoxEmbedding(embed_dim=16, num_frequencies=8, hidden_dim=24, scale=1, learnable=False)",
        ),
    ],
)
def test_repr_shows_the_settings(kind, text):
    assert text in repr(make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_impl_is_passed_on(kind):
    module = make(kind, impl="reference")
    seed = torch.random.get_rng_state()
    torch.random.set_rng_state(seed)
    a = call(module)
    module.impl = None
    torch.random.set_rng_state(seed)
    torch.testing.assert_close(call(module), a, rtol=1e-5, atol=1e-5)
    module.impl = "nonsense"
    with pytest.raises(ValueError, match="impl: expected one of"):
        call(module)


@pytest.mark.parametrize(
    ("make_it", "text"),
    [
        (lambda: gnn.RegionAttentionPool(16, 3), "num_heads: expected a divisor of embed_dim=16, got 3"),
        (lambda: gnn.RegionAttentionPool(16, 0), "num_heads: expected at least 1, got 0"),
        (lambda: gnn.BoxEmbedding(16, 0), "num_frequencies: expected at least 1, got 0"),
        (lambda: gnn.BoxEmbedding(16, scale=0.0), "scale: expected a positive number, got 0.0"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(make_it, text):
    with pytest.raises(ValueError, match=text):
        make_it()


@pytest.mark.parametrize("device", DEVICE_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_bfloat16_stay_near_float32(kind, device):
    """Under autocast tokens come out of bfloat16 layers; the loss and boxes stay float32."""
    torch.manual_seed(3)
    model, arguments = on(device, kind)
    exact = gradients(model, *arguments)
    model.zero_grad()
    teacher = arguments[3].to(torch.bfloat16) if kind == "RegionDistillLoss" else arguments[3]
    with torch.autocast(device, torch.bfloat16):
        loss = model(*arguments[:3], teacher)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        scale = exact[name].abs().max().item()
        # k_proj's bias moves all scores of a softmax alike: its exact gradient is zero, and only rounding is left.
        torch.testing.assert_close(p.grad, exact[name], rtol=0.05, atol=0.05 * scale + 1e-3)


def test_box_embedding_writes_into_a_narrow_sequence_under_autocast():
    _, boxes, _, _ = inputs()
    module = make("BoxEmbedding")
    sequence = torch.randn(40, CHANNELS).to(torch.bfloat16)
    index = torch.arange(len(boxes))
    with torch.autocast("cpu", torch.bfloat16):
        written = module(boxes, out=sequence, index=index)
        assert make("BoxEmbedding", dtype=torch.float64)(boxes).dtype == torch.float64
    assert written.dtype == torch.bfloat16
    torch.testing.assert_close(written[: len(boxes)].float(), module(boxes), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_no_regions_give_empty_output_and_zero_gradients(kind):
    model = make(kind)
    tokens, boxes, image_index, teacher = inputs()
    tokens.requires_grad_()
    if kind == "RegionDistillLoss":
        out = model(tokens, teacher[:0], boxes[:0], image_index[:0], GRID)
        assert out == 0
    elif kind == "BoxEmbedding":
        out = model(boxes[:0])
        assert out.shape == (0, CHANNELS)
    else:
        out = model(tokens, boxes[:0], image_index[:0], GRID)
        assert out.shape == ((0, 6, CHANNELS) if kind == "RoIAlign" else (0, 2, CHANNELS))
    out.sum().backward()
    leaves = [*model.parameters()] if kind == "BoxEmbedding" else [tokens, *model.parameters()]
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("device", DEVICE_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(kind, device):
    model, arguments = on(device, kind)
    expected = gradients(model, *arguments)
    model.zero_grad()
    checkpoint(model, *arguments, use_reentrant=False).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("device", DEVICE_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph_forward_and_backward(kind, device):
    torch._dynamo.reset()
    model, arguments = on(device, kind)
    expected = gradients(model, *arguments)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    model.zero_grad()
    compiled(*arguments).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    fewer = [t.to(device) for t in inputs(per_image=2)]
    torch.testing.assert_close(compiled(*fewer), model(*fewer), rtol=1e-5, atol=1e-6)
