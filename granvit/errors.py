"""Errors that a user can mend."""


class UserError(Exception):
    """What went wrong and what to do about it, in one sentence; the command line prints it without a traceback."""


class MissingDependencyError(UserError, ImportError):
    """An optional package is needed and not installed; the text names the extra of granvit that brings it."""
