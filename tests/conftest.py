"""Fixtures for all tests: a fresh seed a run, and memory that is poisoned before an op writes into it."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

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


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN, so that a value that an op forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan(), "this torch does not poison empty tensors"
    yield
    torch.use_deterministic_algorithms(False)
