"""The package as a whole: what importing it loads, its layout, what its binaries ask of torch, how it installs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import torch

import granvit
from granvit import info, ops, reference

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_import_loads_torch_and_nothing_heavy() -> None:
    heavy = {"torchvision", "transformers", "timm", "triton", "matplotlib", "PIL", "typer", "rich", "torch._dynamo"}
    code = f"import sys, granvit; print(sorted({heavy} & set(sys.modules)))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    # torch itself may load Triton; granvit must not add to what torch loads.
    alone = python(code.replace("granvit", "torch"))
    assert result.stdout == alone.stdout


def test_imports_run_one_way() -> None:
    """reference <- ops <- nn <- adapters, and data beside them; nothing below imports what is above it."""
    allowed = {
        "reference": {"reference"},
        "ops": {"ops", "reference", "kernels", "_extension"},
        "nn": {"nn", "ops"},
        "adapters": {"adapters", "nn", "ops", "geometry", "errors"},
        "data": {"data", "geometry", "errors"},
        "data/importers": {"data", "geometry", "errors"},
    }
    for folder, may in allowed.items():
        for path in (ROOT / "granvit" / folder).glob("*.py"):
            found = set(re.findall(r"^\s*from granvit\.(\w+)", path.read_text(), re.MULTILINE))
            found |= {
                name.strip()
                for line in re.findall(r"^\s*from granvit import (.+)$", path.read_text(), re.MULTILINE)
                for name in line.split(",")
            }
            assert found <= may, f"{path.relative_to(ROOT)} imports {sorted(found - may)}"


def test_every_op_stands_on_every_floor() -> None:
    for op in info.op_names():
        for path in (
            f"csrc/cpu/{op}.cpp",
            f"granvit/reference/{op}.py",
            f"tests/ops/test_{op}.py",
            f"benchmarks/bench_{op}.py",
        ):
            assert (ROOT / path).exists(), path
    assert len(ops.__all__) == len(info.op_names())
    assert set(ops.__all__) == set(reference.__all__)


def test_the_kernels_folder_is_no_regular_package() -> None:
    result = python("import importlib.util as u; s = u.find_spec('kernels'); print(s is not None and s.origin)")
    assert result.stdout.strip() in ("None", "False"), "`import kernels` in a checkout finds a package of ours"
    found = python("import granvit.kernels as k; print(list(k.__path__))", cwd=Path("/"))
    assert found.returncode == 0, found.stderr
    assert Path(granvit.__file__).parents[1].name in found.stdout


@pytest.fixture(scope="module")
def core() -> Path:
    assert granvit.EXTENSION.core is not None, granvit.EXTENSION.core_reason
    return Path(granvit.EXTENSION.core.__file__)


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    return [line.split(None, 1)[1] for line in listing.stdout.splitlines()]


def test_binaries_use_only_the_stable_abi(core: Path) -> None:
    libraries = [core]
    if granvit.EXTENSION.cuda:
        libraries.append(core.parent / "_cuda.so")
    for library in libraries:
        symbols = undefined_symbols(library)
        assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "the check looks at the wrong file"
        unstable = [s for s in symbols if re.search(r"\b(c10|at|torch|caffe2)::", s)]
        assert not unstable, f"{library.name} needs unstable symbols of torch: {unstable[:5]}"


def test_binaries_pass_torch_abi_audit(core: Path) -> None:
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    assert audit is not None, "torch-abi-audit is part of the test extra"
    result = subprocess.run([audit, "--check", "torch", str(core)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def ninja_file(core: Path) -> str:
    build = next((ROOT / "build").glob("ninja-*/core/build.ninja"), None)
    if build is None:
        pytest.skip("the package was not built in this checkout")
    return build.read_text()


def test_pybind11_is_read_before_the_copy_in_torch(ninja_file: str) -> None:
    """That of torch 2.11 refuses to be read beside the stable ABI."""
    includes = re.findall(r"-isystem(\S+)", ninja_file)
    assert includes.index(pybind11.get_include()) < includes.index(str(Path(torch.__file__).parent / "include"))


def test_baseline_code_is_linked_before_wider_code(ninja_file: str) -> None:
    """What csrc/cpu/isa.h relies on: of an inline function in several objects, the oldest machine's is kept."""
    link = re.search(r"^build .*: link (.*)$", ninja_file, re.MULTILINE)
    assert link is not None
    widths = {"avx2": 1, "avx512": 2, "avx512bf16": 3}
    order = [widths.get(Path(name).name.split(".")[1], 0) for name in link[1].split()]
    assert order == sorted(order)


def test_info_names_every_op_and_every_reason() -> None:
    collected = json.loads(json.dumps(info.collect()))
    text = info.render(collected)
    for op in info.op_names():
        assert collected["ops"][op]["cpu"]["reference"] is None
        assert op in text
    for reason in [collected["cuda"].get("reason")]:
        assert reason is None or reason in text
    result = subprocess.run([sys.executable, "-m", "granvit.cli", "info"], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "CPU kernels: built for" in result.stdout


def test_impl_from_the_environment() -> None:
    call = (
        "import torch, granvit; t = torch.randn(1, 4, 8); "
        "granvit.ops.roi_align(t, torch.tensor([[0., 0, 1, 1]]), torch.zeros(1, dtype=torch.long), (2, 2), 2)"
    )
    assert python(call, GRANVIT_IMPL="reference").returncode == 0
    wrong = python(call, GRANVIT_IMPL="fast")
    assert (
        "ValueError: roi_align: GRANVIT_IMPL: expected one of cuda, triton, cpu, reference, got 'fast'" in wrong.stderr
    )
    absent = python(call, GRANVIT_IMPL="cuda")
    assert "RuntimeError: roi_align: GRANVIT_IMPL='cuda' cannot run: it runs on CUDA tensors" in absent.stderr
    isa = python(call, GRANVIT_CPU_ISA="sse9")
    assert "GRANVIT_CPU_ISA: expected default, avx2, avx512 or avx512bf16, got sse9" in isa.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built."""
    folder = tmp_path_factory.mktemp("checkout") / "granvit"
    ignore = shutil.ignore_patterns(".venv*", ".git", "build", "*.so", "_build.json", "__pycache__", "out", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignore, symlinks=True)
    return folder


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=checkout,
        env={**os.environ, "GRANVIT_BUILD_CUDA": "0", "GRANVIT_REQUIRE_EXT": "0", **environment},
        capture_output=True, text=True,
    )  # fmt: skip


# An editable install's import hook would find the compiled modules of the checkout it was made from.
WITHOUT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]"
)
USE = """
import torch, granvit
arguments = (torch.randn(1, 4, 8), torch.tensor([[0., 0, 1, 1]]), torch.zeros(1, dtype=torch.long), (2, 2), 2)
granvit.ops.roi_align(*arguments)
granvit.ops.roi_align(*arguments)
print(granvit.__file__, granvit.ops.roi_align(*arguments).shape)
from granvit import info
print(info.render(info.collect()))
"""


def pip_install(checkout: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    environment = {**os.environ, "GRANVIT_BUILD_CUDA": "0", "GRANVIT_REQUIRE_EXT": "0", **environment}
    return subprocess.run([*command, str(checkout)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_installs_without_a_compiler_and_says_why(checkout: Path, tmp_path: Path, compiler: str) -> None:
    installed = pip_install(checkout, tmp_path, CXX=compiler, CC=compiler)
    assert installed.returncode == 0, installed.stderr
    reason = json.loads((tmp_path / "granvit/_build.json").read_text())["core"]["reason"]
    assert f"the C++ compiler `{compiler}` cannot compile a one-line program" in reason
    assert reason in installed.stdout + installed.stderr
    ran = python(WITHOUT_EDITABLE + USE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert f"{tmp_path}/granvit/__init__.py torch.Size([1, 4, 8])" in ran.stdout
    assert f"CPU kernels: not built: {reason}" in ran.stdout
    assert ran.stderr.count("roi_align runs as plain PyTorch on cpu tensors") == 1, "said once, and only once"


def test_a_wheel_brings_the_kernels(checkout: Path, tmp_path: Path) -> None:
    # Without CUDA: what nvcc makes in minutes is looked at in tests/cuda. Without optimisation: optimised, setup.py has
    # compiled the package that all other tests use.
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    quick = tmp_path / "quick-compiler"
    quick.write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
    quick.chmod(0o755)
    installed = pip_install(checkout, tmp_path / "site", CXX=str(quick), GRANVIT_REQUIRE_EXT="1", MAX_JOBS="2")
    assert installed.returncode == 0, installed.stdout[-3000:]
    site = tmp_path / "site"
    ran = python(WITHOUT_EDITABLE + USE + "import granvit.kernels", cwd=site, PYTHONPATH=str(site))
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr, "the compiled kernels run, so there is nothing to say"
    assert "CPU kernels: built for" in ran.stdout


def test_a_required_build_fails_loudly(checkout: Path) -> None:
    built = build(checkout, CXX="false", GRANVIT_REQUIRE_EXT="1")
    assert built.returncode != 0
    assert "granvit: granvit._C: required, but not built: the C++ compiler `false`" in built.stderr


def test_cuda_slot_follows_its_switch(checkout: Path) -> None:
    built = build(checkout, CXX="false", GRANVIT_BUILD_CUDA="2")
    assert built.returncode == 0
    reason = json.loads((checkout / "granvit/_build.json").read_text())["cuda"]["reason"]
    assert reason == "GRANVIT_BUILD_CUDA: expected 0 or 1, got '2'"
    if torch.version.cuda is not None:
        missing = build(checkout, CXX="false", GRANVIT_BUILD_CUDA="1", CUDA_HOME="/nonexistent")
        assert missing.returncode != 0
        assert "no CUDA toolkit: nvcc was not found on PATH or in CUDA_HOME" in missing.stderr


def test_cuda_library_reports_its_runtime() -> None:
    if not granvit.EXTENSION.cuda:
        pytest.skip(granvit.EXTENSION.cuda_reason)
    assert re.match(r"CUDA runtime \d+\.\d+ \(static\), nvcc \d+\.\d+", torch.ops.granvit.cuda_build_info())
    assert importlib.util.find_spec("granvit") is not None
