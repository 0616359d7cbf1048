"""Which implementation of an op runs, why another cannot, and how the ops become known to PyTorch.

Compiled kernels (CPU and CUDA) stand behind ``torch.ops.granvit``, whose schemas are in C++. Their Triton twins need no
compiler, so they stand behind ops of the same names and signatures in ``torch.ops.granvit_triton``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from granvit._extension import EXTENSION

IMPLS = ("cuda", "triton", "cpu", "reference")
# In the order in which impl=None tries them, for a device type.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_UNAVAILABLE: dict[tuple[str, str, str], str | None] = {}  # (op, impl, device type) -> why not
_VALUE_ERROR = "granvit value error: "  # csrc/arguments.h

# Read once: reading the environment inside a compiled graph would not be traced.
DEFAULT_IMPL = os.environ.get("GRANVIT_IMPL") or None
CHECK_VALUES = os.environ.get("GRANVIT_CHECK") == "1"
# Triton's interpreter runs kernels on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

P = ParamSpec("P")
T = TypeVar("T")


def declare(op: str) -> None:
    """Finds out what can run an op; each op's file calls it once, after its kernels were loaded.

    The answers are kept in a table because finding them cannot be traced by torch.compile, and reading them can.
    """
    for device_type in _PREFERENCE:
        for impl in IMPLS:
            _UNAVAILABLE[op, impl, device_type] = _why_not(op, impl, device_type)


def _why_not(op: str, impl: str, device_type: str) -> str | None:
    if impl == "reference":
        return None
    if impl == "cpu":
        if device_type != "cpu":
            return f"it runs on CPU tensors, not on {device_type}"
        return None if _has_kernel(op, "CPU") else EXTENSION.core_reason or f"this version has no CPU kernel for {op}"
    if device_type != "cuda" and not (impl == "triton" and INTERPRETED):
        return f"it runs on CUDA tensors, not on {device_type}"
    if impl == "cuda":
        if not EXTENSION.cuda:
            return EXTENSION.cuda_reason
        return None if _has_kernel(op, "CUDA") else f"this version has no CUDA kernel for {op}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    kernel = Path(__file__).parents[1] / "kernels" / f"{op}.py"
    return None if kernel.exists() else f"this version has no Triton kernel for {op}"


def _has_kernel(op: str, key: str) -> bool:
    """Whether an op can run; one without its backward cannot, or a gradient would fail where another kernel has it."""
    names = [name for name in (op, f"{op}_backward") if name == op or hasattr(torch.ops.granvit, name)]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(torch.ops.granvit, op) and all(has(f"granvit::{name}", key) for name in names)


def unavailable(op: str, impl: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Why `impl` of `op` cannot run on a device type (for tensors of a dtype), or None where it can."""
    if impl == "reference":
        return None
    if device_type not in _PREFERENCE:
        return f"granvit has no kernels for {device_type}"
    if dtype == torch.float64 and impl != "cpu":
        return _UNAVAILABLE[op, impl, device_type] or "it has no float64 kernels"
    return _UNAVAILABLE[op, impl, device_type]


def choose(op: str, impl: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The implementation to run: the one asked for, or the best that can run.

    Raises:
        ValueError: `impl` (or GRANVIT_IMPL) is not the name of an implementation.
        RuntimeError: the one asked for cannot run here.
    """
    source = "impl"
    if impl is None and DEFAULT_IMPL is not None:
        impl, source = DEFAULT_IMPL, "GRANVIT_IMPL"
    if impl is not None:
        if impl not in IMPLS:
            raise ValueError(f"{op}: {source}: expected one of {', '.join(IMPLS)}, got {impl!r}")
        reason = unavailable(op, impl, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: {source}={impl!r} cannot run: {reason}")
        return impl
    for candidate in _PREFERENCE.get(device_type, ("reference",)):
        if unavailable(op, candidate, device_type, dtype) is None:
            if candidate == "reference":
                _say_once(op, device_type, dtype)
            return candidate
    raise AssertionError("the reference runs everywhere")


def must_check(chosen: str, device: torch.device) -> bool:
    """Whether Python checks what boxes and indices hold: not where the CPU kernels do, nor unasked on a device."""
    return chosen != "cpu" and (device.type == "cpu" or CHECK_VALUES)


_said: set[tuple[str, str, torch.dtype]] = set()


def _say_once(op: str, device_type: str, dtype: torch.dtype) -> None:
    if (op, device_type, dtype) in _said:
        return
    _said.add((op, device_type, dtype))
    impls = [impl for impl in _PREFERENCE.get(device_type, ()) if impl != "reference"]
    why = "; ".join(f"{impl}: {unavailable(op, impl, device_type, dtype)}" for impl in impls)
    why = why or f"granvit has no kernels for {device_type}"
    warnings.warn(f"granvit: {op} runs as plain PyTorch on {device_type} tensors ({why})", stacklevel=4)


def ops(impl: str) -> Any:
    """The namespace of registered ops that an implementation stands behind."""
    return torch.ops.granvit_triton if impl == "triton" else torch.ops.granvit


def call(op: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a registered op; a value that its kernel rejects becomes a ValueError."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        text = str(error)
        if text.startswith(_VALUE_ERROR):
            raise ValueError(text.removeprefix(_VALUE_ERROR)) from None
        raise


def refuse_double_backward(op: str) -> None:
    """Raises where a backward is itself recorded: no kernel for its derivative exists, and zero would be wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: the gradient of its gradient is not implemented; impl='reference' is differentiable twice"
        )


_triton_library = torch.library.Library("granvit_triton", "DEF")


def register(
    file: str,
    name: str,
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
    triton_fake: Callable[..., Any] | None = None,
) -> None:
    """Makes op `name` a citizen of PyTorch, in both namespaces where it has kernels.

    Args:
        file: the op whose files hold the kernels: ``csrc/*/<file>`` and ``kernels/<file>.py``.
        name: the registered op; the function of this name in ``kernels/<file>.py`` is its Triton implementation.
        fake: gives the outputs' shapes and dtypes. Its annotated signature is the schema.
        setup: as in ``torch.library.register_autograd``.
        backward: likewise, but takes the namespace of the op (see :func:`ops`) before everything else.
        mutates: names of arguments that are written to.
        triton_fake: stands for `fake` where the Triton kernels save something else for their backward.
    """
    namespaces = ["granvit"] if hasattr(torch.ops.granvit, name) else []
    if _why_not(file, "triton", "cuda") is None:
        _triton_library.define(name + torch.library.infer_schema(fake, mutates_args=mutates))
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _triton_library.impl(name, functools.partial(_run_triton, file, name), key)
        namespaces.append("granvit_triton")
    for namespace in namespaces:
        qualified = f"{namespace}::{name}"
        for_triton = namespace == "granvit_triton" and triton_fake is not None
        torch.library.register_fake(qualified, triton_fake if for_triton else fake)
        torch.library.register_vmap(qualified, functools.partial(_refuse_vmap, name))
        if backward is not None:
            bound = functools.partial(backward, getattr(torch.ops, namespace))
            torch.library.register_autograd(qualified, bound, setup_context=setup)


def _run_triton(file: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"granvit.kernels.{file}"), name)(*args)


def _refuse_vmap(name: str, info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"{name}: torch.func.vmap is not supported; the op takes the boxes of all images in one call")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
