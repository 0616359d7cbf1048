"""What PyTorch expects of any op, asked of every kernel of every op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from granvit.ops import _dispatch
from tests.ops.calls import make, on_kernels
from tests.support import run_interpreted

EVERY_KERNEL = pytest.mark.parametrize(("name", "device", "impl"), on_kernels())


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


@EVERY_KERNEL
def test_compiles_into_one_graph_for_any_number_of_regions(name: str, device: str, impl: str) -> None:
    first = make(name, 5).on(device, impl)

    def function(*arguments: Tensor) -> Tensor:
        scaled = [2 * t for t in arguments[: len(first.leaves)]]
        return 3 * first.function(*scaled, *arguments[len(first.leaves) :])

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for regions in (5, 11, 3):
        call = make(name, regions).on(device, impl)
        for got, want in zip(call.run(compiled), call.run(function), strict=True):
            torch.testing.assert_close(got, want)


@EVERY_KERNEL
def test_exports_with_dynamic_regions(name: str, device: str, impl: str) -> None:
    call = make(name, 12).on(device, impl)

    class Model(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return call.function(*arguments)

    regions = torch.export.Dim("regions", min=2, max=64)
    shapes = (tuple({0: regions} if by_region else {} for by_region in call.by_region),)
    arguments = tuple(t.detach() for t in call.arguments)
    program = torch.export.export(Model(), arguments, dynamic_shapes=shapes)
    if "packed" not in name:  # whose tokens are another number
        arguments = tuple(t.detach() for t in make(name, 17).on(device, impl).arguments)
    assert torch.equal(program.module()(*arguments), call.function(*arguments))


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_in_the_incoming_dtype(name: str, device: str, impl: str, dtype: torch.dtype) -> None:
    if _dispatch.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter takes the bits of bfloat16 for integers")
    call = make(name, dtype=dtype).on(device, impl)
    expected = call.run()
    with torch.autocast(device, dtype=torch.bfloat16):
        results = call.run()
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@EVERY_KERNEL
def test_activation_checkpointing_changes_nothing(name: str, device: str, impl: str) -> None:
    call = make(name).on(device, impl)
    results = call.run(lambda *arguments: checkpoint(call.function, *arguments, use_reentrant=False))
    for got, want in zip(results, call.run(), strict=True):
        assert torch.equal(got, want)


@EVERY_KERNEL
def test_the_same_bits_twice(name: str, device: str, impl: str) -> None:
    call = make(name, 40).on(device, impl)
    for got, want in zip(call.run(), call.run(), strict=True):
        assert torch.equal(got, want)


@EVERY_KERNEL
def test_vmap_is_refused(name: str, device: str, impl: str) -> None:
    call = make(name).on(device, impl)
    last = len(call.leaves) - 1  # no boxes: some are looked at first
    arguments = [t.detach() for t in call.arguments]
    with pytest.raises(RuntimeError, match=rf"^{call.op}.*: torch\.func\.vmap is not supported"):
        torch.func.vmap(lambda x: call.function(*arguments[:last], x, *arguments[last + 1 :]))(
            torch.stack([arguments[last]] * 2)
        )


if _dispatch.INTERPRETED:  # on a device it would take the device down, on the CPU kernels check for themselves

    @pytest.mark.parametrize("name", ["roi_align", "region_distill", "region_attention"])
    def test_a_triton_graph_asserts_what_it_cannot_look_at(name: str) -> None:
        call = make(name).on("cpu", "triton")
        compiled = torch.compile(call.function, fullgraph=True)
        torch.testing.assert_close(compiled(*call.arguments), call.function(*call.arguments))
        boxes, index = call.constants[-2:]
        index[0] = 3
        with pytest.raises(RuntimeError, match=r"image_index: expected values in \[0, number of images\)"):
            compiled(*call.arguments)
        boxes[0, 2] = torch.nan
        with pytest.raises(RuntimeError, match="boxes: expected finite x0 <= x1 and y0 <= y1"):
            compiled(*call.arguments)

    def test_a_triton_graph_asserts_what_rows_it_writes_to() -> None:
        call = make("box_embedding into a sequence").on("cpu", "triton")
        compiled = torch.compile(call.function, fullgraph=True)
        torch.testing.assert_close(compiled(*call.arguments), call.function(*call.arguments))
        (index,) = call.constants
        index[0] = index[1]
        with pytest.raises(RuntimeError, match="box_embedding: index: expected no row twice"):
            compiled(*call.arguments)
        index[0] = 40
        with pytest.raises(RuntimeError, match=r"box_embedding: index: expected values in \[0, rows of out\)"):
            compiled(*call.arguments)
        call.leaves[0].detach()[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="box_embedding: boxes: expected finite values"):
            compiled(*call.arguments)


@pytest.mark.skipif(_dispatch.INTERPRETED, reason="this is the interpreter")
def test_triton_in_the_interpreter() -> None:
    run_interpreted(__file__, "triton and not interpreter and (graph or exports or vmap)")
