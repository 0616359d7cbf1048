"""Labelled scenes without a download: pictograms over photographs, and rendered text."""

from granvit.data.scenes.composer import SCENE_KINDS, SPLITS, Material, SceneComposer, material
from granvit.data.scenes.photographs import SceneError

__all__ = ["SCENE_KINDS", "SPLITS", "Material", "SceneComposer", "SceneError", "material"]
