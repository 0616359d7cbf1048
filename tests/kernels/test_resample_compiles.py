"""The kernels of roi_align and region_distill compile for GPUs without one, and keep their sums in registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from granvit.ops import _dispatch
from tests.kernels.support import SHARED_LIMIT, TYPES, compile_for

pytest.importorskip("triton")
if _dispatch.INTERPRETED:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)

from granvit.kernels import _pull_back, _regions, _resample, region_distill, roi_align

STRIDES = ("row_stride", "image_stride", "token_row_stride", "token_image_stride")
POINTERS = {
    "boxes": "*fp32", "image_index": "*i64", "grids": "*i64", "outputs": "*i64", "cell_start": "*i64",
    "block_start": "*i32", "token_start": "*i64", "tile_start": "*i32", "order": "*i32", "region_start": "*i32",
    "region_scale": "*fp32", "slope": "*fp32", "partial": "*fp64", "partial_loss": "*fp64", "sums": "*fp64",
}  # fmt: skip


def types(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
    """Pointers as above, `scale` a float, tokens and cells of the dtype, all else integers."""
    tokens = {"tokens", "student", "cells", "teacher", "out", "grad_tokens"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants or name.isupper():
            continue
        signature[name] = POINTERS.get(name) or ("*" + TYPES[dtype] if name in tokens else "i32")
        if name == "scale":
            signature[name] = "fp32"
    return signature


def check(kernel: Any, arch: int, dtype: torch.dtype, constants: dict[str, Any], warps: int) -> None:
    usage = compile_for(kernel, arch, types(kernel, dtype, constants), constants, num_warps=warps, num_stages=1)
    assert usage.spilled == 0, usage
    assert usage.shared <= SHARED_LIMIT[arch], usage


def constants_of(packed: bool, dtype: torch.dtype, channels: int) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "SAMPLING_RATIO": 2,
        "PACKED": packed,
        "PACKED_CELLS": packed,
        "CHANNELS": channels,
        "PRECISION": _resample.precision(dtype),
    }
    return constants if packed else constants | {"grids": None, "outputs": None, "cell_start": None}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("source", ["cells", "mse", "cosine"])
def test_pull_back(source: str, dtype: torch.dtype, arch: int) -> None:
    constants = constants_of(
        source == "mse", dtype, _resample.block_of_channels(1152, dtype, most=32 if source == "cells" else 16)
    )
    height, width = _pull_back.tile_of(dtype, 64)
    constants |= {"FROM": source, "HAS_REGION_SCALE": source == "cosine", "TILE_H": height, "TILE_W": width}
    if source == "cells":
        constants |= {"tokens": None}
    if source != "cosine":
        constants |= {"slope": None, "region_scale": None}
    check(_pull_back.pull_back_kernel, arch, dtype, constants, 8)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("packed", [False, True])
def test_align(packed: bool, dtype: torch.dtype, arch: int) -> None:
    constants = constants_of(packed, dtype, _resample.block_of_channels(1152, dtype, most=32))
    if not packed:
        constants |= {"block_start": None, "token_start": None}
    check(roi_align._forward_kernel, arch, dtype, constants, 8)
    for loss in ("mse", "cosine"):
        wanted = {"COSINE": loss == "cosine", "HAS_SLOPE": loss == "cosine"}
        check(region_distill._compare_kernel, arch, dtype, constants | wanted, 8)


@pytest.mark.parametrize("arch", [80, 90])
def test_plan(arch: int) -> None:
    constants = {"TILE_H": 32, "TILE_W": 32, "PACKED": True, "BLOCK": 256}
    check(_regions._plan_kernel, arch, torch.float32, constants, 4)
    check(region_distill._sum_blocks_kernel, arch, torch.float32, {"BLOCK": 64}, 4)
