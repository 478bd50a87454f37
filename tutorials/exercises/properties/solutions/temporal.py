"""Solution 6. The law: the input of a temporal layer stays the same when the image changes.

In the tests: `test_a_temporal_block_that_reads_the_image_is_caught` (tests/unit/quant/test_units.py).

A temporal layer takes as many inputs as there are time-steps, and that is why it can be calibrated without images. A
layer that sees the image, too, takes infinitely many, and TIAR would fit its rounding to inputs that it never gets. Whether
the law holds is found by intervention: same t, another image. The library looks in this way, and refuses a network
that has no such layers.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

from refquant.autograd import Tensor, no_grad
from refquant.errors import ShapeError
from refquant.nn.unet import UNet
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import watched, wrap

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from verdict import verdict

exercise = runpy.run_path(str(HERE.parent / "temporal.py"))


def inputs_of_layers(network, image, t):
    seen = {}
    with no_grad():
        watched(wrap(network)[0], lambda name, x: seen.setdefault(name, x))(Tensor(image), np.array([t]))
    return seen


def temporal_layers_do_not_see_the_image(implementation):
    """For every layer in the list: input(x, t) = input(x', t)."""
    for kind in (UNet, exercise["NoiseBlind"]):
        network = kind(exercise["SMALL"], np.random.default_rng(0))
        images = np.random.default_rng(1).standard_normal((2, 1, 8, 8, 1)).astype(np.float32)
        one, other = (inputs_of_layers(network, image, 300) for image in images)
        try:
            found = implementation(network)
        except ShapeError:  # the library refuses a network without such layers
            continue
        wrong = [name for name in found if not np.array_equal(one[f"{name}.input"], other[f"{name}.input"])]
        assert not wrong, f"{kind.__name__}: another image, another input, of {', '.join(wrong)}"


if __name__ == "__main__":
    exercise["authors_test"](exercise["layers_by_name"])
    assert verdict(temporal_layers_do_not_see_the_image, exercise["layers_by_name"], temporal_layers)
