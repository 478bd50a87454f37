"""Run a calibrated model in integers: `lower` makes a program of it, `runtime` runs that on NumPy or on the C core."""

from .lower import lower
from .program import Program

__all__ = ["Program", "lower"]
