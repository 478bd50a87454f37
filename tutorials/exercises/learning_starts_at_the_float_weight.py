"""Exercise, after tutorial 09: learned rounding begins far from the trained network, and needs twice the steps.

Property: at the start, AdaRound's soft weights are the float weights: scale * (floor(w / s) + h(alpha)) = w.
"""

import numpy as np

ZETA, GAMMA = 1.1, -0.1


def soft(alpha):
    """h(alpha), the rectified sigmoid of Nagel et al. 2020, eq. 23: in [0, 1], and flat beyond."""
    return np.clip((ZETA - GAMMA) / (1 + np.exp(-alpha)) + GAMMA, 0, 1)


def start(w, scale):
    """The alpha that learning begins with."""
    return np.zeros_like(w)


# --- the property: leave it as it is ---

rng = np.random.default_rng(0)
w, scale = rng.standard_normal(1000), 0.11
begin = scale * (np.floor(w / scale) + soft(start(w, scale)))
error = np.abs(begin - w).max() / scale
assert error < 1e-9, f"learning does not start at the float weights: the worst is off by {error:.2f} of a step"
print("holds: learning starts at the float weights")
