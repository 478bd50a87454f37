"""refquant: post-training quantization of diffusion models, in NumPy and C.

Read `refquant.nn.unet` for the network, `refquant.diffusion` for the samplers, `refquant.quant` for
quantization; ``refquant demo`` runs all three.
"""

from ._version import __version__

__all__ = ["__version__"]
