"""Region ops on the ViTs of timm."""

from __future__ import annotations

from torch import Tensor, nn

from granvit.adapters._base import Attend, BaseRegionEncoder, Grid
from granvit.errors import MissingDependencyError

try:
    from timm.layers import AttentionPoolLatent
except ImportError as error:
    raise MissingDependencyError("granvit.adapters.timm needs timm: pip install timm, or granvit[demo]") from error


class RegionEncoder(BaseRegionEncoder):
    """A timm ViT that looks at boxes: ``RegionEncoder(timm.create_model(...))``.

    For models whose ``forward_features`` returns prefix tokens and then one token a patch: VisionTransformer, Eva
    (DINOv3, EVA-02), BEiT, DeiT and their like. Tokens are what ``forward_features`` returns (after the final norm,
    unless the model has it behind the pooling) less ``num_prefix_tokens``. For other image sizes than the model's,
    create it with ``dynamic_img_size=True``.

    :meth:`region_pool` follows ``forward_head(..., pre_logits=True)`` where the model pools with an
    `AttentionPoolLatent` over its patches (``global_pool="map"``).

    Args:
        model: the timm model.
        pool: pools the tokens of a box in place of the model's head, for example a
            :class:`granvit.nn.RegionAttentionPool`.

    Raises:
        TypeError: `model` has no patch embedding with a grid or no ``num_prefix_tokens``.
    """

    def __init__(self, model: nn.Module, *, pool: nn.Module | None = None) -> None:
        super().__init__(model, pool=pool)
        if not (
            hasattr(model, "forward_features")
            and hasattr(model, "num_prefix_tokens")
            and hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
        ):
            raise TypeError(
                "granvit.adapters.timm.RegionEncoder: model: expected a timm ViT with forward_features, "
                f"num_prefix_tokens and patch_embed.dynamic_feat_size, got {type(model).__name__}"
            )

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The patch grid that the model lays over an image of (height, width) pixels."""
        rows, columns = self.model.patch_embed.dynamic_feat_size(image_size)
        height, width = self.model.patch_embed.feat_ratio(as_scalar=False)
        return Grid((rows, columns), (rows * height, columns * width))

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)[:, self.model.num_prefix_tokens :]

    def _pool_by_head(self, tokens: Tensor, attend: Attend) -> Tensor:
        model, pool = self.model, getattr(self.model, "attn_pool", None)
        # Eva and models with pool_include_prefix attend to class and register tokens too, which lie in no box.
        prefix = model.num_prefix_tokens and getattr(model, "pool_include_prefix", True)
        if not isinstance(pool, AttentionPoolLatent) or prefix:
            raise self._no_head()
        return model.head_drop(model.fc_norm(_pool_latent(pool, tokens, attend)))


def _pool_latent(pool: AttentionPoolLatent, tokens: Tensor, attend: Attend) -> Tensor:
    heads = (pool.num_heads, pool.head_dim)
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed.to(tokens.dtype)
    query = pool.q_norm(pool.q(pool.latent[0]).unflatten(-1, heads))  # [Q, heads, dim]
    key, value = pool.kv(tokens).unflatten(-1, (2, *heads)).unbind(-3)
    x = pool.proj_drop(pool.proj(attend(query, pool.k_norm(key), value)))  # [R, Q, C]
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    if pool.pool == "token":
        return x[:, 0]
    return x.mean(1) if pool.pool == "avg" else x
