"""Modules over the ops of :mod:`granvit.ops`."""

from granvit.nn.box_embedding import BoxEmbedding
from granvit.nn.region_attention import RegionAttentionPool
from granvit.nn.region_distill import RegionDistillLoss
from granvit.nn.roi_align import RoIAlign

__all__ = ["BoxEmbedding", "RegionAttentionPool", "RegionDistillLoss", "RoIAlign"]
