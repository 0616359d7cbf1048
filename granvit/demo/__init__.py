"""``granvit demo``: the region ops on real photographs, in about a minute, without a download."""

from granvit.demo.measure import AgreementError
from granvit.demo.recipe import run

__all__ = ["AgreementError", "run"]
