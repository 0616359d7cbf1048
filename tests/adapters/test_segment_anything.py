import copy
import math

import pytest
import torch
from torch import Tensor, nn

from granvit.adapters.segment_anything import BoxPromptEncoder
from tests.support import assert_within_budget, random_boxes

SIZE = 1024


@pytest.fixture
def prompt_encoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "output_channels": 64,
            "num_pos_feats": 32,
            "image_size": SIZE,
            "patch_size": 64,
            "window_size": 0,
            "global_attn_indexes": [0],
            "mlp_dim": 32,
        },
        prompt_encoder_config={"hidden_size": 64, "image_size": SIZE, "patch_size": 64, "mask_input_channels": 16},
        mask_decoder_config={"hidden_size": 64, "num_hidden_layers": 1, "mlp_dim": 32, "iou_head_hidden_dim": 16},
    )
    encoder = transformers.SamModel(config).prompt_encoder
    with torch.no_grad():
        # The scale of released checkpoints, in place of this configuration's default.
        encoder.shared_embedding.positional_embedding.normal_()
        for embedding in encoder.point_embed:
            embedding.weight.normal_()
    return encoder.eval()


def stock(encoder: nn.Module, boxes: Tensor) -> Tensor:
    """SAM's own sparse embeddings, from pixel boxes."""
    sparse, _ = encoder(input_points=None, input_labels=None, input_boxes=(boxes * SIZE)[None], input_masks=None)
    return sparse[0]


def test_equals_the_prompt_encoder_of_transformers(prompt_encoder):
    module = BoxPromptEncoder(prompt_encoder)
    exact_encoder = copy.deepcopy(prompt_encoder).double()

    def draw():
        boxes = torch.cat([random_boxes(30), torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 0], [-0.1, 0.2, 0.3, 1.1]])])
        exact = stock(exact_encoder, boxes.double())
        ours = module(boxes)
        assert ours.shape == (33, 2, 64)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(BoxPromptEncoder(exact_encoder)(boxes.double()), exact, rtol=1e-11, atol=1e-11)
        yield "prompts", ours, stock(prompt_encoder, boxes), exact

    assert_within_budget(draw)


class MetaPositions(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, count))


class MetaPromptEncoder(nn.Module):
    """The attributes of Meta's PromptEncoder that hold the encoding of boxes, with a height and width that differ."""

    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.pe_layer = MetaPositions(count)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, 2 * count) for _ in range(4))
        self.input_image_size = (512, 1024)

    def corner(self, x: float, y: float, label: int) -> Tensor:
        """The formula of the paper's code for one corner, in pixels."""
        height, width = self.input_image_size
        point = torch.tensor([(x + 0.5) / width, (y + 0.5) / height], dtype=torch.float64)
        angle = 2 * math.pi * (2 * point - 1) @ self.pe_layer.positional_encoding_gaussian_matrix.double()
        return torch.cat([angle.sin(), angle.cos()]) + self.point_embeddings[label].weight[0].double()


def test_reads_metas_prompt_encoder():
    encoder = MetaPromptEncoder()
    found = BoxPromptEncoder(encoder)(torch.tensor([[0.25, 0.125, 0.75, 0.5]]))
    expected = torch.stack([encoder.corner(256, 64, 2), encoder.corner(768, 256, 3)])
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=2e-5)


def test_is_frozen_and_its_state_dict_round_trips(prompt_encoder):
    first, second = BoxPromptEncoder(prompt_encoder), BoxPromptEncoder(copy.deepcopy(prompt_encoder))
    assert not any(p.requires_grad for p in first.parameters())
    assert [n.removeprefix("embedding.") for n in first.state_dict()] == ["w1", "b1", "w2", "b2", "frequencies"]
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    second.load_state_dict(first.state_dict())
    boxes = random_boxes(4)
    assert torch.equal(first(boxes), second(boxes))
    first.requires_grad_()
    first(boxes).square().sum().backward()
    assert first.embedding.b2.grad.abs().sum() > 0


def test_other_modules_are_one_clear_sentence():
    with pytest.raises(TypeError, match=r"BoxPromptEncoder: prompt_encoder: expected .* got Linear"):
        BoxPromptEncoder(nn.Linear(2, 2))
