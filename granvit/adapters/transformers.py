"""Region ops on the vision models of Hugging Face transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from granvit.adapters._base import Attend, BaseRegionEncoder, Grid
from granvit.errors import MissingDependencyError

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise MissingDependencyError(
        "granvit.adapters.transformers needs transformers: pip install transformers, or granvit[train]"
    ) from error

# Tokens in front of the patches, not counting registers, for each model_type.
_CLASS_TOKENS = {
    "siglip_vision_model": 0,
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}
# These interpolate their position embeddings only when asked to; the others always do.
_FIXED_SIZE = ("siglip_vision_model", "clip_vision_model")


class RegionEncoder(BaseRegionEncoder):
    """A transformers vision model that looks at boxes: ``RegionEncoder(SiglipVisionModel.from_pretrained(...))``.

    For SigLIP (and SigLIP 2 of fixed resolution, which loads as SigLIP), CLIP, DINOv2 with and without registers, and
    DINOv3 ViT. A SigLIP or CLIP model with a text tower is taken for its vision tower. Tokens are ``last_hidden_state``
    as the model returns it, less class and register tokens: after the final norm, except for CLIP, which applies its
    final norm to the class token only. For another image size than the configured one, position embeddings are
    interpolated by the model's own method.

    :meth:`region_pool` follows SigLIP's attention-pooling head; the other models have none.

    Args:
        model: the vision model.
        pool: pools the tokens of a box in place of the model's head, for example a
            :class:`granvit.nn.RegionAttentionPool`.

    Raises:
        TypeError: `model` is not one of these.
    """

    def __init__(self, model: nn.Module, *, pool: nn.Module | None = None) -> None:
        super().__init__(model, pool=pool)
        tower = self._tower
        kind = tower.config.model_type if isinstance(tower, PreTrainedModel) else type(tower).__name__
        if kind not in _CLASS_TOKENS:
            raise TypeError(
                "granvit.adapters.transformers.RegionEncoder: model: expected a vision model of type "
                f"{', '.join(_CLASS_TOKENS)}, got {kind}"
            )

    @property
    def _tower(self) -> PreTrainedModel:
        return getattr(self.model, "vision_model", self.model)

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The patch grid that the model lays over an image of (height, width) pixels."""
        patch = _pair(self._tower.config.patch_size)
        rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
        return Grid((rows, columns), (rows * patch[0], columns * patch[1]))

    def _encode(self, images: Tensor) -> Tensor:
        tower = self._tower
        config = tower.config
        options = {}
        if config.model_type in _FIXED_SIZE:
            options["interpolate_pos_encoding"] = tuple(images.shape[-2:]) != _pair(config.image_size)
        hidden = tower(pixel_values=images, return_dict=True, **options).last_hidden_state
        prefix = _CLASS_TOKENS[config.model_type] + getattr(config, "num_register_tokens", 0)
        return hidden[:, prefix:]

    def _pool_by_head(self, tokens: Tensor, attend: Attend) -> Tensor:
        tower = self._tower
        if tower.config.model_type != "siglip_vision_model" or not tower.use_head:
            raise self._no_head()
        head = tower.head
        attention = head.attention
        heads = (attention.num_heads, attention.head_dim)
        dim = attention.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        query = F.linear(head.probe[0], weight[:dim], bias[:dim]).unflatten(-1, heads)  # [1, heads, dim]
        key, value = F.linear(tokens, weight[dim:], bias[dim:]).unflatten(-1, (2, *heads)).unbind(-3)
        x = attention.out_proj(attend(query, key, value))  # [R, 1, C]
        return (x + head.mlp(head.layernorm(x)))[:, 0]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
