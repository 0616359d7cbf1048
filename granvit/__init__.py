"""granvit: fused region ops for Vision Transformers, and the GranViT recipe on top of them.

``import granvit`` loads torch and the compiled kernels, and nothing else. The ops are functions in :mod:`granvit.ops`,
modules in :mod:`granvit.nn`; :mod:`granvit.adapters` puts them into models of other libraries.
"""

from granvit import adapters, geometry, nn, ops, reference
from granvit._extension import EXTENSION

__version__ = "0.1.0"
__all__ = ["EXTENSION", "__version__", "adapters", "geometry", "nn", "ops", "reference"]
