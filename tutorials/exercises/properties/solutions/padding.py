"""Solution 3. The law: an image that means 0 everywhere gives 0 everywhere, the border included.

In the tests: `test_an_image_of_zero_point_gives_zero` (tests/kernels/test_laws.py). Beside it stands the law for all
images, `test_the_border_is_pixels_that_mean_zero`: padding is the same as a wider image whose border means 0.

Padding must *mean* 0. The code that means 0 is the zero point; the code 0 means -scale * zero_point, a bright or dark
frame around every image. The interior is right, and so are pictures with a black border and a zero point at the end of
the range: the mistake shows as an error of the outermost pixels, which grows from layer to layer.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

from refquant import ref

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from verdict import verdict

exercise = runpy.run_path(str(HERE.parent / "padding.py"))


def an_image_of_zero_point_gives_zero(implementation):
    """conv(0) = 0: all codes are the zero point, so all sums are 0, for any zero point."""
    w = np.random.default_rng(0).integers(-128, 128, (2, 3, 3, 3)).astype(np.int8)
    for zero_point in (0, 1, 128, 255):
        x = np.full((1, 4, 4, 3), zero_point, np.uint8)
        y = implementation(x, w, padding=1, x_zero_point=zero_point)
        assert not y.any(), (
            f"zero point {zero_point}: an image of nothing gives\n{y[0, :, :, 0]}\nin the first channel; the border is "
            "wrong, the interior right"
        )


if __name__ == "__main__":
    exercise["authors_test"](exercise["conv2d"])
    assert verdict(an_image_of_zero_point_gives_zero, exercise["conv2d"], ref.conv2d)
