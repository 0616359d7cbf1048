"""Trained models for use without granvit: LLaVA folders, vision towers, region heads."""

from granvit.export.region_head import RegionHead, RegionHeadConfig, load_region_head
from granvit.export.weights import ExportError

__all__ = ["ExportError", "RegionHead", "RegionHeadConfig", "load_region_head"]
