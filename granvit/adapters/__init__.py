"""The region ops on models of other libraries, one submodule a library, loaded when it is first used.

- :mod:`granvit.adapters.timm`: region features, pooling and distillation on any timm ViT.
- :mod:`granvit.adapters.transformers`: the same on SigLIP, CLIP and DINO vision models.
- :mod:`granvit.adapters.segment_anything`: Segment Anything's box prompts through :func:`granvit.ops.box_embedding`.

Importing :mod:`granvit` or this package imports none of those libraries::

    encoder = granvit.adapters.timm.RegionEncoder(model)
    features = encoder.region_features(images, boxes, image_index, output_size=7)
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["segment_anything", "timm", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"granvit.adapters.{name}")
    raise AttributeError(f"module 'granvit.adapters' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
