"""The specification: every op in plain PyTorch.

These functions favour being obviously right over being fast. They run on any device and in any floating dtype, compute
in float32 or wider, and are differentiable as often as PyTorch is. Every kernel of this package is tested against them
in float64. They check nothing: call the functions in :mod:`granvit.ops`, which do.
"""

from granvit.reference.box_embedding import box_embedding
from granvit.reference.region_attention import region_attention
from granvit.reference.region_distill import region_distill_loss
from granvit.reference.roi_align import roi_align

__all__ = ["box_embedding", "region_attention", "region_distill_loss", "roi_align"]
