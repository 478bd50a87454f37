"""Exercise 6. The Temporal Information Block, found by name.

TIAR calibrates all layers that see nothing but the time-step, on time-steps alone. Here they are found by what their
names contain. For the shipped UNet that is the right list.

Task: write a property that holds for `refquant.quant.units.temporal_layers` and fails here. The names are those of the
network's author; what a layer sees is decided by the network. A function from image and t to t is all it takes to
make a network of another kind; `NoiseBlind` is one. After page 11.
"""

import numpy as np

from refquant.nn.unet import UNet, UNetConfig
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import wrap

SMALL = UNetConfig(image_size=8, image_channels=1, channels=8, multipliers=(1, 2), blocks=1, attention=(), groups=4,
                   dropout=0.0)  # fmt: skip


class NoiseBlind(UNet):
    """A UNet that does not trust the time-step it is told: it estimates the noise of each image and works with that."""

    def __call__(self, x, t, rng=None):
        """x (N, H, W, C), t (N,) -> like x."""
        estimate = np.rint(999 * np.clip(x.data.var(axis=(1, 2, 3)) / 2, 0, 1)).astype(int)
        return super().__call__(x, estimate, rng)


def layers_by_name(network):
    return [name for name in wrap(network)[1] if "temb" in name]


def authors_test(implementation):
    network = UNet(SMALL, np.random.default_rng(0))
    assert sorted(implementation(network)) == sorted(temporal_layers(network))


def my_property(implementation):
    """Yours: raise AssertionError where `implementation(network)` breaks a law."""


if __name__ == "__main__":
    from verdict import verdict

    authors_test(layers_by_name)
    print("the author's test passes")
    verdict(my_property, layers_by_name, temporal_layers)
