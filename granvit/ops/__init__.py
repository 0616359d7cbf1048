"""The fused region ops. Each runs as a compiled kernel where there is one and as plain PyTorch elsewhere."""

from granvit.ops.roi_align import roi_align

__all__ = ["roi_align"]
