"""What made a result."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import granvit


def device_name(device: str) -> str:
    """What a device is, for people."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of what made a result; the commit is None where granvit does not run from a git checkout."""
    root = Path(granvit.__file__).resolve().parents[1]
    commit = None
    if (root / ".git").exists():
        try:
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = None  # no git, or a checkout that it does not trust: the version below is what is known
    return {
        "granvit": granvit.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
