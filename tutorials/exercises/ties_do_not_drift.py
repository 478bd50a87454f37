"""Exercise, after tutorial 01: halving an image again and again makes it brighter.

Property: the errors of rounding cancel over all ties, up and down alike.
"""

import numpy as np


def round_to_integer(x):
    """The nearest integer."""
    return np.floor(x + 0.5)


# --- the property: leave it as it is ---

x = np.linspace(-8, 8, 161)
assert np.abs(round_to_integer(x) - x).max() <= 0.5, "rounding is off by more than a half"
ties = np.arange(-128, 128) + 0.5
drift = np.mean(round_to_integer(ties) - ties)
assert drift == 0, f"ties drift: their mean error is {drift:+.3f}"
print("holds: ties do not drift")
