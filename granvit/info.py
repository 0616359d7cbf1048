"""What this installation can do: the text behind ``granvit info``."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import platform
from typing import Any

import torch

import granvit
from granvit import ops
from granvit._extension import EXTENSION
from granvit.ops import _dispatch

OPTIONAL = ("triton", "torchvision", "transformers", "timm", "flash-attn", "xformers", "matplotlib")


def op_names() -> list[str]:
    """The ops, by the name that their files share."""
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_"))


def collect() -> dict[str, Any]:
    """Everything that ``granvit info`` prints, as plain data for bug reports and benchmark records."""
    core: dict[str, Any] = {"built": EXTENSION.core is not None}
    if EXTENSION.core is None:
        core["reason"] = EXTENSION.core_reason
    else:
        core |= {**EXTENSION.core.build_info(), "running": EXTENSION.core.cpu_isa()}
    cuda: dict[str, Any] = {"built": EXTENSION.cuda}
    if EXTENSION.cuda:
        cuda |= {"info": torch.ops.granvit.cuda_build_info(), "targets": EXTENSION.report["cuda"]["targets"]}
    else:
        cuda["reason"] = EXTENSION.cuda_reason
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
    return {
        "granvit": granvit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "core": core,
        "cuda": cuda,
        "default_impl": _dispatch.DEFAULT_IMPL,
        "check_values": _dispatch.CHECK_VALUES,
        "packages": {name: _version(name) for name in OPTIONAL},
        "ops": {
            op: {
                device: {impl: _dispatch.unavailable(op, impl, device) for impl in impls}
                for device, impls in devices.items()
            }
            for op in op_names()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(info: dict[str, Any]) -> str:
    """`info` of :func:`collect` as text."""
    core, cuda = info["core"], info["cuda"]
    lines = [
        f"granvit {info['granvit']}, Python {info['python']}, {info['platform']}",
        f"torch {info['torch']} (CUDA {info['torch_cuda'] or 'none'}), {info['threads']} threads, "
        f"GPUs: {', '.join(info['gpus']) or 'none'}",
        "",
    ]
    if core["built"]:
        lines += [
            f"CPU kernels: built for {core['cpu_targets']}; running {core['running']}",
            f"  by {core['compiler']}, against torch {core['torch_built_with']} "
            f"(loads on {core['torch_target']} and newer), pybind11 {core['pybind11']}",
            f"  flags {core['flags']}",
        ]
    else:
        lines.append(f"CPU kernels: not built: {core['reason']}")
    if cuda["built"]:
        lines += [f"CUDA kernels: built: {cuda['info']}", f"  {' '.join(cuda['targets'])}"]
    else:
        lines.append(f"CUDA kernels: not built: {cuda['reason']}")
    lines += [
        "",
        f"GRANVIT_IMPL: {info['default_impl'] or 'unset (the best that can run)'}; "
        f"GRANVIT_CHECK: {'on' if info['check_values'] else 'off'}",
        "",
    ]
    for op, devices in info["ops"].items():
        lines.append(op)
        for device, impls in devices.items():
            runs = [impl for impl, reason in impls.items() if reason is None]
            lines.append(f"  on {device} tensors: {', '.join(runs)}")
            lines += [f"    not {impl}: {reason}" for impl, reason in impls.items() if reason is not None]
    found = [f"{name} {version}" for name, version in info["packages"].items() if version]
    missing = [name for name, version in info["packages"].items() if not version]
    lines += ["", f"found: {', '.join(found) or 'none'}", f"not installed: {', '.join(missing) or 'none'}"]
    return "\n".join(lines)
