"""Errors that a user can mend."""

from __future__ import annotations

import errno
import json
from typing import Any


class UserError(Exception):
    """What went wrong and what to do about it, in one sentence; the command line prints it without a traceback."""


class MissingDependencyError(UserError, ImportError):
    """An optional package is needed and not installed; the text names the extra of granvit that brings it."""


def why_not_written(error: OSError) -> str:
    """``"the disk is full"``, or that a file cannot be written and what the system says of it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else f"cannot be written: {error.strerror or error}"


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """The first setting that two runs into one place differ in, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return f"{name}: {json.dumps(old)[:80]} there, {json.dumps(new)[:80]} now"
