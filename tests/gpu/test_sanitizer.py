"""compute-sanitizer over small calls: no access outside of memory, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("these need a CUDA device", allow_module_level=True)

TOOL = shutil.which("compute-sanitizer")
ROOT = Path(__file__).resolve().parents[2]
FOUND = 77  # exit status for what the tool finds


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_nothing_is_found(tool: str, impl: str) -> None:
    # Every tensor an allocation of its own: inside a cached block a wrong access would look right.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        TOOL,
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        sys.executable,
        "-m",
        "tests.gpu.small_calls",
        impl,
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    output = (run.stdout + run.stderr)[-6000:]
    assert run.returncode == 0, output
    assert "ERROR SUMMARY: 0 errors" in output or "RACECHECK SUMMARY: 0 hazards" in output, output
