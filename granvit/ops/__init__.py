"""The fused region ops. Each runs as a compiled kernel where there is one and as plain PyTorch elsewhere."""

from granvit.ops.region_attention import region_attention
from granvit.ops.roi_align import roi_align

__all__ = ["region_attention", "roi_align"]
