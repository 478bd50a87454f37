"""Exercise, after tutorial 01: padding with zeros has turned into padding with something else.

Property: real 0 has a code of its own, whatever the tensor: dequantize(quantize(0)) == 0.
"""

import numpy as np

from refquant.quant.affine import QParams, QSpec, fake_quantize


def choose(x, bits):
    """Scale and zero point for the range of x."""
    low, high = float(x.min()), float(x.max())
    top = 2**bits - 1
    scale = max((high - low) / top, 1e-8)
    return QParams(scale, round(-low / scale), QSpec(bits))


# --- the property: leave it as it is ---

rng = np.random.default_rng(0)
for bits in (4, 8):
    for shift in (0.0, -3.0, 3.0):
        x = (rng.uniform(-1, 1, 50) + shift).astype(np.float32)
        q = choose(x, bits)
        assert fake_quantize([0.0], q)[0] == 0.0 and q.zero_is_exact, (
            f"real 0 has no code: {bits} bits, x from {x.min():.2f} to {x.max():.2f}, zero point {q.zero_point}"
        )
print("holds: real 0 has a code of its own")
