"""Runs csrc/cuda on the CPU: compiles it with a host compiler against headers that stand in for CUDA's.

:func:`load` gives ``torch.ops.granvit_emulated``, whose ops take CPU tensors and run the very kernels and host code
that a GPU would run, one thread at a time. The emulation sees wrong barriers, reads of shared memory that was never
written, and (in :func:`run_sanitized`) accesses outside tensors and shared memory. It says nothing about speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import granvit  # noqa: F401  defines the schemas

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZE = os.environ.get("GRANVIT_SANITIZE") == "1"  # set by run_sanitized
# Fibers share frames' addresses in ways that stack checks do not follow; what matters here is in the heap.
# Checks that are calls, and lines without variables, compile in less than half the time.
CALLED_CHECKS = "--param=asan-instrumentation-with-call-threshold=0"
SANITIZER_FLAGS = ["-fsanitize=address", "--param=asan-stack=0", CALLED_CHECKS, "-g1"]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None or "clang" in found:
        pytest.skip("the CUDA emulation needs g++")
    return found


def build() -> Path:
    """The library, compiled unless the same sources were compiled before."""
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "kernels.cu", HERE / "emulation.cpp"]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.h"), *(HERE / "include").glob("*.h")]
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",  # it takes a longjmp to another stack for an attack
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE / 'include'}", "-isystem", f"{torch_folder / 'include'}",
        *(SANITIZER_FLAGS if SANITIZE else []),
    ]  # fmt: skip
    state = hashlib.sha256("\0".join([compiler(), torch.__version__, *flags]).encode())
    for path in [*sources, *sorted(headers)]:
        state.update(path.read_bytes())
    folder = ROOT / "build/cuda-emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"granvit_emulated-{state.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of a parallel run build once
        if not library.exists():
            partial = library.with_suffix(".partial")
            command = [
                *[compiler(), *flags, "-shared", "-o", str(partial), "-x", "c++", *map(str, sources), "-x", "none"],
                *[f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch"],
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-6000:]
            partial.rename(library)
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    path = build()
    torch.ops.load_library(str(path))
    fragment = torch.library.Library("granvit_emulated", "FRAGMENT")
    names = torch._C._dispatch_get_all_op_names()
    for name in names:
        emulated = name.replace("granvit::", "granvit_emulated::")
        if name.startswith("granvit::") and emulated in names and not hasattr(torch.ops.granvit_emulated, name[9:]):
            schema = str(getattr(torch.ops.granvit, name[9:]).default._schema)
            fragment.define(schema.removeprefix("granvit::"))
    library = ctypes.CDLL(str(path))
    library._fragment = fragment  # lives as long as the library
    return library


def load() -> Any:
    _library()
    return torch.ops.granvit_emulated


@contextlib.contextmanager
def switched(name: str, value: int = 1) -> Iterator[None]:
    """Turns one of the emulation's switches on; see emulation.cpp."""
    switch = ctypes.c_int.in_dll(_library(), f"emulation_{name}")
    before, switch.value = switch.value, value
    try:
        yield
    finally:
        switch.value = before


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process where the address sanitizer's red zones surround every tensor and shared memory."""
    # libstdc++ too: the sanitizer looks for its symbols when it starts, before torch brings it.
    find = [[compiler(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    libraries = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in find]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("the compiler has no address sanitizer")
    environment = {
        **os.environ,
        "GRANVIT_SANITIZE": "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
