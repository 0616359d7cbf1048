"""What of a model looks at boxes, apart from the tower and the language model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from granvit.export.weights import ExportError
from granvit.model.granvit import GranViT
from granvit.model.tower import patch_of
from granvit.nn import BoxEmbedding, RegionAttentionPool

CONFIG, WEIGHTS = "region_head.json", "region_head.safetensors"
FORMAT = "granvit region head 1"


@dataclass(frozen=True)
class RegionHeadConfig:
    """Sizes of a region head.

    Attributes:
        prompt: ``"region"`` has a pool of vision tokens, ``"box"`` an embedding of coordinates.
        vision_width: C, channels of the tower's tokens.
        heads: of the pool's attention.
        language_width: D, channels of what the head gives.
        activation: of the projector, as transformers names it.
        bias: whether the projector's layers have one.
        image_size: side in pixels of the square frame that the tower was trained on.
        patch_size: of the tower, in pixels.
        dtype: of the weights.
    """

    prompt: str
    vision_width: int
    heads: int
    language_width: int
    activation: str
    bias: bool
    image_size: int
    patch_size: int
    dtype: str


class RegionHead(nn.Module):
    """The region or box prompt of a trained model with its projector, to be put on the exported tower.

    Attributes:
        config: its sizes.
        region_prompt: pools the tokens under a box to one; None without.
        box_prompt: embeds a box; None without.
        projector: from the tower's width to the language model's.
    """

    region_prompt: RegionAttentionPool | None
    box_prompt: BoxEmbedding | None

    def __init__(self, config: RegionHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.region_prompt = self.box_prompt = None
        if config.prompt == "region":
            self.region_prompt = RegionAttentionPool(config.vision_width, config.heads)
        else:
            self.box_prompt = BoxEmbedding(config.language_width)
        self.projector = LlavaMultiModalProjector(
            LlavaConfig(
                vision_config=CLIPVisionConfig(hidden_size=config.vision_width, num_attention_heads=1),
                text_config=LlamaConfig(hidden_size=config.language_width, num_attention_heads=1),
                projector_hidden_act=config.activation,
                multimodal_projector_bias=config.bias,
                vision_feature_layer=-1,
            )
        )

    def forward(
        self, tokens: Tensor, boxes: Tensor, image_index: Tensor, grid_size: tuple[int, int] | None = None
    ) -> Tensor:
        """One vector a box, at the language model's width.

        Args:
            tokens: ``(B, H*W, C)``, patch tokens of the tower before its final norm.
            boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the frame, 0 to 1.
            image_index: ``(R,)`` integer, the image of each box.
            grid_size: ``(H, W)``; by default that of the frame that the tower was trained on.

        Returns:
            ``(R, D)``. With a box prompt only `boxes` are looked at.
        """
        if self.box_prompt is not None:
            embedded: Tensor = self.box_prompt(boxes)
            return embedded
        assert self.region_prompt is not None
        side = self.config.image_size // self.config.patch_size
        pooled = self.region_prompt(tokens, boxes, image_index, grid_size or (side, side))
        projected: Tensor = self.projector(pooled[:, 0])
        return projected


def write_region_head(model: GranViT, image_size: int, dtype: str, folder: Path) -> None:
    """Writes the head of a model, whose parameters have `dtype` already.

    Raises:
        ExportError: the model has none, since it knows boxes as text only.
        OSError: as the system has it.
    """
    if model.prompt == "text":
        raise ExportError("region-head: this model was made with prompt: text, so there is no head to export")
    llava = model.llava.config
    config = RegionHeadConfig(
        prompt="box" if model.box_prompt is not None else "region",
        vision_width=llava.vision_config.hidden_size,
        heads=llava.vision_config.num_attention_heads,
        language_width=llava.text_config.hidden_size,
        activation=llava.projector_hidden_act,
        bias=llava.multimodal_projector_bias,
        image_size=image_size,
        patch_size=patch_of(model.llava.model.vision_tower)[0],
        dtype=dtype,
    )
    head = RegionHead(config)
    head.region_prompt, head.box_prompt = model.region_prompt, model.box_prompt
    head.projector = model.llava.model.multi_modal_projector
    text = json.dumps({"format": FORMAT, **asdict(config)}, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    weights = {name: value.contiguous() for name, value in head.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS)


def load_region_head(folder: str | Path) -> RegionHead:
    """Reads what ``granvit export --to region-head`` wrote.

    Args:
        folder: of the export.

    Returns:
        In the dtype it was exported in, in evaluation mode.

    Raises:
        ExportError: the folder holds no region head, or not a whole one.
    """
    folder = Path(folder)
    try:
        plain = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if plain.pop("format") != FORMAT:
            raise ValueError(f"{CONFIG}: expected format {FORMAT!r}")
        config = RegionHeadConfig(**plain)
        head = RegionHead(config).to(getattr(torch, config.dtype))
        head.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except Exception as error:  # what is broken in a file shows in many kinds of error
        text = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(f"{folder}: holds no region head that granvit wrote: {text}") from error
    return head.eval()
