"""Compiling Triton kernels for GPUs that are not there, and what the machine code then uses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from granvit.ops import _dispatch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Shared memory that a program may take, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


class Usage(NamedTuple):
    """What a compiled kernel takes: registers and bytes of spilled registers a thread, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def compile_for(
    kernel: Any,
    arch: int,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: bool = True,
) -> Usage:
    """Compiles a kernel for compute capability `arch` (80, 90, ...).

    Args:
        kernel: a function under ``triton.jit``.
        arch: ten times the capability's number.
        signature: type of every argument that is no constant: ``"*bf16"``, ``"i32"``, ...
        constexprs: all others; None for an optional pointer that is not given, 1 for a stride of 1.
        num_warps: of a program.
        num_stages: of the pipeline of loads.
        aligned: whether pointers and integers are known to be multiples of 16, as they mostly are.
    """
    triton = pytest.importorskip("triton")
    if _dispatch.INTERPRETED:
        pytest.skip("nothing is compiled in Triton's interpreter")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    everything = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name, kind in everything.items() if kind == "constexpr" and name not in constexprs]
    assert not missing, f"no type and no value for {missing}"
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(everything.values())
        if aligned and (kind[0] == "*" or kind in ("i32", "i64"))
    }
    source = ASTSource(kernel, everything, constexprs, attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Usage(*_resources(compiled.asm["cubin"]), compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    import tempfile

    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])
