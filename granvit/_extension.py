"""Loads the compiled libraries and remembers what could not be loaded, and why."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Extension:
    """What of the compiled code is loaded.

    Attributes:
        core: the pybind11 module ``granvit._C``, or None.
        core_reason: why `core` is None; empty where it is loaded.
        cuda: whether the library with the CUDA kernels is loaded.
        cuda_reason: why it is not; empty where it is.
        report: what the build wrote about itself (``_build.json``).
    """

    core: ModuleType | None
    core_reason: str
    cuda: bool
    cuda_reason: str
    report: dict[str, Any] = field(repr=False)


def _load() -> Extension:
    path = _FOLDER / "_build.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    core, core_reason = None, ""
    try:
        core = importlib.import_module("granvit._C")
    except ImportError as error:
        core_reason = report.get("core", {}).get("reason") or f"granvit._C cannot be imported: {error}"
    library = _FOLDER / "_cuda.so"
    cuda, cuda_reason = False, ""
    if not library.exists():
        cuda_reason = report.get("cuda", {}).get("reason") or "the CUDA kernels were not built"
    elif torch.version.cuda is None:
        cuda_reason = f"torch {torch.__version__} was built without CUDA"
    else:
        try:
            torch.ops.load_library(str(library))
            cuda = True
        except OSError as error:
            cuda_reason = f"{library.name} cannot be loaded: {error}"
    return Extension(core, core_reason, cuda, cuda_reason, report)


EXTENSION = _load()
