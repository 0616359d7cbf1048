"""What nvcc makes of csrc/cuda, no GPU needed: it builds and links as setup.py does it, and no kernel spills."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from granvit import EXTENSION, info

ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = {name for name in info.op_names() if (ROOT / f"csrc/cuda/{name}.cu").exists()}
ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS_A_THREAD = 168  # with more, a block of 384 threads does not fit a multiprocessor
SMALL_BLOCKS = re.compile("region_distill_by_(tiles|cells)_kernelIf")  # 160 threads, which may have all there are


def cuda_tool(name: str) -> str:
    """A program of the CUDA toolkit; Triton brings some of them too."""
    home, triton = os.environ.get("CUDA_HOME"), importlib.util.find_spec("triton")
    folders = [f"{home}/bin"] if home else os.environ["PATH"].split(os.pathsep)
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} was not found on PATH, in CUDA_HOME or in Triton")
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """_cuda.so for the default architectures, from setup.py's own build: the installed one where it is up to date."""
    installed = ROOT / "granvit/_cuda.so"
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    complete = EXTENSION.cuda and all(arch in str(EXTENSION.report["cuda"]["targets"]) for arch in ARCHITECTURES)
    if complete and installed.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return installed
    cuda_tool("nvcc")
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setenv("GRANVIT_BUILD_CUDA", "1")
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        build_cuda: Any = runpy.run_path(str(ROOT / "setup.py"))["build_cuda"]
        report = build_cuda(folder, folder / "_cuda.so")
    assert report["built"]
    return folder / "_cuda.so"


def test_every_kernel_is_compiled_for_every_architecture(library: Path) -> None:
    listing = subprocess.run([cuda_tool("cuobjdump"), "-lelf", str(library)], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    for op in CUDA_OPS:
        for architecture in ARCHITECTURES:
            assert f" {op}.{architecture}.cubin" in listing.stdout, listing.stdout


def test_the_library_links_what_it_needs(library: Path) -> None:
    """The current stream comes from libtorch_cuda by linking; the CUDA runtime is inside."""
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "libtorch_cuda.so" in needed
    assert "libcudart" not in needed
    undefined = subprocess.run(["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True)
    symbols = [line.split(None, 1)[1] for line in undefined.stdout.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in symbols
    unstable = [symbol for symbol in symbols if re.search(r"\b(c10|at|torch|caffe2)::", symbol)]
    assert not unstable, f"unstable symbols of torch: {unstable[:5]}"


def test_ops_register_for_cuda(library: Path) -> None:
    code = (
        # An installed library of the same sources is loaded already where torch has CUDA.
        "import sys, torch, granvit; from granvit.ops import _dispatch; "
        "granvit.EXTENSION.cuda or torch.ops.load_library(sys.argv[1]); "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*(n for n in sys.argv[2:] if has('granvit::' + n, 'CUDA'))); "
        "print(all(_dispatch._has_kernel(n, 'CUDA') for n in sys.argv[2:]))"
    )
    names = sorted(CUDA_OPS | {f"{op}_backward" for op in CUDA_OPS} | {"box_embedding_"})
    run = subprocess.run([sys.executable, "-c", code, str(library), *names], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    registered, complete = run.stdout.splitlines()
    assert registered.split() == names
    assert complete == "True", "an op without its backward is never chosen"


def test_no_kernel_spills(library: Path) -> None:
    usage = subprocess.run([cuda_tool("cuobjdump"), "-res-usage", str(library)], capture_output=True, text=True)
    assert usage.returncode == 0, usage.stderr
    kernels = re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", usage.stdout)
    assert {op for op in CUDA_OPS if any(f"{op}_" in name for name, _ in kernels)} == CUDA_OPS, usage.stdout[:2000]
    for name, resources in kernels:
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, f"{name} keeps {numbers} bytes in local memory"
        assert numbers["REG"] <= (255 if SMALL_BLOCKS.search(name) else REGISTERS_A_THREAD), f"{name}: {numbers}"
        # sm_90 keeps 1 KiB for itself; more would be static, which the emulation cannot poison.
        assert numbers["SHARED"] <= 1024, f"{name}: {numbers}"
