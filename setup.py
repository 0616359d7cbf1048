"""Builds granvit._C (pybind11 module and CPU kernels) and, where it can, granvit/_cuda.so (CUDA kernels).

What is built is decided here and written to granvit/_build.json, which `granvit info` prints. Nothing that is missing
stops the install: the package then runs on Triton or on plain PyTorch and says why.

Environment:
    CXX                     C++ compiler
    CUDA_HOME               CUDA toolkit
    GRANVIT_BUILD_CUDA      1 builds the CUDA kernels or fails, 0 leaves them out; unset: if nvcc and a CUDA torch are
    GRANVIT_REQUIRE_EXT     1 makes a failed build fail the install
    TORCH_CUDA_ARCH_LIST    GPU architectures, e.g. "8.0;9.0a"
    MAX_JOBS                parallel compile jobs
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10, the oldest torch supported
BYTES_PER_JOB = 1 << 30
# Linked in this order: see csrc/cpu/isa.h.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
}


class BuildSkippedError(Exception):
    """A part cannot be built here; the text says why, for people."""


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def job_count() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, free // BYTES_PER_JOB))


def torch_paths() -> tuple[Path, str, str | None]:
    """Folder of torch, its version, and its CUDA version; read from files, since importing torch takes long."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildSkippedError(
            "torch is not in the environment that builds granvit; install torch first and use "
            "`pip install --no-build-isolation`"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    version: dict[str, object] = {}
    exec((folder / "version.py").read_text(), version)
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise BuildSkippedError(f"torch {version['__version__']} has no stable ABI headers; torch 2.10 or newer has")
    return folder, str(version["__version__"]), version.get("cuda")  # type: ignore[return-value]


def find_compiler() -> list[str]:
    """The C++ compiler's command, proven on a one-line program."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[c] for c in ("c++", "g++", "clang++") if shutil.which(c)]
    if not candidates:
        raise BuildSkippedError("no C++ compiler was found (c++, g++ or clang++); install one or set CXX")
    for command in candidates:
        error = compile_error(command, [])
        if error is None:
            return command
    raise BuildSkippedError(f"the C++ compiler `{' '.join(command)}` cannot compile a one-line program: {error}")


def compile_error(command: list[str], flags: list[str]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <cstdint>\nint main() { return 0; }\n")
        try:
            result = run([*command, "-std=c++17", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
        except OSError as e:
            return str(e)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[0] if lines else f"exit status {result.returncode}"


class Ninja:
    """A build.ninja file: rules, edges, and the run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: list[str] = ["ninja_required_version = 1.8", ""]

    @staticmethod
    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    def rule(self, name: str, command: list[str], *, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", "  command = " + " ".join(command)]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append("")

    def edge(self, rule: str, output: Path, inputs: list[Path], **variables: str) -> Path:
        self.lines.append(f"build {self.escape(output)}: {rule} {' '.join(self.escape(i) for i in inputs)}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        return output

    def build(self, what: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if ninja is None:
            raise BuildSkippedError("ninja was not found; `pip install ninja`")
        result = subprocess.run(
            [ninja, "-C", str(self.folder), "-j", str(job_count())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(result.stdout)
        if result.returncode != 0:
            errors = [line for line in result.stdout.splitlines() if "error" in line]
            raise BuildSkippedError(f"compiling {what} failed: {errors[0] if errors else 'see the build log'}")


def quote(flags: list[str]) -> list[str]:
    return [shlex.quote(flag) for flag in flags]


def build_core(folder: Path, output: Path) -> dict[str, object]:
    """Compiles granvit._C into `output`."""
    torch_folder, torch_version, _ = torch_paths()
    try:
        import pybind11
    except ImportError:
        raise BuildSkippedError("pybind11 is not in the environment that builds granvit") from None
    compiler = find_compiler()
    version = (run([*compiler, "--version"]).stdout.splitlines() or ["unknown"])[0]
    x86 = platform.machine() in ("x86_64", "AMD64")
    isas = {name: flags for name, flags in X86_ISAS.items() if x86 and compile_error(compiler, flags) is None}

    flags = [
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]
    # pybind11 first: torch brings a copy of its own, which in 2.10 and 2.11 must not be read beside the stable ABI.
    includes = [pybind11.get_include(), torch_folder / "include", sysconfig.get_paths()["include"]]
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_TARGET}", *(f"-DGRANVIT_HAVE_{name.upper()}" for name in isas)]

    ninja = Ninja(folder)
    common = quote([*flags, *defines, *(f"-isystem{path}" for path in includes)])
    ninja.rule(
        "cxx", [*quote(compiler), "-MD", "-MF", "$out.d", *common, "$extra", "-c", "$in", "-o", "$out"], depfile=True
    )
    lib = torch_folder / "lib"
    undefined = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
    ninja.rule(
        "link",
        [*quote(compiler), "-shared", "-o", "$out", "$in", f"-L{shlex.quote(str(lib))}", "-ltorch_cpu", *undefined],
    )
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    host_only = {"host.cpp"}
    objects = []
    for source in sources:
        extra = ["-DGRANVIT_ISA=isa_default", "-DGRANVIT_HOST"]
        objects.append(ninja.edge("cxx", folder / f"{source.stem}.o", [source], extra=" ".join(quote(extra))))
    info = {"GRANVIT_COMPILER": version, "GRANVIT_FLAGS": " ".join(flags), "GRANVIT_TORCH_VERSION": torch_version}
    extra = ["-DGRANVIT_ISA=isa_default", *(f'-D{key}="{value}"' for key, value in info.items())]
    bindings = ROOT / "csrc/bindings.cpp"
    objects.append(ninja.edge("cxx", folder / "bindings.o", [bindings], extra=" ".join(quote(extra))))
    for isa, isa_flags in isas.items():
        for source in sources:
            if source.name not in host_only:
                extra = [f"-DGRANVIT_ISA=isa_{isa}", *isa_flags]
                objects.append(
                    ninja.edge("cxx", folder / f"{source.stem}.{isa}.o", [source], extra=" ".join(quote(extra)))
                )
    ninja.edge("link", output, objects)
    ninja.build("granvit._C")
    return {"built": True, "compiler": version, "cpu_targets": ["default", *isas], "torch": torch_version}


def cuda_arch_flags() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST, in the form torch itself reads."""
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(",", ";").replace(" ", ";").split(";"):
        if not arch:
            continue
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise BuildSkippedError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        kinds = [f"sm_{number}", f"compute_{number}"] if arch.endswith("+PTX") else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code={kind}" for kind in kinds]
    return flags


def build_cuda(folder: Path, output: Path) -> dict[str, object]:
    """Compiles the CUDA kernels into `output`, a library of its own that only a CUDA torch loads."""
    wanted = os.environ.get("GRANVIT_BUILD_CUDA")
    if wanted not in (None, "", "0", "1"):
        raise BuildSkippedError(f"GRANVIT_BUILD_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        raise BuildSkippedError("GRANVIT_BUILD_CUDA=0")
    torch_folder, torch_version, torch_cuda = torch_paths()
    if torch_cuda is None:
        raise BuildSkippedError(f"torch {torch_version} was built without CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise BuildSkippedError("no CUDA toolkit: nvcc was not found on PATH or in CUDA_HOME")
    compiler = find_compiler()
    # A CUDA torch brings some toolkit headers as packages; the toolkit's own come first.
    site = torch_folder.parent
    includes = [torch_folder / "include", *(p for p in [site / "nvidia/cu13/include"] if p.exists())]
    ninja = Ninja(folder)
    flags = [
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        f"-ccbin={compiler[0]}",
        *cuda_arch_flags(),
        f"-DTORCH_TARGET_VERSION={STABLE_TARGET}",
        "-DUSE_CUDA",
    ]
    common = quote([*flags, *(f"-isystem={path}" for path in includes)])
    ninja.rule("nvcc", [shlex.quote(nvcc), "-MD", "-MF", "$out.d", *common, "-c", "$in", "-o", "$out"], depfile=True)
    lib = shlex.quote(str(torch_folder / "lib"))
    ninja.rule(
        "link",
        [
            shlex.quote(nvcc),
            "-shared",
            f"-ccbin={shlex.quote(compiler[0])}",
            *cuda_arch_flags(),
            "-cudart=static",
            "-o",
            "$out",
            "$in",
            f"-L{lib}",
            "-ltorch_cuda",
            "-ltorch_cpu",
        ],
    )
    objects = [ninja.edge("nvcc", folder / f"{s.stem}.o", [s]) for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    ninja.edge("link", output, objects)
    ninja.build("the CUDA kernels")
    release = run([nvcc, "--version"]).stdout.strip().splitlines()
    return {
        "built": True,
        "nvcc": release[-1] if release else "unknown",
        "targets": cuda_arch_flags(),
        "torch": torch_version,
    }


class BuildKernels(build_ext):
    """Runs ninja over csrc/ and puts the libraries and the report where setuptools wants them."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = ROOT / "granvit" if in_place else Path(self.build_lib).resolve() / "granvit"
        target.mkdir(parents=True, exist_ok=True)
        # One build folder per Python and torch, so that switching environments never reuses foreign objects.
        work = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        core = target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        report = {
            "core": self.attempt("granvit._C", build_core, work / "core", core),
            "cuda": self.attempt("the CUDA kernels", build_cuda, work / "cuda", target / "_cuda.so"),
        }
        (target / "_build.json").write_text(json.dumps(report, indent=2) + "\n")

    def attempt(self, what: str, build, folder: Path, output: Path) -> dict[str, object]:
        required = os.environ.get("GRANVIT_REQUIRE_EXT") == "1"
        if build is build_cuda:
            required = os.environ.get("GRANVIT_BUILD_CUDA") == "1"
        try:
            return build(folder, output)
        except BuildSkippedError as reason:
            if required:
                raise SystemExit(f"granvit: {what}: required, but not built: {reason}") from None
            output.unlink(missing_ok=True)  # a stale library must not pass for this build
            self.warn(f"{what}: not built: {reason}")
            return {"built": False, "reason": str(reason)}

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / "granvit"
        return [str(p) for p in [*target.glob("_C*"), *target.glob("_cuda.so"), target / "_build.json"] if p.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("granvit._C", sources=[])], cmdclass={"build_ext": BuildKernels})
