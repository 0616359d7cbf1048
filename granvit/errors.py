"""Errors that a user can mend."""

import errno


class UserError(Exception):
    """What went wrong and what to do about it, in one sentence; the command line prints it without a traceback."""


class MissingDependencyError(UserError, ImportError):
    """An optional package is needed and not installed; the text names the extra of granvit that brings it."""


def why_not_written(error: OSError) -> str:
    """``"the disk is full"``, or that a file cannot be written and what the system says of it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else f"cannot be written: {error.strerror or error}"
