"""The fused region ops. Each runs as a compiled kernel where there is one and as plain PyTorch elsewhere."""

from granvit.ops.box_embedding import box_embedding
from granvit.ops.region_attention import region_attention
from granvit.ops.region_distill import region_distill_loss
from granvit.ops.roi_align import roi_align

__all__ = ["box_embedding", "region_attention", "region_distill_loss", "roi_align"]
