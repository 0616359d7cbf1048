"""Fixtures for all tests: a fresh seed a run, and memory that is poisoned before an op writes into it."""

import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from granvit.ops import _dispatch

SEED = int(os.environ.get("GRANVIT_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    return f"inputs are drawn from GRANVIT_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    # The same test draws the same inputs whatever else runs beside it.
    torch.manual_seed(SEED ^ (hash_text(request.node.nodeid) & 0x7FFFFFFF))


def hash_text(text: str) -> int:
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


if _dispatch.INTERPRETED:
    import numpy as np
    from triton.runtime import interpreter

    def dot(self: object, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        """tl.dot as a GPU adds up: along k, one fused multiply-add after the other, whatever the tile's shape.

        The order of numpy's sums depends on the shape; forward and backward would round the same score differently.
        """
        total = d.data
        for k in range(a.data.shape[-1]):
            product = a.data[..., k, None].astype(np.float64) * b.data[..., k, None, :]
            total = (total + product).astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot

    # A launch exchanges the functions of triton.language for interpreted ones. So does, in Triton, each call of a
    # device function within it, to no effect, since by then they are exchanged; but looking through the whole language
    # each time takes as long as the arithmetic.
    exchange, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    exchanged: set[int] = set()  # the namespaces, by id, that were exchanged since the launch

    def exchange_once(fn: Any) -> Any:
        if id(fn.__globals__) in exchanged:
            return interpreter._LangPatchScope()
        exchanged.add(id(fn.__globals__))
        return exchange(fn)

    def launch_anew(self: Any, *arguments: Any, **constants: Any) -> None:
        exchanged.clear()
        launch(self, *arguments, **constants)

    # It also makes a table of all dtypes whenever it looks one up, a tenth of the time.
    look_up = interpreter._get_np_dtype
    look_up_scalar = functools.cache(look_up)

    def look_up_once(dtype: Any) -> Any:
        return look_up_scalar(dtype) if type(dtype) is interpreter.tl.dtype else look_up(dtype)

    interpreter._get_np_dtype = look_up_once
    interpreter._patch_lang = exchange_once
    interpreter.GridExecutor.__call__ = launch_anew


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN, so that a value that an op forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan(), "this torch does not poison empty tensors"
    yield
    torch.use_deterministic_algorithms(False)
