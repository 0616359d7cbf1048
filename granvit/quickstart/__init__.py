"""``granvit quickstart``: the region ops on real photographs, in about a minute, without a download."""

from granvit.quickstart.measure import AgreementError
from granvit.quickstart.recipe import run

__all__ = ["AgreementError", "run"]
