"""The kernels of region_attention compile for GPUs without one, and keep their sums in registers."""

from __future__ import annotations

import pytest
import torch

from granvit.ops import _dispatch
from tests.kernels.support import SHARED_LIMIT, TYPES, Usage, compile_for

pytest.importorskip("triton")
if _dispatch.INTERPRETED:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)

from granvit.kernels import _footprints, _regions
from granvit.kernels import region_attention as kernels

STRIDES = ("region_stride", "query_stride", "key_stride", "value_stride", "key_image_stride", "value_image_stride")


def compile_attention(name: str, arch: int, dtype: torch.dtype, dim: int, queries: int, packed: bool) -> Usage:
    """A kernel as region_attention.py launches it; packed tokens make the last two strides 0."""
    by_token = name == "token_gradient"
    constants = kernels._launch(dim, queries, dtype.itemsize, by_token)
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    tensors = {
        "forward": ["output"],
        "query_gradient": ["output", "grad", "grad_query"],
        "token_gradient": ["grad", "grad_key"],
    }[name]
    types = dict.fromkeys(["query", "key", "value", *tensors], "*" + TYPES[dtype])
    types |= {"lse": "*fp64", "footprints": "*i64", "log_cover": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys((*STRIDES, "num_tokens", "heads", "queries"), "i32")
    if name != "forward":
        types |= {"scale": "fp32"} | dict.fromkeys(("lse_high", "lse_low", "delta"), "*fp32")
    if name == "query_gradient":
        constants["FOR_QUERY"] = True
    if by_token:
        types |= dict.fromkeys(("order", "region_start", "tile_start"), "*i32") | {"token_start": "*i64"}
        types |= dict.fromkeys(("height", "width", "num_images"), "i32") | {"grad_value": types["grad_key"]}
        constants |= {"PACKED": packed, "BLOCK_R": kernels.REGIONS_AT_A_GLANCE}
        if packed:
            types["grids"] = "*i64"
        else:
            constants["grids"] = None
    else:
        constants["query_blocks"] = 1
    if queries == 1:  # a launch makes constants of arguments that are 1
        constants["queries"] = 1
        del types["queries"]
    return compile_for(getattr(kernels, f"{name}_kernel"), arch, types, constants, num_warps, num_stages)


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["forward", "query_gradient", "token_gradient"])
def test_compiles_without_spills(name: str, arch: int, dtype: torch.dtype, dim: int, queries: int) -> None:
    usage = compile_attention(name, arch, dtype, dim, queries, packed=dim == 72)
    assert usage.spilled == 0, usage
    assert usage.shared <= SHARED_LIMIT[86], usage


@pytest.mark.parametrize("dim", [8, 96, 256])
@pytest.mark.parametrize("dtype", TYPES)
def test_other_dims_fit(dtype: torch.dtype, dim: int) -> None:
    for name in ("forward", "query_gradient", "token_gradient"):
        usage = compile_attention(name, 80, dtype, dim, 4, packed=False)
        assert usage.shared <= SHARED_LIMIT[86], usage


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_footprints_and_plan_compile(packed: bool, one: bool) -> None:
    types = {"boxes": "*fp32", "image_index": "*i64", "footprints": "*i64", "log_cover": "*fp32"}
    integers = ("num_images", "num_tokens", "height", "width")
    constants = {"PACKED": packed, "BLOCK": 128}
    types |= {"grids": "*i64"} if packed else {}
    constants |= {} if packed else {"grids": None}
    types |= {} if one else dict.fromkeys(integers, "i32")
    constants |= dict.fromkeys(integers, 1) if one else {}
    assert compile_for(_footprints._footprint_kernel, 90, types, constants, num_warps=1).spilled == 0

    types = {
        "image_index": "*i64",
        "order": "*i32",
        "region_start": "*i32",
        "token_start": "*i64",
        "tile_start": "*i32",
    }
    integers = ("num_regions", "num_images", "height", "width")
    constants = {"PACKED": packed, "BLOCK": 256, "TILE_H": 64, "TILE_W": 0}
    types |= {"grids": "*i64"} if packed else {}
    constants |= {} if packed else {"grids": None}
    types |= {} if one else dict.fromkeys(integers, "i32")
    constants |= dict.fromkeys(integers, 1) if one else {}
    assert compile_for(_regions._plan_kernel, 90, types, constants).spilled == 0
