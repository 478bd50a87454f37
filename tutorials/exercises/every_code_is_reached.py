"""Exercise, after tutorial 01: bright pixels come out black.

Property: saturation comes last. Codes are those of the library, below, inside and above the range.
"""

import numpy as np

from refquant.quant.affine import QParams, QSpec, quantize


def to_codes(x, scale, zero_point):
    """Codes of 8 bits, uint8."""
    q = np.clip(np.rint(x / np.float32(scale)), 0, 255) + zero_point
    return q.astype(np.int64).astype(np.uint8)


# --- the property: leave it as it is ---

x = np.linspace(-40, 40, 321, dtype=np.float32)
for zero_point in (0, 100, 255):
    got, want = to_codes(x, 0.25, zero_point), quantize(x, QParams(0.25, zero_point, QSpec(8)))
    i = np.flatnonzero(got != want)
    assert len(i) == 0, f"saturation is not last: x = {x[i[0]]}, zero point {zero_point}: {got[i[0]]}, not {want[i[0]]}"
print("holds: saturation comes last")
