"""The kernels of box_embedding compile for GPUs without one, and keep their sums in registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from granvit.ops import _dispatch
from tests.kernels.support import SHARED_LIMIT, TYPES, Usage, compile_for

pytest.importorskip("triton")
if _dispatch.INTERPRETED:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)

from granvit.kernels import _box_embedding as kernels
from granvit.kernels import _matmul
from granvit.kernels.box_embedding import FEW_BOXES, choose_tile, features_tile

SIZES = (1, 96, 1000, 4096, 65536)  # numbers of boxes, one for every tile
Variant = tuple[str, Any, dict[str, Any], dict[str, Any], int, int]  # name, kernel, types, constants, warps, stages


def variants(boxes: int, dtype: torch.dtype, widest: bool) -> Iterator[Variant]:
    """Every kernel as box_embedding.py launches it for so many boxes, all gradients wanted."""
    t = "*" + TYPES[dtype]
    tile = choose_tile(boxes, dtype, widest)
    few = boxes <= FEW_BOXES
    geometry = {"boxes": "*fp32", "frequencies": "*fp32", "num_rows": "i32", "num_frequencies": "i32"}
    blocks = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "BLOCK_K": tile.depth, "EVEN_K": True}
    launch = (tile.warps, tile.stages)

    layer = {**geometry, "w": t, "bias": t, "out": t, "depth": "i32", "num_columns": "i32", "out_rows": "i32"}
    layer |= {"w_stride_c": "i32", "out_stride": "i32"}
    first = {"w_stride_k": 1, "index": None, "FEATURES": few, "GELU": True, **blocks}
    if few:
        made = features_tile(tile)
        first |= {"x": None, "BLOCK_K": made.depth}
        yield "first", kernels.layer_kernel, {**layer, "hidden": t}, first, made.warps, made.stages
    else:
        yield "first", kernels.layer_kernel, {**layer, "hidden": t, "x": t}, first, *launch
        yield "features", kernels.features_kernel, {**geometry, "features": t}, {"BLOCK_R": 16, "BLOCK_M": 64}, 4, 3
    second = {**layer, "x": t, "index": "*i64"}
    constants = {"hidden": None, "boxes": None, "frequencies": None, "w_stride_k": 1, **blocks}
    for name in ("boxes", "frequencies"):
        del second[name]
    yield "second", kernels.layer_kernel, second, {**constants, "FEATURES": False, "GELU": False}, *launch

    grad = {"grad": t, "num_rows": "i32", "grad_rows": "i32", "grad_stride_r": "i32"}
    indexed = {**grad, "index": "*i64"}
    types = {**indexed, "w2": t, "hidden": t, "grad_hidden": t, "depth": "i32", "num_columns": "i32"}
    types |= {"w2_stride_k": "i32"}
    constants = {"grad_stride_k": 1, "w2_stride_c": 1, **blocks}
    if few:
        constants |= {"activation": None, "partial_b1": None}
    else:
        types |= {"activation": t, "partial_b1": "*fp32"}
    yield "grad_hidden", kernels.grad_hidden_kernel, types, constants, *launch

    if few:
        types = {**grad, "grad_w": t, "grad_b": t, "size": "i32", "depth": "i32"}
        block = 32 if dtype == torch.float32 else 64
        constants = {"grad_stride_c": 1, "BLOCK_C": block, "BLOCK_K": block, "BLOCK_R": 16 if boxes <= 16 else 32}
        of_w1 = {"hidden": None, "index": None, **constants}
        yield "grad_w1", kernels.grad_weight_kernel, {**types, **geometry}, of_w1, 4, 3
        of_w2 = {"boxes": None, "frequencies": None, "num_frequencies": 0, **constants}
        yield "grad_w2", kernels.grad_weight_kernel, {**types, "hidden": t, "index": "*i64"}, of_w2, 4, 3
    else:
        types = {**indexed, "copy": t, "partial": "*fp32", "size": "i32"}
        constants = {"grad_stride_c": 1, "STEPS": 8, "BLOCK_R": 16, "BLOCK_C": 128}
        yield "rows", kernels.rows_kernel, types, constants, 4, 3

    types = {**geometry, "grad_hidden": t, "w1": t, "depth": "i32", "w1_stride_k": "i32"}
    types |= {"partial_boxes": "*fp32", "partial_frequencies": "*fp32"}
    tile = choose_tile(boxes, dtype)
    blocks |= {"BLOCK_R": tile.rows, "BLOCK_C": max(16, tile.columns // 2), "BLOCK_K": min(64, tile.depth)}
    constants = {**blocks, "w1_stride_c": 1}
    yield "angle", kernels.angle_kernel, types, constants, tile.warps, tile.stages

    types = {"partial": "*fp32", "out": t, "count": "i32", "size": "i32"}
    yield "sum", _matmul._sum_kernel, types, {"BLOCK_S": 32, "BLOCK": 64}, 4, 3


def usages(arch: int, boxes: int, dtype: torch.dtype, aligned: bool = True) -> Iterator[tuple[str, Usage]]:
    for name, kernel, types, constants, warps, stages in variants(boxes, dtype, widest=arch == 90):
        if not aligned:
            constants = {key: False if key == "EVEN_K" else value for key, value in constants.items()}
        yield name, compile_for(kernel, arch, types, constants, warps, stages, aligned)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("boxes", SIZES)
def test_nothing_spills(arch: int, dtype: torch.dtype, boxes: int) -> None:
    for name, usage in usages(arch, boxes, dtype):
        assert usage.spilled == 0, f"{name}: {usage}"
        assert usage.shared <= SHARED_LIMIT[arch], f"{name}: {usage}"
